"""A run of a results folder with what it learned, found by its key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop import escape
from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.errors import UserError, writing
from fastcoop.features.images import RECIPES
from fastcoop.files import atomic_write
from fastcoop.methods import METHODS
from fastcoop.methods.base import read_settings
from fastcoop.methods.coop import layout_of
from fastcoop.prompts import PromptLayout
from fastcoop.results import load_contexts, load_predictions
from fastcoop.results.read import load_runs
from fastcoop.results.store import contexts_path, digest_of_arrays

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
    """The CoOp run whose key begins with ``key``.

    Raises:
        UserError: no results, no such run or more than one, or a run that learned no contexts.
    """
    folder = Path(results)
    frame = load_runs(folder)
    found = frame[[known.startswith(key) for known in frame.key]]
    if not len(found):
        command = escape.shell_command("fastcoop", "results", "list", folder)
        raise UserError(f"{folder} has no run {key}; `{command}` shows what it has.")
    if len(found) > 1:
        raise UserError(f"{len(found)} runs of {folder} begin with {key}; give more of the key.")
    row = found.iloc[0]
    if row.method != "coop":
        raise UserError(
            f"Run {row.key[:12]} is {row.label}, which has no learned contexts; choose a CoOp run."
        )
    contexts = load_contexts(folder, row.key)
    if not np.isfinite(contexts).all():
        raise UserError(
            f"Run {row.key[:12]} ({row.label}, seed {row.seed}) diverged: its contexts are not finite, so there is "
            "nothing to use; choose another run."
        )
    header = _header(contexts_path(folder, row.key))
    names = json.loads(header["class_names"]) if header else load_predictions(folder, row.key).class_names
    return LearnedRun(
        key=row.key,
        backbone=row.backbone,
        backbone_digest=row.backbone_digest,
        dataset=row.dataset,
        shots=int(row.shots) if str(row.shots).isdigit() else str(row.shots),
        seed=int(row.seed),
        epochs=int(row.epochs),
        settings=read_settings(METHODS["coop"], row.settings),
        contexts=contexts,
        class_names=tuple(names),
        learned_dtype=header.get("learned_dtype", "float32"),
        recipe=recipe if (recipe := header.get("recipe")) in RECIPES else "current",
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
    """A run's contexts and what they are: one tensor called "contexts", and ``run.metadata()`` in the header."""
    from safetensors.numpy import save

    contexts = np.ascontiguousarray(run.contexts, dtype=np.float32)
    arrays = {"contexts": contexts}
    write_whole(path, save(arrays, run.metadata() | {"sha256": digest_of_arrays(arrays)}))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all. Raises UserError where the disk refuses."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_bytes(content)


def _header(path: Path) -> dict[str, str]:
    """The header's metadata; {} in the files that sweeps write, whose class names are with their tests."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            header: dict[str, str] = file.metadata() or {}
            return header
    except (SafetensorError, OSError):
        return {}  # load_contexts says what is wrong with it
