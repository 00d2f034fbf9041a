"""What sweeps record in the feature folder: sizes of backbones, paces of methods. A dry run then needs no torch.

A sweep never reads these records.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt

import fastcoop
from fastcoop import backbones
from fastcoop.backbones.planned import PROBE, DeviceName, PromptPath, clip_tokenizer
from fastcoop.files import atomic_write
from fastcoop.memo import Late
from fastcoop.methods.late import Backbone
from fastcoop.sweeps.pace import Kind

FILE = ".plans.json"  # in the folder of features
SIZES = (  # of a `TextTower`
    "width", "hidden", "layers", "heads", "dim", "context_length", "vocabulary", "end_id",
)  # fmt: skip


class Known(BaseModel):
    """What is recorded of a backbone: `SIZES` of its text tower, its files, what it depends on (`_origin`)."""

    name: str
    digest: str
    embed_dim: PositiveInt
    sizes: Annotated[dict[str, NonNegativeInt | None], Field(min_length=len(SIZES))]
    files: list[Path]
    origin: list[list[str | int]]


class Records(BaseModel):
    """The file's content: backbones by the grid's names; by machine each kind of work with its pace."""

    backbones: dict[str, Known] = {}
    paces: dict[str, list[tuple[str, str, bool, FiniteFloat]]] = {}


def loaded_backbone(backbone: Backbone) -> Backbone:
    """Return the backbone with its model, which a recorded one loads now."""
    found: Any = backbone
    return found.load() if isinstance(found, Late) else found


def recorded_backbone(cache: Path, spec: str, device: str) -> Backbone:
    """Return a backbone by what is recorded of it, or load it if there is no record or its files have changed.

    A recorded one has what plans need, and loads itself when anything else is used.
    """

    load = functools.cache(lambda: backbones.backbone_from_spec(spec, device=device))
    known = _read(cache).backbones.get(spec)
    if known is None or known.origin != _origin(spec, known.files):
        return load()
    tensors = {"device": DeviceName.of(device), "dtype": np.dtype("float32")}
    text = Late(lambda: load().text, is_shared=True, **tensors, **known.sizes)
    found: Any = Late(
        load, load=load, name=known.name, digest=known.digest, embed_dim=known.embed_dim, text=text, shared_text=text,
        prompt_path=PromptPath("shared"), tokenizer=clip_tokenizer(), **tensors,
    )  # fmt: skip
    return found


def record_backbones(cache: Path, named: Mapping[str, Backbone]) -> None:
    """Record the backbones of a sweep, by the grid's names: those in float32 with a causal tower and CLIP's tokens."""
    records = _read(cache)
    for spec, one in named.items():
        tokens = [make([PROBE], context_length=77).tolist() for make in (one.tokenizer, clip_tokenizer())]
        is_plain = one.text.is_shared and str(one.dtype) == "torch.float32"
        if is_plain and one.files and tokens[0] == tokens[1]:
            sizes, origin = {name: getattr(one.text, name) for name in SIZES}, _origin(spec, one.files)
            own: dict[str, Any] = {"name": one.name, "digest": one.digest, "embed_dim": one.embed_dim}
            records.backbones[spec] = Known(**own, sizes=sizes, files=list(one.files), origin=origin)
    _write(cache, records)


def known_paces(cache: Path, device: str, threads: int) -> dict[Kind, float]:
    """Return the recorded seconds of one worker per unit of `Batch.cost`, by kind of work, of this machine."""
    return {tuple(kind): pace for *kind, pace in _read(cache).paces.get(_machine(device, threads), [])}  # type: ignore[misc]


def record_paces(cache: Path, device: str, threads: int, found: Mapping[Kind, float]) -> None:
    """Record paces, by kind of work."""
    records, whole = _read(cache), known_paces(cache, device, threads) | dict(found)
    records.paces[_machine(device, threads)] = [(*kind, pace) for kind, pace in whole.items()]
    _write(cache, records)


def _machine(device: str, threads: int) -> str:
    return f"{platform.node()} {device} {threads}"


def _origin(spec: str, files: Iterable[Path]) -> list[list[str | int]]:
    """Return what a record depends on: versions, the working folder, and what the backbone's name finds there now.

    That is each file's own path, size and time; the same of what the name is a path of, and of the folders and configs
    around, since another file there may count.
    """
    found: list[list[str | int]] = [
        [fastcoop.__path__[0], fastcoop.__version__, version("open_clip_torch"), os.getcwd()]
    ]
    named = [Path(part).expanduser() for part in (spec, spec.partition(":")[2]) if part]
    folders = {*named, *(file.parent for file in files)}
    for path in sorted({*files, *folders, *(one for folder in folders for one in folder.glob("*.json"))}):
        with suppress(OSError, ValueError):
            found.append([os.path.realpath(path), path.stat().st_size, path.stat().st_mtime_ns])
    return found


def _read(cache: Path) -> Records:
    with suppress(OSError, ValueError):  # no file, or a damaged one
        return Records.model_validate_json((cache / FILE).read_bytes())
    return Records()


def _write(cache: Path, records: Records) -> None:
    if records != _read(cache) and cache.is_dir():
        # A folder that is only read keeps none, nor is a path kept that is no text.
        with suppress(OSError, ValueError), atomic_write(cache / FILE) as part:
            part.write_text(records.model_dump_json(), encoding="utf-8")
