"""Reading results: a table of runs and tests, single runs, learned contexts, predictions; and merging folders."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcoop.errors import UserError
from fastcoop.sweeps.about import merge_about
from fastcoop.sweeps.store import (
    CONTEXTS,
    DATABASE,
    VERSION,
    advice,
    contexts_path,
    open_store,
    tests_by_run,
)

if TYPE_CHECKING:
    import pandas as pd

CONFLICTS_NAMED = 5


def load_results(folder: str | Path) -> pd.DataFrame:
    """The results table.

    One row per run and dataset that it is tested on. ``dataset`` is the tested one, ``source`` the one that
    the run learned from; they differ under shift only. ``shots`` is 0 for what learns nothing. ``accuracy``,
    ``macro_accuracy`` and ``chance`` are in percent; ``settings``, ``extra``, ``losses``, ``per_class`` JSON.

    Raises:
        UserError: the folder holds no results, or they cannot be read.
    """
    import pandas as pd

    with _reading(Path(folder)) as db:
        frame = pd.read_sql_query("SELECT * FROM results ORDER BY finished, key", db)
    frame["class_specific"] = frame.class_specific.fillna(0).astype(bool)
    return frame


def load_runs(folder: str | Path) -> pd.DataFrame:
    """One row per run, tested or not: imported runs are there before anything has scored them.

    Raises:
        UserError: the folder holds no results, or they cannot be read.
    """
    import pandas as pd

    with _reading(Path(folder)) as db:
        return pd.read_sql_query("SELECT * FROM runs ORDER BY finished, key", db)


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
        raise UserError(
            f"{folder} has {how} whose key begins with {key}; `fastcoop results list` shows the keys."
        )
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
            classes = dict(zip(json.loads(names), json.loads(per_class), strict=True))
            tests[dataset] = {
                "accuracy": accuracy, "macro_accuracy": macro, "chance": chance, "per_class": classes,
            }  # fmt: skip
    run = dict(row)
    for name in ("settings", "losses", "extra", "versions"):
        run[name] = json.loads(run[name]) if run[name] else None
    path = contexts_path(Path(folder), key)
    return run | {"contexts": str(path) if path.is_file() else None, "tests": tests}


def tested_runs(folder: str | Path) -> dict[str, dict[str, str]]:
    """Keys of the runs in a results folder, and the datasets that each has been tested on, with their digests.

    Raises:
        UserError: the folder holds no results, or they cannot be read.
    """
    with _reading(Path(folder)) as db:
        return tests_by_run(db)


def load_test_sets(folder: str | Path) -> pd.DataFrame:
    """One row per run (``key``) and ``dataset`` that it is tested on, and the digest of that dataset: its classes
    and splits (``test``).

    Raises:
        UserError: the folder holds no results, or they cannot be read.
    """
    import pandas as pd

    with _reading(Path(folder)) as db:
        return pd.read_sql_query("SELECT key, dataset, test FROM scores", db)


@dataclass(frozen=True)
class Predictions:
    """What a run said of each test image.

    Attributes:
        class_names: in label order.
        labels: int64 (images,), the truth.
        predicted: int64 (images,).
        confidence: float16 (images,), the softmax probability of the prediction.
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
        UserError: its file is damaged.
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
    contexts = arrays.pop("contexts", None)
    return Learned(contexts, arrays if contexts is None else None, names, ids, header.get("recipe"))


def merge_results(folders: Sequence[str | Path], into: str | Path) -> int:
    """Add the runs of several results folders to one, by key; returns how many were new.

    Raises:
        UserError: a folder cannot be read, or a run differs between two of them (both are named). Folders
            before the one at fault are merged.
    """
    target = Path(into)
    for folder in folders:
        with _reading(Path(folder)):
            pass  # refuses, before anything is written, what is no results folder
    with open_store(target):
        others = (folder for folder in map(Path, folders) if folder.resolve() != target.resolve())
        return sum(_merge_one(folder, target) for folder in others)


def _merge_one(folder: Path, target: Path) -> int:
    db = sqlite3.connect(target / DATABASE)
    try:
        db.execute("ATTACH ? AS other", (str(folder / DATABASE),))
        conflicts = db.execute(
            "SELECT key, dataset, ours.accuracy, theirs.accuracy "
            "FROM main.scores ours JOIN other.scores theirs USING (key, dataset) "
            "WHERE ours.predictions != theirs.predictions ORDER BY key, dataset"
        ).fetchall()
        if conflicts:
            named = "; ".join(
                f"run {key[:12]} on {dataset} came to {ours:.2f}% in {target} but to {theirs:.2f}% in {folder}"
                for key, dataset, ours, theirs in conflicts[:CONFLICTS_NAMED]
            )
            more = len(conflicts) - CONFLICTS_NAMED
            raise UserError(
                f"{named[:1].upper()}{named[1:]}{f'; and {more} more' if more > 0 else ''}. Find out which are right, "
                "and merge without the others; nothing of this folder was taken."
            )
        new = db.execute("SELECT key FROM other.runs WHERE key NOT IN (SELECT key FROM main.runs)").fetchall()
        (target / CONTEXTS).mkdir(exist_ok=True)
        for (key,) in new:
            if contexts_path(folder, key).is_file():
                shutil.copyfile(contexts_path(folder, key), contexts_path(target, key).with_suffix(".part"))
                contexts_path(target, key).with_suffix(".part").replace(contexts_path(target, key))
        with db:
            for table in ("runs", "tests", "scores"):
                db.execute(f"INSERT OR IGNORE INTO main.{table} SELECT * FROM other.{table}")
            db.execute("DELETE FROM main.failures WHERE key IN (SELECT key FROM main.scores)")
        merge_about(folder, target)
        return len(new)
    except (sqlite3.Error, OSError) as error:
        raise UserError(f"{folder} could not be merged into {target} ({error}); {advice(error)}") from None
    finally:
        db.close()


@contextmanager
def _reading(folder: Path) -> Iterator[sqlite3.Connection]:
    path = folder / DATABASE
    if not path.is_file():
        raise UserError(f"{folder} holds no results (no {DATABASE}); run `fastcoop sweep` into it first.")
    db = sqlite3.connect(path, timeout=30)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != VERSION:
            raise UserError(f"{path} was not written by this version of fastcoop.")
        yield db
    except (sqlite3.Error, OSError) as error:  # pandas wraps the one in the other
        cause = error.__cause__ or error
        raise UserError(f"{path} cannot be read ({cause}); {advice(cause)}") from None
    finally:
        db.close()
