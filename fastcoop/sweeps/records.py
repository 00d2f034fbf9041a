"""Make the records of the results folder from planned runs and their outcomes, and find what is left to test."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from fastcoop.datasets import Dataset
from fastcoop.methods import METHODS, Data, Method, Outcome, RunSpec
from fastcoop.methods.base import validate
from fastcoop.methods.data import DEFAULT_VIEWS
from fastcoop.results.parameters import Parameters
from fastcoop.results.records import (
    DATASET_PROMPT,
    FEATURE_PROPERTIES,
    RunDescription,
    RunRecord,
    ScoreInputs,
    ScoreRecord,
)
from fastcoop.results.store import ResultsStore

Tests = Mapping[str, Mapping[str, ScoreInputs]]  # by key and tested dataset

SPLITS = ("train", "val", "test")
USUAL_PROPERTIES = {
    "recipe": ("current", "imported"), "feature_dtype": ("float16",), "feature_precision": ("float32",),
    "views": (DEFAULT_VIEWS,),
}  # fmt: skip


def record_outcome(store: ResultsStore, run: RunSpec, outcome: Outcome) -> None:
    """Store the outcome of a run; of a run that was done before only its new tests."""
    scores = [
        ScoreRecord(
            dataset=data.name, class_names=data.class_names, labels=data.test[1], inputs=score_inputs(run, data),
            **vars(outcome.scores[data.name]),
        )
        for data in run.tests if data.name in outcome.scores
    ]  # fmt: skip
    if run.has_learned:
        store.record_scores(run.key, scores)
        return
    learned = None
    if outcome.contexts is not None or outcome.weights:
        source, features = run.data.dataset, run.data.store
        recipe = features.meta.recipe if features is not None else None
        learned = Parameters(outcome.contexts, outcome.weights, source.class_names, source.class_ids, recipe)
    store.record(run_record(run, outcome), scores, learned)


def describe_run(run: RunSpec) -> RunDescription:
    """Return what identifies a run."""
    method = METHODS[run.method]
    return RunDescription(
        key=run.key, backbone=run.backbone, dataset=run.dataset, method=run.method, label=method.label(run.settings),
        shots=run.shots, seed=run.seed, settings=recorded_settings(method, run),
    )  # fmt: skip


def run_record(run: RunSpec, outcome: Outcome) -> RunRecord:
    """Return the record of a run and its outcome, without tests and what was learned."""
    return RunRecord(
        **vars(describe_run(run)),
        backbone_digest=run.model.digest,
        columns=METHODS[run.method].columns(run, run.model),
        train_images=len(run.data.readable("train", run.subset.train)) if run.subset else 0,
        train_files=train_files(run),
        status=outcome.status,
        seconds=outcome.seconds,
        losses=outcome.losses,
        extra=trained_parameters(outcome) | outcome.extra,
        device=str(run.model.device),
    )


def trained_parameters(outcome: Outcome) -> dict[str, float]:
    """Return how many numbers a run of context vectors or other weights has learned; {} if they are not kept."""
    learned = [outcome.contexts] if outcome.contexts is not None else outcome.weights.values()
    count = sum(array.size for array in learned if array.dtype.kind == "f")
    return {"trained_parameters": float(count)} if count else {}


def describe_datasets(datasets: Iterable[Dataset]) -> dict[str, dict[str, Any]]:
    """Return what a results folder stores of datasets, by name."""
    return {
        dataset.name: {
            "classes": len(dataset.class_names),
            **{split: len(dataset.splits[split]) if split in dataset.splits else None for split in SPLITS},
            "digest": dataset.digest,
            "prompt": dataset.template.replace("{}", "[CLASS]"),
        }
        for dataset in datasets
    }


def recorded_settings(method: Method[Any], run: RunSpec) -> str:
    """Return a run's settings as JSON, with the prompt of its dataset, where the run uses it, and the properties of its
    features that are not the default."""
    given = run.settings.model_dump(mode="json")
    store = run.data.store
    properties = {
        "recipe": store.meta.recipe if store else run.data.recipe,
        "feature_dtype": store.meta.dtype if store else "float16",
        "feature_precision": store.meta.precision if store else "float32",
        "views": method.views(run.data) if method.learns and method.augments else DEFAULT_VIEWS,
    }
    added = {name: value for name, value in properties.items() if value not in USUAL_PROPERTIES[name]}
    prompt = run.data.dataset.template
    if prompt in method.prompts(run.settings, run.data) and prompt not in given.values():
        added[DATASET_PROMPT] = prompt
    if not added:
        return str(run.settings.model_dump_json())
    return json.dumps(given | added, separators=(",", ":"), ensure_ascii=False)


def read_settings(method: Method[Any], recorded: str) -> BaseModel:
    """Return the settings that `recorded_settings` wrote.

    Raises:
        UserError: they are not settings of the method.
    """
    given = json.loads(recorded)
    for name in (DATASET_PROMPT, *FEATURE_PROPERTIES):
        given.pop(name, None)
    return validate(method.Settings, given, f"a recorded run of {method.name}")


def train_files(run: RunSpec) -> str | None:
    """Return the sha256 hex of the files of the images that a run learns, as in `RunRecord`."""
    files = run.data.train_files(run.subset) if run.subset else None
    if files is not None and run.tuning is not None:
        files += run.tuning.train_files(run.tuning.subset(run.shots, run.seed)) or ""
    return files


def score_inputs(run: RunSpec, data: Data) -> ScoreInputs:
    """Return what a test of a run on ``data`` depends on."""
    prompts = json.dumps(METHODS[run.method].prompts(run.settings, data), ensure_ascii=False)
    return ScoreInputs(data.test_digest, data.test_features, data.test_images, prompts, train_files(run))


def training_images_changed(run: RunSpec, tested: Mapping[str, ScoreInputs]) -> bool:
    """Whether the image files that a run learned have changed since."""
    now, before = train_files(run), {inputs.train_files for inputs in tested.values()}
    # Older records lack the images that `selection: imagenet_val` learns first.
    return now is not None and not all(now.startswith(files or "") for files in before)


def missing_tests(run: RunSpec, tested: Mapping[str, ScoreInputs]) -> tuple[Data, ...]:
    """Return the datasets that a run is to be tested on and has not been tested on as they are now.

    Args:
        run: the run.
        tested: what its recorded tests depended on, by dataset.
    """
    if training_images_changed(run, tested):
        return run.tests

    def is_tested(data: Data) -> bool:
        # A run's own dataset may have been renamed since.
        names = tested if data is run.data else {data.name} & tested.keys()
        return any(_is_same_test(run, data, tested[name]) for name in names)

    return tuple(data for data in run.tests if not is_tested(data))


def _is_same_test(run: RunSpec, data: Data, before: ScoreInputs) -> bool:
    now = score_inputs(run, data)
    if before.test != now.test:
        return False
    if data is run.data and before.features is None:
        return True  # of version 1: the run's key covers its own dataset's features and prompt
    return before.prompts == now.prompts and now.features in (None, before.features)
