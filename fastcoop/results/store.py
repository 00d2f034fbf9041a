"""Write a results folder: one SQLite database, and a file beside it of what each run learned."""

from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.errors import UserError, writing
from fastcoop.files import PART, lock
from fastcoop.results.database import DATABASE, execute_when_unlocked, explained, writing_database
from fastcoop.results.metadata import DATASETS, GRID
from fastcoop.results.parameters import CONTEXTS, Parameters, write_parameters
from fastcoop.results.records import Batch, RunDescription, RunRecord, ScoreInputs, ScoreRecord
from fastcoop.results.schema import METHOD_COLUMNS, RESERVED_COLUMNS, WORK_TABLES

LOCK = "results.lock"
PACKAGES = ("fastcoop", "torch", "open_clip_torch", "scikit-learn", "numpy")  # that results may depend on
NEAREST_WORDS = "nearest_words"  # folder that `interpret` writes


class ResultsStore:
    """The runs of a results folder, and the only way to add to them.

    Each call that writes is one transaction, or part of the one of `together`. They raise UserError where the disk is
    full or cannot be written to. Earlier runs are kept.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection):
        self.folder = folder
        self._db = connection
        self._tests: set[tuple[str, str]] = set()  # digest and dataset of tests that the database has

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make all writes of the block one transaction: waiting for the disk takes longer than writing a run.

        If the block raises, the calls that were complete are kept.
        """
        with self._errors_explained():
            execute_when_unlocked(self._db, "BEGIN IMMEDIATE")
            try:
                yield
            finally:
                try:
                    if self._db.in_transaction:  # SQLite itself ends one that it has no room for
                        execute_when_unlocked(self._db, "COMMIT")
                except BaseException:
                    self._tests.clear()
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise

    def finished(self) -> dict[str, dict[str, ScoreInputs]]:
        """Return, by key and tested dataset, what the tests of all finished runs depended on."""
        found: dict[str, dict[str, ScoreInputs]] = {}
        for key, dataset, *inputs in self._db.execute(
            "SELECT key, scores.dataset, test, features, images, prompts, train_files FROM scores JOIN runs USING (key)"
        ):
            found.setdefault(key, {})[dataset] = ScoreInputs(*inputs)
        return found

    def record(
        self, run: RunRecord, scores: Sequence[ScoreRecord] = (), learned: Parameters | None = None
    ) -> None:
        """Store a run, its tests and what it learned. Tests of its key over other training images are deleted."""
        row = _run_row(run)
        with self._transaction() as db:
            if learned is not None:  # first: a row refers to a file that exists
                write_parameters(self.folder, run.key, learned)
            others = "SELECT 1 FROM runs WHERE key = ? AND train_files != ?"
            if db.execute(others, (run.key, run.train_files)).fetchone():
                db.execute("DELETE FROM scores WHERE key = ?", (run.key,))
                (self.folder / NEAREST_WORDS / f"{run.key}.json").unlink(missing_ok=True)
            self._put("runs", row)
            self._put_scores(run.key, scores)

    def record_scores(self, key: str, scores: Sequence[ScoreRecord]) -> None:
        """Store further tests of a recorded run, in place of earlier ones on the same datasets."""
        with self._transaction():
            self._put_scores(key, scores)

    def _put_scores(self, key: str, scores: Sequence[ScoreRecord]) -> None:
        for score in scores:
            test = score.inputs.test, score.dataset
            if test not in self._tests:
                names, labels = json.dumps(score.class_names), score.labels.astype("<u2").tobytes()
                row = dict(zip(("digest", "dataset"), test, strict=True))
                self._put("tests", row | {"class_names": names, "labels": labels})
                self._tests.add(test)
            self._put("scores", _score_row(key, score))
        self._db.execute("DELETE FROM failures WHERE key = ?", (key,))

    def batches(self) -> list[Batch]:
        """Return the recorded batches of training runs, in the order they were planned."""
        columns = "method, backbone, keys, threads, budget, cost, attempt"
        rows = self._db.execute(f"SELECT {columns} FROM batches ORDER BY rowid")
        return [Batch(method, name, tuple(json.loads(keys)), *rest) for method, name, keys, *rest in rows]

    def replace_batches(self, removed: Iterable[Batch], added: Iterable[Batch]) -> None:
        """Delete some batches and record others, in one transaction."""
        with self._transaction() as db:
            db.executemany("DELETE FROM batches WHERE name = ?", [(batch.name,) for batch in removed])
            for batch in added:
                row = dataclasses.asdict(batch) | {"name": batch.name, "keys": json.dumps(batch.keys)}
                self._put("batches", row)

    def failures(self) -> dict[str, str]:
        """Return the error of each failed run, by key."""
        return dict(self._db.execute("SELECT key, error FROM failures"))

    def record_failure(self, run: RunDescription, error: str) -> None:
        """Store that a run failed, and why."""
        with self._transaction():
            self._put("failures", dataclasses.asdict(run) | {"error": error, "failed": _now()})

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Give the database once no other program has it locked; what the block writes is kept as a whole or not."""
        if not self._db.in_transaction:
            with self.together(), self._transaction() as db:
                yield db
            return
        with self._errors_explained():
            self._db.execute("SAVEPOINT call")
            try:
                yield self._db
                self._db.execute("RELEASE call")
            except BaseException:
                self._tests.clear()
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK TO call")
                raise

    def _errors_explained(self) -> AbstractContextManager[None]:
        return explained(f"A result could not be written to {self.folder}, earlier ones are kept", OSError)

    def _put(self, table: str, row: dict[str, Any]) -> None:
        """Insert a row, or replace the one with its primary key."""
        marks = ", ".join(f":{column}" for column in row)
        self._db.execute(f"INSERT OR REPLACE INTO {table} ({', '.join(row)}) VALUES ({marks})", row)


@contextmanager
def open_store(folder: Path) -> Iterator[ResultsStore]:
    """Open a results folder for writing, which no other process can do until the block ends.

    The folder is created where it is missing. Where the block raises UserError before any run began, the files and
    empty folders that this call created are removed again.

    Raises:
        UserError: another sweep is writing to it, or its database is damaged or not one of fastcoop's.
    """
    new_folders = [place for place in (folder, *folder.parents) if not place.exists()]
    new_files = [path for name in (DATABASE, GRID, DATASETS, LOCK) if not (path := folder / name).exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, new_folders)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(lock(folder / LOCK, timeout_s=0))
            except TimeoutError:
                raise UserError(
                    f"Another sweep is writing to {folder}; wait for it, or use another folder (--results)."
                ) from None
        try:
            with writing_database(folder / DATABASE) as db:
                # Left by a process that was killed.
                for pattern in (f"{GRID}.*", f"{DATASETS}.*", f"{CONTEXTS}/*.safetensors.*"):
                    for part in folder.glob(f"{pattern}{PART}"):
                        part.unlink(missing_ok=True)
                try:
                    yield ResultsStore(folder, db)
                except UserError:
                    tables = ("runs", *WORK_TABLES)
                    if any(db.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in tables):
                        new_files = []
                    raise
        except UserError:
            with suppress(OSError):
                for path in new_files:
                    path.unlink(missing_ok=True)
            raise


def _remove_empty(folders: Iterable[Path]) -> None:
    with suppress(OSError):  # of folders that are not empty
        for folder in folders:
            folder.rmdir()


def _run_row(run: RunRecord) -> dict[str, Any]:
    columns = {name: _json_value(value) for name, value in run.columns.items()}
    own = {name: value for name, value in columns.items() if name not in METHOD_COLUMNS}
    if taken := own.keys() & RESERVED_COLUMNS:
        raise UserError(
            f'The method {run.method} gives its runs a column "{min(taken)}", which every run has; rename it.'
        )
    row = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    return row | {name: value for name, value in columns.items() if name in METHOD_COLUMNS} | {
        "columns": json.dumps(own, ensure_ascii=False, allow_nan=False),
        "losses": None if run.losses is None else json.dumps([_seven_digits(loss) for loss in run.losses]),
        "extra": json.dumps({name: _json_value(value) for name, value in run.extra.items()}, allow_nan=False),
        "finished": _now(),
        "versions": _versions(),
    }  # fmt: skip


@cache
def _versions() -> str:
    return json.dumps({"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES})


def _score_row(key: str, score: ScoreRecord) -> dict[str, Any]:
    inputs = score.inputs._asdict()
    del inputs["train_files"]
    return {
        "key": key,
        "dataset": score.dataset,
        **inputs,
        "accuracy": score.accuracy,
        "macro_accuracy": score.macro_accuracy,
        "chance": 100 / len(score.class_names),
        "per_class": json.dumps([_seven_digits(value) for value in score.per_class]),
        "predictions": score.predictions.astype("<u2").tobytes(),
        "confidence": score.confidence.astype("<f2").tobytes(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _json_value(value: Any) -> Any:
    """Return a value as JSON has it: None for a number that is not finite."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _seven_digits(value: float) -> float | None:
    return float(f"{value:.7g}") if np.isfinite(value) else None
