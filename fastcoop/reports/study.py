"""The results of a study as reports read them: one row per run and test, in slices that may be drawn together."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from fastcoop import escape, results
from fastcoop.errors import UserError
from fastcoop.reports.frames import ALL_SHOTS, SHIFT, TRANSFER, rows_of
from fastcoop.reports.series import latest_of_each, rename_backbones, rename_datasets, rename_series
from fastcoop.reports.style import name_of
from fastcoop.results.metadata import GRID, recorded_datasets, recorded_grid

NEEDED = ("key", "backbone", "dataset", "method", "shots", "seed", "accuracy")
OPTIONAL = {
    "label": None, "context_length": np.nan, "class_position": None, "class_specific": False, "init": None,
    "epochs": np.nan, "schedule": None, "macro_accuracy": np.nan, "status": "done", "seconds": np.nan,
    "settings": "{}", "chance": np.nan, "source": None, "classes": "all", "per_class": None, "versions": None,
    "train_images": np.nan, "test": None, "images": None, "backbone_digest": None, "prompts": None,
}  # fmt: skip
WITHOUT_SCHEDULE = ("zero_shot", "ensemble", "linear_probe")  # every schedule's figures show their runs


@dataclass(frozen=True, eq=False)
class Slice:
    """Results that may be drawn together: one backbone, one training schedule.

    Attributes:
        everything: All tests, also on other datasets and on some of the classes.
        suffix: Distinguishes this slice's files from those of other slices.
        has_only_schedule: Whether no other slice has another schedule.
        diverged: Tests of diverged runs, which have no accuracy.
    """

    backbone: str
    schedule: str
    suffix: str
    everything: pd.DataFrame
    has_only_schedule: bool = True
    diverged: pd.DataFrame = field(default_factory=pd.DataFrame)

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
        return (
            self.backbone if self.has_only_schedule else joined(self.backbone, schedule_note(self.schedule))
        )

    @property
    def subtitle(self) -> str:
        """The text on every figure: backbone, schedule unless it is the paper's, number of diverged runs."""
        return joined(self.backbone, schedule_note(self.schedule), diverged_note(self.diverged))

    def name_of(self, series: str, length: float = 0) -> str:
        """Return a series' name in legends and tables, with the limits of a shortened linear probe."""
        if series != "linear_probe":
            return name_of(series, length)
        labels = self.everything.label[self.everything.series == series].dropna().astype(str)
        limits = labels.str.extract(r"(\(.*\))", expand=False).dropna().unique()
        return " ".join([name_of(series, length), *limits])


@dataclass(frozen=True, eq=False)
class Study:
    """All runs of a results folder, one row for each test.

    Attributes:
        name: The folder's name.
        folder: The results folder.
        runs: Tests with an accuracy, of the latest of repeated runs.
        failed: Runs that failed, with their ``error``.
        untested: Runs without a test.
        diverged: Tests of diverged runs, which have no accuracy.
        repeated: Tests of runs that were run again with the same settings and seed.
        known: Datasets by name, as the sweep recorded them: number of classes and images, prompt.
    """

    name: str
    folder: Path
    runs: pd.DataFrame
    failed: pd.DataFrame = field(default_factory=pd.DataFrame)
    untested: pd.DataFrame = field(default_factory=pd.DataFrame)
    diverged: pd.DataFrame = field(default_factory=pd.DataFrame)
    repeated: pd.DataFrame = field(default_factory=pd.DataFrame)
    known: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def backbones(self) -> list[str]:
        """The backbones as the grid names them (possibly by a path), else as the runs do."""
        return self.names_in_grid("backbones", "backbone")

    @property
    def datasets(self) -> list[str]:
        """The training datasets, likewise; the whole dataset in place of its halves."""
        names = self.names_in_grid("datasets", "source")
        return list(dict.fromkeys(re.sub(r":(base|new)$", "", name) for name in names))

    @property
    def places(self) -> list[tuple[str, Path]]:
        """The ``--cache`` and ``--data-root`` options of the sweep, as ``grid.yaml`` records them."""
        try:
            words = shlex.split(self.grid_text().partition("\n")[0].removeprefix("# "))
        except ValueError:
            return []
        return [(word, Path(place)) for word, place in pairwise(words) if word in ("--cache", "--data-root")]

    def grid_text(self) -> str:
        """Return the text of the folder's ``grid.yaml``, empty if there is none."""
        try:
            return (self.folder / GRID).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""

    def names_in_grid(self, axis: str, column: str) -> list[str]:
        """Return the values of an axis of the grid, else those of a column of the runs."""
        given = [text for scope in self.grid_scopes() if axis in scope for text in _texts(scope[axis])]
        return list(dict.fromkeys(given or self.runs[column]))

    def grid_scopes(self) -> list[dict[str, Any]]:
        """Return the grid and its blocks; nothing if it cannot be read."""
        try:
            given = recorded_grid(self.folder)
        except (OSError, ValueError, yaml.YAMLError):
            return []
        blocks = given.get("blocks")
        scopes = [given, *(blocks.values() if isinstance(blocks, dict) else ())]
        return [scope for scope in scopes if isinstance(scope, dict)]

    def slices(self) -> list[Slice]:
        """Return one slice per backbone and schedule; methods without a schedule are in all of a backbone's."""
        pairs: list[tuple[str, str, pd.DataFrame]] = []
        for backbone, frame in self.runs.groupby("backbone", sort=False):
            for schedule in sorted(set(frame.schedule) - {""}) or ["paper"]:
                pairs.append((str(backbone), schedule, frame[frame.schedule.isin(("", schedule))]))
        backbones, schedules = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
        names = {**escape.file_names(backbones), **escape.file_names(schedules)}
        slices = []
        for backbone, schedule, frame in pairs:
            parts = [backbone] * (len(backbones) > 1) + [schedule] * (len(schedules) > 1)
            suffix = "".join(f"-{names[part]}" for part in parts)
            bad = self.diverged
            if len(bad):
                bad = bad[(bad.backbone == backbone) & bad.schedule.isin(("", schedule))]
            slices.append(Slice(backbone, schedule, suffix, frame, len(schedules) == 1, bad))
        return slices


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
    names = {
        row.dataset: results.load_predictions(folder, row.key, row.dataset).class_names
        for row in rows_of(tested)
    }
    study = study_of(frame, folder, names)
    return replace(study, runs=in_grid_order(study), failed=results.load_failures(folder), untested=untested)


def evaluate_targets(untested: pd.DataFrame) -> str:
    """Return the training datasets of runs as ``fastcoop evaluate --targets`` takes them."""
    return ",".join(dict.fromkeys(untested.dataset))


def in_grid_order(study: Study) -> pd.DataFrame:
    """Sort runs by the order of datasets, targets and backbones in the grid; names that are not in it come last."""
    runs = study.runs
    targets = [scope["targets"] for scope in study.grid_scopes() if isinstance(scope.get("targets"), dict)]
    moved = [name for one in targets for pair in one.items() for given in pair for name in _texts(given)]
    orders = {
        "dataset": [*study.names_in_grid("datasets", "dataset"), *moved],
        "backbone": study.names_in_grid("backbones", "backbone"),
    }
    for column, names in orders.items():
        order = {name: place for place, name in enumerate(dict.fromkeys(Path(one).name for one in names))}
        places = [order.get(Path(str(value)).name, len(order)) for value in runs[column]]
        runs = runs.iloc[np.argsort(places, kind="stable")]
    return runs.reset_index(drop=True)


def _texts(given: Any) -> list[str]:
    return [str(one) for one in given] if isinstance(given, list) else [str(given)]


def study_of(
    frame: pd.DataFrame, folder: Path, class_names: Mapping[str, Sequence[str]] | None = None
) -> Study:
    """Check and complete a results table.

    Missing optional columns are filled, shots become numbers, series are named, and runs that cannot be averaged are
    given different names. ``NAME:base`` and ``NAME:new`` are halves of the classes of NAME (column ``classes``).

    Args:
        frame: As `fastcoop.results.load_results` returns it.
        folder: The results folder.
        class_names: By dataset. They distinguish domain shift from transfer to other classes (column ``kind``); an
            unknown dataset counts as shifted.

    Raises:
        UserError: there is no finished run, or all runs diverged.
    """
    if lacking := [name for name in NEEDED if name not in frame]:
        raise UserError(
            f"Expected the results in {folder} to have the columns {', '.join(lacking)}, as a sweep writes them."
        )
    if frame.empty:
        raise UserError(f"{folder} holds no finished run; run `fastcoop sweep` into it first.")
    runs = frame.reset_index(drop=True).copy()
    for name, default in OPTIONAL.items():
        if name not in runs:
            runs[name] = default
        elif not (default is None or default != default):
            runs[name] = runs[name].where(runs[name].notna(), default)
    runs["schedule"] = runs.schedule.where(runs.schedule.notna() & ~runs.method.isin(WITHOUT_SCHEDULE), "")
    runs["source"] = runs.source.where(runs.source.notna(), runs.dataset)
    runs["class_specific"] = runs.class_specific.astype(bool)
    runs["shots"] = pd.to_numeric(runs.shots.replace("all", ALL_SHOTS), errors="coerce")
    runs["accuracy"] = pd.to_numeric(runs.accuracy, errors="coerce")
    settings = [settings_of(text) for text in runs.settings]
    columns = zip(runs.method, runs.class_position, runs.class_specific, settings, strict=True)
    runs["series"] = [_series(*row) for row in columns]
    known = recorded_datasets(folder)
    runs["prompt"] = _foreign_prompts(runs, settings, known)
    half = runs.dataset.str.extract(r":(base|new)$", expand=False)
    runs["classes"] = runs["classes"].where(half.isna(), half)
    pairs = zip(runs.source, runs.dataset, strict=True)
    runs["kind"] = [_kind(*pair, class_names or {}) for pair in pairs]
    runs = rename_datasets(rename_backbones(runs), known)
    runs["series"] = rename_series(runs, settings, known)
    diverged, latest = runs.accuracy.isna(), latest_of_each(runs)
    if diverged.all():
        raise UserError(
            f"All {runs.key.nunique()} runs in {folder} diverged and have no accuracy; lower their learning rate."
        )
    return Study(
        Path(folder).resolve().name,
        Path(folder),
        runs[~diverged & latest].reset_index(drop=True),
        diverged=runs[diverged & latest],
        repeated=runs[~latest],
        known=known,
    )


def _kind(source: str, dataset: str, names: Mapping[str, Sequence[str]]) -> str:
    """Return "own", `TRANSFER` if most classes of the dataset are not the source's, else `SHIFT`."""
    if source == dataset:
        return "own"
    here, there = (set(map(_plain_class, names.get(name, ()))) for name in (dataset, source))
    return TRANSFER if here and there and len(here & there) < len(here) / 2 else SHIFT


def _plain_class(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").lower().split())


def _foreign_prompts(
    runs: pd.DataFrame, settings: Sequence[dict[str, Any]], known: Mapping[str, Mapping[str, Any]]
) -> list[str | None]:
    """Return the prompt of each zero-shot test unless it is its dataset's own, and that of each CoOp run that has one.

    A dataset's own prompt is the recorded one, else that of the latest test.
    """
    tested = [json.loads(text) if isinstance(text, str) else [] for text in runs.prompts]
    rows = list(zip(rows_of(runs), tested, settings, strict=True))
    latest = {
        row.dataset: prompts[0]
        for row, prompts, given in rows
        if row.method == "zero_shot" and prompts and given.get("prompt") is None
    }
    found = []
    for row, prompts, given in rows:
        prompt = given.get("prompt")
        if row.method == "zero_shot":
            prompt = prompts[0] if prompts else prompt
            own = str(known.get(row.dataset, {}).get("prompt", latest.get(row.dataset)))
            if prompt is not None and prompt.replace("{}", "[CLASS]") == own.replace("{}", "[CLASS]"):
                prompt = None
        found.append(prompt)
    return found


def _series(method: str, position: str | None, specific: bool, settings: dict[str, Any]) -> str:
    """Return a method's name with what distinguishes its curves."""
    if method == "coop":
        return f"coop {position or 'end'}{' csc' if specific else ''}"
    return "ensemble all" if method == "ensemble" and settings.get("templates") == "all" else method


def settings_of(settings: object) -> dict[str, Any]:
    """Return a run's settings, given as JSON or as a mapping."""
    return dict(settings) if isinstance(settings, dict) else json.loads(str(settings) or "{}")


def joined(*texts: str) -> str:
    """Join the texts that are not empty by commas."""
    return ", ".join(filter(None, texts))


def diverged_note(diverged: pd.DataFrame) -> str:
    """Return the note of a figure on runs without an accuracy, empty if there are none."""
    number = diverged.key.nunique() if len(diverged) else 0
    return f"{number} diverged run{'s' * (number != 1)} left out" if number else ""


def schedule_note(schedule: str) -> str:
    """Return the note of a figure on a training schedule, empty for the paper's."""
    return "" if schedule == "paper" else "quick schedule: " + re.sub(r"^quick:?\s*", "", schedule)
