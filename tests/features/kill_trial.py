"""Run by test_kill: the parent of children that are killed while they cache features.

    python -m tests.features.kill_trial DATASET CACHE TRIALS

Everything is imported once; each child is a fork that calls ``cache_features``, and gets SIGKILL at a random
instant, until TRIALS of them were killed before they were done. Prints how many that were.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fastcoop.datasets import load_dataset
from fastcoop.features import cache_features, encode, plan
from tests.features.small import make_backbone


def main(folder: str, cache: Path, trials: int) -> None:
    torch.set_num_threads(1)  # a fork does not bring along the threads that OpenMP would wait for
    plan.CROPS_PER_CHUNK = encode.CPU_BATCH = 4  # type: ignore[misc]
    backbone, dataset = make_backbone(), load_dataset(folder)

    def work(root: Path) -> None:
        cache_features(backbone, dataset, root, shots=["all"], seeds=[1], views=2)

    begin = time.monotonic()
    work(cache / "whole")
    duration = time.monotonic() - begin
    rng, killed, store = random.Random(0), 0, 0
    for _ in range(10 * trials):
        if killed == trials:
            break
        child = os.fork()
        if child == 0:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            work(cache / f"cut{store}")
            os._exit(0)
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            killed += 1
        else:
            store += 1
    for number in range(store + 1):
        work(cache / f"cut{number}")
    print(killed)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
