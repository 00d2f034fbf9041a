"""GDA: ``run`` of ``main_few_shots.py`` and ``main_base2new.py`` of mrflogs/ICLR24, on its features.

With fewer samples than dimensions, the pseudoinverse of base_to_new in float32 depends on the order of the images by
more than the bar, which is then what the official code differs from itself by, with its images in the reverse order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastcoop.methods import Data
from tools.parity import world
from tools.parity.official import clip_of_features, load, quiet, reads_arrays_as_numbers, stub, stub_clip
from tools.parity.world import CLOSED_FORM, Row, relative, same

DIM = 512  # of base_to_new, as it is written


def compare(folder: Path, method: str) -> Iterator[Row]:
    folder = folder / "ICLR24"
    stub("datasets", build_dataset=None)
    stub("datasets.utils", build_data_loader=None)
    stub("datasets.imagenet", ImageNet=None)
    stub_clip()
    reads_arrays_as_numbers(load("utils", folder / "utils.py"))
    few, base_to_new = (load(name, folder / f"{name}.py") for name in ("main_few_shots", "main_base2new"))
    for classes, dim, views, shots, seed in (
        (13, 96, 7, 3, 5), (31, 40, 9, 8, 6), (6, 200, 3, 2, 7), (40, 256, 4, 16, 8)
    ):  # fmt: skip
        data, backbone = world.made_up(classes, dim, views, seed), world.scale_alone(dim)
        runs = world.runs_of(data, method, shots, (21, 22, 23), backbone, selection="full_val")
        for run, found in world.learned(backbone, runs):
            alpha, logits = run_official(few, run)
            yield same("alpha", [float(found.weights["alpha"])], [alpha])
            yield Row("logits", relative(world.logits_of(backbone, run, found), logits[-1]), CLOSED_FORM)
    for classes, views, shots, seed in ((24, 10, 8, 3), (40, 4, 16, 4), (16, 4, 5, 5), (37, 1, 16, 6)):
        data, backbone = world.made_up(classes, DIM, views, seed), world.scale_alone(DIM)
        new = world.made_up([f"new {number}" for number in range(11)], DIM, views, seed + 50, name="new")
        given = {"selection": "full_val", "variant": "base_to_new"}
        runs = world.runs_of(data, method, shots, (21,), backbone, **given)
        for run, found in world.learned(backbone, runs):
            alpha, logits = run_official(base_to_new, run, new)
            yield same("base_to_new, alpha", [float(found.weights["alpha"])], [alpha])
            difference = relative(world.logits_of(backbone, run, found), logits[-2])
            itself = relative(run_official(base_to_new, run, new, reverse=True)[1][-2], logits[-2])
            which = "" if itself < CLOSED_FORM else ", where the official ones depend on the order of images"
            yield Row(f"base_to_new, logits of base classes{which}", difference, max(CLOSED_FORM, itself))
            difference = relative(world.logits_of(backbone, run, found, new), logits[-1])
            yield Row("base_to_new, logits of new classes", difference, CLOSED_FORM)


def run_official(
    module: ModuleType, run: Any, new: Data | None = None, reverse: bool = False
) -> tuple[float, list[torch.Tensor]]:
    """Return alpha, and all logits that the official function measures the accuracy of.

    With ``reverse``, its images come in the reverse order.
    """
    measure, seen, loader = module.cls_acc, [], world.ViewLoader(run)
    if reverse:
        loader.features, loader.labels = loader.features[::-1], loader.labels[::-1].copy()

    def accuracy(logits: torch.Tensor, *given: Any) -> float:
        seen.append(logits.detach().clone())
        return measure(logits, *given)

    for name in ("val", "test"):
        features, labels = world.tensors(run.data.split(name, "tip"))
        vars(module).update({f"{name}_features": features, f"{name}_labels": labels})
    config = {"augment_epoch": max(1, run.data.views), "seed": 1}
    more = ()
    if new is not None:
        module.test_features_new, module.test_labels_new = world.tensors(new.split("test", "tip"))
        more = (world.unit_texts(new),)
    module.cls_acc = accuracy
    try:
        with quiet() as printed:
            module.run(config, loader, world.unit_texts(run.data), *more, clip_of_features())
    finally:
        module.cls_acc = measure
    return float(printed.getvalue().partition("best_val_alpha:")[2].split()[0]), seen
