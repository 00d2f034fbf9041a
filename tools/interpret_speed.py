"""How long `fastcoop interpret` takes: 1,000 unified contexts of 16 against CLIP's vocabulary at RN50's width.

    python -m tools.interpret_speed [runs]

The runs are made up: what is read of a context does not depend on how it was learned.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch

from fastcoop.backbones import Backbone, Preprocess
from fastcoop.datasets import Dataset
from fastcoop.methods import METHODS, Data, Outcome, RunSpec, expand
from fastcoop.results.store import open_store
from fastcoop.sweeps import interpret
from fastcoop.sweeps.records import record_outcome
from tests.reference import tiny_model

WIDTH, LENGTH = 512, 16


def main(runs: int) -> None:
    """Print the seconds of one call that reads all runs and writes their files."""
    model = tiny_model(dtype=torch.float32, layers=1, width=WIDTH)
    square = Preprocess(32, (0.5,) * 3, (0.5,) * 3)
    backbone = Backbone(
        "speed", model, "0" * 64, open_clip.get_tokenizer("RN50"), square, 24, quick_gelu=False
    )
    (settings,) = expand(METHODS["coop"], {"context_length": LENGTH, "epochs": 1})
    source = Data(Dataset("made_up", Path(), ("a", "b"), "{}", {}, "", "made_up", Path()), None)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        with open_store(Path(folder)) as store:
            for number in range(runs):
                contexts = rng.normal(scale=0.1, size=(LENGTH, WIDTH)).astype(np.float32)
                key = f"{number:064x}"
                planned = RunSpec.of("coop", settings, source, backbone, seed=number, key=key)
                record_outcome(store, planned, Outcome({}, contexts=contexts))
        start, worked = time.perf_counter(), time.process_time()
        written = interpret(folder, backbone)
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
    words = len(backbone.text.token_embedding)
    print(
        f"{len(written):,} contexts of {LENGTH} vectors against {words:,} words of {WIDTH} numbers: {seconds:.1f} s "
        f"({worked:.1f} s of a core), {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
