"""What the benchmark measures on: lists of class names, and a backbone of real shapes with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastcoop.backbones import Backbone, load_backbone
from fastcoop.datasets.class_names import paper_class_names
from fastcoop.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

IMAGENET = {"imagenet-10": 10, "imagenet-100": 100, "imagenet": None}  # names of its first classes
DTYPES = ("float32", "bfloat16")


def class_lists(folder: Path | None = None, only: str | None = None) -> dict[str, list[str]]:
    """Return class names by dataset, smallest first.

    From ``folder``'s JSON lists, one file per dataset; without one, those of the paper's eleven datasets. ``only``:
    names separated by commas; without it all of a folder's, or ImageNet's, the first 10, the first 100 and all.

    Raises UserError for a missing folder, a file that is no list of names, or an unknown name.
    """
    lists = _of_the_paper() if folder is None else _read(folder)
    only = ",".join(IMAGENET) if only is None and folder is None else only
    if only is not None:
        for name in only.split(","):
            if name not in lists:
                raise UserError(f'There is no list of class names "{name}".{nearest(name, lists)}')
        lists = {name: lists[name] for name in only.split(",")}
    return dict(sorted(lists.items(), key=lambda item: len(item[1])))


def random_backbone(name: str, device: str = "cpu", dtype: str = "float32") -> Backbone:
    """A backbone with random weights. Raises UserError for an unknown model or a dtype that is not offered."""
    return load_backbone(name, None, device=device, dtype=torch_dtype(dtype), force_quick_gelu=True)


def torch_dtype(name: str) -> torch.dtype:
    """A precision by name. Raises UserError for one that is not offered."""
    import torch

    if name not in DTYPES:
        raise UserError(f'The benchmark runs in {" or ".join(DTYPES)}, not in "{name}".')
    return getattr(torch, name)


def _of_the_paper() -> dict[str, list[str]]:
    lists = paper_class_names()
    return lists | {name: lists["imagenet"][:count] for name, count in IMAGENET.items()}


def _read(folder: Path) -> dict[str, list[str]]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"{folder} holds no *.json; put one list of class names per dataset there.")
    lists = {}
    for file in files:
        try:
            names = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is not JSON ({error}); it should be a list of class names.") from None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{file} should be a list of class names, at least one.")
        lists[file.stem] = names
    return lists
