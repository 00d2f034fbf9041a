"""Dataclasses that hold arrays are equal to themselves alone; all others compare by value."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastcoop
import fastcoop as fc
from fastcoop.datasets import FewShot, Split
from fastcoop.engine.runs import Trained
from fastcoop.grids import read_grid
from fastcoop.methods.base import Outcome
from fastcoop.methods.scores import Scores, score
from fastcoop.prompts.vectors import Nearest
from fastcoop.results.predictions import Predictions

ARRAYS = {"ndarray", "Tensor", "DataFrame"}


def classes() -> dict[str, list[type]]:
    """Every dataclass of the package, by name."""
    found: dict[str, list[type]] = {}
    for module in pkgutil.walk_packages(fastcoop.__path__, "fastcoop."):
        if not module.name.endswith(("__main__", ".pretrain")):
            for one in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(one) and dataclasses.is_dataclass(one) and one.__module__ == module.name:
                    found.setdefault(one.__name__, []).append(one)
    return found


def test_no_dataclass_compares_arrays() -> None:
    """Nor what holds such, however deep: NumPy's answer to == is an array, which is neither true nor false."""
    known = classes()
    by_identity = {
        name for name, several in known.items() if not any(one.__dataclass_params__.eq for one in several)
    }
    for several in known.values():
        for one in several:
            fields = [
                f for f in dataclasses.fields(one) if f.compare and not str(f.type).startswith("Callable")
            ]
            held = {word for field in fields for word in re.findall(r"\w+", str(field.type))} & (
                ARRAYS | by_identity
            )
            assert not (one.__dataclass_params__.eq and held), (
                f"{one.__module__}.{one.__name__} compares {held}"
            )


def twins() -> dict[str, list[object]]:
    """Two objects of each kind, made alike."""
    labels, logits = np.array([0, 1]), np.eye(2)
    layout = fc.PromptLayout(2)

    def run() -> fc.Run:
        return fc.Run(["a", "b"], layout, torch.zeros(2, 4), torch.ones(2, 1, 4), torch.tensor(labels), 1, 0)

    def dataset() -> fc.Dataset:
        split = Split(("a", "b"), labels.copy())
        return fc.Dataset("d", Path(), ("a", "b"), "a {}.", {"test": split}, "0" * 64, "d", Path())

    makers = {
        "Split": lambda: Split(("a", "b"), labels.copy()),
        "FewShot": lambda: FewShot(labels.copy(), labels.copy()),
        "Dataset": dataset,
        "Scores": lambda: score(logits.copy(), labels),
        "Outcome": lambda: Outcome({"d": score(logits.copy(), labels)}, contexts=logits.copy()),
        "Run": run,
        "Trained": lambda: Trained(torch.zeros(2, 4), labels.astype(float)),
        "Predictions": lambda: Predictions(("a", "b"), labels.copy(), labels.copy(), labels.astype(float)),
        "Nearest": lambda: Nearest(torch.zeros(1, 1), torch.zeros(1, 1), [["a"]]),
        "Backbone": lambda: fc.backbone_from_spec("demo-resnet"),
    }
    return {name: [make(), make()] for name, make in makers.items()}


def test_arrays_do_not_stand_in_the_way_of_comparing_and_hashing() -> None:
    for name, (one, other) in twins().items():
        assert one == one, name
        assert one != other, name
        assert len({one, other, one}) == 2, name
        assert [one, other].index(other) == 1, name


def test_values_compare_by_value() -> None:
    assert fc.PromptLayout(4, "mid") == fc.PromptLayout(4, "mid") != fc.PromptLayout(4, "end")
    assert len({fc.PromptLayout(4), fc.PromptLayout(4)}) == 1
    demo = fc.backbone_from_spec("demo-resnet")
    assert demo.preprocess == dataclasses.replace(demo.preprocess)
    assert hash(demo.preprocess) == hash(dataclasses.replace(demo.preprocess))
    grid = {"backbones": "b", "datasets": "d", "methods": "coop"}
    assert read_grid(grid) == read_grid(dict(grid)) != read_grid(grid | {"shots": 1})
    with pytest.raises(TypeError, match="unhashable"):
        hash(read_grid(grid | {"targets": {"d": "e"}}))
    assert isinstance(score(np.eye(2), np.array([0, 1])), Scores)
