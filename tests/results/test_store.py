"""Writing a results folder: what is recorded together is there together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastcoop.errors import UserError
from fastcoop.results import load_contexts, load_results
from fastcoop.results.parameters import Parameters
from fastcoop.results.records import RunRecord, ScoreInputs, ScoreRecord
from fastcoop.results.store import ResultsStore, open_store

LABELS = np.array([0, 1, 1])


def record(store: ResultsStore, key: str, **columns: object) -> None:
    """Record a run with one test."""
    inputs = ScoreInputs("digest", None, None, "[]")
    test = ScoreRecord(
        dataset="colours", class_names=("red", "blue"), labels=LABELS, inputs=inputs, accuracy=100.0,
        macro_accuracy=100.0, per_class=np.full(2, 100.0), predictions=LABELS, confidence=np.ones(3),
    )  # fmt: skip
    run = RunRecord(
        key=key, backbone="tiny", dataset="colours", method="coop", label="CoOp", shots=1, seed=1, settings="{}",
        columns=columns, train_images=2, train_files=None, status="done", seconds=1.0, losses=[1.0], extra={},
        device="cpu", backbone_digest="",
    )  # fmt: skip
    store.record(run, [test], Parameters(np.ones((2, 4), np.float32), None))


def keys(folder: Path) -> list[str]:
    return sorted(load_results(folder).key)


def test_runs_recorded_together_are_one_transaction(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        record(store, "a")
        with store.together():
            record(store, "b")
            record(store, "c")
            assert keys(tmp_path) == ["a"]
        assert keys(tmp_path) == ["a", "b", "c"]
    assert load_contexts(tmp_path, "c").shape == (2, 4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_complete_runs_are_kept_where_the_next_one_is_not(tmp_path: Path, error: type[BaseException]) -> None:
    with open_store(tmp_path) as store:

        def interrupted() -> None:
            with store.together():
                record(store, "a")
                if error is KeyboardInterrupt:
                    raise error
                record(store, "b", seed=1)  # a column that every run has

        with pytest.raises(error):
            interrupted()
        assert keys(tmp_path) == ["a"]
        record(store, "c")
    assert keys(tmp_path) == ["a", "c"]


def test_files_that_a_killed_process_left_half_written_are_removed(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        record(store, "a")
    names = ["grid.yaml", "datasets.json", "contexts/b.safetensors"]
    parts = [tmp_path / f"{name}.12-0123abcd.part" for name in names]
    own = tmp_path / "film.part"
    for path in (*parts, own):
        path.write_text("half")
    with open_store(tmp_path):
        pass
    assert not any(part.exists() for part in parts)
    assert own.exists()
    assert keys(tmp_path) == ["a"]
