"""Where a batch stands, kept beside the store while it trains: a killed one goes on from there to the same bits."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastcoop.engine.state import State

FOLDER = "checkpoints"
EVERY = 30.0  # seconds between checkpoints: the most that a kill costs
TRAIN_FILES = "train_files"  # in a State
NUMBERED = re.compile(r"(\w+)\.(\d+)((?:\.\d+)?)")  # a name in a State: what, of which run, of which epoch


class Checkpoint:
    """One batch's state as safetensors, written every few seconds; the file is whole or the one before.

    ``train_files``: digest of each run's training images, None where it is not known. A run whose images are others
    than when the state was written begins again.

    A state that cannot be written costs only a resumed sweep its time, so training goes on without;
    ``problem`` then says why. A file that is damaged counts as none.
    """

    def __init__(self, path: Path, train_files: Sequence[str | None] = ()):
        self.path = path
        self.train_files = {f"{TRAIN_FILES}.{number}": one for number, one in enumerate(train_files) if one}
        self.problem: str | None = None
        self._last = time.monotonic()

    def load(self) -> State | None:
        state = read_state(self.path)
        if state is None:
            return None
        others = {
            name.rpartition(".")[2]
            for name, digest in self.train_files.items()
            if name in state and bytes(state[name].tolist()).hex() != digest
        }
        found = ((name, NUMBERED.fullmatch(name), tensor) for name, tensor in state.items())
        return {
            name: tensor
            for name, match, tensor in found
            if match and match[1] != TRAIN_FILES and match[2] not in others
        }

    def offer(self, get_state: Callable[[], State]) -> None:
        if time.monotonic() - self._last < EVERY:
            return
        try:
            write_state(self.path, get_state() | self._digests())
            self.problem = None
        except OSError as error:
            self.problem = f"{self.path.parent} does not take checkpoints ({error})"
        self._last = time.monotonic()

    def _digests(self) -> State:
        import torch

        return {
            name: torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
            for name, digest in self.train_files.items()
        }


def checkpoint_path(folder: Path, name: str) -> Path:
    """The file of the batch called ``name``."""
    return folder / FOLDER / f"{name}.safetensors"


def read_state(path: Path) -> State | None:
    """The state in a file; None if there is none that can be used."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:  # Not mapped: Windows would refuse to replace or remove the file for as long as the state lives.
        return load(path.read_bytes()) if path.is_file() else None
    except (SafetensorError, OSError):
        return None


def write_state(path: Path, state: State) -> None:
    """Write a state; the file appears whole or not at all. Raises OSError where the disk does not take it."""
    from safetensors.torch import save

    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f"{path.stem}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(save({name: tensor.contiguous() for name, tensor in state.items()}))
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def state_of_some(state: State, numbers: Sequence[int]) -> State:
    """The state of some of a batch's runs, numbered anew in the order of ``numbers``."""
    place = {number: new for new, number in enumerate(numbers)}
    some = {}
    for name, tensor in state.items():
        match = NUMBERED.fullmatch(name)
        if match and int(match[2]) in place:
            some[f"{match[1]}.{place[int(match[2])]}{match[3]}"] = tensor
    return some


def tidy(folder: Path, keep: Container[str]) -> None:
    """Remove all checkpoints but those of the batches named, and what killed writers left half-written."""
    if not (folder / FOLDER).is_dir():
        return
    for path in (folder / FOLDER).iterdir():
        if path.suffix != ".safetensors" or path.stem not in keep:
            path.unlink(missing_ok=True)
    if not any((folder / FOLDER).iterdir()):
        (folder / FOLDER).rmdir()
