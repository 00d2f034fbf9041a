"""The cross-modal linear probe: ``train.py`` of linzhiqiu/cross_modal_adaptation, its head, optimizer and WiSE-FT."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tools.parity import world
from tools.parity.official import load, quiet, stub
from tools.parity.world import Row, moved, relative, same

DIM = 512  # as it is written
LOG_SCALE = 4.60517


def compare(folder: Path, method: str) -> Iterator[Row]:
    official = load_official(folder / "cross_modal_adaptation")
    backbone = world.scale_alone(DIM, float(torch.FloatTensor([LOG_SCALE]).exp()))
    for classes, shots, seed, size, steps, rate, decay in (
        (17, 5, 3, 16, 1301, 1e-3, 0.01), (40, 2, 4, 32, 700, 1e-4, 0.0), (12, 16, 5, 8, 2200, 1e-3, 1e-4)
    ):  # fmt: skip
        data = world.made_up(classes, DIM, 1, seed)
        given = {"learning_rate": rate, "weight_decay": decay, "batch_size": size, "iterations": steps}
        plain, mixed = (
            world.learned(backbone, world.runs_of(data, method, shots, (71, 72), backbone, **given, **more))
            for more in ({}, {"wise_ft": 0.5})
        )
        for (run, found), (mixed_run, mixed_found) in zip(plain, mixed, strict=True):
            W, best, logits, start = run_official(official, run, rate, decay, size, steps)
            yield same("step", [found.extra["iteration"]], [best])
            if best:
                yield Row("W", moved(found.weights["W"], W, start))
            ours = world.logits_of(backbone, run, found), world.logits_of(backbone, mixed_run, mixed_found)
            yield Row("logits", relative(ours[0], logits[0]))
            yield Row("logits of WiSE-FT", relative(ours[1], logits[1]))


def load_official(root: Path) -> Any:
    """Load the training script, without its readers of files."""
    names = (
        "backbone_name few_shot_setup_name view_name image_features_path text_features_path image_encoder_dir"
    )
    names += " text_encoder_dir test_features_path"
    stub("features", **{f"get_{name}": None for name in names.split()})
    stub("engine.config", parser=None)
    stub("engine.tools.utils", makedirs=None, set_random_seed=None)
    stub("engine.datasets.utils", TensorDataset=None, TextTensorDataset=None)
    for name in ("model.head", "model.logit", "optimizer.default", "optimizer.optim", "optimizer.scheduler"):
        load(f"engine.{name}", root / "engine" / f"{name.replace('.', '/')}.py")
    official, threads = load("train", root / "train.py"), torch.get_num_threads()
    torch.set_num_threads(min(threads, 1))
    official.make_classifier_head.__globals__["get_zero_shot_weights"].__defaults__ = ("cpu",)
    return official


class Texts(torch.utils.data.Dataset):
    """Class texts: features, labels and where their end token is, which nothing reads."""

    def __init__(self, features: torch.Tensor):
        self.input_tensor, self.label_tensor = features, torch.arange(len(features))

    def __len__(self) -> int:
        return len(self.input_tensor)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.input_tensor[place], self.label_tensor[place], torch.tensor(0)


class Drawn:
    """A loader in the documented order: each pass a random one, without its short batch."""

    def __init__(self, seed: int, place: int, size: int, *tensors: torch.Tensor):
        self.rng, self.size, self.tensors = np.random.default_rng((seed, place)), size, tensors

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        count = len(self.tensors[0])
        order = self.rng.permutation(count)[: count // self.size * self.size]
        for rows in order.reshape(-1, self.size):
            yield tuple(one[torch.from_numpy(rows)] for one in self.tensors)


class Same(torch.nn.Module):
    """An encoder of features that are encoded."""

    def forward(self, x: torch.Tensor, eot: Any = None) -> torch.Tensor:
        return x


def run_official(
    official: Any, run: Any, rate: float, decay: float, size: int, steps: int
) -> tuple[Any, ...]:
    """Return W at the best step, that step, the logits of test images, plain and by WiSE-FT, and the start of W."""
    raw, (features, labels) = torch.from_numpy(run.data.text_features), run.data.train(run.subset, "flip")
    images = torch.from_numpy(features.reshape(-1, features.shape[-1]))
    labels, texts = torch.from_numpy(np.repeat(labels, features.shape[1])), Texts(raw)
    settings, of_texts = SimpleNamespace(**official.HYPER_DICT["linear"]), int(size * 0.5)
    val = [world.tensors(world.validation_of(run, "few_val", "flip"), scaled=False)]
    with quiet():
        head, classes, _ = official.make_classifier_head("linear", "ViT-B/16", "zeroshot", texts, Same())
        logit_head = official.LogitHead(head, logit_scale=LOG_SCALE).train()
        optimizer = official.build_optimizer([{"params": logit_head.parameters()}], "adamw", rate, decay)
        scheduler = official.build_lr_scheduler(
            optimizer, settings.lr_scheduler, settings.warmup_iter, steps,
            warmup_type=settings.warmup_type, warmup_lr=settings.warmup_min_lr,
        )  # fmt: skip
        result = official.train(
            logit_head, Same(), Same(), Drawn(run.seed, 0, size - of_texts, images, labels), val,
            Drawn(run.seed, 1, of_texts, raw, torch.arange(len(raw)), torch.zeros(len(raw))), optimizer, scheduler,
            torch.nn.CrossEntropyLoss(), steps, device="cpu",
        )  # fmt: skip
        zero_shot = official.get_zero_shot_weights(texts, classes, DIM, Same())
        heads = official.get_eval_heads(
            copy.deepcopy(logit_head.head), zero_shot, logit=LOG_SCALE, ratio_list=[0.5]
        )
        test = torch.from_numpy(run.data.split("test", "flip")[0])
        with torch.no_grad():
            logits = [heads[name](test) for name in ("head", "head_wiseft_0.5")]
    return result["logit_head"]["head.weight"], result["iter"], logits, zero_shot
