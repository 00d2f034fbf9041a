"""The results table as the reports see it: one row per run, named by series, sliced by backbone and
schedule."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import yaml

from fastcoop import escape
from fastcoop.errors import UserError
from fastcoop.methods.data import plain_name
from fastcoop.reports.apart import (
    latest_of_each,
    tell_backbones_apart,
    tell_datasets_apart,
    tell_settings_apart,
)
from fastcoop.reports.style import name_of

NEEDED = ("key", "backbone", "dataset", "method", "shots", "seed", "accuracy")
OPTIONAL = {
    "label": None, "context_length": np.nan, "class_position": None, "class_specific": False, "init": None,
    "epochs": np.nan, "schedule": None, "macro_accuracy": np.nan, "status": "done", "seconds": np.nan,
    "settings": "{}", "chance": np.nan, "source": None, "classes": "all", "per_class": None, "versions": None,
    "train_images": np.nan, "test": None, "images": None, "backbone_digest": None,
    "prompts": None,
}  # fmt: skip
UNTRAINED = (
    "zero_shot",
    "ensemble",
    "linear_probe",
)  # methods without epochs: every schedule shares their runs
AVERAGE = "Average"
SHIFT, TRANSFER = (
    "shift",
    "transfer",
)  # tests on other datasets: the source's classes seen otherwise, other classes
T = TypeVar("T")
ALL_SHOTS = math.inf  # how "all" training images compares with a count


class Missing(Exception):
    """The results do not hold what an item needs; the message says what to add to the grid."""


@dataclass(frozen=True, eq=False)
class Slice:
    """Results that may be drawn together: one backbone, one training schedule.

    ``runs`` holds tests on the dataset the run was trained on, all its classes; ``everything`` also holds
    tests under shift and on some of the classes. ``suffix`` tells this slice's files from another's;
    ``alone`` says that no other slice has another schedule. ``lost`` are tests of diverged runs that have no accuracy.
    """

    backbone: str
    schedule: str
    suffix: str
    everything: pd.DataFrame
    alone: bool = True
    lost: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def runs(self) -> pd.DataFrame:
        frame = self.everything
        frame = frame[(frame.source == frame.dataset) & (frame.classes == "all")]
        learned = frame.dataset[frame.shots > 0].unique()
        return frame[frame.dataset.isin(learned)] if len(learned) else frame

    @property
    def short(self) -> str:
        """The backbone, and the schedule only where the study has several: what tells this slice from the
        others."""
        return self.backbone if self.alone else self._title

    def name_of(self, series: str, length: float = 0) -> str:
        """A series' name in legends and tables: with the context length for CoOp, and with the effort of a linear
        probe that was given less than the official one."""
        if series != "linear_probe":
            return name_of(series, length)
        labels = self.everything.label[self.everything.series == series].dropna().astype(str)
        efforts = labels.str.extract(r"(\(.*\))", expand=False).dropna().unique()
        return " ".join([name_of(series, length), *efforts])

    @property
    def subtitle(self) -> str:
        """What every figure of the slice must say: the backbone, the schedule where it is not the paper's, and how many
        runs are left out because they diverged."""
        return ", ".join(filter(None, (self._title, lost_note(self.lost))))

    @property
    def _title(self) -> str:
        return ", ".join(filter(None, (self.backbone, schedule_note(self.schedule))))


@dataclass(frozen=True, eq=False)
class Study:
    """All runs of a results folder, one row each; ``failed`` are those that came to no result, with their ``error``,
    ``untested`` those that were tested on nothing yet.

    In no figure are ``lost``, the tests of diverged runs, which have no accuracy, and ``repeated``, runs that were done
    again later with the same settings and seed."""

    name: str
    folder: Path
    runs: pd.DataFrame
    failed: pd.DataFrame = field(default_factory=pd.DataFrame)
    lost: pd.DataFrame = field(default_factory=pd.DataFrame)
    repeated: pd.DataFrame = field(default_factory=pd.DataFrame)
    untested: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def backbones(self) -> list[str]:
        """Backbones as ``grid.yaml`` gives them (a path may stand for a name); without one, as the runs name them."""
        return self.specs("backbones", "backbone")

    @property
    def datasets(self) -> list[str]:
        """Datasets that runs learned from, in the same way; the whole one in place of its halves."""
        return list(
            dict.fromkeys(re.sub(r":(base|new)$", "", name) for name in self.specs("datasets", "source"))
        )

    @property
    def places(self) -> list[tuple[str, Path]]:
        """The ``--cache`` and ``--data-root`` of the sweep, where ``grid.yaml`` tells them."""
        try:
            words = shlex.split(self._grid_text().splitlines()[0].removeprefix("# "))
        except (ValueError, IndexError):
            return []
        return [(word, Path(place)) for word, place in pairwise(words) if word in ("--cache", "--data-root")]

    def specs(self, name: str, column: str) -> list[str]:
        given = [text for part in self.grids() if name in part for text in _texts(part[name])]
        return list(dict.fromkeys(given or self.runs[column]))

    def grids(self) -> list[dict[str, Any]]:
        """The folder's ``grid.yaml`` and its blocks; none where there is no file that can be read."""
        try:
            given = yaml.safe_load(self._grid_text())
        except (ValueError, yaml.YAMLError):
            return []
        if not isinstance(given, dict):
            return []
        blocks = given.get("blocks")
        parts = [given, *(blocks.values() if isinstance(blocks, dict) else ())]
        return [part for part in parts if isinstance(part, dict)]

    def _grid_text(self) -> str:
        try:
            return (self.folder / "grid.yaml").read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""

    def slices(self) -> list[Slice]:
        """One slice per backbone and schedule; methods without a schedule belong to all of a backbone's."""
        pairs: list[tuple[str, str, pd.DataFrame]] = []
        for backbone, frame in self.runs.groupby("backbone", sort=False):
            for schedule in sorted(set(frame.schedule) - {""}) or ["paper"]:
                pairs.append((str(backbone), schedule, frame[frame.schedule.isin(("", schedule))]))
        schedules, backbones = {p[1] for p in pairs}, {p[0] for p in pairs}
        names = {**escape.file_names(backbones), **escape.file_names(schedules)}
        slices = []
        for backbone, schedule, frame in pairs:
            parts = [backbone] * (len(backbones) > 1) + [schedule] * (len(schedules) > 1)
            suffix = "".join(f"-{names[part]}" for part in parts)
            lost = self.lost
            if len(lost):
                lost = lost[(lost.backbone == backbone) & lost.schedule.isin(("", schedule))]
            slices.append(Slice(backbone, schedule, suffix, frame, len(schedules) == 1, lost))
        return slices


def read_study(folder: Path) -> Study:
    """The study in a results folder. Raises UserError where there is no run to report."""
    from fastcoop.results import load_failures, load_results, load_untested

    frame, untested = load_results(folder), load_untested(folder)
    if frame.empty and len(untested):
        command = escape.shell_command(
            "fastcoop", "evaluate", Path(folder), "--targets", targets_of(untested)
        )
        raise UserError(
            f"None of the {len(untested)} runs in {folder} was tested yet; `{command}`, with --data-root and --cache "
            "where these are not data and cache, tests them."
        )
    moved = frame[frame.source != frame.dataset] if "source" in frame else frame.iloc[:0]
    tested = frame[frame.dataset.isin({*moved.source, *moved.dataset})].drop_duplicates("dataset")
    study = study_of(frame, Path(folder), _class_names(folder, tested))
    return replace(study, runs=in_grid_order(study), failed=load_failures(folder), untested=untested)


def targets_of(untested: pd.DataFrame) -> str:
    """The datasets that runs learned on, as ``fastcoop evaluate --targets`` takes them."""
    return ",".join(dict.fromkeys(untested.dataset))


def in_grid_order(study: Study) -> pd.DataFrame:
    """Datasets, targets and backbones in the order of the grid, not in that of finishing; what it does not name,
    after."""
    runs = study.runs
    targets = [part["targets"] for part in study.grids() if isinstance(part.get("targets"), dict)]
    moved = [name for one in targets for pair in one.items() for given in pair for name in _texts(given)]
    asked = {
        "dataset": [*study.specs("datasets", "dataset"), *moved],
        "backbone": study.specs("backbones", "backbone"),
    }
    for column, specs in asked.items():
        order = {name: place for place, name in enumerate(dict.fromkeys(Path(spec).name for spec in specs))}
        place = [order.get(Path(str(value)).name, len(order)) for value in runs[column]]
        runs = runs.iloc[np.argsort(place, kind="stable")]
    return runs.reset_index(drop=True)


def _texts(given: Any) -> list[str]:
    return [str(one) for one in given] if isinstance(given, list) else [str(given)]


def _class_names(folder: Path, tested: pd.DataFrame) -> dict[str, Sequence[str]]:
    if tested.empty:
        return {}
    from fastcoop.results import load_predictions

    return {
        row.dataset: load_predictions(folder, row.key, row.dataset).class_names for row in rows_of(tested)
    }


def read_datasets(folder: Path) -> dict[str, dict]:
    """{dataset: its classes, train, val and test images and prompt} as the sweep stored them; empty if it
    did not."""
    path = Path(folder) / "datasets.json"
    if not path.exists():
        return {}
    try:
        return {
            str(name): dict(about) for name, about in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a list of datasets as a sweep writes it ({error}); delete it and run the sweep again."
        ) from None


def study_of(
    frame: pd.DataFrame, folder: Path, class_names: Mapping[str, Sequence[str]] | None = None
) -> Study:
    """Check and complete a results table: missing optional columns filled, shots as numbers, series named.

    ``class_names`` by dataset tell a shift from a transfer to other classes (``kind``); where they are not
    known, it counts as a shift. "NAME:base" and "NAME:new" are halves of NAME's classes (``classes``)."""
    lacking = [name for name in NEEDED if name not in frame]
    if lacking:
        raise UserError(
            f"The results in {folder} lack the columns {', '.join(lacking)}; were they written by a sweep?"
        )
    if frame.empty:
        raise UserError(f"{folder} holds no finished run; run `fastcoop sweep` into it first.")
    runs = frame.reset_index(drop=True).copy()
    for name, default in OPTIONAL.items():
        if name not in runs:
            runs[name] = default
        elif not (default is None or default != default):
            runs[name] = runs[name].where(runs[name].notna(), default)
    runs["schedule"] = runs.schedule.where(runs.schedule.notna() & ~runs.method.isin(UNTRAINED), "")
    runs["source"] = runs.source.where(runs.source.notna(), runs.dataset)
    runs["class_specific"] = runs.class_specific.astype(bool)
    runs["shots"] = pd.to_numeric(runs.shots.replace("all", ALL_SHOTS), errors="coerce")
    runs["accuracy"] = pd.to_numeric(runs.accuracy, errors="coerce")
    settings = [settings_of(text) for text in runs.settings]
    facts = zip(runs.method, runs.class_position, runs.class_specific, settings, strict=True)
    runs["series"] = [_series(*row) for row in facts]
    known = read_datasets(folder)
    runs["prompt"] = _foreign_prompts(runs, settings, known)
    half = runs.dataset.str.extract(r":(base|new)$", expand=False)
    runs["classes"] = runs["classes"].where(half.isna(), half)
    names = class_names or {}
    runs["kind"] = [_kind(*pair, names) for pair in zip(runs.source, runs.dataset, strict=True)]
    runs = tell_datasets_apart(tell_backbones_apart(runs), known)
    runs["series"] = tell_settings_apart(runs, settings, known)
    lost = runs.accuracy.isna()
    if lost.all():
        raise UserError(
            f"All {runs.key.nunique()} runs in {folder} diverged and have no accuracy; lower their learning rate."
        )
    last = latest_of_each(runs)
    return Study(
        Path(folder).resolve().name,
        Path(folder),
        runs[~lost & last].reset_index(drop=True),
        lost=runs[lost & last],
        repeated=runs[~last],
    )


def _kind(source: str, dataset: str, names: Mapping[str, Sequence[str]]) -> str:
    """ "own", or how a dataset stands to the one learned on: most of its classes are also that one's, or not."""
    if source == dataset:
        return "own"
    here, there = ({plain_name(n) for n in names.get(name, ())} for name in (dataset, source))
    return TRANSFER if here and there and len(here & there) < len(here) / 2 else SHIFT


def _foreign_prompts(
    runs: pd.DataFrame, settings: Sequence[dict], known: Mapping[str, dict]
) -> list[str | None]:
    """The prompt of each zero-shot test that is not its dataset's own: the one that ``known`` has, else the one of the
    latest test; and that of each CoOp run that has one."""
    tested = [json.loads(text) if isinstance(text, str) else [] for text in runs.prompts]
    latest = {
        row.dataset: prompts[0]
        for row, prompts, given in zip(rows_of(runs), tested, settings, strict=True)
        if row.method == "zero_shot" and prompts and given.get("prompt") is None
    }
    found = []
    for row, prompts, given in zip(rows_of(runs), tested, settings, strict=True):
        prompt = given.get("prompt")
        if row.method == "zero_shot":
            prompt = prompts[0] if prompts else prompt
            own = known.get(row.dataset, {}).get("prompt", latest.get(row.dataset))
            if prompt is not None and _written(prompt) == _written(str(own)):
                prompt = None
        found.append(prompt)
    return found


def _written(prompt: str) -> str:
    return prompt.replace("{}", "[CLASS]")


def _series(method: str, position: str | None, specific: bool, settings: dict) -> str:
    """A method's name, with what tells its curves apart."""
    if method == "coop":
        return f"coop {position or 'end'}{' csc' if specific else ''}"
    return "ensemble all" if method == "ensemble" and settings.get("templates") == "all" else method


def settings_of(settings: object) -> dict:
    """A run's settings, given as JSON text or already as a mapping."""
    return dict(settings) if isinstance(settings, dict) else json.loads(str(settings) or "{}")


def lost_note(lost: pd.DataFrame) -> str:
    """What a drawing says about runs that have no accuracy: nothing where there are none."""
    number = lost.key.nunique() if len(lost) else 0
    return f"{number} diverged run{'s' * (number != 1)} left out" if number else ""


def schedule_note(schedule: str) -> str:
    """What a drawing says about a training schedule: nothing for the paper's own."""
    if schedule == "paper":
        return ""
    return "quick schedule: " + re.sub(r"^quick:?\s*", "", schedule)


def main_setting(runs: pd.DataFrame) -> tuple[float, str]:
    """(context length, init) of the runs that stand for CoOp: the paper's 16 and "random", else what most
    runs have."""
    coop = runs[runs.method == "coop"]
    if coop.empty:
        raise Missing("there is no run of coop; add the method to the grid")
    inits = coop.init.fillna("random")
    init = "random" if (inits == "random").any() else str(inits.mode()[0])
    lengths = coop.context_length[inits == init]
    return (16.0 if (lengths == 16).any() else float(lengths.mode()[0])), init


def main_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Every run but those of CoOp with another context length or initialisation than the main one, and but
    zero-shot runs with other than the dataset's own prompt where both were run."""
    length, init = main_setting(runs)
    coop = runs.method == "coop"
    kept = runs[~coop | ((runs.context_length == length) & (runs.init.fillna("random") == init))]
    return own_prompt(kept)


def own_prompt(runs: pd.DataFrame) -> pd.DataFrame:
    """One zero-shot prompt per dataset: its own (``prompt`` None), else the first that was run."""
    zero = runs[runs.method == "zero_shot"]
    first = zero.sort_values("prompt", key=lambda prompts: prompts.notna(), kind="stable")
    chosen = first.drop_duplicates("dataset").set_index("dataset").prompt.fillna("")
    return runs[(runs.method != "zero_shot") | (runs.prompt.fillna("") == runs.dataset.map(chosen))]


def summarise(runs: pd.DataFrame, by: Sequence[str], value: str = "accuracy") -> pd.DataFrame:
    """Mean, standard deviation over seeds (n - 1; NaN for one run) and number of runs of each group."""
    grouped = runs.dropna(subset=[value]).groupby(list(by), sort=False, dropna=False)[value]
    return grouped.agg(mean="mean", std="std", runs="count").reset_index()


def average(runs: pd.DataFrame, by: Sequence[str], value: str = "accuracy") -> pd.DataFrame:
    """As `summarise`, of the mean over datasets. Only datasets present in every group count (see `complete`).

    The spread is that of the per-seed averages, over the seeds that every dataset has.
    """
    rows = []
    for key, group in runs.dropna(subset=[value]).groupby(list(by), sort=False, dropna=False):
        table = group.pivot_table(index="seed", columns="dataset", values=value, aggfunc="mean")
        seeds = table.dropna().mean(axis=1)
        std = seeds.std() if len(seeds) > 1 else np.nan
        rows.append((*(key if isinstance(key, tuple) else (key,)), table.mean().mean(), std, len(group)))
    return pd.DataFrame(rows, columns=[*by, "mean", "std", "runs"])


def complete(runs: pd.DataFrame, by: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """(runs of the datasets that have every group of ``by`` found anywhere, the names of the other
    datasets)."""
    counts = runs.drop_duplicates([*by, "dataset"]).groupby("dataset", sort=False).size()
    groups = len(runs.drop_duplicates(list(by)))
    whole = [name for name in counts.index if counts[name] == groups]
    return runs[runs.dataset.isin(whole)], [name for name in counts.index if name not in whole]


def shots_text(shots: float) -> str:
    """``"16"``, or ``"all"``."""
    return "all" if shots == ALL_SHOTS else f"{int(shots)}"


def in_shots(shots: float) -> str:
    """``"16 shots"``, ``"1 shot"``, or ``"all shots"``."""
    return "1 shot" if shots == 1 else f"{shots_text(shots)} shots"


def rows_of(frame: pd.DataFrame) -> Iterator[Any]:
    """The rows of a table as named tuples (pandas' own types forbid the use of their values)."""
    return iter(frame.itertuples(index=False))


def panels(runs: pd.DataFrame, by: Sequence[str]) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """({name: summary}, notes): the average over datasets first, then each dataset.

    With one dataset there is no average. Datasets that lack a group of ``by`` stay out of it, and a note
    says so."""
    found = {str(name): summarise(frame, by) for name, frame in runs.groupby("dataset", sort=False)}
    whole, others = complete(runs, by)
    if len(found) > 1 and not whole.empty:
        found = {f"{AVERAGE} over {whole.dataset.nunique()} datasets": average(whole, by), **found}
    if len(found) > 1 and others:
        return found, [
            f"The average leaves out {', '.join(others)}, where some of the runs compared are missing."
        ]
    return found, []


def most_shots(runs: pd.DataFrame) -> float:
    """The training set size that end results are compared at: the paper's 16, else the largest that CoOp
    was run at.

    Raises Missing where there is no run of CoOp.
    """
    shots = runs.shots[runs.method == "coop"]
    if shots.empty:
        raise Missing("there is no run of coop; add the method to the grid")
    return 16.0 if (shots == 16).any() else float(shots.max())


def per_slice(study: Study, make: Callable[[Slice], list[T]]) -> list[T]:
    """The parts ``make`` gives for each slice. Raises Missing, with every slice's reason, where none gives
    any."""
    parts: list[T] = []
    reasons: dict[str, list[str]] = {}
    for piece in study.slices():
        try:
            parts += make(piece)
        except Missing as why:
            reasons.setdefault(str(why), []).append(piece.backbone)
    if not parts:
        raise Missing(
            "; ".join(reasons)
            if len(reasons) == 1
            else "; ".join(f"{', '.join(b)}: {r}" for r, b in reasons.items())
        )
    return parts
