/* Attention over trees on a CPU, in float32: each query goes over its own keys, where the products wrote them.
 *
 * The numbers of a run and head are computed in one order, so that neither other runs nor threads change their bits.
 * `vec` is GCC's and Clang's own type: 16 numbers, in as many registers as that takes.
 */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define MOST_VECTORS 8    /* of a head: cpu.py takes no wider ones */
#define MOST_KEYS 1024    /* of a query, a multiple of LANES */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

INLINE vec load(const float *from) {
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float *to, vec x) { memcpy(to, &x, sizeof x); }

/* The lanes of `a` where `yes`, else those of `b`. */
INLINE vec pick(ivec yes, vec a, vec b) { return (vec)((yes & (ivec)a) | (~yes & (ivec)b)); }

INLINE vec larger(vec a, vec b) { return pick(a > b, a, b); }

/* Each lane beside its neighbour at a distance of 8, 4, 2 and 1. */
INLINE vec by8(vec x) { return SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }
INLINE vec by4(vec x) { return SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11); }
INLINE vec by2(vec x) { return SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13); }
INLINE vec by1(vec x) { return SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }

/* The sum of all lanes, in each lane. */
INLINE vec sum(vec x) {
    x += by8(x);
    x += by4(x);
    x += by2(x);
    return x + by1(x);
}

/* The largest lane, in each lane. */
INLINE vec largest(vec x) {
    x = larger(x, by8(x));
    x = larger(x, by4(x));
    x = larger(x, by2(x));
    return larger(x, by1(x));
}

/* Lane i of the result is the sum of x[i]'s lanes. Overwrites x. */
INLINE vec sums(vec x[LANES]) {
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            x[i] = SHUFFLE(x[2 * i], x[2 * i + 1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
                   SHUFFLE(x[2 * i], x[2 * i + 1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return x[0];
}

/* exp(x) of x <= 0, to the last bit or two; 0 below -87. x = n ln 2 + r with a polynomial for exp(r) (Cephes). */
INLINE vec exponential(vec x) {
    const float rounds = 12582912.0f; /* 1.5 * 2^23: a number added to it has no bits behind the point */
    vec n = (larger(x, (vec){0} - 88.0f) * 1.44269504f + rounds) - rounds;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return pick(x < -87.0f, (vec){0}, p * (vec)power);
}

/* Attention. A run's rows are (rows, 3 width): queries, keys and values. Constants are (constants, 2 width). */

typedef struct {
    int32_t rows, queries, outputs; /* of one run */
    const int32_t *row;             /* (queries,) each query's row */
    const int32_t *output;          /* (queries,) its row in the output */
    const int32_t *first;           /* (queries + 1,) its first entry of `key` */
    const int32_t *key;             /* (entries,) the rows that it reads; constant c is -1 - c */
} Tree;

/* Where the keys of a query are, filled up to whole vectors of keys. Returns their number. */
INLINE int locate(const Tree *tree, int query, const float *keys, const float *constants, long width, const float **at) {
    const int32_t *key = tree->key + tree->first[query];
    const int n = tree->first[query + 1] - tree->first[query];
    for (int j = 0; j < n; j++)
        at[j] = key[j] >= 0 ? keys + key[j] * 3 * width : constants + (-1 - key[j]) * 2 * width;
    for (int j = n; j % LANES; j++)
        at[j] = at[n - 1];
    return n;
}

/* Products of x with what lies `offset` behind each place, a lane each; `rest` in the lanes behind the last. */
INLINE void products(int d, const float *x, const float **at, int n, long offset, float rest, vec *result) {
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec own[MOST_VECTORS], parts[LANES];
    for (int e = 0; e < d / LANES; e++)
        own[e] = load(x + e * LANES);
    for (int j = 0; j < n; j += LANES) {
        for (int i = 0; i < LANES; i++) {
            parts[i] = own[0] * load(at[j + i] + offset);
            for (int e = 1; e < d / LANES; e++)
                parts[i] += own[e] * load(at[j + i] + offset + e * LANES);
        }
        result[j / LANES] = pick(lane < n - j, sums(parts), (vec){0} + rest);
    }
}

INLINE void forward(int d, const Tree *tree, long run, int first, int last, int heads, const float *qkv,
                    const float *constants, float *probabilities, float *out) {
    const long width = (long)heads * d, entries = tree->first[tree->queries];
    const float *at[MOST_KEYS];
    vec p[MOST_KEYS / LANES];
    qkv += run * tree->rows * 3 * width;
    probabilities += run * heads * entries;
    out += run * tree->outputs * width;
    for (int i = 0; i < tree->queries; i++) {
        const int n = locate(tree, i, qkv + width, constants, width, at);
        for (int h = first; h < last; h++) {
            float *own = probabilities + h * entries + tree->first[i];
            products(d, qkv + tree->row[i] * 3 * width + h * d, at, n, h * d, -1e30f, p);
            vec most = p[0], total = {0}, sums[MOST_VECTORS] = {{0}};
            for (int j = 1; j * LANES < n; j++)
                most = larger(most, p[j]);
            most = largest(most);
            for (int j = 0; j * LANES < n; j++)
                total += p[j] = exponential(p[j] - most);
            total = 1.0f / sum(total);
            for (int j = 0; j * LANES < n; j++)
                p[j] *= total;
            memcpy(own, p, n * sizeof(float));
            for (int j = 0; j < n; j++)
                for (int e = 0; e < d / LANES; e++)
                    sums[e] += own[j] * load(at[j] + width + h * d + e * LANES);
            for (int e = 0; e < d / LANES; e++)
                store(out + tree->output[i] * width + h * d + e * LANES, sums[e]);
        }
    }
}

INLINE void backward(int d, const Tree *tree, long run, int first, int last, int heads, const float *qkv,
                     const float *constants, const float *probabilities, const float *grad, float *grad_qkv) {
    const long width = (long)heads * d, entries = tree->first[tree->queries];
    const float *at[MOST_KEYS];
    vec p[MOST_KEYS / LANES], scores[MOST_KEYS / LANES];
    qkv += run * tree->rows * 3 * width;
    grad_qkv += run * tree->rows * 3 * width;
    probabilities += run * heads * entries;
    grad += run * tree->outputs * width;
    for (long part = 0; part < tree->rows * 3l; part++) /* queries, keys and values of a row in turn */
        memset(grad_qkv + part * width + first * d, 0, (last - first) * d * sizeof(float));
    for (int i = 0; i < tree->queries; i++) {
        const int32_t *key = tree->key + tree->first[i];
        const int n = locate(tree, i, qkv + width, constants, width, at), end = (n - 1) / LANES;
        for (int h = first; h < last; h++) {
            const float *own = probabilities + h * entries + tree->first[i];
            const float *q = qkv + tree->row[i] * 3 * width + h * d, *g = grad + tree->output[i] * width + h * d;
            products(d, g, at, n, width + h * d, 0.0f, scores); /* gradients of the probabilities */
            p[end] = (vec){0};
            memcpy(p, own, n * sizeof(float));
            vec mean = {0}, own_q[MOST_VECTORS], own_g[MOST_VECTORS], sums[MOST_VECTORS] = {{0}};
            for (int j = 0; j <= end; j++)
                mean += p[j] * scores[j];
            mean = sum(mean);
            for (int j = 0; j <= end; j++)
                scores[j] = p[j] * (scores[j] - mean);
            for (int e = 0; e < d / LANES; e++) {
                own_q[e] = load(q + e * LANES);
                own_g[e] = load(g + e * LANES);
            }
            for (int j = 0; j < n; j++) {
                const float score = ((const float *)scores)[j], weight = own[j];
                for (int e = 0; e < d / LANES; e++)
                    sums[e] += score * load(at[j] + h * d + e * LANES);
                if (key[j] < 0)
                    continue; /* nothing reads a constant's gradient */
                float *grad_k = grad_qkv + (key[j] * 3 + 1) * width + h * d, *grad_v = grad_k + width;
                for (int e = 0; e < d / LANES; e++) {
                    store(grad_k + e * LANES, load(grad_k + e * LANES) + score * own_q[e]);
                    store(grad_v + e * LANES, load(grad_v + e * LANES) + weight * own_g[e]);
                }
            }
            for (int e = 0; e < d / LANES; e++)
                store(grad_qkv + tree->row[i] * 3 * width + h * d + e * LANES, sums[e]);
        }
    }
}

/* For all runs and heads: threads share the runs, or where these are few, the heads of each. The number of vectors of a
   head is known to the compiler for CLIP's 64 numbers, and for small towers' 32. */
#define EACH(function, ...)                                                          \
    const int parts = runs < threads ? heads : 1, size = heads / parts;              \
    _Pragma("omp parallel for collapse(2) schedule(static) num_threads(threads)")    \
    for (long run = 0; run < runs; run++)                                            \
        for (int part = 0; part < parts; part++) {                                   \
            const int first = part * size, last = first + size;                      \
            if (d == 64)                                                             \
                function(64, tree, run, first, last, heads, __VA_ARGS__);            \
            else if (d == 32)                                                        \
                function(32, tree, run, first, last, heads, __VA_ARGS__);            \
            else                                                                     \
                function(d, tree, run, first, last, heads, __VA_ARGS__);             \
        }

/* Write the probabilities, (runs, heads, entries), and the output (runs, outputs, width). */
void attend(int threads, const Tree *tree, long runs, int heads, int d, const float *qkv, const float *constants,
            float *probabilities, float *out) {
    EACH(forward, qkv, constants, probabilities, out)
}

/* Write the gradient of qkv from that of the output: zero for keys that nothing reads, and for rows without query. */
void attend_backward(int threads, const Tree *tree, long runs, int heads, int d, const float *qkv,
                     const float *constants, const float *probabilities, const float *grad, float *grad_qkv) {
    EACH(backward, qkv, constants, probabilities, grad, grad_qkv)
}
