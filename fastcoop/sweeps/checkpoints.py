"""Training states kept in the results folder, so that a killed sweep resumes its batches with bit-identical results."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastcoop.files import atomic_write

if TYPE_CHECKING:
    from fastcoop.engine.runs import State

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
        self._digests = {n: list(bytes.fromhex(digest)) for n, digest in enumerate(train_files) if digest}
        self._last = time.monotonic()

    def load(self) -> State | None:
        """Return the state in the file, or None where there is none that can be used."""
        state = read_state(self.path)
        if state is None:
            return None
        written = {n: state.get(f"{TRAIN_FILES}.{n}") for n in self._digests}
        changed = {n for n, one in written.items() if one is not None and one.tolist() != self._digests[n]}

        def is_kept(name: str) -> bool:
            match = STATE_NAME.fullmatch(name)
            return match is not None and match[1] != TRAIN_FILES and int(match[2]) not in changed

        return {name: tensor for name, tensor in state.items() if is_kept(name)}

    def offer(self, get_state: Callable[[], State]) -> None:
        """Write the state, if the last write was more than `EVERY` seconds ago."""
        import torch

        if time.monotonic() - self._last < EVERY:
            return
        digests = {
            f"{TRAIN_FILES}.{n}": torch.tensor(digest, dtype=torch.uint8)
            for n, digest in self._digests.items()
        }
        self.problem = None
        try:
            write_state(self.path, get_state() | digests)
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
        return load(path.read_bytes())
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
    matches = {name: match for name in state if (match := STATE_NAME.fullmatch(name))}
    return {
        f"{match[1]}.{indices.index(int(match[2]))}{match[3]}": state[name]
        for name, match in matches.items()
        if int(match[2]) in indices
    }


def remove_stale(folder: Path, keep: Container[str]) -> None:
    """Remove the checkpoints of all batches but those named in ``keep``, and incomplete files of killed processes."""
    if not (folder / FOLDER).is_dir():
        return
    for path in (folder / FOLDER).iterdir():
        if path.suffix != ".safetensors" or path.stem not in keep:
            path.unlink(missing_ok=True)
    if not any((folder / FOLDER).iterdir()):
        (folder / FOLDER).rmdir()
