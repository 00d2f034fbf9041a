"""Fine-tuning of CLIP's image encoder against frozen prompts (paper, Table 5). It needs images, not features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import numpy as np

from fastcoop import engine, features
from fastcoop.errors import MissingFile, UserError
from fastcoop.methods.base import Outcome, report_share
from fastcoop.methods.data import DEFAULT_VIEWS, Data
from fastcoop.methods.late import Backbone, F, Tensor, fresh_state, torch
from fastcoop.methods.schedule import (
    LearningRate,
    ScheduledMethod,
    ScheduleSettings,
    epoch_order,
    epochs_of,
    sgd,
)
from fastcoop.methods.scores import accuracy, score, unit
from fastcoop.methods.spec import RunSpec
from fastcoop.methods.text import class_texts
from fastcoop.progress import counted

TESTED_AT_ONCE = 64


class FinetuneSettings(ScheduleSettings):
    """Settings of fine-tuning.

    Attributes:
        learning_rate: Small, since every weight of the tower is trained. Compare ``val_accuracy`` of several.
    """

    learning_rate: LearningRate = 1e-5


Run = RunSpec[FinetuneSettings]


class FinetuneImageEncoderMethod(ScheduledMethod[FinetuneSettings]):
    """Train the image tower on a few images, with the dataset's own prompts as the fixed classifier.

    The paper gives no settings. Chosen here: CoOp's SGD, batches and epochs, a new random crop of each image in each
    epoch (the test-time crop if the grid has ``views: 0``), and batch normalization with frozen statistics. The tuned
    tower is not stored, so a run can be tested on targets only while it runs.
    """

    name = "finetune_image_encoder"
    Settings = FinetuneSettings
    reads_prompt = True

    def label(self, settings: FinetuneSettings) -> str:
        return f"Fine-tuned image encoder (lr {settings.learning_rate:g})"

    def check(self, run: Run) -> None:
        for data in (run.data, *run.targets):
            path = data.dataset.root / data.dataset.splits["test"].paths[0]
            if (data.store and data.store.meta.recipe == "imported") or not path.is_file():
                raise MissingFile(
                    f"finetune_image_encoder needs the images of {data.name}, but {path} is not there; "
                    "features alone are not enough for this method. Leave it out, or put the images back."
                )

    def views(self, data: Data) -> int:
        return DEFAULT_VIEWS if data.views else 0  # each epoch has a view of its own

    def key_settings(self, run: Run, backbone: Backbone) -> dict[str, Any]:
        return super().key_settings(run, backbone) | {"views": run.data.views > 0}

    def notes(self, runs: Sequence[Run]) -> Iterator[str]:
        trained = sum(len(run.subset.train) * epochs_of(run) for run in runs)
        tested = sum(len(data.dataset.splits["test"]) for run in runs for data in run.tests)
        yield (
            f"{self.name} reads images, not cached features: {counted(len(runs), 'run')}, one after the other, with "
            f"{trained:,} images forward and backward through the image tower and {tested:,} forward. CoOp's training "
            "reads no image."
        )

    def learn(self, backbone: Backbone, run: Run) -> Outcome:
        with fresh_state():
            tower, losses = _train(backbone, run)

        scores, extra = {}, {}
        for data in run.tests:
            rows = data.readable("test", np.arange(len(data.dataset.splits["test"])))
            scores[data.name] = score(_logits(backbone, tower, data, "test", rows), data.test[1])
        if len(rows := run.data.readable("val", run.subset.val)):
            logits = _logits(backbone, tower, run.data, "val", rows)
            on_validation = float(accuracy(logits, run.data.dataset.splits["val"].labels[rows]))
            if np.isfinite(on_validation):
                extra["val_accuracy"] = on_validation
        return Outcome.learned(losses, scores=scores, extra=extra)


def _train(backbone: Backbone, run: Run) -> tuple[torch.nn.Module, np.ndarray]:
    """Return a tuned copy of the image tower, and its mean loss per epoch, float32 (epochs,)."""
    data, settings, rows = run.data, run.settings, run.data.readable("train", run.subset.train)
    labels = torch.from_numpy(data.dataset.splits["train"].labels[rows]).to(backbone.device)
    texts = torch.from_numpy(class_texts(backbone, data)).to(backbone.device)
    tower: torch.nn.Module = deepcopy(backbone.model.visual).to(torch.float32).eval().requires_grad_(True)
    tower.output_tokens = False  # type: ignore[assignment]  # CoCa's puts out its tokens, too
    optimizer = sgd(tower.parameters())
    epochs = epochs_of(run)
    rates = np.minimum(engine.schedule.learning_rates(epochs, settings.learning_rate), settings.learning_rate)
    rng = np.random.default_rng(run.seed)
    losses = np.zeros(epochs, np.float32)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = float(rates[epoch])
        steps = epoch_order(len(rows), settings.batch_size, rng)
        view = 1 + epoch if data.views else 0
        batches = _batches(backbone, data, "train", [rows[step] for step in steps], view, run.seed)
        for step, images in zip(steps, batches, strict=True):
            logits = backbone.logit_scale * F.normalize(tower(images), dim=-1) @ texts.T
            loss = F.cross_entropy(logits, labels[torch.from_numpy(step)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[epoch] += loss.item() / len(steps)
            report_share(1 / (epochs * len(steps)))
    return tower.requires_grad_(False), losses


def _logits(
    backbone: Backbone, tower: torch.nn.Module, data: Data, split: str, rows: np.ndarray
) -> np.ndarray:
    """Return logits float32 (rows, classes) of a split's images at the test-time crop."""
    cuts = [rows[at : at + TESTED_AT_ONCE] for at in range(0, len(rows), TESTED_AT_ONCE)]
    with torch.no_grad():
        found = [tower(images).cpu().numpy() for images in _batches(backbone, data, split, cuts)]
    return backbone.logit_scale * unit(np.concatenate(found)) @ class_texts(backbone, data).T


def _batches(
    backbone: Backbone, data: Data, split: str, batches: Sequence[np.ndarray], view: int = 0, seed: int = 0
) -> Iterator[Tensor]:
    """Yield float32 (batch, 3, size, size) of each batch of a split's images, at one view of ``features.images``."""
    assert data.store is not None
    recorded = dict(zip(data.store.indices(split).tolist(), data.store.files(split), strict=True))
    encoding = features.plan.Encoding(backbone, data.dataset, data.store.meta.recipe, seed)
    chunk = features.plan.Chunk(split, (), range(view, view + 1))

    def crop(row: int) -> np.ndarray:
        image = features.encode.decode(encoding, chunk, row)
        path = data.dataset.root / data.dataset.splits[split].paths[row]
        if image.crops is None:
            raise UserError(
                f"{path} could not be read ({image.problem}), but could when its features were cached; repair it."
            )
        known = recorded[row]["size"] != features.image_files.UNKNOWN
        if known and (recorded[row]["sha256"] != image.file["sha256"]).any():
            raise UserError(f"{path} changed after its features were computed; run the same command again.")
        return image.crops

    with ThreadPoolExecutor() as pool:
        for batch in batches:
            pixels = np.concatenate(list(pool.map(crop, batch.tolist())))
            yield features.images.normalize(pixels, backbone.preprocess, backbone.device)
