"""A small study to export from, and checkpoints of exactly the structure that the official code saves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.datasets import Dataset, load_dataset
from fastcoop.exchange.coop_files import frozen_embeddings
from fastcoop.results import load_results
from fastcoop.sweeps import sweep
from tests.small_world import write_backbone, write_dataset

COOP = {
    "context_length": 3,
    "class_position": ["end", "mid", "front"],
    "class_specific": [False, True],
    "epochs": 2,
}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data/colours``, the backbone ``tiny``, and the results of a sweep over both in ``results``."""
    root = tmp_path_factory.mktemp("exchange")
    write_dataset(root / "data" / "colours")
    write_backbone(root / "tiny")
    grid = {
        "backbones": str(root / "tiny"), "datasets": "colours", "shots": 2, "seeds": 1, "views": 1,
        "methods": {"zero_shot": None, "coop": COOP},
    }  # fmt: skip
    sweep(grid, data_root=root / "data", cache=root / "cache", results=root / "results", jobs=1)
    return root


@pytest.fixture(scope="session")
def backbone(world: Path) -> Backbone:
    return backbone_from_spec(str(world / "tiny"))


@pytest.fixture(scope="session")
def dataset(world: Path) -> Dataset:
    return load_dataset("colours", world / "data")


@pytest.fixture(scope="session")
def key(world: Path) -> Callable[..., str]:
    """The key of the study's run of a layout."""

    def find(class_position: str = "end", class_specific: bool = False) -> str:
        frame = load_results(world / "results")
        frame = frame[(frame.class_position == class_position) & (frame.class_specific == class_specific)]
        (found,) = frame.key
        return str(found)

    return find


@pytest.fixture
def save_official(
    monkeypatch: pytest.MonkeyPatch, backbone: Backbone, dataset: Dataset
) -> Callable[..., None]:
    """Write a checkpoint as the official code does after training: the state dict of its prompt learner with buffers
    that are slices of longer tensors, SGD's state with momentum, and a warm-up scheduler's whole ``__dict__``, in
    which lies a cosine scheduler object that holds the optimizer."""

    def save(
        path: Path, ctx: torch.Tensor, names: tuple[str, ...] = dataset.class_names, **changes: object
    ) -> None:
        module = ModuleType("dassl.optim.lr_scheduler")

        class ConstantWarmupScheduler(torch.optim.lr_scheduler.LRScheduler):
            def __init__(self, optimizer, successor, warmup_epoch, cons_lr):
                self.successor, self.warmup_epoch, self.cons_lr = successor, warmup_epoch, cons_lr
                super().__init__(optimizer)

            def get_lr(self):
                return [self.cons_lr for _ in self.base_lrs]

        class CosineAnnealingLR(torch.optim.lr_scheduler.CosineAnnealingLR):
            """Named as if it came with the official packages, which a reader does not have."""

        for made in (ConstantWarmupScheduler, CosineAnnealingLR):
            made.__module__, made.__qualname__ = module.__name__, made.__name__
            setattr(module, made.__name__, made)

        learner = torch.nn.Module()
        learner.ctx = torch.nn.Parameter(ctx.clone())
        prefix, suffix = frozen_embeddings(backbone, names, ctx.shape[-2])
        whole = torch.cat([prefix, torch.zeros(len(names), ctx.shape[-2], 16), suffix], 1).to(ctx.dtype)
        learner.register_buffer("token_prefix", whole[:, :1])
        learner.register_buffer("token_suffix", whole[:, 1 + ctx.shape[-2] :])
        optimizer = torch.optim.SGD(learner.parameters(), 0.002, momentum=0.9, weight_decay=5e-4)
        scheduler = ConstantWarmupScheduler(optimizer, CosineAnnealingLR(optimizer, 50.0), 1, 1e-5)
        learner.ctx.grad = torch.zeros_like(learner.ctx)
        optimizer.step()
        with torch.no_grad():
            learner.ctx.copy_(ctx)
        content = {
            "state_dict": learner.state_dict(), "epoch": 50,
            "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "val_result": None,
        } | changes  # fmt: skip
        content["state_dict"] = {**content["state_dict"]} if changes else content["state_dict"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "dassl", ModuleType("dassl"))
            patch.setitem(sys.modules, "dassl.optim", ModuleType("dassl.optim"))
            patch.setitem(sys.modules, module.__name__, module)
            torch.save(content, path)

    return save
