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
NUMBERED = re.compile(r"(\w+)\.(\d+)((?:\.\d+)?)")  # a name in a State: what, of which run, of which epoch


class Checkpoint:
    """One batch's state as safetensors, written every few seconds; the file is whole or the one before.

    A state that cannot be written costs only a resumed sweep its time, so training goes on without;
    ``problem`` then says why. A file that is damaged counts as none.
    """

    def __init__(self, path: Path):
        self.path = path
        self.problem: str | None = None
        self._last = time.monotonic()

    def load(self) -> State | None:
        return read_state(self.path)

    def offer(self, get_state: Callable[[], State]) -> None:
        if time.monotonic() - self._last < EVERY:
            return
        try:
            write_state(self.path, get_state())
            self.problem = None
        except OSError as error:
            self.problem = f"{self.path.parent} does not take checkpoints ({error})"
        self._last = time.monotonic()


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
