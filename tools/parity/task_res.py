"""TaskRes: the model and the steps of ``trainers/taskres.py`` of geekyutao/TaskRes, on its features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tools.parity import official, world
from tools.parity.world import Row, moved, relative


def compare(folder: Path, method: str) -> Iterator[Row]:
    official.stub_dassl(folder / "Dassl.pytorch")
    official.stub_clip()
    official.stub("trainers.imagenet_templates", IMAGENET_TEMPLATES=[], IMAGENET_TEMPLATES_SELECT=[])
    trainers = official.load("trainers.taskres", folder / "TaskRes/trainers/taskres.py")
    for classes, dim, views, shots, seed, size, epochs, rate, alpha in (
        (17, 72, 5, 7, 3, 24, 45, 4e-3, 0.8), (9, 160, 2, 16, 4, 256, 200, 2e-3, 0.5),
        (100, 512, 5, 16, 5, 256, 50, 2e-3, 0.5),
    ):  # fmt: skip
        data, backbone = world.made_up(classes, dim, views, seed), world.scale_alone(dim, world.ROUNDED_SCALE)
        given = {"epochs": epochs, "batch_size": size, "learning_rate": rate, "alpha": alpha}
        runs = world.runs_of(data, method, shots, (41, 42, 43), backbone, **given)
        for run, found in world.learned(backbone, runs):
            x, losses, logits = run_official(trainers, run, epochs, size, rate, alpha)
            yield Row("x", moved(found.weights["x"], x, 0 * x))
            yield Row("losses", relative(found.losses, losses))
            yield Row("logits", relative(world.logits_of(backbone, run, found), logits))


def run_official(
    trainers: Any, run: Any, epochs: int, size: int, rate: float, alpha: float
) -> tuple[Any, ...]:
    """Return the residuals, the losses and the logits of test images."""
    texts, space = torch.from_numpy(run.data.text_features), SimpleNamespace
    trainers._get_base_text_features = lambda *given: texts.clone()
    config = space(TRAINER=space(TaskRes=space(RESIDUAL_SCALE=alpha, ENHANCED_BASE="none", PREC="fp32")))
    trainer = trainers.TaskRes()
    trainer.device, trainer.cfg = "cpu", config
    with official.quiet():
        trainer.model = trainers.CustomCLIP(config, run.data.class_names, official.clip_of_features())
        learner = trainer.model.prompt_learner
        settings = official.optimizer_config(NAME="adam", LR=rate, MAX_EPOCH=epochs)
        official.register(trainer, "prompt_learner", learner, settings)
        losses = official.train(trainer, world.epochs_of(run, epochs, size))
    with torch.no_grad():
        logits = trainer.model.eval()(torch.from_numpy(run.data.split("test")[0]))
    return learner.text_feature_residuals.detach(), losses, logits
