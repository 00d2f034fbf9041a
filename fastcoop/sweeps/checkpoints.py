"""Training states kept in the results folder, so that a killed sweep resumes its batches with bit-identical results."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastcoop.files import atomic_write

if TYPE_CHECKING:
    from fastcoop.engine.training import State

FOLDER = "checkpoints"
EVERY = 30.0  # seconds between checkpoints: the most work that a kill loses
TRAIN_FILES = "train_files"  # a name in the file: the digest of a run's training images
STATE_NAME = re.compile(r"(\w+)\.(\d+)((?:\.\d+)?)")  # "<what>.<run index>" or "<what>.<run index>.<epoch>"


class CheckpointFile:
    """One batch's training state as safetensors, rewritten every `EVERY` seconds.

    A state that cannot be written must not stop the training: ``problem`` then says why.

    Args:
        path: The file.
        train_files: Digest of each run's training images, None where unknown. A run whose images have changed since
            its state was written starts over.
    """

    def __init__(self, path: Path, train_files: Sequence[str | None] = ()):
        self.path = path
        self.problem: str | None = None
        self._digests = {
            f"{TRAIN_FILES}.{index}": digest for index, digest in enumerate(train_files) if digest
        }
        self._last = time.monotonic()

    def load(self) -> State | None:
        """Return the state in the file, or None where there is none that can be used."""
        state = read_state(self.path)
        if state is None:
            return None
        changed = {
            name.rpartition(".")[2]
            for name, digest in self._digests.items()
            if name in state and bytes(state[name].tolist()).hex() != digest
        }
        matches = {name: STATE_NAME.fullmatch(name) for name in state}
        return {
            name: state[name]
            for name, match in matches.items()
            if match and match[1] != TRAIN_FILES and match[2] not in changed
        }

    def offer(self, get_state: Callable[[], State]) -> None:
        """Write the state, if the last write was more than `EVERY` seconds ago."""
        import torch

        if time.monotonic() - self._last < EVERY:
            return
        digests = {
            name: torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
            for name, digest in self._digests.items()
        }
        try:
            write_state(self.path, get_state() | digests)
            self.problem = None
        except OSError as error:
            self.problem = f"{self.path.parent} does not take checkpoints ({error})"
        self._last = time.monotonic()


def checkpoint_path(folder: Path, name: str) -> Path:
    """Return the file of the batch called ``name``."""
    return folder / FOLDER / f"{name}.safetensors"


def read_state(path: Path) -> State | None:
    """Return the state in a file, or None where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:  # read, not mapped: Windows cannot replace or remove a mapped file
        return load(path.read_bytes()) if path.is_file() else None
    except (SafetensorError, OSError):
        return None


def write_state(path: Path, state: State) -> None:
    """Write a state, all or nothing. Raises OSError where the disk refuses."""
    from safetensors.torch import save

    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as part:
        part.write_bytes(save({name: tensor.contiguous() for name, tensor in state.items()}))


def subset_state(state: State, indices: Sequence[int]) -> State:
    """Return the state of some runs of a batch, renumbered in the order of ``indices``."""
    new_index = {index: new for new, index in enumerate(indices)}
    subset = {}
    for name, tensor in state.items():
        match = STATE_NAME.fullmatch(name)
        if match and int(match[2]) in new_index:
            subset[f"{match[1]}.{new_index[int(match[2])]}{match[3]}"] = tensor
    return subset


def remove_stale(folder: Path, keep: Container[str]) -> None:
    """Remove the checkpoints of all batches but those named in ``keep``, and incomplete files of killed processes."""
    if not (folder / FOLDER).is_dir():
        return
    for path in (folder / FOLDER).iterdir():
        if path.suffix != ".safetensors" or path.stem not in keep:
            path.unlink(missing_ok=True)
    if not any((folder / FOLDER).iterdir()):
        (folder / FOLDER).rmdir()
