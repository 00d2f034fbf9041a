"""Open the SQLite database of a results folder, for reading or writing."""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fastcoop.errors import MissingFile, UserError
from fastcoop.results.schema import VERSION, create, upgrade, version_of

DATABASE = "results.sqlite"
BUSY_TIMEOUT = 1.0  # seconds that SQLite waits for a lock by itself; Ctrl-C is handled after each
READ_TIMEOUT = 30.0  # seconds that a reader waits for another program's lock
NOTICE_AFTER = 5.0  # seconds of waiting after which a warning is logged

log = logging.getLogger("fastcoop")


@contextmanager
def explained(problem: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise SQLite's errors, and those of further ``kinds``, as a UserError that names the problem and a remedy."""
    errors: tuple[type[Exception], ...] = (sqlite3.Error, *kinds)
    try:
        yield
    except UserError:
        raise
    except errors as error:
        cause = str(error.__cause__ or error)  # pandas wraps SQLite's errors
        if "locked" in cause:
            remedy = "close the program that has it open."
        elif any(word in cause for word in ("full", "No space", "I/O", "Input/output")):
            remedy = "free space on its disk and run the same command again."
        elif any(word in cause for word in ("readonly", "Read-only", "unable to open", "denied")):
            remedy = "choose another folder, or change this folder's permissions."
        else:
            remedy = "restore it from a copy, or move it away and run the sweep again."
        raise UserError(f"{problem} ({cause}); {remedy}") from None


@contextmanager
def decoding(folder: Path) -> Iterator[None]:
    """Raise a UserError where values of a results database are not such as were written: SQLite compares no digests."""
    with explained(f"{folder / DATABASE} is damaged", ValueError, TypeError):
        yield


def execute_when_unlocked(db: sqlite3.Connection, statement: str, timeout_s: float = math.inf) -> None:
    """Execute a statement, waiting up to ``timeout_s`` while other programs have the database locked.

    A program that only reads keeps a writer from committing as long as its transaction is open. SQLite gives up after
    its busy timeout but keeps the transaction, so the statement can be tried again.
    """
    start, warned = time.monotonic(), False
    while True:
        try:
            db.execute(statement)
            return
        except sqlite3.OperationalError as error:
            waited = time.monotonic() - start
            if "locked" not in str(error) or waited > timeout_s:
                raise
        if waited > NOTICE_AFTER and not warned:
            path = db.execute("PRAGMA database_list").fetchone()[2]
            log.warning("Waiting for another program that has %s open; close it to continue.", path)
            warned = True


@contextmanager
def reading(folder: Path) -> Iterator[sqlite3.Connection]:
    """Give a snapshot of a results database, which blocks writers; of one of version 1, an upgraded copy.

    Raises:
        UserError: the folder holds no results, or they cannot be read.
    """
    path = folder / DATABASE
    if not path.is_file():
        raise MissingFile(f"{folder} holds no results (no {DATABASE}); run `fastcoop sweep` into it first.")
    with (
        explained(f"{path} cannot be read", OSError),
        closing(connect(path)) as db,
        closing(connect("")) as copy,
    ):
        db.execute("BEGIN")
        execute_when_unlocked(db, "SELECT 1 FROM sqlite_master", READ_TIMEOUT)
        version = version_of(db)
        if version == 0:
            raise UserError(f"{folder} holds no results yet; run `fastcoop sweep` into it first.")
        if version == 1:
            db.backup(copy)
            upgrade(copy)
        elif version != VERSION:
            raise UserError(f"{path} was not written by this version of fastcoop.")
        yield copy if version == 1 else db


@contextmanager
def writing_database(path: Path) -> Iterator[sqlite3.Connection]:
    """Give a connection to a database of the current version, which is created or upgraded where needed.

    Raises:
        UserError: the database is damaged, or not one of fastcoop's.
    """
    with explained(f"{path} cannot be used as a results store"), closing(connect(path)) as db:
        # No write-ahead log: it does not work between machines that share a folder, needs a writable folder for
        # reading, and would be left out where someone copies the one file.
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("PRAGMA cache_spill = OFF")  # or a large row would need the lock before the commit
        execute_when_unlocked(db, "BEGIN IMMEDIATE")
        version = version_of(db)
        is_empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version == 1:
            upgrade(db)
        elif version != VERSION and not (version == 0 and is_empty):
            raise UserError(f"{path} was not written by this version of fastcoop; use another folder.")
        create(db)
        execute_when_unlocked(db, "COMMIT")
        yield db


def connect(path: Path | str) -> sqlite3.Connection:
    """Open a database ("": a temporary one), with transactions as the caller begins them."""
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)
