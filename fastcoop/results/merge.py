"""Merge results folders."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from fastcoop import escape
from fastcoop.checks import several
from fastcoop.errors import UserError, abbreviate
from fastcoop.files import atomic_write
from fastcoop.results.database import DATABASE, connect, execute_when_unlocked, explained, reading
from fastcoop.results.metadata import merge_metadata, recorded_datasets
from fastcoop.results.parameters import CONTEXTS, parameters_path
from fastcoop.results.read import load_failures, load_results, load_runs, percent
from fastcoop.results.schema import COLUMNS
from fastcoop.results.store import NEAREST_WORDS, open_store

log = logging.getLogger("fastcoop")

MAX_CONFLICTS = 5  # named in one message
REASONS = (  # for a difference in test, images, prompts and train_files
    *(" (two datasets called {dataset})",) * 2,
    " (with other prompts)",
    " (learned from other images)",
)
SCORES = """
SELECT key, scores.dataset, accuracy, predictions, test, images, prompts, train_files FROM scores JOIN runs USING (key)
"""


def merge_results(folders: Sequence[str | Path] | str | Path, into: str | Path) -> int:
    """Add the runs of several results folders to one, by key.

    Args:
        folders: results folders.
        into: the results folder to add to, created where it is missing.

    Returns:
        The number of runs that were added.

    Raises:
        UserError: a folder cannot be read, or two of them have different results of a run. Folders before the one at
            fault are merged.
    """
    target, sources = Path(into), [Path(folder) for folder in several(folders)]
    for source in sources:
        for read in (load_runs, load_results, recorded_datasets):
            read(source)  # refuses no or damaged results before anything is written
    with open_store(target):
        return sum(_merge_one(source, target) for source in sources if source.resolve() != target.resolve())


def _merge_one(folder: Path, target: Path) -> int:
    problem = f"{folder} could not be merged into {target}"
    copied: list[Path] = []  # while nothing refers to them
    try:
        with (
            reading(folder) as source,
            explained(problem, OSError),
            closing(connect(target / DATABASE)) as db,
        ):
            execute_when_unlocked(db, "BEGIN IMMEDIATE")
            if conflicts := list(_conflicts(source, db, folder, target)):
                raise UserError(
                    f"{abbreviate(conflicts, MAX_CONFLICTS, '; ')}. Merge only the "
                    f"folder whose results are right; nothing of {folder} was merged."
                )
            known = {key for (key,) in db.execute("SELECT key FROM runs")}
            new = [key for (key,) in source.execute("SELECT key FROM runs") if key not in known]
            for (key,) in source.execute("SELECT key FROM runs"):
                copy = parameters_path(target, key)
                if key not in known or not copy.exists():
                    copied.append(copy)
                    _copy(parameters_path(folder, key), copy)
            for table, columns in COLUMNS.items():
                names, marks = ", ".join(columns), ", ".join("?" * len(columns))
                rows = source.execute(f"SELECT {names} FROM {table}")
                db.executemany(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})", rows)
            db.execute("DELETE FROM failures WHERE key IN (SELECT key FROM scores)")
            execute_when_unlocked(db, "COMMIT")
            copied.clear()
            merge_metadata(folder, target)
            for path in (folder / NEAREST_WORDS).glob("*.json"):
                if not (copy := target / NEAREST_WORDS / path.name).exists():
                    _copy(path, copy)
    except UserError:
        for path in copied:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # where it holds other runs' files
            (target / CONTEXTS).rmdir()
        raise
    if failed := len(load_failures(folder)):
        command = escape.shell_command("fastcoop", "results", "list", folder, "--where", "status=failed")
        log.warning("%d run(s) of %s failed and are not merged; `%s` shows them.", failed, folder, command)
    return len(new)


def _conflicts(
    source: sqlite3.Connection, db: sqlite3.Connection, folder: Path, target: Path
) -> Iterator[str]:
    """Yield how scores of the same run on the same dataset differ between two databases."""
    for key, dataset, *theirs in source.execute(f"{SCORES} ORDER BY key, scores.dataset"):
        query = f"{SCORES} WHERE key = ? AND scores.dataset = ?"
        _, _, *ours = db.execute(query, (key, dataset)).fetchone() or (None, None, *theirs)
        differ = (None not in pair and pair[0] != pair[1] for pair in zip(ours[2:], theirs[2:], strict=True))
        reasons = [reason for reason, one in zip(REASONS, differ, strict=True) if one]
        if reasons or ours[1] != theirs[1]:
            (reason, *_) = (*reasons, " (with other predictions)")
            yield (
                f"The accuracy of run {key[:12]} on {dataset} is {percent(ours[0])} in {target} but "
                f"{percent(theirs[0])} in {folder}{reason.format(dataset=dataset)}"
            )


def _copy(path: Path, to: Path) -> None:
    if path.is_file():
        to.parent.mkdir(exist_ok=True)
        with atomic_write(to) as part:
            shutil.copyfile(path, part)
