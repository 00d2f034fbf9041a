"""The tables of a results database, and how the current version reads those of version 1."""

from __future__ import annotations

import json
import sqlite3

import numpy as np

VERSION = 2

# Columns of ``runs`` that only some methods fill. Further columns of a method are in the JSON column ``columns``.
METHOD_COLUMNS = {
    "context_length": "INTEGER", "class_position": "TEXT", "class_specific": "INTEGER", "init": "TEXT",
    "epochs": "INTEGER", "schedule": "TEXT",
}  # fmt: skip
TABLES = {
    "runs": {
        "key": "TEXT PRIMARY KEY", "backbone": "TEXT NOT NULL", "backbone_digest": "TEXT NOT NULL",
        "dataset": "TEXT NOT NULL", "method": "TEXT NOT NULL", "label": "TEXT NOT NULL", "shots": "NOT NULL",
        "seed": "INTEGER NOT NULL", "settings": "TEXT NOT NULL", **METHOD_COLUMNS, "train_images": "INTEGER NOT NULL",
        "train_files": "TEXT", "status": "TEXT NOT NULL", "seconds": "REAL NOT NULL", "losses": "TEXT",
        "extra": "TEXT NOT NULL", "finished": "TEXT NOT NULL", "device": "TEXT NOT NULL", "versions": "TEXT NOT NULL",
        "columns": "TEXT NOT NULL",
    },
    "tests": {
        "digest": "TEXT PRIMARY KEY", "dataset": "TEXT NOT NULL", "class_names": "TEXT NOT NULL",
        "labels": "BLOB NOT NULL",
    },
    "scores": {
        "key": "TEXT NOT NULL REFERENCES runs (key)", "dataset": "TEXT NOT NULL",
        "test": "TEXT NOT NULL REFERENCES tests (digest)", "features": "TEXT", "images": "TEXT", "prompts": "TEXT",
        "accuracy": "REAL", "macro_accuracy": "REAL", "chance": "REAL NOT NULL", "per_class": "TEXT NOT NULL",
        "predictions": "BLOB NOT NULL", "confidence": "BLOB NOT NULL", "PRIMARY KEY": "(key, dataset)",
    },
}  # fmt: skip
COLUMNS = {table: [name for name in columns if name != "PRIMARY KEY"] for table, columns in TABLES.items()}
# Of a sweep in progress, and so in no merged folder: which runs train together, and which failed.
WORK_TABLES = {
    "batches": {
        "name": "TEXT PRIMARY KEY", "method": "TEXT NOT NULL", "backbone": "TEXT NOT NULL", "keys": "TEXT NOT NULL",
        "threads": "INTEGER NOT NULL", "budget": "INTEGER NOT NULL", "cost": "REAL NOT NULL",
        "attempt": "INTEGER NOT NULL",
    },
    "failures": {
        "key": "TEXT PRIMARY KEY", "backbone": "TEXT NOT NULL", "dataset": "TEXT NOT NULL", "method": "TEXT NOT NULL",
        "label": "TEXT NOT NULL", "shots": "NOT NULL", "seed": "INTEGER NOT NULL", "settings": "TEXT NOT NULL",
        "error": "TEXT NOT NULL", "failed": "TEXT NOT NULL",
    },
}  # fmt: skip
# The columns of `load_results`, and of the view that other programs read.
RESULTS = f"""
SELECT scores.key, backbone, backbone_digest, scores.dataset, runs.dataset AS source, method, label, shots, seed,
    {", ".join(METHOD_COLUMNS)}, accuracy, macro_accuracy, chance, status, seconds, train_images, settings, extra,
    losses, per_class, finished, device, versions, test, features, images, prompts, columns
FROM scores JOIN runs USING (key)
"""
RESERVED_COLUMNS = {*COLUMNS["runs"], *COLUMNS["scores"], "source"} - METHOD_COLUMNS.keys()

# Version 1 scored outputs that are not finite as if they named class 0; their confidence is NaN.
_DIVERGED = "has_nan(confidence)"
_FROM_VERSION_1 = {
    "columns": "'{}'",
    **dict.fromkeys(("train_files", "features", "images", "prompts"), "NULL"),
    "accuracy": f"CASE WHEN {_DIVERGED} THEN NULL ELSE accuracy END",
    "macro_accuracy": f"CASE WHEN {_DIVERGED} THEN NULL ELSE macro_accuracy END",
    "per_class": f"CASE WHEN {_DIVERGED} THEN nulls_of(per_class) ELSE per_class END",
    "predictions": f"CASE WHEN {_DIVERGED} THEN no_class_of(predictions) ELSE predictions END",
    "status": "CASE WHEN key IN (SELECT key FROM {scores} WHERE "
    f"{_DIVERGED}) THEN 'diverged' ELSE status END",
}


def version_of(db: sqlite3.Connection, schema: str = "main") -> int:
    """Return the version of a database; 0 for an empty one."""
    (version,) = db.execute(f"PRAGMA {schema}.user_version").fetchone()
    return int(version)


def create(db: sqlite3.Connection) -> None:
    """Create the missing tables and the view of a database, within the open transaction."""
    for table, columns in (TABLES | WORK_TABLES).items():
        text = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        db.execute(f"CREATE TABLE IF NOT EXISTS {table} ({text})")
    db.execute(f"CREATE VIEW IF NOT EXISTS results AS {RESULTS}")
    if version_of(db) != VERSION:
        db.execute(f"PRAGMA user_version = {VERSION}")


def upgrade(db: sqlite3.Connection) -> None:
    """Rewrite the tables of a version-1 database in the current version, within the open transaction."""
    _add_functions(db)
    db.execute("DROP VIEW results")
    for table in ("runs", "scores"):
        db.execute(f"ALTER TABLE {table} RENAME TO {table}_1")
    create(db)
    for table in ("runs", "scores"):
        select = _select(table, 1, f"{table}_1", "scores_1")
        db.execute(f"INSERT INTO {table} ({', '.join(COLUMNS[table])}) {select}")
    for table in ("scores", "runs"):
        db.execute(f"DROP TABLE {table}_1")


def show_as_current(db: sqlite3.Connection, schema: str = "main", prefix: str = "") -> None:
    """Create temporary views ``<prefix>runs``, ``<prefix>tests`` and ``<prefix>scores`` with the current columns.

    Without a prefix they replace the database's own tables, where it is of an older version.
    """
    version = version_of(db, schema)
    if not prefix:
        for table in WORK_TABLES.keys() - {name for (name,) in db.execute("SELECT name FROM sqlite_master")}:
            db.execute(f"CREATE TEMP TABLE {table} ({', '.join(WORK_TABLES[table])})")
        if version == VERSION:
            return
    _add_functions(db)
    for table in TABLES:
        select = _select(table, version, f"{schema}.{table}", f"{schema}.scores")
        db.execute(f"CREATE TEMP VIEW {prefix}{table} AS {select}")


def _select(table: str, version: int, source: str, scores: str) -> str:
    """Return the SELECT of a table's current columns from ``source``, a table of a version."""
    known = _FROM_VERSION_1 if version == 1 else {}
    selected = [
        f"{known[name].replace('{scores}', scores)} AS {name}" if name in known else name
        for name in COLUMNS[table]
    ]
    return f"SELECT {', '.join(selected)} FROM {source}"


def _add_functions(db: sqlite3.Connection) -> None:
    db.create_function("has_nan", 1, _has_nan, deterministic=True)
    db.create_function("nulls_of", 1, lambda text: json.dumps([None] * len(json.loads(text))))
    db.create_function("no_class_of", 1, lambda blob: b"\xff" * len(blob))


def _has_nan(confidence: bytes) -> bool:
    return bool(np.isnan(np.frombuffer(confidence, dtype="<f2")).any())
