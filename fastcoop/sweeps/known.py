"""What sweeps record in the feature folder, so that a dry run needs no model: sizes of backbones, speeds of methods.

A sweep never reads these records.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, FiniteFloat, NonNegativeInt, PositiveInt

import fastcoop
from fastcoop.backbones import Backbone, Preprocess, PromptPath, TextTower, backbone_from_spec
from fastcoop.backbones.tokenizer import load_tokenizer, tokenizer_facts
from fastcoop.files import atomic_write

FILE = ".plans.json"  # in the folder of features


class Speed(NamedTuple):
    """The seconds of a run, and what it adds to them per unit of its work."""

    per_run: FiniteFloat
    per_work: FiniteFloat

    def seconds(self, work: float) -> float:
        """Return the seconds of a run with this work."""
        return self.per_run + self.per_work * work


class Sizes(BaseModel, from_attributes=True):
    """Those of a `TextTower`."""

    width: PositiveInt
    hidden: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    dim: PositiveInt
    context_length: PositiveInt
    vocabulary: PositiveInt
    end_id: NonNegativeInt | None


class Known(BaseModel, from_attributes=True):
    """What is recorded of a backbone: its own, its text tower's sizes, its files and what it depends on (`_origin`)."""

    name: str
    digest: str
    embed_dim: PositiveInt
    quick_gelu: bool
    preprocess: Preprocess
    text: Sizes
    files: list[Path]
    of: list[list[str | int]] = []


class Records(BaseModel):
    """The file's content: backbones by the grid's names, and speeds by machine and kind of run."""

    backbones: dict[str, Known] = {}
    speeds: dict[str, dict[str, Speed]] = {}


@dataclass(frozen=True, eq=False)
class LateBackbone:
    """Stands for the model and the text tower of a recorded backbone: knows sizes, and loads all else when asked."""

    load: Callable[[], Backbone]
    part: str
    known: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.known[name] if name in self.known else getattr(getattr(self.load(), self.part), name)


def loaded_backbone(backbone: Backbone) -> Backbone:
    """Return the backbone with its model, which a recorded one loads now."""
    model: Any = backbone.model
    return model.load() if isinstance(model, LateBackbone) else backbone


def recorded_backbone(cache: Path, spec: str, device: str) -> Backbone:
    """Return a backbone by what is recorded of it, or load it if there is no record or its files have changed."""
    load = functools.cache(lambda: backbone_from_spec(spec, device=device))
    known = _read(cache).backbones.get(spec)
    if known is None or known.of != _origin(spec, known.files):
        return load()
    own = {name: getattr(known, name) for name in ("name", "digest", "embed_dim", "quick_gelu", "preprocess")}
    tokenizer = load_tokenizer({"context_length": known.text.context_length}, None)
    model: Any = LateBackbone(load, "model", {})
    backbone = Backbone(model=model, tokenizer=tokenizer, **own)
    # As tensors name their device: "cuda" is "cuda:0" there.
    tensors = {"device": torch.empty(0, device=device).device, "dtype": torch.float32}
    text = LateBackbone(load, "text", vars(known.text) | tensors)
    vars(backbone).update(text=text, prompt_path=PromptPath("shared"))
    return backbone


def record_backbones(cache: Path, named: Mapping[str, Backbone]) -> None:
    """Record the backbones of a sweep, by the grid's names: those with a causal tower and CLIP's own tokenizer."""
    found = {}
    for spec, one in named.items():
        plain = one.dtype == torch.float32 and tokenizer_facts(one.tokenizer) is None
        if isinstance(one.text, TextTower) and plain and one.files:
            of = _origin(spec, one.files)
            found[spec] = Known.model_validate(one).model_copy(update={"of": of})
    _add(cache, "backbones", found)


def known_speeds(cache: Path, device: str, threads: int) -> dict[str, Speed]:
    """Return the recorded speeds of this machine, by kind of run."""
    return _read(cache).speeds.get(_machine(device, threads), {})


def record_speeds(cache: Path, device: str, threads: int, found: Mapping[str, Speed]) -> None:
    """Record speeds, by kind of run."""
    known = known_speeds(cache, device, threads)
    _add(cache, "speeds", {_machine(device, threads): known | dict(found)} if found else {})


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
    folders = {*(file.parent for file in files), *(path for path in named if path.is_dir())}
    configs = chain.from_iterable(folder.glob("*.json") for folder in folders)
    for path in sorted({*named, *files, *folders, *configs}):
        with suppress(OSError, ValueError):
            found.append([os.path.realpath(path), path.stat().st_size, path.stat().st_mtime_ns])
    return found


def _read(cache: Path) -> Records:
    with suppress(OSError, ValueError):  # no file, or a damaged one
        return Records.model_validate_json((cache / FILE).read_bytes())
    return Records()


def _add(cache: Path, kind: str, found: Mapping[str, Any]) -> None:
    records = _read(cache)
    known = getattr(records, kind)
    if known | dict(found) != known and cache.is_dir():
        known.update(found)
        # A folder that is only read keeps none, nor is a path kept that is no text.
        with suppress(OSError, ValueError), atomic_write(cache / FILE) as part:
            part.write_text(records.model_dump_json(), encoding="utf-8")
