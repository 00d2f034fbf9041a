"""Runs of a results folder: exported for other programs, and imported from the official code."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastcoop.backbones import Backbone
from fastcoop.backbones.precision import fresh_state
from fastcoop.checks import one_of, several, whole_number
from fastcoop.datasets import Dataset
from fastcoop.engine import encode_prompts
from fastcoop.errors import UserError, nearest, writing
from fastcoop.exchange import coop_files
from fastcoop.exchange.classifier import Classifier, load_backbone_of
from fastcoop.exchange.coop_files import CoOpFile
from fastcoop.features.images import RECIPES
from fastcoop.files import refuse_foreign
from fastcoop.methods import METHODS, Data, LinearClassifier, Outcome, RunSpec, unit
from fastcoop.methods.base import validate
from fastcoop.methods.coop import CoOpSettings, layout_of
from fastcoop.methods.schedule import paper_epochs
from fastcoop.progress import progress
from fastcoop.results import load_contexts, load_predictions, load_results
from fastcoop.results.metadata import DATASETS, recorded_datasets
from fastcoop.results.parameters import load_parameters, parameters_path, write_arrays
from fastcoop.results.read import find_key, load_run, load_runs
from fastcoop.results.records import DATASET_PROMPT
from fastcoop.results.store import open_store
from fastcoop.results.tables import select_rows
from fastcoop.sweeps.evaluation import load_backbones, restore_run
from fastcoop.sweeps.records import read_settings, record_outcome

FORMATS = ("coop", "safetensors", "classifier")
HEADER = {"format": "fastcoop contexts", "format_version": "1"}
WEIGHTS = "text_features.pt"
SCALE = 100.0  # that readers of class weights multiply products by
METHOD_NAMES = {"task_res": "taskres"}  # where readers of class weights have other names than grid files
ENCODERS = {
    "RN50": "rn50", "RN101": "rn101", "ViT-B-32": "vit_b32", "ViT-B-16": "vit_b16", "ViT-L-14": "vit_l14",
}  # fmt: skip
IN_RESULTS = ("key", "backbone", "backbone_digest", "dataset", "shots", "seed", "epochs")
IN_ORIGIN = ("key", "dataset", "shots", "seed", "epochs", "settings")
TOLERANCE = 2e-3  # of embeddings in float16, against the same in float32


@dataclass(frozen=True, eq=False)
class LearnedRun:
    """A CoOp run, as in the results, with what it learned."""

    key: str
    backbone: str
    backbone_digest: str
    dataset: str
    shots: int | str
    seed: int
    epochs: int
    settings: Any
    contexts: np.ndarray  # float32 (M, width), or (classes, M, width) if class-specific
    class_names: tuple[str, ...]  # in label order
    learned_dtype: str  # of the contexts in training: "float32", or "float16" of some imported runs
    recipe: str = "current"  # name of the image transforms behind the features

    def metadata(self) -> dict[str, str]:
        """Return everything except the contexts, as text for the header of a safetensors file."""
        facts = {name: str(getattr(self, name)) for name in (*IN_RESULTS, "learned_dtype", "recipe")}
        names = json.dumps(list(self.class_names))
        return HEADER | facts | {"class_names": names, "settings": self.settings.model_dump_json()}

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
    run = load_run(folder, key)
    key, name = run["key"], f"Run {run['key'][:12]}"
    if run["method"] != "coop":
        raise UserError(
            f"{name} is {run['label']}; only CoOp's contexts are exported as contexts: export the classifier instead."
        )
    contexts, learned = load_contexts(folder, key), load_parameters(folder, key)
    assert learned is not None
    if not np.isfinite(contexts).all():
        raise UserError(
            f"{name} ({run['label']}, seed {run['seed']}) diverged: its contexts are not finite; choose another run."
        )
    return LearnedRun(
        **{name: run[name] for name in IN_RESULTS},
        settings=read_settings(METHODS["coop"], json.dumps(run["settings"])),
        contexts=contexts,
        class_names=learned.class_names or load_predictions(folder, key).class_names,
        learned_dtype=learned.header.get("learned_dtype", "float32"),
        recipe=learned.recipe if learned.recipe in RECIPES else "current",
    )


@fresh_state()
def make_classifier(run: LearnedRun, backbone: Backbone) -> Classifier:
    """Return the classifier of a run's contexts.

    Args:
        run: a run of `find_run`.
        backbone: the backbone that it learned over.
    """
    item = (run.class_names, layout_of(run.settings, backbone), torch.from_numpy(run.contexts))
    with torch.no_grad():
        texts = encode_prompts(backbone, [item])[0].float().cpu().numpy()
    origin = {name: value for name, value in run.metadata().items() if name in IN_ORIGIN}
    return Classifier(
        run.class_names, unit(texts), backbone.logit_scale, backbone.preprocess, run.backbone, run.backbone_digest,
        origin, run.recipe,
    )  # fmt: skip


def _linear_classifier(results: str | Path, key: str, backbone: str | None) -> Classifier:
    """Return the classifier of a run of any method, for the classes of the run's dataset."""
    folder = Path(results)
    key = find_key(folder, key)
    row: Any = next(one for one in load_runs(folder).itertuples() if one.key == key)
    model = load_backbone_of(row, f"the run {key[:12]}", backbone)
    run = restore_run(folder, row, model)
    if (made := _linear(folder, row, run, model)) is None:
        raise UserError(
            f"Run {key[:12]} is {row.label}, whose logits are no linear function of image features of length 1, as a "
            "classifier file needs; choose a run of another method."
        )
    kept = load_parameters(folder, key)
    # The table has epochs as floats, since some of its runs have none.
    recorded = load_run(folder, key) | {"settings": row.settings}
    origin = {name: str(recorded[name]) for name in IN_ORIGIN if recorded.get(name) is not None}
    recipe = kept.recipe if kept is not None and kept.recipe in RECIPES else "current"
    return Classifier(
        run.data.class_names, made.weights, made.scale, model.preprocess, row.backbone, row.backbone_digest,
        origin, recipe, made.bias,
    )  # fmt: skip


def _linear(folder: Path, row: Any, run: RunSpec[Any], backbone: Backbone) -> LinearClassifier | None:
    """Return the classifier of a recorded run; None if it is no linear function of image features of length 1."""
    given = json.loads(row.settings)
    prompt = given.get(DATASET_PROMPT) or given.get("template")  # one that is a setting is not recorded twice
    if prompt is None and run.data.dataset.template in METHODS[run.method].prompts(run.settings, run.data):
        prompt = recorded_datasets(folder).get(row.dataset, {}).get("prompt")  # results of version 1
        if prompt is None:
            raise UserError(
                f"Neither run {row.key[:12]} nor {folder / DATASETS} says which prompt of {row.dataset} the run has "
                "been tested with; repeat its sweep into this folder, which records the prompt."
            )
    template = (prompt or "{}").replace("[CLASS]", "{}")
    data = Data(replace(run.data.dataset, template=template), None)
    made = METHODS[run.method].classifier(backbone, replace(run, data=data), data)
    return made if isinstance(made, LinearClassifier) and made.unit_length and made.rows is None else None


@fresh_state()
def export_run(
    results: str | Path, key: str, format: str, out: str | Path, backbone: str | None = None
) -> Path:
    """Write what a run learned for other programs: a CoOp run's contexts, or a classifier.

    Args:
        results: a results folder.
        key: the run's key, or its beginning.
        format: "coop", a checkpoint in the official folder layout under ``out``; "safetensors", the contexts with
            their metadata; "classifier", a `Classifier`, also of other methods whose logits are linear.
        out: the file to write; for "coop" the folder.
        backbone: the run's backbone: a tag, a folder or a weights file. None: the backbone of the recorded name.

    Returns:
        The file that was written.

    Raises:
        UserError: no such run, format or backbone, or the file cannot be written, or is another program's checkpoint.
    """
    if format not in FORMATS:
        raise UserError(f'Runs cannot be exported as "{format}".{nearest(format, FORMATS)}')
    path = Path(out)
    if format == "classifier":
        _linear_classifier(results, key, backbone).save(path)
        return path
    run = find_run(results, key)
    if format == "safetensors":
        if backbone is not None:  # which is not needed, but may be another
            load_backbone_of(run, f"the run {run.key[:12]}", backbone)
        run.write_contexts(path)
        return path
    model = load_backbone_of(run, f"the run {run.key[:12]}", backbone)
    layout = layout_of(run.settings, model)
    if layout.prompt is not None:
        raise UserError(
            f'The official code has no place for the words of "{layout.prompt}"; export the classifier instead.'
        )
    facts = run.dataset, run.backbone, layout, run.shots, run.seed, run.epochs, run.settings.init
    path = coop_files.coop_path(path, *facts)
    coop_files.refuse_foreign_checkpoint(path)
    contexts = torch.from_numpy(run.contexts).to(getattr(torch, run.learned_dtype))
    frozen = coop_files.frozen_embeddings(model, run.class_names, layout.context_length)
    with writing(path):
        coop_files.write_coop_file(path, contexts, *frozen, run.epochs)
    return path


@fresh_state()
def export_text_features(
    results: str | Path,
    out: str | Path,
    *,
    where: Sequence[str] = (),
    backbones: Sequence[str] = (),
    device: str = "auto",
) -> list[Path]:
    """Write the class weights of runs, each as a float32 tensor (classes, dim) of ``torch.load``.

    The layout is that of the prototypes of TransCLIP (Zanella et al., NeurIPS 2024):
    ``Few-shot/METHOD/ENCODER/Kshots/DATASET/seedS/text_features.pt``. The products of a tensor with image features of
    length 1, times 100, are logits.

    Args:
        results: A results folder.
        out: Folder to write ``Few-shot/...`` to.
        where: Conditions on the runs, as `results list` takes them. Runs without few-shot training are left out.
        backbones: Names or folders of the runs' backbones, if they are not found by their recorded names.
        device: Of the backbones.

    Returns:
        The files.

    Raises:
        UserError: There is no such run, several runs would be written to one file, a run's logits are no products of
            image features of length 1 and class weights, or a file cannot be written or is another program's.
    """
    folder = Path(results)
    table = load_results(folder)
    few_shot = table[(table.dataset == table.source) & (table.shots.astype(str) != "0")]
    table = select_rows(few_shot, several(where))
    if table.empty:
        raise UserError(f"{folder} has no few-shot run that meets the conditions; change --where.")
    rows: list[Any] = list(table.itertuples())
    places: dict[Path, str] = {}
    for row in rows:
        method, encoder = METHOD_NAMES.get(row.method, row.method), ENCODERS.get(row.backbone, row.backbone)
        path = Path(out, "Few-shot", method, encoder, f"{row.shots}shots", row.dataset, f"seed{row.seed}")
        if path in places:
            raise UserError(
                f"Runs of {places[path]} and {row.label} would both be written to {path}; choose one with --where, "
                f'such as --where "label={row.label}".'
            )
        places[path] = row.label
        refuse_foreign(path / WEIGHTS, coop_files.is_own_torch_file)
    models = load_backbones(rows, several(backbones), device)
    with progress("Exporting class weights", len(places)) as advance:
        for path, row in zip(places, rows, strict=True):
            model = models[row.backbone_digest]
            found = _linear(folder, row, restore_run(folder, row, model), model)
            if found is None or found.bias is not None:
                raise UserError(
                    f"The logits of {row.label} are no products of image features and class weights, so they have no "
                    "text_features.pt; leave such runs out with --where."
                )
            weights = np.asarray(found.weights * (found.scale / SCALE), np.float32)
            with writing(path):
                coop_files.write_torch_file(path / WEIGHTS, torch.from_numpy(weights))
            advance()
    return [path / WEIGHTS for path in places]


class ImportedRun(NamedTuple):
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
    one_of(recipe, "recipe", RECIPES)
    given = {
        "class_position": class_position,
        "shots": None if shots is None else whole_number(shots, "shots", 1),
        "seed": None if seed is None else whole_number(seed, "the seed"),
    }
    files = [coop_files.read_coop_file(path) for path in coop_files.find_coop_files(Path(place))]
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
    path, ctx, facts = file.path, file.ctx, coop_files.path_facts(file.path)
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
    # A context that starts from words has one vector per word and is unified, even if its folder's name differs.
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
    _check_fit(file, backbone, dataset)
    identity = {
        "imported": hashlib.sha256(ctx.tobytes()).hexdigest(), "dtype": str(ctx.dtype), "epoch": file.epoch,
        "settings": settings.model_dump(mode="json"), "backbone": backbone.digest, "dataset": dataset.digest,
        "shots": shots, "seed": seed, "recipe": recipe,
    }  # fmt: skip
    return LearnedRun(
        key=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        backbone=backbone.name, backbone_digest=backbone.digest, dataset=dataset.name, shots=shots, seed=seed,
        epochs=file.epoch, settings=settings, contexts=ctx.astype(np.float32),
        class_names=dataset.class_names, learned_dtype=str(ctx.dtype), recipe=recipe,
    )  # fmt: skip


def _check_fit(file: CoOpFile, backbone: Backbone, dataset: Dataset) -> None:
    """Refuse contexts that do not fit; warn where they were learned with other class names."""
    path, classes, length = file.path, len(dataset.class_names), file.ctx.shape[-2]
    embedded = coop_files.frozen_embeddings(backbone, dataset.class_names, length)
    prefix, suffix = (one.numpy() for one in embedded)
    ctx_shape = (*(classes,) * (file.ctx.ndim - 2), length, backbone.text.width)
    for name, array, shape in (
        ("ctx", file.ctx, ctx_shape),
        ("token_prefix", file.prefix, prefix.shape),
        ("token_suffix", file.suffix, suffix.shape),
    ):
        if array is not None and array.shape != shape:
            raise UserError(
                f"Expected {name} of shape {shape} for {backbone.name} and the {classes} classes of {dataset.name}, "
                f"got {array.shape} in {path}; name the backbone and the dataset that it was learned with."
            )
    if file.prefix is not None and _differ(file.prefix, prefix).any():
        weights = f"other weights than {backbone.name}'s"
        raise UserError(f"{path} was learned over {weights}: its start token differs.")
    other = np.flatnonzero(_differ(suffix if file.suffix is None else file.suffix, suffix))
    if len(other):
        message = (
            f"{path} was learned with other names for {len(other)} of {classes} classes, such as class {other[0]}, "
            f'"{dataset.class_names[other[0]]}" in {dataset.name}'
        )
        if file.ctx.ndim == 3:
            raise UserError(f"{message}; class-specific contexts need the same names in the same order.")
        logging.getLogger("fastcoop").warning(f"{message}; it is imported with the dataset's names.")


def _differ(saved: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Return bool (classes,): embeddings that differ by more than float16 does, or are not finite."""
    differs: np.ndarray = ~(np.abs(saved.astype(np.float32) - ours).max(axis=(1, 2)) <= TOLERANCE)
    return differs
