"""What sweeps record beside the features, so that a dry run needs no model: backbones' sizes, and methods' speed.

A sweep never reads these records.
"""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastcoop
from fastcoop.backbones import Backbone, Preprocess, PromptPath, TextTower, backbone_from_spec
from fastcoop.backbones.tokenizer import load_tokenizer, tokenizer_facts
from fastcoop.files import atomic_write

FILE = ".plans.json"  # in the folder of features
SIZES = ("width", "hidden", "layers", "heads", "dim", "context_length", "vocabulary", "end_id")


class Speed(NamedTuple):
    """The seconds of a run, and what it adds to them per unit of its work."""

    per_run: float
    per_work: float


@dataclass(frozen=True, eq=False)
class LateBackbone:
    """Stands for the model and the text tower of a recorded backbone: knows sizes, and loads all else when asked."""

    load: Callable[[], Backbone]
    part: str
    sizes: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.sizes[name] if name in self.sizes else getattr(getattr(self.load(), self.part), name)


def loaded_backbone(backbone: Backbone) -> Backbone:
    """Return the backbone with its model, which a recorded one loads now."""
    model: Any = backbone.model
    return model.load() if isinstance(model, LateBackbone) else backbone


def recorded_backbone(cache: Path, spec: str, device: str) -> Backbone:
    """Return a backbone by what is recorded of it, or load it if there is no record or its files have changed."""
    load = functools.cache(lambda: backbone_from_spec(spec, device=device))
    facts = _read(cache)["backbones"].get(spec, {})
    if facts.get("of") != _origin(facts.get("files", ())):
        return load()
    own = facts["backbone"] | {"preprocess": Preprocess(**facts["backbone"]["preprocess"])}
    tokenizer = load_tokenizer({"context_length": facts["sizes"]["context_length"]}, None)
    model: Any = LateBackbone(load, "model", {})
    backbone = Backbone(model=model, tokenizer=tokenizer, **own)
    sizes = facts["sizes"] | {"device": torch.device(device), "dtype": torch.float32}
    vars(backbone).update(text=LateBackbone(load, "text", sizes), prompt_path=PromptPath("shared"))
    return backbone


def record_backbones(cache: Path, named: Mapping[str, Backbone]) -> None:
    """Record the backbones of a sweep, by the grid's names: those with a causal tower and CLIP's own tokenizer."""
    found = {}
    for spec, one in named.items():
        plain = one.dtype == torch.float32 and tokenizer_facts(one.tokenizer) is None
        if isinstance(one.text, TextTower) and plain and one.files:
            own = {name: getattr(one, name) for name in ("name", "digest", "embed_dim", "quick_gelu")}
            found[spec] = {
                "backbone": own | {"preprocess": asdict(one.preprocess)},
                "sizes": {name: getattr(one.text, name) for name in SIZES},
                "files": list(map(str, one.files)),
                "of": _origin(map(str, one.files)),
            }
    _add(cache, "backbones", found)


def known_speeds(cache: Path, device: str, threads: int) -> dict[str, Speed]:
    """Return the recorded speeds of this machine, by kind of run."""
    found = _read(cache)["speeds"].get(f"{platform.node()} {device} {threads}", {})
    return {kind: Speed(*speed) for kind, speed in found.items()}


def record_speeds(cache: Path, device: str, threads: int, found: Mapping[str, Speed]) -> None:
    """Record speeds, by kind of run."""
    known = known_speeds(cache, device, threads)
    _add(cache, "speeds", {f"{platform.node()} {device} {threads}": known | dict(found)})


def _origin(files: Iterable[str]) -> list[Any]:
    """Return what a record depends on: versions, the working folder (names may be paths), sizes and times of files."""
    found: list[Any] = [fastcoop.__path__[0], fastcoop.__version__, version("open_clip_torch"), os.getcwd()]
    for file in files:
        with suppress(OSError):
            found.append([file, os.stat(file).st_size, os.stat(file).st_mtime_ns])
    return found


def _read(cache: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"backbones": {}, "speeds": {}}
    with suppress(OSError, ValueError):
        found |= dict(json.loads((cache / FILE).read_text(encoding="utf-8")))
    return found


def _add(cache: Path, kind: str, found: Mapping[str, Any]) -> None:
    everything = _read(cache)
    if found and everything[kind] | dict(found) != everything[kind] and cache.is_dir():
        everything[kind] |= found
        with suppress(OSError), atomic_write(cache / FILE) as part:  # a folder that is only read keeps none
            part.write_text(json.dumps(everything), encoding="utf-8")
