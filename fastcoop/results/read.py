"""Reading results: a table of runs and tests, single runs, learned contexts, predictions; and merging folders."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcoop import escape
from fastcoop.checks import several
from fastcoop.errors import UserError
from fastcoop.files import atomic_write
from fastcoop.grids.plan import TestFacts
from fastcoop.methods.scores import NO_CLASS, percent
from fastcoop.results.about import merge_about
from fastcoop.results.schema import (
    RUN_COLUMNS,
    SCORE_COLUMNS,
    TEST_COLUMNS,
    VERSION,
    VIEW_COLUMNS,
    show_as_current,
    version_of,
)
from fastcoop.results.store import (
    BUSY_TIMEOUT,
    CONTEXTS,
    DATABASE,
    NEAREST_WORDS,
    advice,
    contexts_path,
    digest_of_arrays,
    insist,
    open_store,
    tests_by_run,
)

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("fastcoop")

CONFLICTS_NAMED = 5
READING_TIMEOUT = 30.0  # seconds that a reader waits for another program's lock


def load_results(folder: str | Path) -> pd.DataFrame:
    """The results table.

    One row per run and dataset that it is tested on. ``dataset`` is the tested one, ``source`` the one that
    the run learned from; they differ under shift only. ``shots`` is 0 for what learns nothing. ``accuracy``,
    ``macro_accuracy`` and ``chance`` are in percent, the first two NaN where a run diverged to outputs that are not
    finite; ``settings``, ``extra``, ``losses``, ``per_class``, ``prompts`` JSON. ``test`` and ``features`` are digests
    of what was tested on, ``backbone_digest`` that of the weights. Columns of a method's own follow.

    Raises:
        UserError: the folder holds no results, or they cannot be read.
    """
    import pandas as pd

    with _reading(Path(folder)) as db:
        query = f"SELECT {', '.join(VIEW_COLUMNS)} FROM scores JOIN runs USING (key)"
        frame = pd.read_sql_query(f"{query} ORDER BY finished, key", db)
    frame["class_specific"] = frame.class_specific.fillna(0).astype(bool)
    for name in ("accuracy", "macro_accuracy"):
        frame[name] = frame[name].astype(float)
    return _with_own_columns(frame)


def load_runs(folder: str | Path) -> pd.DataFrame:
    """One row per run, tested or not: imported runs are there before anything has scored them.

    Raises:
        UserError: the folder holds no results, or they cannot be read.
    """
    import pandas as pd

    with _reading(Path(folder)) as db:
        frame = pd.read_sql_query("SELECT * FROM runs ORDER BY finished, key", db)
    return _with_own_columns(frame)


def load_untested(folder: str | Path) -> pd.DataFrame:
    """One row per run that was tested on nothing yet, as imported ones are at first.

    Raises:
        UserError: the folder holds no results, or they cannot be read.
    """
    runs = load_runs(folder)
    return runs[~runs.key.isin(load_results(folder).key)]


def _with_own_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """A table with its JSON column ``columns`` spread into a column for each of its names."""
    own = [json.loads(text) for text in frame.pop("columns")]
    for name in dict.fromkeys(name for row in own for name in row):
        frame[name] = [row.get(name) for row in own]
    return frame


def load_failures(folder: str | Path) -> pd.DataFrame:
    """Runs that failed and were not done since, with their ``error``; one row each, none in older folders.

    Raises:
        UserError: the folder holds no results, or they cannot be read.
    """
    import pandas as pd

    with _reading(Path(folder)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'failures'").fetchone():
            return pd.DataFrame()
        return pd.read_sql_query("SELECT * FROM failures ORDER BY failed, key", db)


def find_run(folder: str | Path, key: str) -> str:
    """The whole key of the run whose key begins with ``key``.

    Raises:
        UserError: there is none, or more than one.
    """
    with _reading(Path(folder)) as db:
        query = "SELECT key FROM runs WHERE substr(key, 1, ?) = ? LIMIT 2"
        found: list[str] = [row[0] for row in db.execute(query, (len(key), key.lower()))]
    if len(found) != 1:
        how = "more than one run" if found else "no run"
        command = escape.shell_command("fastcoop", "results", "list", folder)
        raise UserError(f"{folder} has {how} whose key begins with {key}; `{command}` shows the keys.")
    return found[0]


def load_run(folder: str | Path, key: str) -> dict[str, Any]:
    """All that is kept of a run but its predictions and contexts: the columns of ``runs``, with JSON read, and
    ``tests``, per dataset its accuracies and, by class name, those ``per_class``.

    Raises:
        UserError: there is no such run, or it cannot be read.
    """
    with _reading(Path(folder)) as db:
        db.row_factory = sqlite3.Row
        row = db.execute("SELECT * FROM runs WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise UserError(f"{folder} has no run {key}.")
        query = (
            "SELECT scores.dataset, accuracy, macro_accuracy, chance, per_class, class_names FROM scores "
            "JOIN tests ON test = digest WHERE key = ?"
        )
        tests = {}
        for dataset, accuracy, macro, chance, per_class, names in db.execute(query, (key,)):
            classes = dict(zip(_told_apart(json.loads(names)), json.loads(per_class), strict=True))
            tests[dataset] = {
                "accuracy": accuracy, "macro_accuracy": macro, "chance": chance, "per_class": classes,
            }  # fmt: skip
    run = dict(row)
    for name in ("settings", "losses", "extra", "versions"):
        run[name] = json.loads(run[name]) if run[name] else None
    run |= json.loads(run.pop("columns"))
    path = contexts_path(Path(folder), key)
    return run | {"contexts": str(path) if path.is_file() else None, "tests": tests}


def _told_apart(names: Sequence[str]) -> list[str]:
    """Class names, those that are equal numbered: "crane", "crane (2)"."""
    counts: Counter[str] = Counter()
    apart = []
    for name in names:
        counts[name] += 1
        apart.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return apart


def tested_runs(folder: str | Path) -> dict[str, dict[str, TestFacts]]:
    """Keys of the runs in a results folder, and what each test depended on, by dataset.

    Raises:
        UserError: the folder holds no results, or they cannot be read.
    """
    with _reading(Path(folder)) as db:
        return tests_by_run(db)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a run said of each test image.

    Attributes:
        class_names: in label order.
        labels: int64 (images,), the truth.
        predicted: int64 (images,); -1 where the run's outputs are not finite.
        confidence: float16 (images,), the softmax probability of the prediction; NaN where there is none.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray


def load_predictions(folder: str | Path, key: str, dataset: str | None = None) -> Predictions:
    """A run's predictions on a dataset it was tested on; None is its own.

    Raises:
        UserError: there is no such run or test.
    """
    query = (
        "SELECT class_names, labels, predictions, confidence FROM scores JOIN runs USING (key) JOIN tests ON "
        "test = digest WHERE key = ? AND scores.dataset = coalesce(?, runs.dataset)"
    )
    with _reading(Path(folder)) as db:
        row = db.execute(query, (key, dataset)).fetchone()
    if row is None:
        raise UserError(f"{folder} has no run {key}{f' tested on {dataset}' if dataset else ''}.")
    labels, predicted = (np.frombuffer(blob, dtype="<u2").astype(np.int64) for blob in row[1:3])
    predicted[predicted == NO_CLASS] = -1
    return Predictions(tuple(json.loads(row[0])), labels, predicted, np.frombuffer(row[3], dtype="<f2"))


def load_contexts(folder: str | Path, key: str) -> np.ndarray:
    """The contexts that a run learned, float32 (M, width), or (classes, M, width) if class-specific.

    Raises:
        UserError: there is no file of them, or it is damaged.
    """
    learned = load_learned(folder, key)
    if learned is None or learned.contexts is None:
        raise UserError(f"{folder} has no learned contexts for run {key}.")
    return learned.contexts


@dataclass(frozen=True, eq=False)
class Learned:
    """What a run learned, and on which classes.

    Attributes:
        contexts: float32 (M, width) or (classes, M, width), of prompt learning; else None.
        weights: arrays by name, of other methods; else None.
        class_names, class_ids: of the dataset learned on, in label order; empty in files that do not say.
        recipe: of the image transforms behind the features; None in files that do not say.
    """

    contexts: np.ndarray | None
    weights: dict[str, np.ndarray] | None
    class_names: tuple[str, ...] = ()
    class_ids: tuple[str, ...] = ()
    recipe: str | None = None


def load_learned(folder: str | Path, key: str) -> Learned | None:
    """What a run learned; None where nothing is kept of it.

    Raises:
        UserError: its file is damaged, or another run's.
    """
    from safetensors import SafetensorError, safe_open

    path = contexts_path(Path(folder), key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names, ids = (tuple(json.loads(header.get(part, "[]"))) for part in ("class_names", "class_ids"))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy.") from None
    found = digest_of_arrays(arrays)
    if header.get("key", key) != key or header.get("sha256", found) != found:
        raise UserError(
            f"{path} is damaged: it does not hold what was written for run {key[:12]}; restore it from a copy."
        )
    contexts = arrays.pop("contexts", None)
    return Learned(contexts, arrays if contexts is None else None, names, ids, header.get("recipe"))


def merge_results(folders: Sequence[str | Path], into: str | Path) -> int:
    """Add the runs of several results folders to one, by key; returns how many were new.

    Raises:
        UserError: a folder cannot be read, or a run differs between two of them (both are named). Folders
            before the one at fault are merged.
    """
    target, folders = Path(into), several(folders)
    for folder in folders:
        with _reading(Path(folder)):
            pass  # refuses, before anything is written, what is no results folder
    with open_store(target):
        others = (folder for folder in map(Path, folders) if folder.resolve() != target.resolve())
        return sum(_merge_one(folder, target) for folder in others)


def _merge_one(folder: Path, target: Path) -> int:
    db = sqlite3.connect(target / DATABASE, timeout=BUSY_TIMEOUT, isolation_level=None)
    try:
        db.execute("ATTACH ? AS other", (str(folder / DATABASE),))
        show_as_current(db, "other", "other_")
        insist(db, "BEGIN IMMEDIATE")
        conflicts = db.execute(
            "SELECT key, ours.dataset, ours.accuracy, theirs.accuracy, "
            "CASE WHEN ours.test != theirs.test OR ours.images != theirs.images THEN ' (two datasets called ' || "
            "ours.dataset || ')' WHEN ours.prompts != theirs.prompts THEN ' (with other prompts)' "
            "WHEN here.train_files != there.train_files THEN ' (learned from other images)' ELSE '' END AS how "
            "FROM main.scores ours JOIN other_scores theirs USING (key, dataset) "
            "JOIN main.runs here USING (key) JOIN other_runs there USING (key) "
            "WHERE ours.predictions != theirs.predictions OR how != '' ORDER BY key, ours.dataset"
        ).fetchall()
        if conflicts:
            raise UserError(_conflict_text(conflicts, folder, target))
        new = db.execute("SELECT key FROM other_runs WHERE key NOT IN (SELECT key FROM main.runs)").fetchall()
        (target / CONTEXTS).mkdir(exist_ok=True)
        for (key,) in new:
            if contexts_path(folder, key).is_file():
                with atomic_write(contexts_path(target, key)) as part:
                    shutil.copyfile(contexts_path(folder, key), part)
        for table, columns in (("runs", RUN_COLUMNS), ("tests", TEST_COLUMNS), ("scores", SCORE_COLUMNS)):
            names = ", ".join(columns)
            db.execute(f"INSERT OR IGNORE INTO main.{table} ({names}) SELECT {names} FROM other_{table}")
        db.execute("DELETE FROM main.failures WHERE key IN (SELECT key FROM main.scores)")
        insist(db, "COMMIT")
        merge_about(folder, target)
        for path in (folder / NEAREST_WORDS).glob("*.json"):
            if not (copy := target / NEAREST_WORDS / path.name).exists():
                copy.parent.mkdir(exist_ok=True)
                with atomic_write(copy) as part:
                    shutil.copyfile(path, part)
        _warn_of_failures(folder)
        return len(new)
    except (sqlite3.Error, OSError) as error:
        with suppress(OSError):  # where other runs' contexts are in it
            (target / CONTEXTS).rmdir()
        raise UserError(f"{folder} could not be merged into {target} ({error}); {advice(error)}") from None
    finally:
        db.close()


def _warn_of_failures(folder: Path) -> None:
    """Say how many runs of a folder failed, which are not merged."""
    if failed := len(load_failures(folder)):
        command = escape.shell_command("fastcoop", "results", "list", folder, "--status", "failed")
        log.warning("%d run(s) of %s failed and are not merged; `%s` shows them.", failed, folder, command)


def _conflict_text(conflicts: Sequence[tuple[str, str, Any, Any, str]], folder: Path, target: Path) -> str:
    named = "; ".join(
        f"the accuracy of run {key[:12]} on {dataset} is {percent(ours)} in {target} but {percent(theirs)} in {folder}"
        + how
        for key, dataset, ours, theirs, how in conflicts[:CONFLICTS_NAMED]
    )
    more = len(conflicts) - CONFLICTS_NAMED
    return (
        f"{named[:1].upper()}{named[1:]}{f'; and {more} more' if more > 0 else ''}. Merge only the folder "
        f"whose results are right; nothing of {folder} was merged."
    )


@contextmanager
def _reading(folder: Path) -> Iterator[sqlite3.Connection]:
    path = folder / DATABASE
    if not path.is_file():
        raise UserError(f"{folder} holds no results (no {DATABASE}); run `fastcoop sweep` into it first.")
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)
    try:
        # A snapshot, held only until the block ends: a sweep cannot write while it is.
        db.execute("BEGIN")
        insist(db, "SELECT 1 FROM sqlite_master", READING_TIMEOUT)
        version = version_of(db)
        if version == 0:
            raise UserError(f"{folder} holds no results yet; run `fastcoop sweep` into it first.")
        if version not in (1, VERSION):
            raise UserError(f"{path} was not written by this version of fastcoop.")
        show_as_current(db)
        yield db
    except (sqlite3.Error, OSError) as error:  # pandas wraps the one in the other
        cause = error.__cause__ or error
        raise UserError(f"{path} cannot be read ({cause}); {advice(cause)}") from None
    finally:
        db.close()
