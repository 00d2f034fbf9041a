"""Test runs of a results folder on further datasets, without training."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop import escape
from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.backbones.devices import resolve_device
from fastcoop.backbones.precision import fresh_state
from fastcoop.checks import one_of, several
from fastcoop.datasets import Dataset
from fastcoop.datasets.load import ClassNames
from fastcoop.errors import UserError
from fastcoop.features import cache_all, find_datasets, open_current, open_if_there, store_path
from fastcoop.features.images import RECIPES
from fastcoop.methods import METHODS, Data, Outcome, RunContext, RunSpec
from fastcoop.methods.text import check_texts
from fastcoop.progress import counted, progress
from fastcoop.results.metadata import add_datasets, recorded_grid
from fastcoop.results.parameters import Parameters, load_parameters, parameters_path
from fastcoop.results.predictions import load_predictions
from fastcoop.results.read import load_results, load_runs
from fastcoop.results.store import ResultsStore, open_store
from fastcoop.sweeps.loading import refuse_shared_names
from fastcoop.sweeps.records import Tests, describe_datasets, missing_tests, read_settings, record_outcome

log = logging.getLogger("fastcoop")


@dataclass(frozen=True)
class Tested:
    """One test of one run.

    Attributes:
        key: Key of the run.
        label: Its method and settings, as figures name them.
        source: The dataset that it was trained on.
        shots, seed: Of its few-shot subset.
        dataset: The dataset that it was tested on.
        accuracy, macro_accuracy: In percent; NaN if the run's outputs are not finite.
        new: Whether the test was made by this call.
    """

    key: str
    label: str
    source: str
    shots: int | str
    seed: int
    dataset: str
    accuracy: float
    macro_accuracy: float
    new: bool


@fresh_state()
def evaluate(
    results: str | Path,
    targets: Sequence[str | Path],
    *,
    runs: Sequence[str] = (),
    backbones: Sequence[str] = (),
    data_root: str | Path | None = "data",
    cache: str | Path = "cache",
    recipe: str | None = None,
    device: str = "auto",
    skip_unreadable: bool = False,
    class_names: ClassNames | None = None,
) -> list[Tested]:
    """Test runs of a results folder on further datasets, with the class names of these datasets.

    Contexts, text transforms, text biases and zero-shot prompts are combined with the target's class names.
    Class-specific contexts and linear probes are tested on those of their classes that the target has, found by WordNet
    ID or by name. Runs of `fastcoop import-coop` are tested on their own dataset in the same way. Test features of the
    targets are cached first. Tests that were made before are not repeated.

    Args:
        results: The results folder. The tests are added to it.
        targets: Datasets, as a grid names them.
        runs: Keys, or their first characters. Empty: all runs that can be tested on the targets; a warning counts the
            tests left out.
        backbones: Names or folders of the runs' backbones, if they are not found by their recorded names.
        data_root: Folder of the datasets.
        cache: Folder of the feature stores.
        recipe: Image transforms for the targets; by default those that the runs were trained with.
        device: Device of the backbones, as `sweep` takes it.
        skip_unreadable: Leave out images that cannot be decoded, with a warning, in place of raising.
        class_names: Names to show for the classes of the only target that is the user's own, as `load_dataset` takes
            them.

    Returns:
        All tests of the selected runs on the targets, new or not.

    Raises:
        UserError: There are no results, no such run, target or backbone, or a run of ``runs`` cannot be tested on a
            target. Nothing has been recorded then.
    """
    folder = Path(results)
    targets, runs, backbones = several(targets), several(runs), several(backbones)
    if not targets:
        raise UserError("There is nothing to test on; name at least one dataset (--targets a,b).")
    recipe = None if recipe is None else one_of(recipe, "recipe", RECIPES)
    device = resolve_device(device)
    rows = _select(folder, runs)
    datasets = list(find_datasets(targets, data_root, class_names).values())
    refuse_shared_names("datasets", {str(dataset.root): dataset for dataset in datasets})
    found = load_backbones(rows, backbones, device)
    recipe = recipe or _recipe(folder, rows)
    planned = _plan(folder, rows, datasets, found, strict=bool(runs))
    swept = {row.key for row in rows if "imported_epoch" not in row.extra}
    for backbone, data in _targets(planned):
        with suppress(UserError):  # raised below if the store is needed
            path = store_path(cache, backbone, data.dataset)
            data.store = open_if_there(path, backbone, data.dataset, only_unchanged=True)
    with open_store(folder) as store:
        tested = store.finished()
        _refuse_replacements(folder, planned, tested, swept)
        pending = _pending(planned, tested)
        pending += [run for run in planned if any(data.store is None for data in run.targets)]
        for _ in cache_all(
            list({run.model.digest: run.model for run in pending}.values()),
            [(dataset, (), ()) for dataset in datasets],
            cache,
            views=0,
            kinds=[kind for kind in ("pre",) if any(kind in METHODS[run.method].kinds for run in pending)],
            recipe=recipe,
            skip_unreadable=skip_unreadable,
            retry_skipped=False,
        ):
            pass
        for backbone, data in _targets(pending):
            data.store = open_current(store_path(cache, backbone, data.dataset), backbone, data.dataset)
        _refuse_replacements(folder, planned, tested, swept)
        pending = _pending(planned, tested)
        add_datasets(folder, describe_datasets(datasets))
        _test(pending, store)
    new = {(run.key, data.name) for run, data in _tests(pending)}
    recorded: dict[Any, Any] = load_results(folder).set_index(["key", "dataset"]).to_dict("index")
    return [
        Tested(
            run.key, str(row["label"]), str(row["source"]), run.shots, run.seed, data.name, float(row["accuracy"]),
            float(row["macro_accuracy"]), (run.key, data.name) in new,
        )
        for run, data in _tests(planned)
        for row in [recorded[run.key, data.name]]
    ]  # fmt: skip


def _tests(runs: Iterable[RunSpec[Any]]) -> Iterator[tuple[RunSpec[Any], Data]]:
    return ((run, data) for run in runs for data in run.targets)


def _targets(runs: Iterable[RunSpec[Any]]) -> Iterable[tuple[Backbone, Data]]:
    """Return every distinct target of the runs, with its backbone."""
    return {id(data): (run.model, data) for run, data in _tests(runs)}.values()


def _select(folder: Path, runs: Sequence[str]) -> list[Any]:
    """Return rows of the runs' table: those whose keys begin with one of ``runs``, or all."""
    runs = [run.lower() for run in runs]
    rows: list[Any] = list(load_runs(folder).itertuples())
    if missing := [run for run in runs if not any(row.key.startswith(run) for row in rows)]:
        command = escape.shell_command("fastcoop", "results", "list", folder)
        raise UserError(f"{folder} has no run {missing[0]}; `{command}` shows its runs.")
    if not rows:
        raise UserError(f"{folder} holds no runs yet; run `fastcoop sweep` into it first.")
    return [row for row in rows if not runs or row.key.startswith(tuple(runs))]


def _recipe(folder: Path, rows: Iterable[Any]) -> str:
    """Return the image transforms of the runs, as far as they are recorded. Raises UserError for several."""
    recipes = set()
    for row in rows:
        with suppress(UserError):  # of a damaged file; raised for its run
            learned = load_parameters(folder, row.key)
            recipes |= {learned.recipe} & {*RECIPES} if learned is not None else set()
    if len(recipes) > 1:
        raise UserError(
            f"The runs of {folder} were trained with several recipes of images ({', '.join(sorted(map(str, recipes)))})"
            "; choose runs of one (--run), or name the recipe for the targets (--recipe)."
        )
    return str(recipes.pop()) if recipes else recorded_grid(folder).get("recipe", "current")


def load_backbones(rows: Iterable[Any], specs: Sequence[str], device: str) -> dict[str, Backbone]:
    """Return the backbones of the runs by digest. Raises UserError if one is not found or has other weights."""
    given = [backbone_from_spec(spec, device=device) for spec in specs]
    found = {backbone.digest: backbone for backbone in given}
    for name, digest in {(row.backbone, row.backbone_digest) for row in rows}:
        if digest in found:
            continue
        try:
            found[digest] = backbone_from_spec(name, device=device)
        except UserError as error:
            raise UserError(
                f"The backbone {name} of these runs is not found by its name; give it with --backbone. ({error})"
            ) from None
        if (other := found[digest].digest) != digest:
            raise UserError(
                f"The runs were trained with {name} of digest {digest[:12]}, but the {name} that is here has digest "
                f"{other[:12]}; give the right one with --backbone."
            )
    return found


def _plan(
    folder: Path,
    rows: Sequence[Any],
    datasets: Sequence[Dataset],
    backbones: dict[str, Backbone],
    strict: bool,
) -> list[RunSpec[Any]]:
    """Return each run with the targets that it can be tested on. If ``strict``, raise for other targets."""
    targets = {digest: [Data(dataset, None) for dataset in datasets] for digest in backbones}
    planned, errors = [], []
    checked: set[tuple[Any, ...]] = set()
    for row in rows:
        fitting = []
        try:
            run = restore_run(folder, row, backbones[row.backbone_digest])
        except UserError as error:
            errors.append(error)
            continue
        for target in targets[row.backbone_digest]:
            try:
                METHODS[row.method].check(run.with_targets((target,)))
                check_texts([run.with_targets((target,))], checked)
                fitting.append(target)
            except UserError as error:
                errors.append(error)
        if fitting:
            planned.append(run.with_targets(tuple(fitting)))
    if errors and (strict or not planned):
        raise errors[0]
    if errors:
        log.warning("%d tests cannot be done and are left out; the first: %s", len(errors), errors[0])
    return planned


def restore_run(folder: Path, row: Any, backbone: Backbone) -> RunSpec[Any]:
    """Return a recorded run with what it learned, without images. Raises UserError if nothing is kept of it."""
    method = METHODS[row.method]
    kept = load_parameters(folder, row.key) if method.learns else Parameters(None, {})
    if kept is None:
        raise UserError(
            f"There is no {parameters_path(folder, row.key)}, so run {row.key[:12]} ({row.label}) keeps nothing that "
            "could be tested; name the targets in its grid and sweep it again."
        )
    arrays = [kept.contexts] if kept.contexts is not None else list((kept.weights or {}).values())
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(
            f"Run {row.key[:12]} ({row.label}, seed {row.seed}) diverged: what it learned is not finite and cannot be "
            "tested; choose other runs."
        )
    names = kept.class_names or load_predictions(folder, row.key).class_names
    bare = Dataset(row.dataset, folder, names, "{}", {}, "", row.dataset, folder, class_ids=kept.class_ids)
    return RunSpec.of(
        row.method, read_settings(method, row.settings), Data(bare, None), backbone,
        shots=int(row.shots) if str(row.shots).isdigit() else str(row.shots), seed=int(row.seed),
        contexts=kept.contexts, weights=kept.weights, key=row.key,
    )  # fmt: skip


def _refuse_replacements(
    folder: Path, planned: Sequence[RunSpec[Any]], tested: Tests, swept: Collection[str]
) -> None:
    """Raise UserError for a test that would replace one of another dataset, since a run keeps one test per name; or one
    of a swept run on its own dataset, whose features its key contains, with other features.

    Features that are not cached are passed over.
    """
    for run, data in _tests(planned):
        before = tested.get(run.key, {}).get(data.name)
        if before is None:
            continue
        # The test may have been of all images, or of those that the store has.
        if before.test not in (data.dataset.digest, data.test_digest):
            known = load_predictions(folder, run.key, data.name)
            raise UserError(
                f"Run {run.key[:12]} of {folder} was tested on another dataset called {data.name} "
                f"({len(known.class_names)} classes, {len(known.labels)} test images) than the one in "
                f"{data.dataset.root} ({len(data.class_names)} classes, {len(data.dataset.splits['test'])} test "
                "images), whose test would replace it; give this one another name, under name: of its YAML."
            )
        in_key = run.key in swept and data.name == run.dataset and before.features is not None
        if in_key and data.test_features not in (None, before.features):
            raise UserError(
                f"Run {run.key[:12]} of {folder} was tested on its own dataset {data.name} with other features than "
                "today's: the pictures, their recipe or how they were encoded changed. The new test would replace that "
                f"one; leave {data.name} out of the targets, and sweep again for runs with today's features."
            )


def _pending(planned: Sequence[RunSpec[Any]], tested: Tests) -> list[RunSpec[Any]]:
    """Return the runs with those of their targets that they have not been tested on."""
    missing = ((run, missing_tests(run, tested.get(run.key, {}))) for run in planned)
    return [run.with_targets(targets) for run, targets in missing if targets]


def _test(pending: Sequence[RunSpec[Any]], store: ResultsStore) -> None:
    groups: dict[tuple[str, str], list[RunSpec[Any]]] = {}
    for run in pending:
        groups.setdefault((run.method, run.model.digest), []).append(run)
    for (method, _), runs in groups.items():
        backbone, what = runs[0].model, counted(len(runs), f"{method} run")

        def done(index: int, outcome: Outcome, runs: list[RunSpec[Any]] = runs) -> None:
            record_outcome(store, runs[index], outcome)

        with progress(f"{backbone.name}: testing {what}", len(runs)) as advance:
            METHODS[method].run(backbone, runs, done, RunContext(on_progress=advance))
