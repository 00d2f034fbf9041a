"""A run of a results folder with what it learned, found by its key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.errors import UserError, writing
from fastcoop.features.images import RECIPES
from fastcoop.methods import METHODS
from fastcoop.methods.coop import layout_of
from fastcoop.prompts import PromptLayout
from fastcoop.results import load_contexts, load_predictions
from fastcoop.results.parameters import load_parameters, write_arrays
from fastcoop.results.read import find_key, load_run
from fastcoop.sweeps.records import read_settings

FORMAT = "fastcoop contexts"
FORMAT_VERSION = "1"


@dataclass(frozen=True, eq=False)
class LearnedRun:
    """A CoOp run.

    Attributes:
        key, backbone, backbone_digest, dataset, shots, seed, epochs: as in the results.
        settings: of the method, as in the results.
        contexts: float32 (M, width), or (classes, M, width) if class-specific.
        class_names: in label order.
        learned_dtype: what the contexts were learned in, "float32", or "float16" of an import.
        recipe: of the image transforms that its features were made by, "current" or "official-2021".
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
        """The backbone that the contexts were learned over, by ``spec`` or else by its name.

        Raises UserError if there is none of this name, or its weights are others.
        """
        backbone = named_backbone(spec, self.backbone, f"the run {self.key[:12]} learned over")
        if backbone.digest != self.backbone_digest:
            raise UserError(
                f"Run {self.key[:12]} learned over {self.backbone} ({self.backbone_digest[:12]}), not over "
                f"{backbone.name} ({backbone.digest[:12]}); name that backbone with --backbone."
            )
        return backbone

    def layout(self, backbone: Backbone) -> PromptLayout:
        """The prompt layout."""
        layout: PromptLayout = layout_of(self.settings, backbone)
        return layout

    def metadata(self) -> dict[str, str]:
        """All but the contexts themselves, as the header of a safetensors file takes it."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "key": self.key,
            "backbone": self.backbone,
            "backbone_digest": self.backbone_digest,
            "dataset": self.dataset,
            "class_names": json.dumps(list(self.class_names)),
            "shots": str(self.shots),
            "seed": str(self.seed),
            "epochs": str(self.epochs),
            "settings": self.settings.model_dump_json(),
            "learned_dtype": self.learned_dtype,
            "recipe": self.recipe,
        }


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
    if run["method"] != "coop":
        raise UserError(
            f"Run {run['key'][:12]} is {run['label']}, which has no learned contexts; choose a CoOp run."
        )
    contexts = load_contexts(folder, run["key"])
    if not np.isfinite(contexts).all():
        raise UserError(
            f"Run {run['key'][:12]} ({run['label']}, seed {run['seed']}) diverged: its contexts are not finite; "
            "choose another run."
        )
    learned = load_parameters(folder, run["key"])
    assert learned is not None
    names = learned.class_names or load_predictions(folder, run["key"]).class_names
    return LearnedRun(
        **{
            name: run[name]
            for name in ("key", "backbone", "backbone_digest", "dataset", "shots", "seed", "epochs")
        },
        settings=read_settings(METHODS["coop"], json.dumps(run["settings"])),
        contexts=contexts,
        class_names=names,
        learned_dtype=learned.header.get("learned_dtype", "float32"),
        recipe=learned.recipe if learned.recipe in RECIPES else "current",
    )


def named_backbone(spec: str | None, name: str, whose: str, device: str = "cpu") -> Backbone:
    """The backbone ``spec``, else the one of this ``name``.

    Raises UserError where there is none; of a name alone, one that says ``whose`` backbone it is and how to give it.
    """
    if spec is not None:
        return backbone_from_spec(spec, device=device)
    try:
        return backbone_from_spec(name, device=device)
    except UserError as error:
        raise UserError(
            f"The backbone {name}, which {whose}, is not found by its name alone; pass its folder or weights with "
            f"--backbone. ({error})"
        ) from None


def write_contexts_file(path: Path, run: LearnedRun) -> None:
    """Write a run's contexts as one tensor called "contexts", with ``run.metadata()`` in the header.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(path):
        write_arrays(path, {"contexts": run.contexts.astype(np.float32)}, run.metadata())
