"""The results of a study as reports read them: one row per run and test, in slices that may be drawn together."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml

from fastcoop import escape, results
from fastcoop.errors import UserError
from fastcoop.progress import counted
from fastcoop.reports import frames, series
from fastcoop.reports.style import name_of
from fastcoop.results import metadata

T = TypeVar("T")

WITHOUT_SCHEDULE = ("zero_shot", "ensemble", "linear_probe")  # every schedule's figures show their runs


@dataclass(frozen=True, eq=False)
class Slice:
    """Results that may be drawn together: one backbone, one training schedule, or two that are compared."""

    backbone: str
    schedule: str
    suffix: str  # of the names of its files
    everything: pd.DataFrame  # all tests, also on other datasets and on some of the classes
    has_only_schedule: bool  # whether no other slice has another schedule
    diverged: pd.DataFrame  # tests without an accuracy
    beside: str = ""  # a schedule that is compared with the paper's

    @property
    def runs(self) -> pd.DataFrame:
        """Tests on the training dataset of each run, all its classes."""
        frame = self.everything
        frame = frame[(frame.source == frame.dataset) & (frame.classes == "all")]
        learned = frame.dataset[frame.shots > 0].unique()
        return frame[frame.dataset.isin(learned)] if len(learned) else frame

    @property
    def short_title(self) -> str:
        """The backbone, with the schedule if the study has several."""
        return joined(self.backbone, "" if self.has_only_schedule else schedule_note(self.schedule))

    @property
    def subtitle(self) -> str:
        """The text on every figure: backbone, schedule unless it is the paper's, number of diverged runs."""
        note = schedule_note(self.schedule)
        if self.beside:
            note = f"{self.schedule} schedule and {schedule_note(self.beside)}"
        return joined(self.backbone, note, diverged_note(self.diverged))

    def name_of(self, name: str, length: float = 0) -> str:
        """Return a series' name in legends and tables, with the limits of a shortened linear probe."""
        labels = self.everything.label[self.everything.series == name].astype(str)
        limits = labels.str.extract(r"(\(.*\))", expand=False).dropna().unique()
        return " ".join([name_of(name, length), *(limits if name == "linear_probe" else ())])


@dataclass(frozen=True, eq=False)
class Study:
    """All runs of a results folder, one row for each test."""

    folder: Path
    runs: pd.DataFrame  # tests with an accuracy, of the latest of repeated runs
    diverged: pd.DataFrame  # tests without an accuracy
    repeated: pd.DataFrame  # tests of runs that were run again with the same settings and seed
    known: series.Known  # datasets by name, as the sweep recorded them
    failed: pd.DataFrame = field(default_factory=pd.DataFrame)  # runs with their ``error``
    untested: pd.DataFrame = field(default_factory=pd.DataFrame)  # runs without a test
    pictures: Any = None  # a `fastcoop.features.PictureFinder`; None: no pictures are shown
    chosen: tuple[str, ...] = ()  # keys of runs whose mistakes are shown; none: one run per dataset
    damaged: list[str] = field(default_factory=list)  # sentences on files that `read` could not read

    @property
    def backbones(self) -> list[str]:
        """The backbones as the grid names them (possibly by a path), else as the runs do."""
        return listed(self.folder, "backbones") or list(self.runs.backbone.unique())

    @property
    def datasets(self) -> list[str]:
        """The training datasets, likewise; the whole dataset in place of its halves."""
        names = listed(self.folder, "datasets") or self.runs.source
        return list(dict.fromkeys(re.sub(r":(base|new)$", "", name) for name in names))

    @cached_property
    def grid_text(self) -> str:
        """The text of the folder's ``grid.yaml``, empty if there is none."""
        path = self.folder / metadata.GRID
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    @property
    def places(self) -> list[str | Path]:
        """The ``--cache`` and ``--data-root`` options of the sweep, as ``grid.yaml`` records them."""
        return metadata.recorded_places(self.folder)

    @property
    def sweep_options(self) -> list[str | Path]:
        """The same, with ``--class-names`` where it was given: what a sweep of the same datasets takes."""
        return metadata.recorded_places(self.folder, (*metadata.PLACES, metadata.CLASS_NAMES))

    def read(self, what: Callable[[Path, str], T], key: str) -> T | None:
        """Return what a function reads from a file of a run; None, and an entry of ``damaged``, if it is damaged."""
        try:
            return what(self.folder, key)
        except UserError as error:
            self.damaged.extend({str(error)}.difference(self.damaged))
            return None

    def slices(self, paired: bool = False) -> list[Slice]:
        """Return one slice per backbone and schedule; methods without a schedule are in all of a backbone's.

        With ``paired``, the paper's schedule and a backbone's only other one are in one slice, if both trained a method
        in the same setting and on the same datasets.
        """
        found = {
            str(backbone): sorted(set(frame.schedule) - {""}) or ["paper"]
            for backbone, frame in self.runs.groupby("backbone", sort=False)
        }
        schedules = {schedule for given in found.values() for schedule in given}
        names = {**escape.file_names(found), **escape.file_names(schedules)}

        def one(backbone: str, schedule: str, beside: str = "") -> Slice:
            parts = [backbone] * (len(found) > 1) + [schedule] * (len(schedules) > 1 and not beside)
            suffix = "".join(f"-{names[part]}" for part in parts)
            runs, diverged = (
                frame[(frame.backbone == backbone) & frame.schedule.isin(("", schedule, beside))]
                for frame in (self.runs, self.diverged)
            )
            return Slice(backbone, schedule, suffix, runs, len(schedules) == 1, diverged, beside)

        slices = []
        for backbone, given in found.items():
            own = [one(backbone, schedule) for schedule in given]
            if paired and len(given) == 2 and "paper" in given:
                (other,) = set(given) - {"paper"}
                both = one(backbone, "paper", other)
                own = [both] if _compares(both) else own
            slices += own
        return slices


def across_backbones(study: Study, shots: float) -> dict[str, tuple[str, dict[str, pd.DataFrame]]]:
    """Return by schedule the suffix of its files, and by backbone the main runs at ``shots`` and without training.

    The main setting is that of all backbones together. Backbones without CoOp in it at ``shots`` are left out.
    """
    found: dict[str, tuple[str, dict[str, pd.DataFrame]]] = {}
    slices = study.slices()
    names = escape.file_names(piece.schedule for piece in slices)
    for piece in slices:
        rivals = pd.concat(one.runs for one in slices if one.schedule == piece.schedule)
        with suppress(frames.Missing):
            runs = frames.main_runs(piece.runs, frames.main_setting(rivals))
            runs = runs[runs.shots.isin((0.0, shots))]
            if (runs.method == "coop").any():
                suffix = "" if piece.has_only_schedule else f"-{names[piece.schedule]}"
                found.setdefault(piece.schedule, (suffix, {}))[1][piece.backbone] = runs
    return found


def lacking_note(study: Study, schedule: str, shown: Collection[str]) -> list[str]:
    """Return the note on backbones that `across_backbones` leaves out though CoOp was run on them; none for none."""
    coop = study.runs[(study.runs.method == "coop") & (study.runs.schedule == schedule)]
    names = ", ".join(str(name) for name in coop.backbone.unique() if name not in shown)
    return [f"Left out, since CoOp was run in another setting there: {names}."] * bool(names)


def read_study(folder: Path) -> Study:
    """Return the study in a results folder. Raises UserError if there is no run to report."""
    frame, untested = results.load_results(folder), results.load_untested(folder)
    if frame.empty and len(untested):
        words = ("fastcoop", "evaluate", folder, "--targets", evaluate_targets(untested))
        raise UserError(
            f"None of the {len(untested)} runs in {folder} was tested yet; run `{escape.shell_command(*words)}`, with "
            "--data-root and --cache if they are not data and cache."
        )
    moved = frame[frame.source != frame.dataset]
    tested = frame[frame.dataset.isin({*moved.source, *moved.dataset})].drop_duplicates("dataset")
    pairs = zip(tested.key, tested.dataset, strict=True)
    names = {name: results.load_predictions(folder, key, name).class_names for key, name in pairs}
    failed, untested = (_in_grid_order(part, folder) for part in (results.load_failures(folder), untested))
    return replace(study_of(frame, folder, names), failed=failed, untested=untested)


def evaluate_targets(untested: pd.DataFrame) -> str:
    """Return the training datasets of runs as ``fastcoop evaluate --targets`` takes them."""
    return ",".join(dict.fromkeys(untested.dataset))


def study_of(
    frame: pd.DataFrame, folder: str | Path, class_names: Mapping[str, Sequence[str]] | None = None
) -> Study:
    """Return the study in a results table.

    Shots become numbers, settings dictionaries, series are named, and runs that cannot be averaged are given different
    names. Where nothing is recorded, ``context_length`` is 0 and ``init`` "random". ``NAME:base`` and ``NAME:new`` are
    halves of the classes of NAME (column ``classes``).

    Args:
        frame: As `fastcoop.results.load_results` returns it.
        folder: The results folder.
        class_names: By dataset. They distinguish domain shift from transfer to other classes (column ``kind``); an
            unknown dataset counts as shifted.

    Raises:
        UserError: there is no finished run, or all runs diverged.
    """
    if frame.empty:
        raise UserError(f"{folder} holds no finished run; run `fastcoop sweep` into it first.")
    folder = Path(folder)
    known = metadata.recorded_datasets(folder)
    has_schedule = frame.schedule.notna() & ~frame.method.isin(WITHOUT_SCHEDULE)
    runs = frame.assign(
        schedule=frame.schedule.where(has_schedule, ""),
        shots=pd.to_numeric(frame.shots.replace("all", frames.ALL_SHOTS)),
        context_length=pd.to_numeric(frame.context_length).fillna(0.0),
        init=frame.init.fillna("random"),
        settings=frame.settings.map(json.loads),
        classes=frame.dataset.str.extract(r":(base|new)$", expand=False).fillna("all"),
    ).reset_index(drop=True)
    runs["schedule"] = series.plain_schedules(runs)
    runs["series"] = list(map(_series, frames.rows_of(runs)))
    runs["prompt"] = _foreign_prompts(runs, known)
    runs["kind"] = [_kind(*pair, class_names or {}) for pair in zip(runs.source, runs.dataset, strict=True)]
    runs = series.rename_datasets(series.rename_backbones(runs), known)
    runs["series"] = series.rename_series(runs, known)
    diverged, latest = runs.accuracy.isna(), series.latest_of_each(runs)
    if diverged.all():
        raise UserError(
            f"All {runs.key.nunique()} runs in {folder} diverged and have no accuracy; lower their learning rate."
        )
    parts = (runs[~diverged & latest], runs[diverged & latest], runs[~latest])
    finished, lost, repeated = (_in_grid_order(part, folder) for part in parts)
    return Study(folder, finished, lost, repeated, known)


def listed(folder: Path, axis: str) -> list[str]:
    """Return the values of an axis of the recorded grid and its blocks; none if there is no such axis, or no grid."""
    try:
        given = metadata.recorded_grid(folder)
    except (OSError, ValueError, yaml.YAMLError):
        return []
    blocks = given.get("blocks")
    scopes = [given, *(blocks.values() if isinstance(blocks, dict) else ())]
    found = [_texts(scope.get(axis, [])) for scope in scopes if isinstance(scope, dict)]
    return list(dict.fromkeys(name for names in found for name in names))


def _texts(given: Any) -> list[str]:
    """Return all names in a value of a grid: one, a list, or names of targets by sources."""
    if isinstance(given, dict):
        given = [one for pair in given.items() for one in pair]
    return [name for one in given for name in _texts(one)] if isinstance(given, list) else [str(given)]


def _in_grid_order(runs: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Sort runs by backbone and dataset in the grid's order, then by what they are, never by when they finished.

    Names that are not in the grid come last.
    """
    if runs.empty:
        return runs
    shots = runs.shots.replace("all", frames.ALL_SHOTS).astype(float)
    keys = [runs.label, shots, runs.seed, runs.key, runs.dataset]
    for column, more in (("dataset", listed(folder, "targets")), ("backbone", [])):
        names = [*(listed(folder, f"{column}s") or runs[column]), *more]
        order = {name: place for place, name in enumerate(dict.fromkeys(Path(one).name for one in names))}
        keys.insert(0, runs[column].map(lambda name, order=order: order.get(Path(name).name, len(order))))
    table = pd.concat(keys, axis=1, ignore_index=True)
    return runs.loc[table.sort_values([*table]).index].reset_index(drop=True)


def _kind(source: str, dataset: str, names: Mapping[str, Sequence[str]]) -> str:
    """Return "own", `TRANSFER` if most classes of the dataset are not the source's, else `SHIFT`."""
    if source == dataset:
        return "own"
    here, there = (set(map(_plain_class, names.get(name, ()))) for name in (dataset, source))
    return frames.TRANSFER if here and there and len(here & there) < len(here) / 2 else frames.SHIFT


def _plain_class(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").lower().split())


def _foreign_prompts(runs: pd.DataFrame, known: series.Known) -> list[str | None]:
    """Return the prompt of each run; None where a zero-shot test has the dataset's own, or none is recorded.

    A dataset's own prompt is the recorded one, else that of the latest test.
    """
    zero, given = runs.method == "zero_shot", runs.settings.map(lambda one: one.get("prompt"))
    tested = runs.prompts.map(
        lambda text: next(iter(json.loads(text)), None) if isinstance(text, str) else None
    )
    used = given.where(~zero | tested.isna(), tested)
    is_own = zero & given.isna() & tested.notna()
    own = dict(zip(runs.dataset[is_own], tested[is_own], strict=True))
    own |= {name: about["prompt"] for name, about in known.items() if "prompt" in about}
    return [
        None if method == "zero_shot" and series.equal_prompts(prompt, own.get(dataset)) else prompt
        for method, dataset, prompt in zip(runs.method, runs.dataset, used, strict=True)
    ]


def _series(run: Any) -> str:
    """Return a method's name with what distinguishes its curves."""
    if run.method == "coop":
        return f"coop {run.class_position or 'end'}{' csc' if run.class_specific else ''}"
    is_all = run.method == "ensemble" and run.settings.get("templates") == "all"
    return "ensemble all" if is_all else str(run.method)


def _compares(both: Slice) -> bool:
    """Return whether two schedules trained a variant of CoOp in the same setting, with averages over the same datasets.

    A schedule that was tried on some of the datasets would take the others out of the average.
    """
    coop = both.runs[both.runs.method == "coop"]
    groups = [frame for _, frame in coop.groupby("schedule")]
    if len(groups) < 2:
        return False
    one, other = map(frames.main_runs, groups)
    averaged = [frozenset(frames.averaged_datasets(runs, ["series", "shots"])) for runs in (one, other)]
    settings = [frames.main_setting(runs)[:2] for runs in (one, other)]
    return settings[0] == settings[1] and averaged[0] == averaged[1] and bool({*one.series} & {*other.series})


def joined(*texts: str) -> str:
    """Join the texts that are not empty by commas."""
    return ", ".join(filter(None, texts))


def diverged_note(diverged: pd.DataFrame) -> str:
    """Return the note of a figure on runs without an accuracy, empty if there are none."""
    return f"{counted(diverged.key.nunique(), 'diverged run')} left out" if len(diverged) else ""


def schedule_note(schedule: str) -> str:
    """Return the note of a figure on a training schedule, empty for the paper's."""
    if schedule == "paper":
        return ""
    if fast := re.match("fast(-half)?", schedule):
        return f"{fast.group()} schedule{schedule[fast.end() :]}"
    return "quick schedule: " + re.sub(r"^quick:?\s*", "", schedule)
