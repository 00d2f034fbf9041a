"""Run by test_two_processes: one of two processes that cache features into the same store.

    python -m tests.features.two_processes_trial DATASET CACHE GATE

Each batch waits until the file GATE exists; the first batch writes GATE.started. Prints how many crops it encoded.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import torch

from fastcoop.datasets import load_dataset
from fastcoop.features import cache_features, encode, plan
from tests.features.small import make_backbone


def main(folder: str, cache: str, gate: Path) -> None:
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(1)
    plan.CROPS_PER_CHUNK, encode.CPU_BATCH = 8, 4  # type: ignore[misc]
    backbone, encoded = make_backbone(), [0]
    original = backbone.model.encode_image

    def gated(images: torch.Tensor, normalize: bool) -> torch.Tensor:
        encoded[0] += len(images)
        if encoded[0] > 8:  # the first part is done and written
            gate.with_suffix(".started").touch()
            while not gate.exists():
                time.sleep(0.02)
        return original(images, normalize)

    backbone.model.encode_image = gated  # type: ignore[method-assign]
    cache_features(backbone, load_dataset(folder), cache, shots=["all"], seeds=[1], views=1)
    print(encoded[0])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
