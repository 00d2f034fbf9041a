"""The tables of a results database, and the upgrade of a database of version 1."""

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
        "columns": "TEXT NOT NULL DEFAULT '{}'",
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


def version_of(db: sqlite3.Connection) -> int:
    """Return the version of a database; 0 for an empty one."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def create(db: sqlite3.Connection) -> None:
    """Create the missing tables and the view of a database, within the open transaction."""
    for table, columns in (TABLES | WORK_TABLES).items():
        text = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        db.execute(f"CREATE TABLE IF NOT EXISTS {table} ({text})")
    db.execute(f"CREATE VIEW IF NOT EXISTS results AS {RESULTS}")
    if version_of(db) != VERSION:
        db.execute(f"PRAGMA user_version = {VERSION}")


def upgrade(db: sqlite3.Connection) -> None:
    """Rewrite the tables of a version-1 database in the current version, within the open transaction.

    Version 1 scored outputs that are not finite as if they named class 0. Their confidence is NaN.
    """
    db.execute("DROP VIEW results")
    for table in ("runs", "scores"):
        db.execute(f"ALTER TABLE {table} RENAME TO {table}_1")
    create(db)
    for table in ("runs", "scores"):
        names = ", ".join(row[1] for row in db.execute(f"PRAGMA table_info({table}_1)"))
        db.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM {table}_1")
    for table in ("scores", "runs"):
        db.execute(f"DROP TABLE {table}_1")
    scores = db.execute("SELECT rowid, confidence FROM scores")
    for row in [row for row, confidence in scores if np.isnan(np.frombuffer(confidence, dtype="<f2")).any()]:
        query = "SELECT key, per_class, predictions FROM scores WHERE rowid = ?"
        key, per_class, predictions = db.execute(query, (row,)).fetchone()
        nulls, no_classes = json.dumps([None] * len(json.loads(per_class))), b"\xff" * len(predictions)
        db.execute(
            "UPDATE scores SET accuracy = NULL, macro_accuracy = NULL, per_class = ?, predictions = ? WHERE rowid = ?",
            (nulls, no_classes, row),
        )
        db.execute("UPDATE runs SET status = 'diverged' WHERE key = ?", (key,))
