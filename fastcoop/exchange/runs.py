"""CoOp runs of a results folder with their contexts, and their export for other programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.backbones.precision import fresh_state
from fastcoop.errors import UserError, nearest, writing
from fastcoop.exchange.classifier import load_recorded_backbone, make_classifier
from fastcoop.exchange.coop_files import coop_path, frozen_embeddings, write_coop_file
from fastcoop.features.images import RECIPES
from fastcoop.methods import METHODS
from fastcoop.methods.coop import layout_of
from fastcoop.prompts import PromptLayout
from fastcoop.results import load_contexts, load_predictions
from fastcoop.results.parameters import load_parameters, write_arrays
from fastcoop.results.read import find_key, load_run
from fastcoop.sweeps.records import read_settings

FORMATS = ("coop", "safetensors", "classifier")
HEADER = {"format": "fastcoop contexts", "format_version": "1"}
IN_RESULTS = ("key", "backbone", "backbone_digest", "dataset", "shots", "seed", "epochs")


@dataclass(frozen=True, eq=False)
class LearnedRun:
    """A CoOp run.

    Attributes:
        key, backbone, backbone_digest, dataset, shots, seed, epochs, settings: as in the results.
        contexts: float32 (M, width), or (classes, M, width) if class-specific.
        class_names: in label order.
        learned_dtype: dtype of the contexts in training, "float32", or "float16" of some imported runs.
        recipe: of the image transforms behind the features, "current" or "official-2021".
    """

    key: str
    backbone: str
    backbone_digest: str
    dataset: str
    shots: int | str
    seed: int
    epochs: int
    settings: Any
    contexts: np.ndarray
    class_names: tuple[str, ...]
    learned_dtype: str
    recipe: str = "current"

    def load_backbone(self, spec: str | None = None) -> Backbone:
        """Load the backbone that the contexts were learned over.

        Args:
            spec: a tag, a folder or a weights file; None: the backbone of the recorded name.

        Raises:
            UserError: there is no such backbone, or its weights differ.
        """
        owner = f"the run {self.key[:12]} learned over"
        return load_recorded_backbone(spec, self.backbone, self.backbone_digest, owner)

    def layout(self, backbone: Backbone) -> PromptLayout:
        """Return the prompt layout."""
        layout: PromptLayout = layout_of(self.settings, backbone)
        return layout

    def metadata(self) -> dict[str, str]:
        """Return everything except the contexts, as text for the header of a safetensors file."""
        facts = {name: str(getattr(self, name)) for name in (*IN_RESULTS, "learned_dtype", "recipe")}
        names, settings = json.dumps(list(self.class_names)), self.settings.model_dump_json()
        return HEADER | facts | {"class_names": names, "settings": settings}

    def write_contexts(self, path: Path) -> None:
        """Write the contexts as one tensor called "contexts", with `metadata` in the header.

        Raises:
            UserError: the file cannot be written.
        """
        with writing(path):
            write_arrays(path, {"contexts": self.contexts.astype(np.float32)}, self.metadata())


def find_run(results: str | Path, key: str) -> LearnedRun:
    """Return the CoOp run whose key begins with ``key``, with its contexts.

    Args:
        results: a results folder.
        key: a run's key, or its beginning.

    Raises:
        UserError: no results, no such run or more than one, or a run that learned no contexts.
    """
    folder = Path(results)
    run = load_run(folder, find_key(folder, key))
    key, name = run["key"], f"Run {run['key'][:12]}"
    if run["method"] != "coop":
        raise UserError(f"{name} is {run['label']}, which has no learned contexts; choose a CoOp run.")
    contexts = load_contexts(folder, key)
    if not np.isfinite(contexts).all():
        raise UserError(
            f"{name} ({run['label']}, seed {run['seed']}) diverged: its contexts are not finite; choose another run."
        )
    learned = load_parameters(folder, key)
    assert learned is not None
    return LearnedRun(
        **{name: run[name] for name in IN_RESULTS},
        settings=read_settings(METHODS["coop"], json.dumps(run["settings"])),
        contexts=contexts,
        class_names=learned.class_names or load_predictions(folder, key).class_names,
        learned_dtype=learned.header.get("learned_dtype", "float32"),
        recipe=learned.recipe if learned.recipe in RECIPES else "current",
    )


@fresh_state()
def export_run(
    results: str | Path, key: str, format: str, out: str | Path, backbone: str | None = None
) -> Path:
    """Write a CoOp run's contexts for other programs.

    Args:
        results: a results folder.
        key: the run's key, or its beginning.
        format: "coop", a checkpoint in the official folder layout under ``out``; "safetensors", the contexts with
            their metadata; "classifier", a `Classifier`.
        out: the file to write; for "coop" the folder.
        backbone: the run's backbone: a tag, a folder or a weights file. None: the backbone of the recorded name.

    Returns:
        The file that was written.

    Raises:
        UserError: no such run, format or backbone, or the file cannot be written.
    """
    import torch

    if format not in FORMATS:
        raise UserError(f'Runs cannot be exported as "{format}".{nearest(format, FORMATS)}')
    run, path = find_run(results, key), Path(out)
    if format == "safetensors":
        if backbone is not None:
            run.load_backbone(backbone)
        run.write_contexts(path)
        return path
    model = run.load_backbone(backbone)
    if format == "classifier":
        make_classifier(run, model).save(path)
        return path
    layout = run.layout(model)
    if layout.prompt is not None:
        raise UserError(
            f'The official code has no place for the words of "{layout.prompt}"; export the classifier instead.'
        )
    path = coop_path(
        path, run.dataset, run.backbone, layout, run.shots, run.seed, run.epochs, run.settings.init
    )
    contexts = torch.from_numpy(run.contexts).to(getattr(torch, run.learned_dtype))
    with writing(path):
        write_coop_file(
            path, contexts, *frozen_embeddings(model, run.class_names, layout.context_length), run.epochs
        )
    return path
