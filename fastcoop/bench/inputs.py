"""Inputs of the benchmark: lists of class names, and a backbone of real sizes with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastcoop.backbones import Backbone, load_backbone
from fastcoop.datasets.class_names import paper_class_names
from fastcoop.errors import MissingFile, UserError, nearest

IMAGENET = {"imagenet-10": 10, "imagenet-100": 100, "imagenet": None}  # the first classes, None: all
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def class_lists(folder: Path | None = None, only: str | None = None) -> dict[str, list[str]]:
    """Return class names by dataset, the shortest list first.

    Args:
        folder: Holds one JSON list per dataset; None for those of the paper's eleven datasets.
        only: Names of datasets, separated by commas; None for all in ``folder``, or without a folder for the first 10,
            the first 100 and all of ImageNet's classes.

    Raises:
        UserError: the folder does not exist, a file is no list of names, or there is no list of that name.
    """
    lists = _paper_lists() if folder is None else _read(folder)
    only = ",".join(IMAGENET) if only is None and folder is None else only
    names = lists if only is None else only.split(",")
    for name in names:
        if name not in lists:
            raise UserError(f'There is no list of class names "{name}".{nearest(name, lists)}')
    return dict(sorted(((name, lists[name]) for name in names), key=lambda item: len(item[1])))


def random_backbone(name: str, device: str = "cpu", dtype: str = "float32") -> Backbone:
    """Return a backbone with random weights. Raises UserError for an unknown model or precision."""
    return load_backbone(name, None, device=device, dtype=torch_dtype(dtype), force_quick_gelu=True)


def torch_dtype(name: str) -> torch.dtype:
    """Return a precision by name. Raises UserError for one that the benchmark does not offer."""
    if name not in DTYPES:
        raise UserError(f'Expected a precision among {", ".join(DTYPES)}, got "{name}".')
    return DTYPES[name]


def _paper_lists() -> dict[str, list[str]]:
    lists = paper_class_names()
    return lists | {name: lists["imagenet"][:count] for name, count in IMAGENET.items()}


def _read(folder: Path) -> dict[str, list[str]]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise MissingFile(f"{folder} holds no *.json; put one list of class names per dataset there.")
    lists = {}
    for file in files:
        try:
            names = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"Expected {file} to be a JSON list of class names ({error}).") from None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"Expected {file} to be a list of class names, at least one.")
        lists[file.stem] = names
    return lists
