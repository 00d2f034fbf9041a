"""The frozen tower's weights, folded, and matrix products whose rows do not depend on the rows beside them.

Folding is exact: each identity moves work from every row and step into the weights, once.
- A layer norm's affine goes into the next matrix: (x * g + b) W = x (g W) + b W.
- The attention's 1 / sqrt(d) goes into the query columns.
- QuickGELU(x) = x sigmoid(1.702 x) = silu(1.702 x) / 1.702: the factors go into the matrices around it.
- LayerScale goes into the matrix before it.
- The bias behind a layer norm goes into the matrix too (``_absorb``): a product alone is faster than one with a bias.
Matrices are stored (in, out), so that forward is ``x @ w`` and backward is ``g @ w.T``, both without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcoop.backbones.precision import disable_autocast
from fastcoop.backbones.text_tower import Block, PlainTower, TextTower
from fastcoop.engine.fit import CPU_CHUNK

QUICK_GELU = 1.702
LN_OFFSET = 0.25  # added to layer-norm outputs; small against their deviation of 1, for bfloat16's precision

aten = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Any, Any, dict[str, str]]] = {  # forward, backward, options of both
    "silu": (aten.silu.out, aten.silu_backward.grad_input, {}),
    "gelu": (aten.gelu.out, aten.gelu_backward.grad_input, {"approximate": "none"}),
    "gelu_tanh": (aten.gelu.out, aten.gelu_backward.grad_input, {"approximate": "tanh"}),
}


@dataclass(frozen=True, eq=False)
class FoldedBlock:
    """One residual block. ``qkv`` and ``fc`` contain the layer norm before them and their bias."""

    eps_1: float
    eps_2: float
    qkv: Tensor  # (width, 3 width)
    out: Tensor  # (width, width)
    out_bias: Tensor
    fc: Tensor  # (width, hidden)
    proj: Tensor  # (hidden, width)
    proj_bias: Tensor


@dataclass(frozen=True, eq=False)
class FoldedTower:
    """A text tower ready for the engine, and its element-wise operations; each is here only."""

    blocks: tuple[FoldedBlock, ...]
    token_embedding: Tensor  # (vocabulary, width)
    positional_embedding: Tensor  # (context length, width)
    projection: Tensor  # (width, dim), with the final layer norm and the bias
    gain: Tensor  # (width,) ones: with a gain, a CPU's layer norm is vectorized
    shift: Tensor  # (width,) LN_OFFSET
    eps_final: float
    heads: int
    activation: str  # of ACTIVATIONS

    @property
    def width(self) -> int:
        return self.token_embedding.shape[1]

    @property
    def hidden(self) -> int:
        return self.blocks[0].fc.shape[1]

    @property
    def dim(self) -> int:
        return self.projection.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of residual gradients, to which every layer adds: float32 at least."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.projection.device

    def layer_norm(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalized ``x`` (..., width) plus LN_OFFSET, means and reciprocal deviations (..., 1)."""
        return torch.native_layer_norm(x, x.shape[-1:], self.gain, self.shift, eps)

    def layer_norm_backward(self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """Return the gradient (rows, width) of x from that of its layer norm."""
        shape, wanted = (x.shape[-1],), (True, False, False)
        return aten.native_layer_norm_backward(grad, x, shape, mean, rstd, None, None, wanted)[0]

    def activate(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Write the activation of ``hidden`` (rows, hidden) into ``out`` and return it."""
        function, _, options = ACTIVATIONS[self.activation]
        for c in even_slices(hidden):
            function(hidden[c], **options, out=out[c])
        return out

    def activate_backward(self, grad: Tensor, hidden: Tensor) -> None:
        """Multiply ``grad`` by the activation's derivative at ``hidden`` (rows, hidden), in place."""
        _, function, options = ACTIVATIONS[self.activation]
        for c in even_slices(hidden):
            function(grad[c], hidden[c], **options, grad_input=grad[c])

    def map(self, function: Callable[[Tensor], Tensor]) -> FoldedTower:
        """Return the tower with ``function`` applied to every tensor."""

        def mapped(thing: Any) -> Any:
            values = {field.name: getattr(thing, field.name) for field in fields(thing)}
            return replace(thing, **{k: function(v) for k, v in values.items() if isinstance(v, Tensor)})

        return replace(mapped(self), blocks=tuple(map(mapped, self.blocks)))


@torch.no_grad()
@disable_autocast
def fold(tower: TextTower, dtype: torch.dtype | None = None) -> FoldedTower:
    """Fold ``tower`` in float64 and round once, to ``dtype`` (by default the tower's own)."""
    to = dtype or tower.dtype
    quick = tower.activation == "quick_gelu"
    projection, bias = tower.projection, tower.projection_bias
    projection = torch.eye(tower.width, device=tower.device) if projection is None else projection
    bias = torch.zeros(1, device=tower.device) if bias is None else bias
    projection, bias = _behind_norm(tower.ln_final, projection, bias)
    return FoldedTower(
        blocks=tuple(_fold_block(block, tower.heads, quick, to) for block in tower.blocks),
        token_embedding=tower.token_embedding.detach().to(to),
        positional_embedding=tower.positional_embedding.detach().to(to),
        projection=_absorb(projection, bias).to(to).contiguous(),
        gain=torch.ones(tower.width, dtype=to, device=tower.device),
        shift=torch.full((tower.width,), LN_OFFSET, dtype=to, device=tower.device),
        eps_final=tower.ln_final.eps,
        heads=tower.heads,
        activation="silu" if quick else tower.activation,
    )


def _fold_block(block: Block, heads: int, quick: bool, to: torch.dtype) -> FoldedBlock:
    qkv, qkv_bias = _behind_norm(block.ln_1, block.qkv_weight.t(), block.qkv_bias)
    fc, fc_bias = _behind_norm(block.ln_2, block.fc.weight.t(), block.fc.bias)
    (out, out_bias), (proj, proj_bias) = (
        (linear.weight.double().t(), linear.bias.double()) for linear in (block.out, block.proj)
    )
    query = torch.ones_like(qkv_bias)
    query[: len(out)] = (len(out) // heads) ** -0.5
    qkv, qkv_bias = qkv * query, qkv_bias * query
    if quick:
        fc, fc_bias, proj = fc * QUICK_GELU, fc_bias * QUICK_GELU, proj / QUICK_GELU
    if block.scale_1 is not None:
        out, out_bias = out * block.scale_1.double(), out_bias * block.scale_1.double()
    if block.scale_2 is not None:
        proj, proj_bias = proj * block.scale_2.double(), proj_bias * block.scale_2.double()
    folded = (_absorb(qkv, qkv_bias), out, out_bias, _absorb(fc, fc_bias), proj, proj_bias)
    return FoldedBlock(block.ln_1.eps, block.ln_2.eps, *(matrix.to(to).contiguous() for matrix in folded))


def _behind_norm(norm: nn.LayerNorm, matrix: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrix and bias, in float64, that need no affine of the layer norm before them."""
    gain, shift, matrix = norm.weight.double(), norm.bias.double(), matrix.double()
    return gain[:, None] * matrix, bias.double() + shift @ matrix


def _absorb(matrix: Tensor, bias: Tensor) -> Tensor:
    """Return the matrix W' with (x + LN_OFFSET) @ W' = x @ matrix + bias for layer-norm outputs x.

    Each x has mean zero, so subtracting each column's mean leaves x @ W unchanged; adding b / (c n) to every entry of
    an n-row column makes the offset c contribute exactly b.
    """
    return matrix - matrix.mean(0) + bias / (LN_OFFSET * len(matrix))


# A BLAS chooses its kernel by the number of rows, and another kernel sums in another order. So that a run gives the
# same bits alone and among others, CPU products get numbers of rows for which this machine's BLAS sums in one order
# (spare rows fill up the number), and few rows are summed in the pieces in which the BLAS sums many. Both are
# measured once per process.

FEW_ROWS = CPU_CHUNK // 2  # below this many rows, a BLAS may sum in other pieces
WHOLE_SUM = 512  # shorter sums are never cut into pieces
THREAD_GRAIN = 32768  # torch uses one thread for element-wise operations on fewer numbers


class RowRule(NamedTuple):
    """Numbers of rows for which a BLAS sums a row in one order."""

    least: int  # rows
    step: int  # the number of rows is a multiple of it
    terms: int | None = None  # length of the pieces that sums of fewer than FEW_ROWS rows are cut into

    def mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ``a @ b`` of (rows, n) and (n, m)."""
        terms = self._piece(a)
        if terms == a.shape[1]:
            return torch.mm(a, b, out=out)
        return self.addmm_(torch.mm(a[:, :terms], b[:terms], out=out), a[:, terms:], b[terms:])

    def addmm_(self, onto: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Add ``a @ b`` to ``onto``, in place."""
        terms = self._piece(a)
        for start in range(0, a.shape[1], terms):
            part = slice(start, start + terms)
            torch.addmm(onto, a[:, part], b[part], out=onto)
        return onto

    def _piece(self, a: Tensor) -> int:
        rows, terms = a.shape
        return terms if self.terms is None or rows >= FEW_ROWS or terms <= WHOLE_SUM else self.terms

    def padded(self, rows: int) -> int:
        """Return the next allowed number of rows; products take CPU_CHUNK rows at a time, a multiple of ``step``."""
        full, rest = divmod(rows, CPU_CHUNK)
        rest = max(self.least, -(-rest // self.step) * self.step) if rest else 0
        return full * CPU_CHUNK + rest


ANY_ROWS = RowRule(1, 1)
# The first rule that holds is used: it wastes least. BLAS kernels work on 4 to 48 rows, MKL's on 384 terms.
RULES = (
    RowRule(16, 1),
    RowRule(16, 1, 384),
    *(RowRule(least, 48, terms) for least in (48, 96, 192, 384, 576) for terms in (None, 384)),
)


def row_rule(tower: FoldedTower | PlainTower) -> RowRule:
    """Return the rule for training with the current number of threads; ANY_ROWS on a GPU and on the plain path.

    A GPU's libraries choose by rows, too, in ways that are slow to measure: there runs agree to rounding.
    """
    if isinstance(tower, PlainTower) or tower.device.type != "cpu":
        return ANY_ROWS
    return _measure_rule(tower.width, tower.hidden, tower.dim, tower.dtype, torch.get_num_threads())


@lru_cache(maxsize=32)
@disable_autocast  # which would round the products of this process's rule
def _measure_rule(width: int, hidden: int, dim: int, dtype: torch.dtype, threads: int) -> RowRule:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float32).to(dtype)

    shapes = ((hidden, width), (width, 3 * width), (width, width), (width, dim))
    forward = [random(*shape) for shape in shapes]
    pairs = [(random(CPU_CHUNK, len(matrix)), matrix) for matrix in (*forward, *(m.t() for m in forward))]
    products = [(rows, matrix, rows @ matrix) for rows, matrix in pairs]
    return next((rule for rule in RULES if all(_holds(rule, *product) for product in products)), ANY_ROWS)


def _holds(rule: RowRule, rows: Tensor, matrix: Tensor, whole: Tensor) -> bool:
    """Return whether products of parts of ``rows`` have the same bits as these rows of the ``whole`` product."""
    # Kernels change mostly at small numbers of rows, so the sizes are dense there (Fibonacci numbers of steps) and
    # sparse above. Parts begin at three places, since a row's place in a block of rows may matter as well.
    sizes = [rule.least + step * rule.step for step in (0, 1, 2, 3, 5, 8, 21, 55, 144)]
    sizes = [*(size for size in sizes if size < FEW_ROWS), FEW_ROWS]
    starts = [rule.step * (number % 3) for number in range(len(sizes))]
    parts = (slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return all(torch.equal(rule.mm(rows[part], matrix), whole[part]) for part in parts)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.bmm``, with at least as many products as threads: fewer would each be split among threads."""
    missing = torch.get_num_threads() - len(a) if a.device.type == "cpu" else 0
    if missing <= 0:
        return torch.bmm(a, b)
    a, b = (torch.cat([x, x[:1].expand(missing, -1, -1)]) for x in (a, b))
    return torch.bmm(a, b)[:-missing]


def even_slices(numbers: Tensor) -> Iterator[slice]:
    """Cut ``numbers`` (rows, width) so that an element-wise operation rounds equal numbers alike in any batch.

    Torch gives every thread an equal share. With three or more threads a share may end within a vector, whose
    numbers are then rounded by other instructions; where it ends depends on the number of rows.
    """
    rows, width = numbers.shape
    threads = torch.get_num_threads() if numbers.device.type == "cpu" else 1
    if threads < 3:
        yield slice(0, rows)
        return
    share = -(-THREAD_GRAIN // width)  # rows of each thread
    even = rows // (share * threads) * share * threads
    if even:
        yield slice(0, even)
    alone = max(1, (THREAD_GRAIN - 1) // width)
    yield from (slice(at, min(at + alone, rows)) for at in range(even, rows, alone))
