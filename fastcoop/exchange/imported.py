"""Official checkpoints into a results folder: contexts where `load_contexts` finds them, and a run row for each."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.backbones.precision import fresh_state
from fastcoop.checks import whole_number
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError, nearest
from fastcoop.exchange.official import (
    Official,
    find_checkpoints,
    frozen_embeddings,
    path_facts,
    read_official,
)
from fastcoop.exchange.runs import LearnedRun, write_contexts_file
from fastcoop.features.images import RECIPES
from fastcoop.methods import METHODS, Data, Outcome, RunSpec
from fastcoop.methods.base import validate
from fastcoop.methods.coop import CoOpSettings, context_length_of
from fastcoop.methods.schedule import paper_epochs
from fastcoop.results.parameters import parameters_path
from fastcoop.results.store import open_store
from fastcoop.sweeps.records import record_outcome

TOLERANCE = 2e-3  # float16 embeddings against the same in float32


@dataclass(frozen=True)
class Imported:
    """A checkpoint that now is a run: its key, the file it came from, and its label."""

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
) -> list[Imported]:
    """Read the official checkpoints under ``place`` into a results folder, all of them or none.

    Each becomes a run without test scores: a row of the runs' table, and a contexts file whose header has the class
    names that an untested run has nowhere else. Contexts learned in float16 keep their values, and are exported as
    float16 again. The same checkpoint comes to the same key.

    Args:
        place: a checkpoint, or a folder that has some anywhere below it.
        backbone, dataset: what they were learned over and on.
        results: a results folder, made if it is not there.
        class_position, shots, seed: where the official folder names do not say.
        recipe: of the image transforms they were learned with, which nothing in them says: "official-2021" for
            checkpoints trained before October 2021. Predictions and tests use it.

    Raises:
        UserError: no checkpoints, one that cannot be read or does not fit the backbone or the dataset, or facts that
            neither path nor caller gives.
    """
    if recipe not in RECIPES:
        raise UserError(f'There is no recipe "{recipe}".{nearest(recipe, RECIPES)}')
    shots = None if shots is None else whole_number(shots, "shots", 1)
    seed = None if seed is None else whole_number(seed, "the seed")
    runs: list[tuple[LearnedRun, Path]] = []
    for path in find_checkpoints(Path(place)):
        official = read_official(path)
        settings, run_shots, run_seed = _settled(official, backbone, dataset, class_position, shots, seed)
        _check(official, settings, backbone, dataset)
        run = LearnedRun(
            key=_key(official, settings, backbone, dataset, run_shots, run_seed, recipe),
            backbone=backbone.name,
            backbone_digest=backbone.digest,
            dataset=dataset.name,
            shots=run_shots,
            seed=run_seed,
            epochs=official.epoch,
            settings=settings,
            contexts=official.ctx.astype(np.float32),
            class_names=dataset.class_names,
            learned_dtype=str(official.ctx.dtype),
            recipe=recipe,
        )
        runs.append((run, path))
    folder = Path(results)
    with open_store(folder) as store:
        for run, _ in runs:
            write_contexts_file(parameters_path(folder, run.key), run)
            data = Data(dataset, None, recipe=recipe)
            spec = RunSpec.of(
                "coop", run.settings, data, shots=run.shots, seed=run.seed, backbone=backbone, key=run.key
            )
            record_outcome(store, spec, Outcome({}, extra={"imported_epoch": float(run.epochs)}))
    return [Imported(run.key, path, METHODS["coop"].label(run.settings)) for run, path in runs]


def _settled(
    official: Official,
    backbone: Backbone,
    dataset: Dataset,
    class_position: str | None,
    shots: int | None,
    seed: int | None,
) -> tuple[CoOpSettings, int, int]:
    """Settings, shots and seed, from the path and what is given beside it."""
    path, facts = official.path, path_facts(official.path)
    for name, told, asked in (
        ("class-position", facts.class_position, class_position),
        ("shots", facts.shots, shots),
        ("seed", facts.seed, seed),
    ):
        if asked is not None and told not in (None, asked):
            raise UserError(
                f"The path {path} says that the run's {name} is {told}, but {asked} was given; leave out --{name}."
            )
    settled = {
        "class-position": facts.class_position or class_position,
        "shots": facts.shots if facts.shots is not None else shots,
        "seed": facts.seed if facts.seed is not None else seed,
    }
    for name, value in settled.items():
        if value is None:
            raise UserError(
                f"The path {path} does not say the run's {name} as the official folders do; pass --{name}."
            )
    ctx = official.ctx
    if ctx.ndim not in (2, 3) or ctx.dtype == np.float64 or not np.isfinite(ctx).all():
        raise UserError(
            f"{path} should hold finite float16 or float32 contexts (M, width) or (classes, M, width); "
            f"it holds {ctx.dtype} {ctx.shape}, or numbers that are not finite."
        )
    length, specific = ctx.shape[-2], ctx.ndim == 3
    said = (
        facts.context_length or length,
        specific if facts.class_specific is None else facts.class_specific,
    )
    # A context that starts from words has their number and is unified, whatever the scripts were given.
    if said != (length, specific) and (facts.words is None or specific):
        raise UserError(
            f"{path} lies in a folder of M={said[0]}, class-specific {said[1]}, but its contexts are {ctx.shape}."
        )
    number = int(settled["shots"] or 0)
    as_paper = paper_epochs(dataset.name, number) == official.epoch
    words = facts.words or "random"
    given = {
        "context_length": length,
        "class_position": settled["class-position"],
        "class_specific": specific,
        "init": words,
        "epochs": "paper" if as_paper else official.epoch,
    }
    settings = validate(CoOpSettings, given, str(path))
    if context_length_of(settings, backbone) != length:
        raise UserError(
            f'{path} has {length} vectors where its config\'s words "{words}" have another number.'
        )
    return settings, number, int(settled["seed"] or 0)


def _check(official: Official, settings: CoOpSettings, backbone: Backbone, dataset: Dataset) -> None:
    """Refuse contexts that do not fit; warn of prompts that are not those the contexts were learned in."""
    path, ctx, classes = official.path, official.ctx, len(dataset.class_names)
    if ctx.shape[-1] != backbone.text.width:
        raise UserError(
            f"{path} has vectors of {ctx.shape[-1]} numbers and {backbone.name} takes {backbone.text.width}; "
            "name the backbone that it was learned over."
        )
    length = ctx.shape[-2]
    prefix, suffix = frozen_embeddings(backbone, dataset.class_names, length)
    saved = {"token_prefix": (official.prefix, prefix), "token_suffix": (official.suffix, suffix)}
    counts = {len(array) for array, _ in saved.values() if array is not None}
    counts |= {len(ctx)} if settings.class_specific else set()
    if counts - {classes}:
        raise UserError(
            f"{path} was learned on {max(counts - {classes})} classes and {dataset.name} has {classes}; name the "
            "dataset that it was learned on."
        )
    for name, (array, ours) in saved.items():
        if array is not None and array.shape != ours.shape:
            raise UserError(
                f"{path} has a {name} of {array.shape} where {backbone.name} has {tuple(ours.shape)}; name the "
                "backbone that it was learned over."
            )
    if official.prefix is not None and _differ(official.prefix, prefix.numpy()).any():
        raise UserError(
            f"{path} was learned over other weights than those of {backbone.name}: its start token differs."
        )
    if official.suffix is None:
        return
    other = np.flatnonzero(_differ(official.suffix, suffix.numpy()))
    if len(other):
        message = (
            f"{path} was learned with other names for {len(other)} of {classes} classes, such as class {other[0]}, "
            f'"{dataset.class_names[other[0]]}" in {dataset.name}'
        )
        if settings.class_specific:
            raise UserError(f"{message}; class-specific contexts need the same names in the same order.")
        logging.getLogger("fastcoop").warning(f"{message}; it is imported with the dataset's names.")


def _differ(saved: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """bool (classes,): whose embeddings are not the same up to float16, or not finite."""
    differs: np.ndarray = ~(np.abs(saved.astype(np.float32) - ours).max(axis=(1, 2)) <= TOLERANCE)
    return differs


def _key(
    official: Official,
    settings: CoOpSettings,
    backbone: Backbone,
    dataset: Dataset,
    shots: int,
    seed: int,
    recipe: str,
) -> str:
    facts = {
        "imported": hashlib.sha256(official.ctx.tobytes()).hexdigest(),
        "dtype": str(official.ctx.dtype),
        "epoch": official.epoch,
        "settings": settings.model_dump(mode="json"),
        "backbone": backbone.digest,
        "dataset": dataset.digest,
        "shots": shots,
        "seed": seed,
        "recipe": recipe,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
