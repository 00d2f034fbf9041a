"""Import checkpoints of the official CoOp code into a results folder, as runs without tests."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.backbones.precision import fresh_state
from fastcoop.checks import whole_number
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError, nearest
from fastcoop.exchange.coop_files import (
    CoOpFile,
    find_coop_files,
    frozen_embeddings,
    path_facts,
    read_coop_file,
)
from fastcoop.exchange.runs import LearnedRun
from fastcoop.features.images import RECIPES
from fastcoop.methods import METHODS, Data, Outcome, RunSpec
from fastcoop.methods.base import validate
from fastcoop.methods.coop import CoOpSettings, layout_of
from fastcoop.methods.schedule import paper_epochs
from fastcoop.results.parameters import parameters_path
from fastcoop.results.store import open_store
from fastcoop.sweeps.records import record_outcome

TOLERANCE = 2e-3  # of embeddings in float16, against the same in float32


@dataclass(frozen=True)
class ImportedRun:
    """A checkpoint that was imported: the key and label of its run, and its file."""

    key: str
    path: Path
    label: str


@fresh_state()
def import_coop(
    place: str | Path,
    backbone: Backbone,
    dataset: Dataset,
    results: str | Path,
    *,
    class_position: str | None = None,
    shots: int | None = None,
    seed: int | None = None,
    recipe: str = "current",
) -> list[ImportedRun]:
    """Import the official checkpoints under ``place`` into a results folder, all of them or none.

    Each becomes a run without tests, with its class names in the header of its contexts file. Contexts in float16 keep
    their values, and are exported in float16 again. Importing the same checkpoint again gives the same key.

    Args:
        place: a checkpoint, or a folder with checkpoints anywhere below it.
        backbone: the backbone that they were learned over.
        dataset: the dataset that they were learned on.
        results: a results folder, created if it is missing.
        class_position: "end", "mid" or "front", where the official folder names do not contain it.
        shots: training images per class, where the folder names do not contain it.
        seed: the seed, where the folder names do not contain it.
        recipe: of the image transforms they were trained with, which no file contains: "official-2021" for checkpoints
            trained before October 2021. Predictions and tests use it.

    Raises:
        UserError: no checkpoints, one that cannot be read or does not fit the backbone or the dataset, or a property
            that neither the path nor the caller gives.
    """
    if recipe not in RECIPES:
        raise UserError(f'There is no recipe "{recipe}".{nearest(recipe, RECIPES)}')
    given = {
        "class_position": class_position,
        "shots": None if shots is None else whole_number(shots, "shots", 1),
        "seed": None if seed is None else whole_number(seed, "the seed"),
    }
    files = [read_coop_file(path) for path in find_coop_files(Path(place))]
    runs = [_as_run(file, backbone, dataset, given, recipe) for file in files]
    folder, data = Path(results), Data(dataset, None, recipe=recipe)
    with open_store(folder) as store:
        for run in runs:
            run.write_contexts(parameters_path(folder, run.key))
            spec = RunSpec.of(
                "coop", run.settings, data, backbone, shots=run.shots, seed=run.seed, key=run.key
            )
            record_outcome(store, spec, Outcome({}, extra={"imported_epoch": float(run.epochs)}))
    return [
        ImportedRun(run.key, file.path, METHODS["coop"].label(run.settings))
        for run, file in zip(runs, files, strict=True)
    ]


def _as_run(
    file: CoOpFile, backbone: Backbone, dataset: Dataset, given: dict[str, Any], recipe: str
) -> LearnedRun:
    """Return a checkpoint as a run, its properties from the path and the caller."""
    path, ctx, facts = file.path, file.ctx, path_facts(file.path)
    for name, value in given.items():
        option = name.replace("_", "-")
        if value is not None and facts.setdefault(name, value) != value:
            raise UserError(
                f"In the path {path}, the run's {option} is {facts[name]}, but {value} was given; leave out --{option}."
            )
        if name not in facts:
            raise UserError(
                f"The path {path} does not contain the run's {option} as the official folders do; pass --{option}."
            )
    if ctx.ndim not in (2, 3) or ctx.dtype == np.float64 or not np.isfinite(ctx).all():
        raise UserError(
            f"{path} should hold finite float16 or float32 contexts (M, width) or (classes, M, width); "
            f"it holds {ctx.dtype} {ctx.shape}, or numbers that are not finite."
        )
    length, specific = ctx.shape[-2], ctx.ndim == 3
    named = facts.get("context_length", length), facts.get("class_specific", specific)
    # A context that starts from words has one vector per word and is unified, whatever its folder is called.
    if named != (length, specific) and ("words" not in facts or specific):
        raise UserError(
            f"{path} is in a folder of M={named[0]}, class-specific {named[1]}, but its contexts are {ctx.shape}."
        )
    words, shots, seed = facts.get("words", "random"), facts["shots"], facts["seed"]
    epochs = "paper" if paper_epochs(dataset.name, shots) == file.epoch else file.epoch
    values = {"context_length": length, "class_position": facts["class_position"], "class_specific": specific}
    settings = validate(CoOpSettings, values | {"init": words, "epochs": epochs}, str(path))
    if layout_of(settings, backbone).context_length != length:
        raise UserError(
            f'{path} has {length} vectors, but its config\'s words "{words}" have another number.'
        )
    _check_fit(file, specific, backbone, dataset)
    identity = {
        "imported": hashlib.sha256(ctx.tobytes()).hexdigest(),
        "dtype": str(ctx.dtype),
        "epoch": file.epoch,
        "settings": settings.model_dump(mode="json"),
        "backbone": backbone.digest,
        "dataset": dataset.digest,
        "shots": shots,
        "seed": seed,
        "recipe": recipe,
    }
    return LearnedRun(
        key=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        backbone=backbone.name,
        backbone_digest=backbone.digest,
        dataset=dataset.name,
        shots=shots,
        seed=seed,
        epochs=file.epoch,
        settings=settings,
        contexts=ctx.astype(np.float32),
        class_names=dataset.class_names,
        learned_dtype=str(ctx.dtype),
        recipe=recipe,
    )


def _check_fit(file: CoOpFile, specific: bool, backbone: Backbone, dataset: Dataset) -> None:
    """Refuse contexts that do not fit; warn where they were learned with other class names."""
    path, classes, length = file.path, len(dataset.class_names), file.ctx.shape[-2]
    prefix, suffix = frozen_embeddings(backbone, dataset.class_names, length)
    width = backbone.text.width
    ctx_shape = (classes, length, width) if specific else (length, width)
    for name, array, shape in (
        ("ctx", file.ctx, ctx_shape),
        ("token_prefix", file.prefix, tuple(prefix.shape)),
        ("token_suffix", file.suffix, tuple(suffix.shape)),
    ):
        if array is not None and array.shape != shape:
            raise UserError(
                f"Expected {name} of shape {shape} for {backbone.name} and the {classes} classes of {dataset.name}, "
                f"got {array.shape} in {path}; name the backbone and the dataset that it was learned with."
            )
    if file.prefix is not None and _differ(file.prefix, prefix.numpy()).any():
        raise UserError(
            f"{path} was learned over other weights than those of {backbone.name}: its start token differs."
        )
    if file.suffix is None:
        return
    other = np.flatnonzero(_differ(file.suffix, suffix.numpy()))
    if len(other):
        message = (
            f"{path} was learned with other names for {len(other)} of {classes} classes, such as class {other[0]}, "
            f'"{dataset.class_names[other[0]]}" in {dataset.name}'
        )
        if specific:
            raise UserError(f"{message}; class-specific contexts need the same names in the same order.")
        logging.getLogger("fastcoop").warning(f"{message}; it is imported with the dataset's names.")


def _differ(saved: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Return bool (classes,): embeddings that differ by more than float16 does, or are not finite."""
    differs: np.ndarray = ~(np.abs(saved.astype(np.float32) - ours).max(axis=(1, 2)) <= TOLERANCE)
    return differs
