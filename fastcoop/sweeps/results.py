"""Reading results: a table of runs and tests, learned contexts, predictions; and merging folders."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastcoop.errors import UserError
from fastcoop.sweeps.store import CONTEXTS, DATABASE, VERSION, advice, contexts_path, open_store

if TYPE_CHECKING:
    import pandas as pd


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


def tested_runs(folder: str | Path) -> dict[str, set[str]]:
    """Keys of the runs in a results folder, and the datasets that each has been tested on.

    Raises:
        UserError: the folder holds no results, or they cannot be read.
    """
    tested: dict[str, set[str]] = {}
    with _reading(Path(folder)) as db:
        for key, dataset in db.execute("SELECT key, dataset FROM scores"):
            tested.setdefault(key, set()).add(dataset)
    return tested


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
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = contexts_path(Path(folder), key)
    if not path.is_file():
        raise UserError(f"{folder} has no learned contexts for run {key}.")
    try:
        return load_file(path)["contexts"]
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy.") from None


def merge_results(folders: Sequence[str | Path], into: str | Path) -> int:
    """Add the runs of several results folders to one, by key; returns how many were new.

    Raises:
        UserError: a folder cannot be read, or a run differs between two of them (both are named). Folders
            before the one at fault are merged.
    """
    target = Path(into)
    added = 0
    for folder in map(Path, folders):
        with _reading(folder):
            pass  # refuses, before anything is written, what is no results folder
        with open_store(target):
            added += _merge_one(folder, target)
    return added


def _merge_one(folder: Path, target: Path) -> int:
    db = sqlite3.connect(target / DATABASE)
    try:
        db.execute("ATTACH ? AS other", (str(folder / DATABASE),))
        conflict = db.execute(
            "SELECT key, dataset, ours.accuracy, theirs.accuracy "
            "FROM main.scores ours JOIN other.scores theirs USING (key, dataset) "
            "WHERE ours.predictions != theirs.predictions LIMIT 1"
        ).fetchone()
        if conflict:
            key, dataset, ours, theirs = conflict
            raise UserError(
                f"Run {key[:12]} on {dataset} came to {ours:.2f}% in {target} but to {theirs:.2f}% in "
                f"{folder}; find out which is right before merging."
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
        return len(new)
    except sqlite3.Error as error:
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
    except sqlite3.Error as error:
        raise UserError(f"{path} cannot be read ({error}); {advice(error)}") from None
    finally:
        db.close()
