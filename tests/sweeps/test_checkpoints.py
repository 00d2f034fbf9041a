"""Checkpoints: whole or not there, never in the way, and good for parts of a batch."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from fastcoop.sweeps import checkpoints
from fastcoop.sweeps.checkpoints import (
    CheckpointFile,
    checkpoint_path,
    read_state,
    remove_stale,
    subset_state,
    write_state,
)

STATE = {
    "contexts.0": torch.arange(6.0).view(2, 3), "step.0": torch.tensor(5), "contexts.1": torch.ones(2, 3),
    "ended.1": torch.tensor(-1), "snapshot.1.20": torch.zeros(2, 3), "contexts.12": torch.full((2, 3), 7.0),
}  # fmt: skip


def same(one: dict[str, torch.Tensor] | None, two: dict[str, torch.Tensor]) -> bool:
    return (
        one is not None
        and one.keys() == two.keys()
        and all(torch.equal(one[name], two[name]) for name in two)
    )


def test_a_state_is_written_when_it_is_time_to_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = CheckpointFile(checkpoint_path(tmp_path, "one"))
    assert checkpoint.load() is None
    checkpoint.offer(lambda: pytest.fail("asked for too early"))
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    checkpoint.offer(lambda: STATE)
    assert same(CheckpointFile(checkpoint_path(tmp_path, "one")).load(), STATE)


def test_runs_over_other_training_images_begin_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a part of the batch; a run whose images are not known goes on."""
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    path = checkpoint_path(tmp_path, "one")
    CheckpointFile(path, ["aa" * 32, "bb" * 32]).offer(lambda: STATE)
    assert same(CheckpointFile(path, ["aa" * 32, "bb" * 32]).load(), STATE)
    assert same(CheckpointFile(path, [None, None]).load(), STATE)
    left = {name: tensor for name, tensor in STATE.items() if name.split(".")[1] != "1"}
    assert same(CheckpointFile(path, ["aa" * 32, "cc" * 32]).load(), left)
    whole = read_state(path)
    assert whole is not None
    write_state(path, subset_state(whole, [1]))
    assert CheckpointFile(path, ["cc" * 32]).load() == {}
    assert CheckpointFile(path, ["bb" * 32]).load() is not None


@pytest.mark.skipif(
    not hasattr(psutil.Process, "memory_maps"), reason="this system does not list mapped files"
)
def test_a_state_that_was_read_does_not_hold_its_file(tmp_path: Path) -> None:
    """On Windows a file that is mapped can be neither replaced nor removed."""
    path = checkpoint_path(tmp_path, "one")
    write_state(path, {"contexts.0": torch.ones(1000, 100)})
    state = read_state(path)
    assert state is not None
    assert path.name not in {Path(mapped.path).name for mapped in psutil.Process().memory_maps()}


def test_a_damaged_checkpoint_counts_as_none(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, "one")
    write_state(path, STATE)
    path.write_bytes(path.read_bytes()[:-8])
    assert read_state(path) is None
    path.write_bytes(b"nonsense")
    assert read_state(path) is None


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    checkpoint = CheckpointFile(checkpoint_path(tmp_path, "one"))
    checkpoint.offer(lambda: STATE)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastcoop.files.os.replace", full)
        checkpoint.offer(lambda: {"step.0": torch.tensor(6)})
    assert checkpoint.problem is not None
    assert "No space left" in checkpoint.problem
    assert same(checkpoint.load(), STATE)
    assert [path.name for path in checkpoint.path.parent.iterdir()] == ["one.safetensors"]


def test_a_part_of_a_batch_takes_its_own_runs_along() -> None:
    part = subset_state(STATE, [12, 1])
    assert same(part, {
        "contexts.0": STATE["contexts.12"], "contexts.1": STATE["contexts.1"], "ended.1": STATE["ended.1"],
        "snapshot.1.20": STATE["snapshot.1.20"],
    })  # fmt: skip


def test_what_is_over_is_tidied_away(tmp_path: Path) -> None:
    write_state(checkpoint_path(tmp_path, "one"), STATE)
    write_state(checkpoint_path(tmp_path, "two"), STATE)
    (tmp_path / "checkpoints" / "two.77.part").write_bytes(b"half")
    remove_stale(tmp_path, {"two"})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["two.safetensors"]
    remove_stale(tmp_path, set())
    assert not (tmp_path / "checkpoints").exists()
