"""ZS-LP and CLAP: ``trainers/adapters.py`` of jusiro/CLAP, with its multipliers and outer steps, on its features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from tools.parity import official, world
from tools.parity.world import Row, moved, relative

VARIANTS = {  # of a method: its settings, and the official name
    "zs_lp": (({}, "none"),),
    "clap": (({}, "l2"), ({"constraint": "adaptive"}, "l2 adaptative")),
}


def compare(folder: Path, method: str) -> Iterator[Row]:
    official.stub_dassl(folder / "Dassl.pytorch")
    official.stub_clip()
    official.stub("datasets.imagenet_templates", IMAGENET_TEMPLATES=[], IMAGENET_TEMPLATES_SELECT=[])
    trainers = official.load("adapters", folder / "CLAP/trainers/adapters.py")
    for classes, dim, views, shots, seed, size, epochs, rate in (
        (17, 72, 6, 7, 3, 48, 70, 0.05), (8, 130, 8, 16, 4, 256, 120, 0.1), (25, 60, 5, 1, 5, 256, 300, 0.1),
        (100, 512, 5, 1, 6, 256, 300, 0.1),
    ):  # fmt: skip
        data, backbone = world.made_up(classes, dim, views, seed), world.scale_alone(dim, world.ROUNDED_SCALE)
        for variant, constraint in VARIANTS[method]:
            given = {"epochs": epochs, "batch_size": size, "learning_rate": rate, **variant}
            runs = world.runs_of(data, method, shots, (51, 52, 53), backbone, **given)
            about = "adaptive, " if variant else ""
            for run, found in world.learned(backbone, runs):
                prototypes, losses, logits = run_official(trainers, run, epochs, size, rate, constraint)
                start = data.text_features
                yield Row(f"{about}prototypes", moved(found.weights["prototypes"], prototypes, start))
                yield Row(f"{about}losses", relative(found.losses, losses))
                yield Row(f"{about}logits", relative(world.logits_of(backbone, run, found), logits))


def run_official(
    trainers: Any, run: Any, epochs: int, size: int, rate: float, constraint: str
) -> tuple[Any, ...]:
    """Return the prototypes, the losses and the logits of test images."""
    texts, space = torch.from_numpy(run.data.text_features), SimpleNamespace
    trainers._get_base_text_features = lambda *given: (texts.clone(), texts[:, None])
    adapter = space(INIT="ZS", CONSTRAINT=constraint, ENHANCED_BASE="none", PREC="fp32")
    config = space(TRAINER=space(ADAPTER=adapter), TRAIN=space(PRINT_FREQ=5))
    trainer = trainers.ADAPTER()
    trainer.device, trainer.cfg, trainer.max_epoch = "cpu", config, epochs
    features, labels = run.data.train_views(run.subset)
    images, views, dim = features.shape
    with official.quiet():
        trainer.model = trainers.CustomCLIP(config, run.data.class_names, official.clip_of_features())
        learner = trainer.model.adapter
        settings = official.optimizer_config(LR=rate, MAX_EPOCH=epochs, WEIGHT_DECAY=0.0)
        official.register(trainer, "adapter", learner, settings)
        loader = type("Loader", (), {"__len__": lambda self: max(1, images // size), "batch_size": size})
        trainer.train_loader_x = loader()
        trainer.features_test, trainer.labels_test = world.tensors(run.data.split("test"), scaled=False)
        # As its extraction of features leaves them: all images at one view, then all at the next.
        trainer.features_train = torch.from_numpy(features.transpose(1, 0, 2).reshape(-1, dim).copy())
        trainer.labels_train = torch.from_numpy(np.tile(labels, views))
        with torch.no_grad():
            trainer.logits_zs = trainer.model(trainer.features_train)
        if constraint != "none":
            learner.device = trainer.device
            learner.init_lagrangian_multipliers(trainer.labels_train, trainer.logits_zs)
        losses, steps, forward_backward = [], [], trainer.forward_backward

        def step(*batch: torch.Tensor) -> dict[str, float]:
            summary = forward_backward(*batch)
            steps.append(summary["loss"])
            return summary

        trainer.forward_backward, trainer.get_current_lr = step, lambda: 0.0
        draw = np.random.default_rng(run.seed)
        for trainer.epoch in range(epochs):
            # The documented order, over images and then views. The official code sorts random numbers.
            mine = draw.permutation(images * views)
            ranks = np.empty(len(mine))
            ranks[mine % views * images + mine // views] = np.arange(len(mine))
            with patch.object(np.random, "rand", lambda count, ranks=ranks: ranks):
                trainer.run_epoch()
            if "adaptative" in constraint:
                learner.outer_step()
            losses.append(np.mean(steps))
            steps.clear()
        with torch.no_grad():
            logits = trainer.model.forward_features(trainer.features_test)
    return learner.prototypes.detach(), np.array(losses), logits
