"""Read files that torch wrote, checkpoints or TorchScript archives, without running code that they name.

A pickle can name any function of any module to be called, and a TorchScript archive contains code that runs while it is
loaded. Here nothing named is imported: every name but ``OrderedDict`` becomes a stand-in that keeps its arguments and
does nothing; tensors are read from the file afterwards, by the arguments of their stand-ins.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"Half": "f2", "Float": "f4", "Double": "f8", "Bool": "?", "Byte": "u1", "Char": "i1"}
DTYPES |= {"Short": "i2", "Int": "i4", "Long": "i8"}
REBUILD = "torch._utils._rebuild_tensor_v2"
MAX_CODE_BYTES = 1 << 26  # far more than any CLIP's; a few compressed bytes may unpack to any number


class StandIn:
    """Replaces what a pickle names: keeps the arguments of its call and its state, accepts items, does nothing."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        # A new class for each, so that a pickle's changes of a class do not outlive the reading.
        return type("StandIn", (StandIn,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid  # ("storage", stand-in of its class, number, device, elements)


class TorchFile:
    """A file of ``torch.save`` since torch 1.6, or of ``torch.jit.save``, for a ``with`` statement.

    Damaged files may raise any exception.
    """

    def __init__(self, path: Path):
        self._archive = zipfile.ZipFile(path)
        (pickled,) = (entry for entry in self._archive.namelist() if entry.endswith("/data.pkl"))
        self._root = pickled.removesuffix("data.pkl")
        self._order = ">" if self.has("byteorder") and self.read("byteorder") == b"big" else "<"

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._archive.close()

    def has(self, entry: str) -> bool:
        return self._root + entry in self._archive.namelist()

    def read(self, entry: str) -> bytes:
        """Return the bytes of an entry that is not compressed."""
        if self._archive.getinfo(self._root + entry).compress_type != zipfile.ZIP_STORED:
            raise ValueError("its entries are compressed, which those of torch.save never are")
        return self._archive.read(self._root + entry)

    def unpickled(self, entry: str = "data.pkl") -> Any:
        """Return what ``entry`` pickles, with stand-ins for all that it names."""
        return _Unpickler(io.BytesIO(self.read(entry))).load()

    def tensor(self, stand_in: Any, folder: str = "data") -> np.ndarray:
        """Return a tensor's array, in its own dtype, by its stand-in; ``folder`` holds its numbers."""
        if not isinstance(stand_in, StandIn) or stand_in.name != REBUILD:
            raise ValueError("a tensor was expected where there is none")
        (_, storage, number, _, _), offset, size, stride = stand_in.args[:4]
        kind = DTYPES.get(storage.name.removeprefix("torch.").removesuffix("Storage"))
        if kind is None:
            raise ValueError(f"{storage.name} holds no numbers that are known here")
        flat = np.frombuffer(self.read(f"{folder}/{number}"), self._order + kind)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride)) < 0 or 0 in size or last >= len(flat):
            raise ValueError(f"a tensor {tuple(size)} reaches outside its {len(flat)} stored numbers")
        steps = [step * flat.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(flat[offset:], tuple(size), steps).astype(kind)

    def code(self) -> str:
        """Return the text of a TorchScript archive's code, "" in a file of ``torch.save``."""
        folder = f"{self._root}code/"
        files = [file for file in self._archive.infolist() if file.filename.startswith(folder)]
        files = [file for file in files if file.filename.endswith(".py")]
        if sum(file.file_size for file in files) > MAX_CODE_BYTES:
            raise ValueError(f"its code is longer than {MAX_CODE_BYTES} bytes")
        return "\n".join(self._archive.read(file).decode() for file in files)
