"""Compare the linear probe's solvers with scikit-learn: chosen C, test images recognized, time.

    python -m tools.probe_trial [STORE.h5 ...] [--shots 4 16] [--seeds 1] [--threads 2] [--rounds 1]
    python -m tools.probe_trial --made-up 100x1024x0.7 20x64x1.0 --shots 16

Each search is made four times: by scikit-learn alone, one fit after the other; by scikit-learn with the features in
another order, which changes nothing but rounding; by solver: official; by solver: converged. Without stores, features
are made up (classes x dim x decay of the spectrum; they have a large common mean, as CLIP's). Times of a busy machine
mean little; compare the CPU time then.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from statistics import mean, median
from unittest.mock import patch

import numpy as np
import sklearn.linear_model  # noqa: F401  (its first import takes seconds, which are not a search's)
import torch
from threadpoolctl import threadpool_limits

from fastcoop.features import FeatureStore
from fastcoop.methods.data import Labelled
from fastcoop.methods.linear_probe import LinearProbeSettings, _Fits, choose_c

Search = tuple[Labelled, Labelled, Labelled]  # training, validation and test images
SOLVERS = ("scikit-learn", "permuted", "official", "converged")


def made_up(kind: str, shots: int, seed: int) -> Search:
    """Return images of made-up features: ``kind`` is classes x dim x decay."""
    rng, (classes, dim, decay) = np.random.default_rng(seed), kind.split("x")
    spectrum = np.arange(1, int(dim) + 1) ** -float(decay)
    axes = np.linalg.qr(rng.standard_normal((len(spectrum), len(spectrum))))[0]
    center, centers = rng.standard_normal(len(spectrum)), rng.standard_normal((int(classes), len(spectrum)))

    def draw(count: int) -> Labelled:
        labels = np.repeat(np.arange(int(classes)), count)
        features = (centers[labels] + 1.3 * rng.standard_normal((len(labels), len(spectrum)))) * spectrum
        return 0.06 * center + 0.08 * features @ axes.T, labels

    return draw(shots), draw(min(shots, 4)), draw(10)


def drawn(store: FeatureStore, split: str, count: int, seed: int) -> Labelled:
    """Return as many images of each class of a split, or all."""
    labels, rng = store.labels(split), np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    chosen = np.sort(np.concatenate(rows))
    return store.raw(split, chosen, 1)[:, 0].astype(np.float64), labels[chosen]


def searches(given: argparse.Namespace) -> Iterator[tuple[str, Search]]:
    for shots in given.shots:
        for seed in given.seeds:
            for path in given.stores:
                store = FeatureStore.open(path)
                test = store.raw("test", slice(None), 1)[:, 0].astype(np.float64), store.labels("test")
                parts = (drawn(store, "train", shots, seed), drawn(store, "val", min(shots, 4), seed), test)
                yield f"{store.meta.dataset}, {shots} shots, seed {seed}", parts
            for kind in given.made_up or ([] if given.stores else ["100x1024x0.7"]):
                yield f"{kind}, {shots} shots, seed {seed}", made_up(kind, shots, seed)


def timed(solver: str, search: Search, threads: int) -> tuple[float, int, float, float]:
    """Return log10 of the chosen C, recognized test images, wall and CPU seconds."""
    order: np.ndarray | slice = slice(None)
    if solver == "permuted":
        order = np.random.default_rng(0).permutation(search[0][0].shape[1])
    train, val, (features, labels) = ((np.ascontiguousarray(x[:, order]), y) for x, y in search)
    is_scikit_learn = solver in SOLVERS[:2]
    settings = LinearProbeSettings(solver="converged" if solver == "converged" else "official")
    torch.set_num_threads(1 if is_scikit_learn else threads)
    fit = (lambda fits, log_c, near: (fits._scikit_learn(log_c), 0.0)) if is_scikit_learn else _Fits._official
    with threadpool_limits(1, user_api="blas"), patch.object(_Fits, "_official", fit):
        wall, cpu = time.perf_counter(), time.process_time()
        log_c, _, model = choose_c(train, val, settings)
        seconds = time.perf_counter() - wall, time.process_time() - cpu
    return log_c, int((model.predict(features) == labels).sum()), *seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stores", nargs="*", help="feature stores with test images")
    parser.add_argument("--made-up", nargs="*", default=[], help="classes x dim x decay")
    parser.add_argument("--shots", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=1, help="times are medians of as many")
    given = parser.parse_args()
    equal, accuracies = dict.fromkeys(SOLVERS, 0), {solver: [] for solver in SOLVERS}
    for name, search in searches(given):
        found = {solver: [] for solver in SOLVERS}
        for _ in range(given.rounds):
            for solver in SOLVERS:
                found[solver].append(timed(solver, search, given.threads))
        images, base = len(search[2][1]), found["scikit-learn"]
        print(name, flush=True)
        for solver, rounds in found.items():
            (log_c, correct, *_), (wall, cpu) = rounds[0], (median(row[n] for row in rounds) for n in (2, 3))
            times = [median(row[n] for row in base) / median(row[n] for row in rounds) for n in (2, 3)]
            equal[solver] += log_c == base[0][0]
            accuracies[solver].append(100 * correct / images)
            print(
                f"  {solver:12s} log10 C {log_c:7.3f}, {correct} of {images} test images, {wall:.1f} s, CPU {cpu:.1f} s"
                f" ({times[0]:.1f} and {times[1]:.1f} times faster)",
                flush=True,
            )
    for solver, values in accuracies.items():
        print(
            f"{solver}: scikit-learn's C in {equal[solver]} of {len(values)} searches; "
            f"mean accuracy {mean(values):.1f} %"
        )


if __name__ == "__main__":
    main()
