"""Merge results folders."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from fastcoop import escape
from fastcoop.checks import several
from fastcoop.errors import UserError
from fastcoop.files import atomic_write
from fastcoop.results.database import DATABASE, connect, execute_when_unlocked, explained, reading
from fastcoop.results.metadata import merge_metadata
from fastcoop.results.parameters import CONTEXTS, parameters_path
from fastcoop.results.read import load_failures, percent
from fastcoop.results.schema import COLUMNS, show_as_current
from fastcoop.results.store import NEAREST_WORDS, open_store

log = logging.getLogger("fastcoop")

MAX_CONFLICTS = 5  # named in one message
CONFLICTS = """
SELECT key, ours.dataset, ours.accuracy, theirs.accuracy,
    CASE WHEN ours.test != theirs.test OR ours.images != theirs.images THEN
        ' (two datasets called ' || ours.dataset || ')'
    WHEN ours.prompts != theirs.prompts THEN ' (with other prompts)'
    WHEN here.train_files != there.train_files THEN ' (learned from other images)' ELSE '' END AS reason
FROM main.scores ours JOIN other_scores theirs USING (key, dataset)
    JOIN main.runs here USING (key) JOIN other_runs there USING (key)
WHERE ours.predictions != theirs.predictions OR reason != '' ORDER BY key, ours.dataset
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
        with reading(source):
            pass  # refuses what is no results folder before anything is written
    with open_store(target):
        return sum(_merge_one(source, target) for source in sources if source.resolve() != target.resolve())


def _merge_one(folder: Path, target: Path) -> int:
    try:
        with (
            explained(f"{folder} could not be merged into {target}", OSError),
            closing(connect(target / DATABASE)) as db,
        ):
            db.execute("ATTACH ? AS other", (str(folder / DATABASE),))
            show_as_current(db, "other", "other_")
            execute_when_unlocked(db, "BEGIN IMMEDIATE")
            if conflicts := db.execute(CONFLICTS).fetchall():
                raise UserError(_conflict_text(conflicts, folder, target))
            new = db.execute(
                "SELECT key FROM other_runs WHERE key NOT IN (SELECT key FROM main.runs)"
            ).fetchall()
            for (key,) in new:
                _copy(parameters_path(folder, key), parameters_path(target, key))
            for table, columns in COLUMNS.items():
                names = ", ".join(columns)
                db.execute(f"INSERT OR IGNORE INTO main.{table} ({names}) SELECT {names} FROM other_{table}")
            db.execute("DELETE FROM main.failures WHERE key IN (SELECT key FROM main.scores)")
            execute_when_unlocked(db, "COMMIT")
            merge_metadata(folder, target)
            for path in (folder / NEAREST_WORDS).glob("*.json"):
                if not (copy := target / NEAREST_WORDS / path.name).exists():
                    _copy(path, copy)
    except UserError:
        with suppress(OSError):  # where it holds other runs' files
            (target / CONTEXTS).rmdir()
        raise
    if failed := len(load_failures(folder)):
        command = escape.shell_command("fastcoop", "results", "list", folder, "--status", "failed")
        log.warning("%d run(s) of %s failed and are not merged; `%s` shows them.", failed, folder, command)
    return len(new)


def _copy(path: Path, to: Path) -> None:
    if path.is_file():
        to.parent.mkdir(exist_ok=True)
        with atomic_write(to) as part:
            shutil.copyfile(path, part)


def _conflict_text(conflicts: Sequence[tuple[str, str, Any, Any, str]], folder: Path, target: Path) -> str:
    named = "; ".join(
        f"the accuracy of run {key[:12]} on {dataset} is {percent(ours)} in {target} but {percent(theirs)} in {folder}"
        f"{reason}"
        for key, dataset, ours, theirs, reason in conflicts[:MAX_CONFLICTS]
    )
    more = len(conflicts) - MAX_CONFLICTS
    return (
        f"{named[:1].upper()}{named[1:]}{f'; and {more} more' if more > 0 else ''}. Merge only the folder whose "
        f"results are right; nothing of {folder} was merged."
    )
