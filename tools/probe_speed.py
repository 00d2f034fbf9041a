"""How long the search of a linear probe takes, and how long scikit-learn's takes, in turns; run by hand.

    python -m tools.probe_speed [--shots 4 16] [--rounds 3] [--threads 2]

The features are made up: they have a large common mean and a decaying spectrum, as CLIP's.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from fastcoop.methods import linear_probe, logistic
from fastcoop.methods.data import Labelled
from fastcoop.methods.linear_probe import LinearProbeSettings, choose_c


class OfficialProblem(logistic.LogisticProblem):
    """Fits with scikit-learn itself."""

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        self._train = features, labels

    def fit(self, c: float, max_iterations: int) -> LogisticRegression:
        return LogisticRegression(C=c, max_iter=max_iterations).fit(*self._train)


def made_up_images(classes: int, shots: int, dim: int) -> tuple[Labelled, Labelled]:
    """Return training and validation features, float64 (images, dim), with labels."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, dim + 1) ** -0.7
    mean, rotation = rng.standard_normal(dim), np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    centers = rng.standard_normal((classes, dim)) * spectrum

    def draw(count: int) -> Labelled:
        labels = np.repeat(np.arange(classes), count)
        features = centers[labels] + 1.3 * spectrum * rng.standard_normal((len(labels), dim))
        return 0.06 * mean + 0.08 * features @ rotation.T, labels

    return draw(shots), draw(min(shots, 4))


def measured(search: Callable[[], float]) -> tuple[float, float, float]:
    """Return the chosen log10 of C, wall seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    log_c = search()
    return log_c, time.perf_counter() - wall, time.process_time() - cpu


def compare(shots: int, arguments: argparse.Namespace) -> None:
    """Print the median seconds of both searches, and their ratio."""
    train, val = made_up_images(arguments.classes, shots, arguments.dim)
    settings = LinearProbeSettings(iterations=arguments.iterations, search_steps=arguments.search_steps)
    problems = {"scikit-learn": OfficialProblem, "fastcoop": logistic.LogisticProblem}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in problems}
    for _ in range(arguments.rounds):
        for name, problem in problems.items():
            linear_probe.LogisticProblem = problem  # type: ignore[misc]
            torch.set_num_threads(1 if problem is OfficialProblem else arguments.threads)
            found[name].append(measured(lambda: choose_c(train, val, settings)[0]))
    medians = {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    for name, (log_c, wall, cpu) in medians.items():
        print(f"{shots} shots, {name}: {wall:.1f} s, {cpu:.1f} s of a core, log10 C = {log_c:.4f}")
    wall, cpu = (medians["scikit-learn"][one] / medians["fastcoop"][one] for one in (1, 2))
    print(f"{shots} shots: {wall:.1f} times faster on {arguments.threads} threads, {cpu:.1f} times less work")


def main() -> None:
    """Compare the searches for each number of shots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=int, nargs="+", default=[4, 16])
    for name, default in {"classes": 100, "dim": 1024, "rounds": 3, "threads": 2, "iterations": 1000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--search-steps", type=int, default=8)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    with threadpool_limits(1, user_api="blas"):
        for shots in arguments.shots:
            compare(shots, arguments)


if __name__ == "__main__":
    main()
