"""The results folder while a sweep writes it: one SQLite file, and contexts beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from fastcoop.errors import UserError
from fastcoop.files import PART, atomic_write
from fastcoop.grids.plan import TestFacts, test_facts, train_files
from fastcoop.methods import METHODS, Data, Outcome, RunSpec, Scores
from fastcoop.methods.base import recorded_settings
from fastcoop.results.about import DATASETS, GRID
from fastcoop.results.batch import Batch
from fastcoop.results.schema import (
    METHOD_COLUMNS,
    RESERVED_COLUMNS,
    SCORE_COLUMNS,
    VERSION,
    WORK,
    create,
    statements,
    upgrade,
    version_of,
)

DATABASE = "results.sqlite"
LOCK = "lock.sqlite"
NEAREST_WORDS = "nearest_words"  # folder of what ``interpret`` writes
CONTEXTS = "contexts"
BUSY_TIMEOUT = 1.0  # seconds that SQLite waits for a lock by itself; after each, Ctrl-C is heard
NOTICE_AFTER = 5.0  # seconds of waiting for a lock after which a line says so

log = logging.getLogger("fastcoop")


class ResultsStore:
    """What is done, and the way to add to it: a transaction per run, after its contexts file is in place."""

    def __init__(self, folder: Path, connection: sqlite3.Connection):
        self.folder = folder
        self._db = connection

    def done(self) -> dict[str, dict[str, TestFacts]]:
        """Keys of the runs that are done, and the tests of each by dataset."""
        return tests_by_run(self._db)

    def complete(self, planned: Iterable[RunSpec]) -> None:
        """Add what databases of version 1 did not keep of these runs and their tests on their own datasets, where the
        runs' keys say it.

        Raises:
            UserError: the disk does not take it.
        """
        tested = self.done()
        for run in planned:
            data = run.data
            facts, before = test_facts(run, data), tested.get(run.key, {}).get(data.name)
            if before is None or before.features is not None or before.test != facts.test:
                continue
            with self._writing() as db:
                db.execute(
                    "UPDATE scores SET features = ?, images = ?, prompts = ? WHERE key = ? AND dataset = ?",
                    (facts.features, facts.images, facts.prompts, run.key, data.name),
                )
                settings = recorded_settings(METHODS[run.method], run)
                db.execute("UPDATE runs SET settings = ? WHERE key = ?", (settings, run.key))

    def record(self, planned: RunSpec, outcome: Outcome) -> None:
        """Keep what a run came to; a run already there gains the tests that it lacked, or that were of a dataset that
        has changed since.

        Raises:
            UserError: the disk does not take it. What was recorded before is unharmed.
        """
        with self._writing() as db:
            if not planned.has_learned:
                if outcome.contexts is not None or outcome.weights:
                    write_learned(self.folder, planned, outcome)
                row = _run_row(planned, outcome)
                self._forget_other_images(planned.key, row["train_files"])
                self._put("runs", row)
            for data in planned.tests:
                if data.name in outcome.scores:
                    self._put("tests", _test_row(data))
                    self._put("scores", _scores_row(planned, data, outcome.scores[data.name]))
            db.execute("DELETE FROM failures WHERE key = ?", (planned.key,))

    def _forget_other_images(self, key: str, train_files: str | None) -> None:
        """Remove the tests and the nearest words of what a run learned from other training images."""
        other = "SELECT 1 FROM runs WHERE key = ? AND train_files != ?"
        if self._db.execute(other, (key, train_files)).fetchone():
            self._db.execute("DELETE FROM scores WHERE key = ?", (key,))
            (self.folder / NEAREST_WORDS / f"{key}.json").unlink(missing_ok=True)

    def batches(self) -> list[Batch]:
        """The recorded batches of training runs, in the order they were planned."""
        columns = "method, backbone, keys, threads, budget, cost, attempt"
        rows = self._db.execute(f"SELECT {columns} FROM batches ORDER BY rowid").fetchall()
        return [
            Batch(method, backbone, tuple(json.loads(keys)), *rest) for method, backbone, keys, *rest in rows
        ]

    def replace_batches(self, gone: Iterable[Batch], new: Iterable[Batch]) -> None:
        """Forget some batches and record others, all or nothing.

        Raises:
            UserError: the disk does not take it.
        """
        with self._writing() as db:
            db.executemany("DELETE FROM batches WHERE name = ?", [(batch.name,) for batch in gone])
            for batch in new:
                row = dataclasses.asdict(batch) | {"name": batch.name, "keys": json.dumps(batch.keys)}
                self._put("batches", row)

    def failures(self) -> dict[str, str]:
        """Keys of the runs that failed, and the error of each."""
        return dict(self._db.execute("SELECT key, error FROM failures"))

    def record_failure(self, planned: RunSpec, error: str) -> None:
        """Keep that a run failed, and why.

        Raises:
            UserError: the disk does not take it.
        """
        row = {
            "key": planned.key,
            "backbone": planned.backbone,
            "dataset": planned.dataset,
            "method": planned.method,
            "label": METHODS[planned.method].label(planned.settings),
            "shots": planned.shots,
            "seed": planned.seed,
            "settings": recorded_settings(METHODS[planned.method], planned),
            "error": error,
            "failed": _now(),
        }
        with self._writing():
            self._put("failures", row)

    def forget_failures(self, keys: Iterable[str]) -> None:
        """Count these runs as not tried."""
        with self._writing() as db:
            db.executemany("DELETE FROM failures WHERE key = ?", [(key,) for key in keys])

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, which waits for other programs that have the database open.

        Raises UserError for what the disk does not take.
        """
        try:
            insist(self._db, "BEGIN IMMEDIATE")
            try:
                yield self._db
                insist(self._db, "COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"Results in {self.folder} could not be written ({error}); runs recorded before are safe; "
                "make room or close what else uses the folder, then run the same command again."
            ) from None

    def _put(self, table: str, row: dict[str, Any]) -> None:
        """Add a row, in place of one that is there."""
        marks = ", ".join(f":{column}" for column in row)
        self._db.execute(f"INSERT OR REPLACE INTO {table} ({', '.join(row)}) VALUES ({marks})", row)


def insist(db: sqlite3.Connection, statement: str, seconds: float = math.inf) -> None:
    """Execute a statement, waiting up to ``seconds`` where other programs have the database open.

    A program that only reads keeps a writer from committing for as long as its transaction is open. SQLite gives up
    after its busy timeout but keeps the transaction, so the statement can be tried again and nothing is lost.
    """
    start, told = time.monotonic(), False
    while True:
        try:
            db.execute(statement)
            return
        except sqlite3.OperationalError as error:
            waited = time.monotonic() - start
            if "locked" not in str(error) or waited > seconds:
                raise
        if waited > NOTICE_AFTER and not told:
            path = db.execute("PRAGMA database_list").fetchone()[2]
            log.warning("Waiting for another program that has %s open; close it to go on.", path)
            told = True


def tests_by_run(db: sqlite3.Connection) -> dict[str, dict[str, TestFacts]]:
    """{key: {dataset: what its test depended on}} of all tests in a store."""
    tested: dict[str, dict[str, TestFacts]] = {}
    for key, dataset, *facts in db.execute(
        "SELECT key, scores.dataset, test, features, images, prompts, train_files FROM scores JOIN runs USING (key)"
    ):
        tested.setdefault(key, {})[dataset] = TestFacts(*facts)
    return tested


@contextmanager
def open_store(folder: Path) -> Iterator[ResultsStore]:
    """The results folder, made if it is not there, and held against any other sweep until the block ends. If the block
    is refused before any run was begun, the files and empty folders that this call made are removed again.

    Raises:
        UserError: another sweep holds it, or its database is damaged or not one of ours.
    """
    new_folders = [place for place in (folder, *folder.parents) if not place.exists()]
    new_files = [path for name in (DATABASE, GRID, DATASETS, LOCK) if not (path := folder / name).exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The results folder {folder} cannot be made: {error.strerror}.") from None
    try:
        lock = _lock(folder)
    except sqlite3.Error as error:
        raise UserError(f"{folder / LOCK} cannot be used ({error}); {advice(error)}") from None
    try:
        for left in (folder / CONTEXTS).glob(f"*.safetensors.*{PART}"):  # by a process that was killed
            left.unlink(missing_ok=True)
        connection = _connect(folder / DATABASE)
        try:
            yield ResultsStore(folder, connection)
        except UserError:
            if _is_empty(connection):
                connection.close()
                with suppress(OSError):
                    for path in new_files:
                        path.unlink(missing_ok=True)
            raise
        except sqlite3.Error as error:  # found on reading: damage that its first pages do not show
            path = folder / DATABASE
            raise UserError(f"{path} cannot be used as a results store ({error}); {advice(error)}") from None
        finally:
            connection.close()
    finally:
        lock.close()
        with suppress(OSError):  # of folders that are not empty
            for place in new_folders:
                place.rmdir()


def _is_empty(connection: sqlite3.Connection) -> bool:
    tables = ("runs", "batches", "failures")
    return not any(connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in tables)


def _lock(folder: Path) -> sqlite3.Connection:
    """A lock that every platform has, and that goes when its process does: an open transaction on a file."""
    lock = sqlite3.connect(folder / LOCK, timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        lock.close()
        if "locked" in str(error):
            raise UserError(
                f"Another sweep is writing to {folder}; wait for it, or use another folder (--results)."
            ) from None
        raise
    return lock


def _connect(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)
    except sqlite3.Error as error:  # such as a folder of this name
        raise UserError(f"{path} cannot be used as a results store ({error}); {advice(error)}") from None
    try:
        # No write-ahead log: it does not work between machines that share a folder, needs a writable folder for
        # reading, and would be left out where someone copies the one file.
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA cache_spill = OFF")  # or a large row would need the lock before the commit
        insist(connection, "BEGIN IMMEDIATE")
        version = version_of(connection)
        empty = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version == 1:
            upgrade(connection)
        elif version == 0 and empty:
            create(connection)
        elif version != VERSION:
            raise UserError(f"{path} was not written by this version of fastcoop; use another folder.")
        for statement in statements(WORK):
            connection.execute(statement)
        insist(connection, "COMMIT")
    except sqlite3.Error as error:
        connection.close()
        raise UserError(f"{path} cannot be used as a results store ({error}); {advice(error)}") from None
    except UserError:
        connection.close()
        raise
    return connection


def advice(error: BaseException) -> str:
    """What to do about a database that cannot be used."""
    said = str(error)
    if "locked" in said:
        return "close the program that has it open."
    if "full" in said or "No space" in said or "disk I/O" in said:
        return "make room on its disk and run the same command again."
    if "readonly" in said or "unable to open" in said:
        return "its folder cannot be written to: name another one, or change its permissions."
    return "restore it from a copy, or move it away and run the sweep again."


def contexts_path(folder: Path, key: str) -> Path:
    """The safetensors file of what a run learned: one tensor called "contexts", or those of its method."""
    return folder / CONTEXTS / f"{key}.safetensors"


def digest_of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 hex of arrays: their names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype.str}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_learned(folder: Path, planned: RunSpec, outcome: Outcome) -> None:
    """Write a run's contexts or weights, with the classes learned on and the features' recipe in the header; the file
    appears whole or not at all."""
    from safetensors.numpy import save

    arrays = dict(outcome.weights)
    if outcome.contexts is not None:
        arrays["contexts"] = outcome.contexts.astype(np.float32)
    source, features = planned.data.dataset, planned.data.store
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = {
        "class_names": json.dumps(source.class_names),
        "class_ids": json.dumps(source.class_ids),
        "key": planned.key,
        "sha256": digest_of_arrays(arrays),
    }
    if features is not None:
        header["recipe"] = features.meta.recipe
    path = contexts_path(folder, planned.key)
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as part, part.open("wb") as file:
        file.write(save(arrays, header))
        file.flush()
        os.fsync(file.fileno())  # as the database's, which will say that it is there


def _run_row(planned: RunSpec, outcome: Outcome) -> dict[str, Any]:
    method = METHODS[planned.method]
    columns = {name: _plain(value) for name, value in method.columns(planned, planned.model).items()}
    own = {name: value for name, value in columns.items() if name not in METHOD_COLUMNS}
    if taken := own.keys() & RESERVED_COLUMNS:
        raise UserError(
            f'The method {planned.method} gives its runs a column "{min(taken)}", which every run has; rename it.'
        )
    losses = None if outcome.losses is None else json.dumps([_number(loss) for loss in outcome.losses])
    return {
        "key": planned.key,
        "backbone": planned.backbone,
        "backbone_digest": planned.model.digest,
        "dataset": planned.dataset,
        "method": planned.method,
        "label": method.label(planned.settings),
        "shots": planned.shots,
        "seed": planned.seed,
        "settings": recorded_settings(method, planned),
        **{name: value for name, value in columns.items() if name in METHOD_COLUMNS},
        "columns": json.dumps(own, ensure_ascii=False, allow_nan=False),
        "train_files": train_files(planned),
        "train_images": len(planned.data.readable("train", planned.subset.train)) if planned.subset else 0,
        "status": outcome.status,
        "seconds": outcome.seconds,
        "losses": losses,
        "extra": json.dumps({name: _plain(value) for name, value in outcome.extra.items()}, allow_nan=False),
        "finished": _now(),
        "device": str(planned.model.device),
        "versions": versions(),
    }


def _test_row(data: Data) -> dict[str, Any]:
    return {
        "digest": data.test_digest,
        "dataset": data.name,
        "class_names": json.dumps(list(data.class_names)),
        "labels": np.asarray(data.test[1]).astype("<u2").tobytes(),
    }


def _scores_row(planned: RunSpec, data: Data, scores: Scores) -> dict[str, Any]:
    return {
        "key": planned.key,
        "dataset": data.name,
        **{name: fact for name, fact in test_facts(planned, data)._asdict().items() if name in SCORE_COLUMNS},
        "accuracy": scores.accuracy,
        "macro_accuracy": scores.macro_accuracy,
        "chance": 100 / len(data.class_names),
        "per_class": json.dumps([_number(value) for value in scores.per_class]),
        "predictions": scores.predictions.astype("<u2").tobytes(),
        "confidence": scores.confidence.astype("<f2").tobytes(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    """What JSON can hold of a column or a further number: None for a number that is not finite."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> float | None:
    """Seven digits; None, which JSON has, for what is not finite."""
    return float(f"{value:.7g}") if np.isfinite(value) else None


def versions() -> str:
    """JSON of the versions that a result may depend on."""
    from importlib.metadata import version

    packages = ("fastcoop", "torch", "open_clip_torch", "scikit-learn", "numpy")
    return json.dumps({"python": sys.version.split()[0]} | {name: version(name) for name in packages})
