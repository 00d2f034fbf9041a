"""Fine-tuning of CLIP's image encoder against frozen prompts (paper, Table 5). It needs images, not features."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcoop.errors import MissingFile, UserError
from fastcoop.methods.base import Done, Method, Outcome, RunContext
from fastcoop.methods.data import DEFAULT_VIEWS, Data
from fastcoop.methods.schedule import LearningRate, ScheduleSettings, epoch_order, epochs_of, schedule_of
from fastcoop.methods.scores import accuracy, score, unit
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import prompt_features

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastcoop.backbones import Backbone

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
TESTED_AT_ONCE = 64

log = logging.getLogger("fastcoop")


class FinetuneSettings(ScheduleSettings):
    """``learning_rate``: small, since every weight of the tower is trained. Compare ``val_accuracy`` of several."""

    learning_rate: LearningRate = 1e-5


class FinetuneImageEncoderMethod(Method[FinetuneSettings]):
    """Train the image tower on a few images, with the dataset's own prompts as the fixed classifier.

    The paper gives no settings. Chosen here: CoOp's SGD, batches and epochs, a new random crop of each image in each
    epoch (the test-time crop if the grid has ``views: 0``), and batch normalization with frozen statistics. The tuned
    tower is not kept, so a run can be tested on targets only while it runs.
    """

    name = "finetune_image_encoder"
    Settings = FinetuneSettings

    def label(self, settings: FinetuneSettings) -> str:
        return f"Fine-tuned image encoder (lr {settings.learning_rate:g})"

    def check(self, run: RunSpec[FinetuneSettings]) -> None:
        for data in (run.data, *run.targets):
            _require_images(data)

    def views(self, data: Data) -> int:
        return DEFAULT_VIEWS if data.views else 0  # each epoch has a view of its own

    def key_settings(self, run: RunSpec[FinetuneSettings], backbone: Backbone) -> dict[str, Any]:
        resolved = {"epochs": epochs_of(run), "views": run.data.views > 0}
        return run.settings.model_dump(mode="json") | resolved | {"prompt": run.data.dataset.template}

    def prompts(self, settings: FinetuneSettings, data: Data) -> tuple[str, ...]:
        return (data.dataset.template,)

    def columns(self, run: RunSpec[FinetuneSettings], backbone: Backbone) -> dict[str, Any]:
        return {"epochs": epochs_of(run), "schedule": schedule_of(run.settings)}

    def run(
        self,
        backbone: Backbone,
        runs: Sequence[RunSpec[FinetuneSettings]],
        done: Done,
        context: RunContext,
    ) -> None:
        from fastcoop.backbones.precision import fresh_state

        if not runs:
            return
        trained = sum(len(run.subset.train) * epochs_of(run) for run in runs if run.subset)
        tested = sum(len(data.test[1]) for run in runs for data in run.tests)
        log.warning(
            "%s works on images, not on cached features: %d runs take %d images forward and backward through the "
            "image tower and %d forward, one run after the other; CoOp's training takes none.",
            *(self.name, len(runs), trained, tested),
        )
        for index, run in enumerate(runs):
            start = time.perf_counter()
            with fresh_state():
                tower, losses = _train(backbone, run, context)
            scores = {}
            for data in run.tests:
                assert data.store is not None
                rows = data.store.indices("test")
                scores[data.name] = score(_logits(backbone, tower, data, "test", rows), data.test[1])
            extra = {}
            if run.subset is not None and len(run.subset.val):
                rows = _readable(run.data, "val", run.subset.val)
                logits = _logits(backbone, tower, run.data, "val", rows)
                on_validation = float(accuracy(logits, run.data.dataset.splits["val"].labels[rows]))
                if np.isfinite(on_validation):
                    extra["val_accuracy"] = on_validation
            status = "done" if np.isfinite(losses).all() else "diverged"
            seconds = time.perf_counter() - start
            done(index, Outcome(scores, losses, status=status, seconds=seconds, extra=extra))


def _require_images(data: Data) -> None:
    meta = getattr(data.store, "meta", None)
    path = data.dataset.root / data.dataset.splits["test"].paths[0]
    if (meta is not None and meta.recipe == "imported") or not path.is_file():
        raise MissingFile(
            f"finetune_image_encoder needs the images of {data.name}, but {path} is not there; "
            "features alone are not enough for this method. Leave it out, or put the images back."
        )


def _readable(data: Data, split: str, rows: np.ndarray) -> np.ndarray:
    """Return those of the split's images that caching did not skip."""
    assert data.store is not None
    return rows[np.isin(rows, data.store.indices(split))]


def _train(
    backbone: Backbone, run: RunSpec[FinetuneSettings], context: RunContext
) -> tuple[nn.Module, np.ndarray]:
    """Return a tuned copy of the image tower, and its mean loss per epoch, float32 (epochs,)."""
    import torch

    from fastcoop.engine.runs import learning_rates

    assert run.subset is not None
    settings, rows = run.settings, _readable(run.data, "train", run.subset.train)
    labels = torch.from_numpy(run.data.dataset.splits["train"].labels[rows]).to(backbone.device)
    texts = torch.from_numpy(_texts(backbone, run.data)).to(backbone.device)
    tower: nn.Module = deepcopy(backbone.model.visual).to(torch.float32).eval().requires_grad_(True)
    optimizer = torch.optim.SGD(
        tower.parameters(), lr=settings.learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    epochs = epochs_of(run)
    rates = np.minimum(learning_rates(epochs, settings.learning_rate), settings.learning_rate)
    rng = np.random.default_rng(run.seed)
    losses = np.zeros(epochs, np.float32)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = float(rates[epoch])
        steps = epoch_order(len(rows), settings.batch_size, rng)
        view = 1 + epoch if run.data.views else 0
        batches = _batches(backbone, run.data, "train", [rows[step] for step in steps], view, run.seed)
        for step, images in zip(steps, batches, strict=True):
            features = torch.nn.functional.normalize(tower(images), dim=-1)
            loss = torch.nn.functional.cross_entropy(
                backbone.logit_scale * features @ texts.T, labels[torch.from_numpy(step)]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[epoch] += loss.item() / len(steps)
        context.on_progress(1 / epochs)
    return tower.requires_grad_(False), losses


def _logits(backbone: Backbone, tower: nn.Module, data: Data, split: str, rows: np.ndarray) -> np.ndarray:
    """Return logits float32 (rows, classes) of a split's images at the test-time crop."""
    import torch

    cuts = [rows[at : at + TESTED_AT_ONCE] for at in range(0, len(rows), TESTED_AT_ONCE)]
    with torch.no_grad():
        features = [tower(images).cpu().numpy() for images in _batches(backbone, data, split, cuts)]
    return backbone.logit_scale * unit(np.concatenate(features)) @ _texts(backbone, data).T


def _batches(
    backbone: Backbone, data: Data, split: str, batches: Sequence[np.ndarray], view: int = 0, seed: int = 0
) -> Iterator[Tensor]:
    """float32 (batch, 3, size, size) of each batch of the split's images, at one view of ``features.images``."""
    from fastcoop.features.images import UnreadableImage, crops, normalize, read_rgb

    meta = getattr(data.store, "meta", None)
    recipe = meta.recipe if meta is not None else "current"

    def crop(row: int) -> np.ndarray:
        name = data.dataset.splits[split].paths[row]
        try:
            image = read_rgb(data.dataset.root / name)
        except UnreadableImage as error:
            raise UserError(
                f"{data.dataset.root / name} could not be read ({error}), but could when its features were "
                "cached; repair it."
            ) from None
        return crops(image, name, [view], backbone.preprocess, recipe, seed)

    with ThreadPoolExecutor() as pool:
        for batch in batches:
            pixels = np.concatenate(list(pool.map(crop, batch.tolist())))
            yield normalize(pixels, backbone.preprocess, backbone.device)
    _refuse_changes(data, split, batches)


def _refuse_changes(data: Data, split: str, batches: Sequence[np.ndarray]) -> None:
    """Raise UserError if image files that were read are no longer those of the run's key."""
    from fastcoop.features.image_files import find_changes

    assert data.store is not None
    rows = np.unique(np.concatenate(batches))
    paths = [data.dataset.root / data.dataset.splits[split].paths[row] for row in rows]
    recorded = data.store.files(split)[np.searchsorted(data.store.indices(split), rows)]
    changed, _ = find_changes(paths, recorded, f"Reading image files of {data.name}")
    if changed.any():
        raise UserError(
            f"{changed.sum()} image file(s) of {data.name} changed after their features were computed; run the same "
            "command again."
        )


def _texts(backbone: Backbone, data: Data) -> np.ndarray:
    return prompt_features(backbone, data.class_names, data.dataset.template)
