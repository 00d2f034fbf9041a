"""Fixtures of tests that sweep: a small world on disk, and grids over it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastcoop.sweeps import Summary, sweep
from tests.small_world import write_backbone, write_dataset

COOP = {"context_length": 2, "class_position": ["end", "mid"], "class_specific": [False, True], "epochs": 3}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_dataset(root / "data" / "colours")
    write_dataset(root / "data" / "shifted", ("grey", "green"), train=0, val=0, seed=1)
    write_dataset(root / "data" / "other", ("purple", "green"), train=0, val=0)
    write_backbone(root / "tiny")
    return root


@pytest.fixture
def grid(world: Path) -> dict[str, Any]:
    """Two zero-shot runs, four probes and sixteen of CoOp."""
    return {
        "backbones": str(world / "tiny"),
        "datasets": "colours",
        "shots": [1, 2],
        "seeds": [1, 2],
        "views": 1,
        "methods": {"coop": COOP, "linear_probe": None, "zero_shot": {"prompts": [None, "some {}."]}},
    }


@pytest.fixture
def run(world: Path) -> Callable[..., Summary]:
    """``sweep`` with the world's folders; features are cached once for all tests."""
    return partial(sweep, data_root=world / "data", cache=world / "cache", jobs=1)
