"""Tables of a results database, and older versions of them brought to the current columns."""

from __future__ import annotations

import json
import sqlite3

import numpy as np

VERSION = 2

# Columns of ``runs`` that only some methods have. What a method adds beyond these is in the JSON column ``columns``.
METHOD_COLUMNS = (
    "context_length", "class_position", "class_specific", "init", "epochs", "schedule",
)  # fmt: skip
RUN_COLUMNS = (
    "key", "backbone", "backbone_digest", "dataset", "method", "label", "shots", "seed", "settings", *METHOD_COLUMNS,
    "train_images", "train_files", "status", "seconds", "losses", "extra", "finished", "device", "versions", "columns",
)  # fmt: skip
SCORE_COLUMNS = (
    "key", "dataset", "test", "features", "images", "prompts", "accuracy", "macro_accuracy", "chance", "per_class",
    "predictions", "confidence",
)  # fmt: skip
# Names that a method's own columns cannot have: those of every row that `load_results` returns.
RESERVED_COLUMNS = {*RUN_COLUMNS, *SCORE_COLUMNS, "source"} - {*METHOD_COLUMNS}
TEST_COLUMNS = ("digest", "dataset", "class_names", "labels")
VIEW_COLUMNS = (
    "scores.key", "backbone", "backbone_digest", "scores.dataset", "runs.dataset AS source", "method", "label", "shots",
    "seed", *METHOD_COLUMNS, "accuracy", "macro_accuracy", "chance", "status", "seconds", "train_images", "settings",
    "extra", "losses", "per_class", "finished", "device", "versions", "test", "features", "images", "prompts",
    "columns",
)  # fmt: skip

RESULTS = f"VIEW results AS SELECT {', '.join(VIEW_COLUMNS)} FROM scores JOIN runs USING (key);"

SCHEMA = f"""
CREATE TABLE runs (
    key TEXT PRIMARY KEY, backbone TEXT NOT NULL, backbone_digest TEXT NOT NULL, dataset TEXT NOT NULL,
    method TEXT NOT NULL, label TEXT NOT NULL, shots NOT NULL, seed INTEGER NOT NULL, settings TEXT NOT NULL,
    context_length INTEGER, class_position TEXT, class_specific INTEGER, init TEXT, epochs INTEGER,
    schedule TEXT, train_images INTEGER NOT NULL, train_files TEXT, status TEXT NOT NULL, seconds REAL NOT NULL,
    losses TEXT, extra TEXT NOT NULL, finished TEXT NOT NULL, device TEXT NOT NULL, versions TEXT NOT NULL,
    columns TEXT NOT NULL
);
CREATE TABLE tests (
    digest TEXT PRIMARY KEY, dataset TEXT NOT NULL, class_names TEXT NOT NULL, labels BLOB NOT NULL
);
CREATE TABLE scores (
    key TEXT NOT NULL REFERENCES runs (key), dataset TEXT NOT NULL,
    test TEXT NOT NULL REFERENCES tests (digest), features TEXT, images TEXT, prompts TEXT,
    accuracy REAL, macro_accuracy REAL, chance REAL NOT NULL, per_class TEXT NOT NULL,
    predictions BLOB NOT NULL, confidence BLOB NOT NULL,
    PRIMARY KEY (key, dataset)
);
CREATE {RESULTS}
"""

# What is only of the work under way, and so in no merged folder: which runs train together, and which failed.
WORK = """
CREATE TABLE IF NOT EXISTS batches (
    name TEXT PRIMARY KEY, method TEXT NOT NULL, backbone TEXT NOT NULL, keys TEXT NOT NULL,
    threads INTEGER NOT NULL, budget INTEGER NOT NULL, cost REAL NOT NULL, attempt INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS failures (
    key TEXT PRIMARY KEY, backbone TEXT NOT NULL, dataset TEXT NOT NULL, method TEXT NOT NULL, label TEXT NOT NULL,
    shots NOT NULL, seed INTEGER NOT NULL, settings TEXT NOT NULL, error TEXT NOT NULL, failed TEXT NOT NULL
);
"""

# Version 1 scored outputs that are not finite as if they named class 0; their confidence is NaN.
_LOST = "has_nan(confidence)"
_FROM_1 = {
    "columns": "'{}'",
    "train_files": "NULL",
    "features": "NULL",
    "images": "NULL",
    "prompts": "NULL",
    "accuracy": f"CASE WHEN {_LOST} THEN NULL ELSE accuracy END",
    "macro_accuracy": f"CASE WHEN {_LOST} THEN NULL ELSE macro_accuracy END",
    "per_class": f"CASE WHEN {_LOST} THEN nulls_of(per_class) ELSE per_class END",
    "predictions": f"CASE WHEN {_LOST} THEN no_class_of(predictions) ELSE predictions END",
    "status": "CASE WHEN key IN (SELECT key FROM {scores} WHERE "
    + _LOST
    + ") THEN 'diverged' ELSE status END",
}


def version_of(db: sqlite3.Connection, schema: str = "main") -> int:
    """Return the version of a database; 0 for one that has nothing in it yet."""
    (version,) = db.execute(f"PRAGMA {schema}.user_version").fetchone()
    return int(version)


def statements(script: str) -> list[str]:
    """The statements of a script, to execute one by one: ``executescript`` would commit first."""
    return [statement for statement in script.split(";\n") if statement.strip()]


def create(db: sqlite3.Connection) -> None:
    """Create the tables of an empty database, within the transaction that is open."""
    for statement in statements(SCHEMA):
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {VERSION}")


def upgrade(db: sqlite3.Connection) -> None:
    """Rewrite the tables of a version-1 database in the current version, within the transaction that is open."""
    _add_functions(db)
    db.execute("DROP VIEW results")
    for table in ("runs", "scores"):
        db.execute(f"ALTER TABLE {table} RENAME TO {table}_1")
    for statement in statements(SCHEMA):
        if "CREATE TABLE tests" not in statement:
            db.execute(statement)
    for table, columns in (("runs", RUN_COLUMNS), ("scores", SCORE_COLUMNS)):
        db.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) {_select_1(columns, f'{table}_1', 'scores_1')}"
        )
    for table in ("scores", "runs"):
        db.execute(f"DROP TABLE {table}_1")
    db.execute(f"PRAGMA user_version = {VERSION}")


def show_as_current(db: sqlite3.Connection, schema: str = "main", prefix: str = "") -> None:
    """Create temporary views ``<prefix>runs``, ``<prefix>tests`` and ``<prefix>scores`` of a database of any version,
    with the current version's columns. Without a prefix they stand in place of its own tables and view, and nothing is
    created for the current version, which needs none."""
    version = version_of(db, schema)
    if version == VERSION and not prefix:
        return
    _add_functions(db)
    for table, columns in (("runs", RUN_COLUMNS), ("tests", TEST_COLUMNS), ("scores", SCORE_COLUMNS)):
        place = f"{schema}.{table}"
        select = f"SELECT {', '.join(columns)} FROM {place}"
        if version == 1:
            select = _select_1(columns, place, f"{schema}.scores")
        db.execute(f"CREATE TEMP VIEW {prefix}{table} AS {select}")
    if not prefix:
        db.execute(f"CREATE TEMP {RESULTS.rstrip(';')}")


def _select_1(columns: tuple[str, ...], table: str, scores: str) -> str:
    known = {name: text.replace("{scores}", scores) for name, text in _FROM_1.items()}
    if not table.endswith(("runs", "runs_1")):
        del known["status"]
    return f"SELECT {', '.join(f'{known[c]} AS {c}' if c in known else c for c in columns)} FROM {table}"


def _add_functions(db: sqlite3.Connection) -> None:
    db.create_function("has_nan", 1, _has_nan, deterministic=True)
    db.create_function("nulls_of", 1, lambda text: json.dumps([None] * len(json.loads(text))))
    db.create_function("no_class_of", 1, lambda blob: b"\xff" * len(blob))


def _has_nan(confidence: bytes) -> bool:
    return bool(np.isnan(np.frombuffer(confidence, dtype="<f2")).any())
