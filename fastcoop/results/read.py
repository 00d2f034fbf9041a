"""Read a results folder: tables of runs and tests, and single runs.

Every function raises UserError where the folder holds no results or they cannot be read.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcoop import escape
from fastcoop.checks import shortened
from fastcoop.errors import UserError
from fastcoop.results.database import decoding, reading
from fastcoop.results.parameters import parameters_path
from fastcoop.results.schema import RESULTS

if TYPE_CHECKING:
    import pandas as pd

JSON_COLUMNS = {  # and what they hold
    "settings": dict, "extra": dict, "columns": dict, "versions": dict, "losses": list, "per_class": list,
    "prompts": list,
}  # fmt: skip
SAME_RUN = "backbone, dataset, method, shots, seed, settings"
NUMBERS = ("accuracy", "macro_accuracy", "chance", "seconds")


def load_results(folder: str | Path) -> pd.DataFrame:
    """Return the results table: one row per run and dataset that it was tested on.

    Args:
        folder: a results folder.

    Returns:
        The tested dataset in the column ``dataset``, the one that the run learned in ``source``; they differ under
        domain shift only. ``shots`` is 0 for methods that learn nothing. ``accuracy``, ``macro_accuracy`` and
        ``chance`` are in percent, the first two NaN where the outputs of a diverged run are not finite. ``settings``,
        ``extra``, ``losses``, ``per_class`` and ``prompts`` are JSON. ``test`` and ``features`` are digests of what was
        tested on, ``backbone_digest`` is that of the weights. The methods' own columns follow, and the number of
        ``trained_parameters`` if some method records it.

    Raises:
        UserError: the folder holds no results, or they cannot be read.
    """
    frame = _table(folder, f"{RESULTS} ORDER BY finished, key")
    frame["class_specific"] = frame.class_specific.fillna(0).astype(bool)
    return frame


def load_runs(folder: str | Path) -> pd.DataFrame:
    """Return one row per run, tested or not (imported runs are not tested at first)."""
    return _table(folder, "SELECT * FROM runs ORDER BY finished, key")


def load_untested(folder: str | Path) -> pd.DataFrame:
    """Return one row per run that has no test."""
    return _table(
        folder, "SELECT * FROM runs WHERE key NOT IN (SELECT key FROM scores) ORDER BY finished, key"
    )


def load_failures(folder: str | Path) -> pd.DataFrame:
    """Return one row per run that failed and was not finished since, with its ``error``.

    A run of the same settings finished it too: its key is another if its features, or other inputs, have changed.
    """
    return _table(
        folder,
        "SELECT failures.* FROM failures"
        f" LEFT JOIN (SELECT {SAME_RUN}, max(finished) AS done FROM runs GROUP BY {SAME_RUN}) USING ({SAME_RUN})"
        " WHERE done IS NULL OR done < failed ORDER BY failed, key",
    )


def _table(folder: str | Path, query: str) -> pd.DataFrame:
    """Return a table, with the JSON column ``columns`` replaced by a column for each of its names.

    If some run records its ``trained_parameters``, they are a column too.
    """
    import pandas as pd

    with reading(Path(folder)) as db:
        frame = pd.read_sql_query(query, db)
    with decoding(Path(folder)):
        for name in frame.columns.intersection([*NUMBERS]):
            frame[name] = frame[name].astype(float)
        own = [_parse("columns", text) for text in frame.pop("columns")] if "columns" in frame else []
        parsed = {
            name: {text: _parse(name, text) for text in frame[name].dropna().unique()}
            for name in frame.columns.intersection([*JSON_COLUMNS])
        }
    for name in dict.fromkeys(name for row in own for name in row):
        frame[name] = [row.get(name) for row in own]
    trained = {text: one.get("trained_parameters") for text, one in parsed.get("extra", {}).items()}
    if any(count is not None for count in trained.values()):
        frame["trained_parameters"] = frame.extra.map(trained).astype(float)
    return frame


def _parse(column: str, text: str) -> Any:
    """Return what a JSON column holds. Raises ValueError or TypeError if it is something else."""
    value = json.loads(text)
    if not isinstance(value, JSON_COLUMNS[column]):
        raise TypeError(f"{shortened(text)} in the column {column}")
    return value


def find_key(folder: str | Path, beginning: str) -> str:
    """Return the key of the only run whose key begins with ``beginning``.

    Raises:
        UserError: there is no such run, or more than one.
    """
    query = "SELECT key FROM runs WHERE substr(key, 1, ?) = ? LIMIT 2"
    with reading(Path(folder)) as db:
        found: list[str] = [key for (key,) in db.execute(query, (len(beginning), beginning.lower()))]
    if not found:
        command = escape.shell_command("fastcoop", "results", "list", folder)
        raise UserError(f"{folder} has no run whose key begins with {beginning}; `{command}` shows the keys.")
    if len(found) > 1:
        raise UserError(
            f"{folder} has more than one run whose key begins with {beginning}; give more of the key."
        )
    return found[0]


def load_run(folder: str | Path, key: str) -> dict[str, Any]:
    """Return everything that is stored of a run, except its predictions and what it learned.

    Args:
        folder: a results folder.
        key: the run's key, or its beginning.

    Returns:
        The columns of the table ``runs``, with JSON decoded; the path of its ``contexts`` file, or None; and ``tests``:
        by dataset its accuracies, those ``per_class`` by class name.

    Raises:
        UserError: there is no such run, or more than one.
    """
    key = find_key(folder, key)
    with reading(Path(folder)) as db, decoding(Path(folder)):
        db.row_factory = sqlite3.Row
        run = dict(db.execute("SELECT * FROM runs WHERE key = ?", (key,)).fetchone())
        query = (
            "SELECT scores.dataset, accuracy, macro_accuracy, chance, per_class, class_names FROM scores "
            "JOIN tests ON test = digest WHERE key = ?"
        )
        tests = {}
        for test in map(dict, db.execute(query, (key,))):
            names = unique_names(json.loads(test.pop("class_names")))
            test["per_class"] = dict(zip(names, _parse("per_class", test["per_class"]), strict=True))
            tests[test.pop("dataset")] = test
        for name in ("settings", "losses", "extra", "versions"):
            run[name] = _parse(name, run[name]) if run[name] else None
        run |= _parse("columns", run.pop("columns"))
    path = parameters_path(Path(folder), key)
    return run | {"contexts": str(path) if path.is_file() else None, "tests": tests}


def unique_names(class_names: Sequence[str]) -> list[str]:
    """Return class names with their labels behind those that several classes have."""
    counts = Counter(class_names)
    return [f"{name} (class {i})" if counts[name] > 1 else name for i, name in enumerate(class_names)]


def percent(accuracy: float | None) -> str:
    """Return an accuracy in percent as it is printed, or "no accuracy"."""
    return "no accuracy" if accuracy is None or math.isnan(accuracy) else f"{accuracy:.2f}%"
