"""State dicts from files of every format that CLIP weights come in, read without running code of the files.

A pickle can name any function of any module to be called, and a TorchScript archive contains code that runs while it is
loaded. Here nothing named is imported: tensors are read from the file afterwards, by the arguments of their stand-ins.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastcoop.backbones.late import open_clip
from fastcoop.errors import MissingFile, UserError
from fastcoop.files import StandIn, unpickle

DTYPES = {"Half": "f2", "Float": "f4", "Double": "f8", "Bool": "?", "Byte": "u1", "Char": "i1"}
DTYPES |= {"Short": "i2", "Int": "i4", "Long": "i8"}
REBUILD = "torch._utils._rebuild_tensor_v2"
MAX_CODE_BYTES = 1 << 26  # far more than any CLIP's; a few compressed bytes may unpack to any number


class TorchFile(zipfile.ZipFile):
    """A file of ``torch.save`` since torch 1.6, or of ``torch.jit.save``. Damaged files may raise any exception."""

    def __init__(self, path: Path):
        super().__init__(path)
        (pickled,) = (entry for entry in self.namelist() if entry.endswith("/data.pkl"))
        self._root = pickled.removesuffix("data.pkl")
        self._order = ">" if self.has("byteorder") and self.content("byteorder") == b"big" else "<"

    def has(self, entry: str) -> bool:
        return self._root + entry in self.namelist()

    def content(self, entry: str) -> bytes:
        """Return the bytes of an entry that is not compressed."""
        if self.getinfo(self._root + entry).compress_type != zipfile.ZIP_STORED:
            raise ValueError("its entries are compressed, which those of torch.save never are")
        return self.read(self._root + entry)

    def unpickled(self, entry: str = "data.pkl") -> Any:
        """Return what ``entry`` pickles, with stand-ins for all that it names."""
        return unpickle(self.content(entry))

    def tensor(self, stand_in: Any, folder: str = "data") -> np.ndarray:
        """Return a tensor's array, in its own dtype, by its stand-in; ``folder`` holds its numbers."""
        if not isinstance(stand_in, StandIn) or stand_in.name != REBUILD:
            raise ValueError("a tensor was expected where there is none")
        (_, storage, number, _, _), offset, size, stride = stand_in.args[:4]
        kind = DTYPES.get(storage.name.removeprefix("torch.").removesuffix("Storage"))
        if kind is None:
            raise ValueError(f"{storage.name} holds no numbers that are known here")
        flat = np.frombuffer(self.content(f"{folder}/{number}"), self._order + kind)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride)) < 0 or 0 in size or last >= len(flat):
            raise ValueError(f"a tensor {tuple(size)} reaches outside its {len(flat)} stored numbers")
        steps = [step * flat.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(flat[offset:], tuple(size), steps).astype(kind)

    def code(self) -> str:
        """Return the text of a TorchScript archive's code, "" in a file of ``torch.save``."""
        names = (
            name for name in self.namelist() if name.startswith(f"{self._root}code/") and name.endswith(".py")
        )
        files = [self.getinfo(name) for name in names]
        if sum(file.file_size for file in files) > MAX_CODE_BYTES:
            raise ValueError(f"its code is longer than {MAX_CODE_BYTES} bytes")
        return "\n".join(self.read(file).decode() for file in files)


OPENAI_INTEGERS = ("input_resolution", "context_length", "vocab_size")
TOKEN_TABLE = "token_embedding.weight"
SEEN_IDS = "token_embedding.seen_ids"
SEEN_ROWS = "token_embedding.seen_rows"
UNSEEN_STD = 0.02
TOWERS = ("vision_cfg", "text_cfg")  # in a config


@dataclass(frozen=True, eq=False)
class Weights:
    """The content of a weights file: the state dict, and what else the file itself states (else None)."""

    state: dict[str, Tensor]
    quick_gelu: bool | None = None  # whether the activation is QuickGELU
    config: dict[str, Any] | None = None  # of open_clip
    trained_tokens: Tensor | None = None  # bool (vocabulary,): the trained token embeddings; None: all


def read_weights(path: Path) -> Weights:
    """Read OpenAI's TorchScript archive, a plain state dict, a training checkpoint or safetensors.

    The state dict of an .npz file of big_vision is empty: open_clip reads such a file into a model itself. A UserError
    says if the file is missing, damaged, or none of these.
    """
    if not path.is_file():
        raise MissingFile(f"There is no weights file {path}.")
    try:
        if path.suffix == ".npz":
            return Weights({})
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with TorchFile(path) as file:
                if file.has("constants.pkl"):
                    return _read_torchscript(file)
        return Weights(_cleaned(torch.load(path, map_location="cpu", weights_only=True)))
    except Exception as error:  # damaged files may raise any exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not isinstance(error, (OSError, RuntimeError, ValueError, EOFError, SafetensorError)):
            # torch's own message explains how to run what it does not unpickle
            reason = "it is damaged, or holds things other than tensors"
        raise UserError(
            f"{path} should hold CLIP weights (an OpenAI .pt archive, a state dict or safetensors) "
            f"but cannot be read: {reason[:200]}"
        ) from error


def _read_safetensors(path: Path) -> Weights:
    """Read weights that may leave out token embeddings that were never trained, most of a small CLIP: these are
    drawn from N(0, 0.02^2) with the file's seed; such a file has the model's config, too."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    if SEEN_IDS not in state:
        return Weights(_cleaned(state))
    ids = state.pop(SEEN_IDS).long()
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    rows = state.pop(SEEN_ROWS)
    generator = torch.Generator().manual_seed(int(metadata["seed"]))
    shape = int(metadata["vocab_size"]), rows.shape[1]
    table = torch.randn(shape, generator=generator, dtype=torch.float32) * UNSEEN_STD
    table[ids] = rows
    trained = torch.zeros(len(table), dtype=torch.bool)
    trained[ids] = True
    config = json.loads(metadata["config"])
    if not isinstance(config["embed_dim"], int) or not all(isinstance(config[one], dict) for one in TOWERS):
        raise ValueError("the config in it is none of open_clip's")
    return Weights(state | {TOKEN_TABLE: table}, None, config, trained)


def _read_torchscript(file: TorchFile) -> Weights:
    """Read without ``torch.jit.load``, which runs code of the archive."""
    found = dict(_tensors(file.unpickled(), ""))
    state = {name: torch.from_numpy(file.tensor(stand_in)) for name, stand_in in found.items()}
    code = file.code()
    scalars = [one for one in file.unpickled("constants.pkl") if _is_tensor(one) and not one.args[2]]
    # QuickGELU's factor is in the code, or among the constants, where tracing puts it.
    has_factor = any(abs(float(file.tensor(one, "constants")) - 1.702) < 1e-3 for one in scalars)
    # Only OpenAI's own releases have these three integers, and all of them use it.
    is_openai = all(key in state for key in OPENAI_INTEGERS)
    quick_gelu = (
        True if "1.702" in code or has_factor else False if "torch.gelu(" in code else is_openai or None
    )
    return Weights(_cleaned(state), quick_gelu)


def _is_tensor(value: object) -> bool:
    return isinstance(value, StandIn) and value.name == REBUILD


def _tensors(module: object, prefix: str) -> Iterator[tuple[str, StandIn]]:
    """Yield the stand-ins of a TorchScript module's tensors, with their names in a state dict."""
    attributes = module.state if isinstance(module, StandIn) else None
    for name, value in attributes.items() if isinstance(attributes, dict) else ():
        if _is_tensor(value):
            yield prefix + name, value
        else:
            yield from _tensors(value, f"{prefix}{name}.")


def _cleaned(content: object) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise ValueError("it holds no state dict")
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    state = {key: value for key, value in state.items() if key not in OPENAI_INTEGERS}
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("it holds things other than tensors")
    return state


def known_activation(path: Path) -> bool | None:
    """Return whether a file that open_clip knows by its sha256 uses QuickGELU; None for other files."""
    digest = file_sha256(path)
    for model, tag in open_clip.list_pretrained():
        config = open_clip.get_pretrained_cfg(model, tag)
        expected = expected_sha256(config.get("url", ""))
        if expected and digest.startswith(expected):
            return bool(config.get("quick_gelu", False))
    return None


def expected_sha256(url: str) -> str:
    """Return the digest, whole or its beginning, in an address of OpenAI or open_clip; "" for others."""
    if "openaipublic" in url:
        return url.split("/")[-2]
    return Path(url).stem.split("-")[-1] if "mlfoundations" in url else ""


def file_sha256(path: Path) -> str:
    """Return the sha256 hex of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
