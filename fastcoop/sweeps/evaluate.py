"""What was learned on one dataset, tested on others: no training, and the tests join the run in its results folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop import escape
from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.backbones.load import check_device
from fastcoop.backbones.precision import fresh_state
from fastcoop.checks import several
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError, nearest
from fastcoop.features import (
    FeatureStore,
    cache_all,
    find_dataset,
    open_current,
    open_if_there,
    store_path,
)
from fastcoop.features.images import RECIPES
from fastcoop.grids.planning import refuse_long_prompts, refuse_shared_names
from fastcoop.methods import METHODS, Data, Outcome, RunContext, RunSpec
from fastcoop.progress import progress
from fastcoop.results.metadata import add_datasets, recorded_grid
from fastcoop.results.parameters import Parameters, load_parameters
from fastcoop.results.read import (
    load_predictions,
    load_results,
    load_runs,
    load_score_inputs,
)
from fastcoop.results.records import ScoreInputs
from fastcoop.results.store import open_store
from fastcoop.sweeps.records import describe_datasets, missing_tests, read_settings, record_outcome

log = logging.getLogger("fastcoop")


@dataclass(frozen=True)
class Tested:
    """One test of one run.

    Attributes:
        accuracy, macro_accuracy: in percent; NaN where the run's outputs are not finite.
        new: whether the test was made now.
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
    device: str = "cpu",
    skip_unreadable: bool = False,
) -> list[Tested]:
    """Test runs of a results folder on further datasets, with these datasets' own class lists.

    Contexts, text transforms and biases and zero-shot prompts meet the target's class names; class-specific contexts
    and a linear probe answer with those of their classes that the target has, found by WordNet ID or by name. Runs
    that `fastcoop import-coop` brought are tested on their own dataset in the same way. Test features of the targets
    are cached first. What was tested before is not tested again.

    Args:
        results: a results folder.
        targets: datasets as a grid names them.
        runs: keys, or beginnings of keys; none is every run that can be tested on the targets. The others are
            then left out with a warning.
        backbones: of the runs, as a command line names them, where their names alone do not find them.
        data_root, cache: where datasets and feature stores lie.
        recipe: of the targets' image transforms; by default that of the features the runs learned from.
        device: of the towers.
        skip_unreadable: leave images out that cannot be decoded, and say which, instead of raising.

    Raises:
        UserError: no results, no such run, target or backbone, or runs named that cannot be tested on a target.
            Nothing has been recorded then.
    """
    folder, root = Path(results), Path(data_root) if data_root is not None else None
    targets, runs, backbones = several(targets), several(runs), several(backbones)
    if not targets:
        raise UserError("There is nothing to test on; name at least one dataset (--targets a,b).")
    if recipe is not None and recipe not in RECIPES:
        raise UserError(f'There is no recipe "{recipe}".{nearest(recipe, RECIPES)}')
    check_device(device)
    rows = _chosen(folder, runs)
    datasets = [find_dataset(spec, root) for spec in dict.fromkeys(targets)]
    refuse_shared_names("datasets", {str(dataset.root): dataset for dataset in datasets})
    found = _backbones(rows, backbones, device)
    recipe = recipe or _recipe(folder, rows)
    planned = _plan(folder, rows, datasets, found, strict=bool(runs))
    _refuse_other_datasets(folder, planned, cache)
    with open_store(folder) as store:
        for backbone, data in _targets(planned):
            with suppress(UserError):  # refused when it is needed
                path = store_path(cache, backbone, data.dataset)
                data.store = open_if_there(path, backbone, data.dataset, only_unchanged=True)
        tested = store.finished()
        swept = {row.key for row in rows if "imported_epoch" not in row.extra}
        _refuse_other_features(folder, planned, tested, swept)
        pending = _lacking(planned, tested)
        pending += [run for run in planned if any(data.store is None for data in run.targets)]
        used = list({run.model.digest: run.model for run in pending}.values())
        for _ in cache_all(
            used, [(data, (), ()) for data in datasets], cache, views=0, recipe=recipe,
            skip_unreadable=skip_unreadable, retry_skipped=False,
        ):  # fmt: skip
            pass
        for backbone, data in _targets(pending):
            data.store = open_current(store_path(cache, backbone, data.dataset), backbone, data.dataset)
        _refuse_other_features(folder, planned, tested, swept)
        pending = _lacking(planned, tested)
        add_datasets(folder, describe_datasets(datasets))
        _test(pending, partial(record_outcome, store))
    return _report(folder, planned, {(run.key, data.name) for run in pending for data in run.targets})


def _targets(runs: Iterable[RunSpec[Any]]) -> Iterable[tuple[Backbone, Data]]:
    """Every target of the runs once, with its backbone."""
    return {id(data): (run.model, data) for run in runs for data in run.targets}.values()


def _chosen(folder: Path, runs: Sequence[str]) -> list[Any]:
    """Rows of the runs' table, of all runs or those whose keys begin so."""
    rows: list[Any] = list(load_runs(folder).itertuples())
    for run in runs:
        if not any(row.key.startswith(run) for row in rows):
            command = escape.shell_command("fastcoop", "results", "list", folder)
            raise UserError(f"{folder} has no run {run}; `{command}` shows what it has.")
    if not rows:
        raise UserError(f"{folder} holds no runs yet; run `fastcoop sweep` into it first.")
    return [row for row in rows if not runs or row.key.startswith(tuple(runs))]


def _recipe(folder: Path, rows: Iterable[Any]) -> str:
    """The recipe of image transforms that the runs learned from, as far as they say. Raises UserError for several."""
    learned = (load_parameters(folder, row.key) for row in rows)
    said = {one.recipe for one in learned if one is not None and one.recipe in RECIPES}
    if len(said) > 1:
        raise UserError(
            f"The runs of {folder} learned by several recipes of images ({', '.join(sorted(map(str, said)))}); "
            "choose runs of one (--run), or say which to test by (--recipe)."
        )
    return str(said.pop()) if said else recorded_grid(folder).get("recipe", "current")


def _backbones(rows: Iterable[Any], specs: Sequence[str], device: str) -> dict[str, Backbone]:
    """{digest: the backbone that runs learned over}. Raises UserError where one is not found, or has other weights."""
    found = {}
    for spec in specs:
        backbone = backbone_from_spec(spec, device=device)
        found[backbone.digest] = backbone
    for name, digest in {(row.backbone, row.backbone_digest) for row in rows}:
        if digest in found:
            continue
        try:
            backbone = backbone_from_spec(name, device=device)
        except UserError as error:
            raise UserError(
                f"The backbone {name} of these runs is not found by its name; give it with --backbone. ({error})"
            ) from None
        if backbone.digest != digest:
            raise UserError(
                f"The runs learned over {name} ({digest[:12]}), not over the {name} that is here "
                f"({backbone.digest[:12]}); give the right one with --backbone."
            )
        found[digest] = backbone
    return found


def _plan(
    folder: Path,
    rows: Sequence[Any],
    datasets: Sequence[Dataset],
    backbones: dict[str, Backbone],
    strict: bool,
) -> list[RunSpec[Any]]:
    """Each run with the targets it can be tested on. ``strict`` raises for what cannot be, else it is left out."""
    data = {digest: [Data(dataset, None) for dataset in datasets] for digest in backbones}
    planned, refused = [], []
    checked: set[tuple[Any, ...]] = set()
    for row in rows:
        method, fitting, backbone = METHODS[row.method], [], backbones[row.backbone_digest]
        try:
            run = _run(folder, row, backbone)
            for target in data[row.backbone_digest]:
                try:
                    tested = run.with_targets((target,))
                    method.check(tested)
                    refuse_long_prompts([tested], checked)
                    fitting.append(target)
                except UserError as error:
                    refused.append(error)
        except UserError as error:
            refused.append(error)
        if fitting:
            planned.append(run.with_targets(tuple(fitting)))
    if refused and (strict or not planned):
        raise refused[0]
    if refused:
        log.warning("%d tests cannot be done and are left out; the first: %s", len(refused), refused[0])
    return planned


def _refuse_other_datasets(folder: Path, planned: Sequence[RunSpec[Any]], cache: str | Path) -> None:
    """Raise UserError for a target of the same name as another dataset that its run was tested on: a run keeps one test
    of a name, and the new one would take the other's place."""
    tested = load_score_inputs(folder)
    digests: dict[int, set[str]] = {}
    for run in planned:
        for data in run.targets:
            before = tested.get(run.key, {}).get(data.name)
            if before is None:
                continue
            if id(data) not in digests:
                digests[id(data)] = _test_digests(data, store_path(cache, run.model, data.dataset))
            if before.test in digests[id(data)]:
                continue
            known = load_predictions(folder, run.key, data.name)
            raise UserError(
                f"Run {run.key[:12]} of {folder} was tested on another dataset called {data.name} "
                f"({len(known.class_names)} classes, {len(known.labels)} test images) than the one in "
                f"{data.dataset.root} ({len(data.class_names)} classes, {len(data.dataset.splits['test'])} test "
                "images), whose test would replace it; give this one another name, under name: of its YAML."
            )


def _refuse_other_features(
    folder: Path,
    planned: Sequence[RunSpec[Any]],
    tested: Mapping[str, Mapping[str, ScoreInputs]],
    swept: Collection[str],
) -> None:
    """Raise UserError for a test of a swept run on its own dataset over other features: the run's key stands for those
    that it was tested on, and the new test would take that one's place. Features not cached yet are passed over."""
    for run in (run for run in planned if run.key in swept):
        for data in run.targets:
            before = tested.get(run.key, {}).get(data.name)
            if data.name != run.dataset or before is None or before.features is None:
                continue
            if data.test_features not in (None, before.features):
                raise UserError(
                    f"Run {run.key[:12]} of {folder} was tested on its own dataset {data.name} over other features "
                    "than today's: the pictures, their recipe or how they were encoded changed. The new test would "
                    f"replace that one; leave {data.name} out of the targets, and sweep again for runs over today's."
                )


def _test_digests(data: Data, store: Path) -> set[str]:
    """What a test on ``data`` may be called: by all its test images, and without those that its store left out."""
    digests = {data.test_digest}
    if store.is_file():
        with suppress(UserError):  # of another dataset: refused, or told of, later
            digests.add(Data(data.dataset, FeatureStore.open(store, dataset=data.dataset)).test_digest)
    return digests


def _run(folder: Path, row: Any, backbone: Backbone) -> RunSpec[Any]:
    """A run as it was, without images, with what it learned. Raises UserError where it kept nothing."""
    method = METHODS[row.method]
    kept = load_parameters(folder, row.key) if method.learns else Parameters(None, {})
    if kept is None:
        raise UserError(
            f"Run {row.key[:12]} ({row.label}) keeps nothing that it could be tested by; name the targets in its grid "
            "and sweep it again."
        )
    arrays = [kept.contexts] if kept.contexts is not None else list((kept.weights or {}).values())
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(
            f"Run {row.key[:12]} ({row.label}, seed {row.seed}) diverged: what it learned is not finite, so it cannot "
            "be tested; choose other runs."
        )
    names = kept.class_names or load_predictions(folder, row.key).class_names
    bare = Dataset(row.dataset, folder, names, "{}", {}, "", row.dataset, folder, class_ids=kept.class_ids)
    return RunSpec.of(
        row.method,
        read_settings(method, row.settings),
        Data(bare, None),
        shots=int(row.shots) if str(row.shots).isdigit() else str(row.shots),
        seed=int(row.seed),
        contexts=kept.contexts,
        weights=kept.weights,
        backbone=backbone,
        key=row.key,
    )


def _lacking(
    planned: Sequence[RunSpec[Any]], tested: Mapping[str, Mapping[str, ScoreInputs]]
) -> list[RunSpec[Any]]:
    """The runs with those of their targets alone that they have not been tested on."""
    pending = []
    for run in planned:
        if left := missing_tests(run, tested.get(run.key, {})):
            pending.append(run.with_targets(left))
    return pending


def _test(pending: Sequence[RunSpec[Any]], record: Callable[[RunSpec[Any], Outcome], None]) -> None:
    groups: dict[tuple[str, str], list[RunSpec[Any]]] = {}
    for run in pending:
        groups.setdefault((run.method, run.model.digest), []).append(run)
    for (method, _), runs in groups.items():
        backbone = runs[0].model
        with progress(f"{backbone.name}: testing {len(runs)} {method} runs", len(runs)) as advance:

            def done(index: int, outcome: Outcome, runs: list[RunSpec[Any]] = runs) -> None:
                record(runs[index], outcome)

            METHODS[method].run(backbone, runs, done, RunContext(on_progress=advance))


def _report(folder: Path, planned: Sequence[RunSpec[Any]], new: Collection[tuple[str, str]]) -> list[Tested]:
    frame = load_results(folder).set_index(["key", "dataset"])
    tested = []
    for run in planned:
        for data in run.targets:
            row: Any = frame.loc[(run.key, data.name)]
            tested.append(
                Tested(
                    *(run.key, str(row.label), str(row.source), run.shots, run.seed, data.name),
                    *(float(row.accuracy), float(row.macro_accuracy), (run.key, data.name) in new),
                )
            )
    return tested
