"""Reading a checkpoint of torch.save without running anything that it names.

A genuine checkpoint of the official code pickles its learning rate scheduler, and with it an optimizer; such a file
can name any function of any module and ask for it to be called. Here nothing named is ever imported: every name but
``OrderedDict`` becomes a stand-in that keeps what it is called with and does nothing, and the tensors that are wanted
are read from the archive afterwards, by what their stand-ins were given.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.errors import UserError

DTYPES = {"HalfStorage": "f2", "FloatStorage": "f4", "DoubleStorage": "f8"}
REBUILD = "torch._utils._rebuild_tensor_v2"


class StandIn:
    """Instead of whatever a pickle names: keeps the arguments of its call, takes any state and items, does nothing."""

    name = ""
    args: tuple[Any, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        made = object.__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        # A class of its own for each, so that nothing a pickle does to one outlives the reading.
        return type("StandIn", (StandIn,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid  # ("storage", stand-in of its class, number, device, elements)


class Checkpoint:
    """A file of torch.save, opened. ``content`` has stand-ins in place of tensors; ``tensor`` reads them."""

    def __init__(self, path: Path):
        """Raises UserError if the file is missing, damaged, or not in the format of torch.save since 1.6."""
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                (pickled,) = (entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
                self._root = pickled.removesuffix("data.pkl")
                order = self._root + "byteorder"
                big = order in archive.namelist() and self._read(archive, order) == b"big"
                self._order = ">" if big else "<"
                self.content: Any = _Unpickler(io.BytesIO(self._read(archive, pickled))).load()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None
        except Exception as error:  # a damaged pickle raises whatever its next byte happens to mean
            raise self._damaged(error) from None

    def tensor(self, stand_in: Any) -> np.ndarray:
        """The array, in its own dtype, behind a tensor's stand-in.

        Raises UserError if it is no stand-in of a tensor, of a dtype other than float16, 32 or 64, or reaches
        outside its storage.
        """
        try:
            if not isinstance(stand_in, StandIn) or stand_in.name != REBUILD:
                raise ValueError("a tensor was expected where there is none")
            (_, storage, number, _, _), offset, size, stride = stand_in.args[:4]
            kind = DTYPES.get(storage.name.removeprefix("torch."))
            if kind is None:
                raise ValueError(f"{storage.name} holds no floating-point numbers that are known here")
            with zipfile.ZipFile(self.path) as archive:
                flat = np.frombuffer(self._read(archive, f"{self._root}data/{number}"), self._order + kind)
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            if min((offset, *size, *stride)) < 0 or 0 in size or last >= len(flat):
                raise ValueError(f"a tensor {tuple(size)} reaches outside its {len(flat)} stored numbers")
            steps = [step * flat.itemsize for step in stride]
            view = np.lib.stride_tricks.as_strided(flat[offset:], tuple(size), steps)
            return view.astype(kind)
        except Exception as error:
            raise self._damaged(error) from None

    @staticmethod
    def _read(archive: zipfile.ZipFile, entry: str) -> bytes:
        if archive.getinfo(entry).compress_type != zipfile.ZIP_STORED:
            raise ValueError("its entries are compressed, which those of torch.save never are")
        return archive.read(entry)

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self.path} should be a checkpoint of torch.save, version 1.6 or later, but cannot be read as one "
            f"({error}); if torch itself can load it, save it again there."
        )


def state_dict_of(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], int]:
    """The state dict, of stand-ins, and the epoch. Raises UserError where the file has none."""
    content = checkpoint.content
    state = content.get("state_dict") if isinstance(content, dict) else None
    epoch = content.get("epoch") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not isinstance(epoch, int) or isinstance(epoch, bool):
        raise UserError(
            f"{checkpoint.path} should hold a state_dict and an epoch, as the official code saves; it does not."
        )
    return state, epoch
