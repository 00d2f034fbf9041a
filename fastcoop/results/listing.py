"""A results folder as lists and files for people: its runs, one run in full, and its table as CSV or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcoop import escape
from fastcoop.errors import UserError, writing
from fastcoop.files import atomic_write
from fastcoop.results.predictions import calibration_errors
from fastcoop.results.read import load_failures, load_results, load_untested, percent
from fastcoop.results.tables import select_rows

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "key", "backbone", "dataset", "source", "label", "shots", "seed", "accuracy", "status", "seconds", "error",
)  # fmt: skip
SORTED_BY = ("backbone", "dataset", "method", "label", "shots", "seed")
# Above the table if all rows agree, so that it fits 80 columns.
SHOWN_ONCE = ("backbone", "dataset", "status")


def list_runs(folder: str | Path, conditions: Sequence[str] = ()) -> pd.DataFrame:
    """Return the runs that meet all conditions (see `select_rows`), with those that failed or were tested on nothing.

    A row per run and dataset that it was tested on, sorted by ``SORTED_BY``; columns as ``COLUMNS``, and the settings
    in which runs of one label, shots and seed differ.
    """
    import pandas as pd

    table = load_results(folder)
    for status, others in (("untested", load_untested(folder)), ("failed", load_failures(folder))):
        if len(others):
            others = others.assign(status=status, source=others.dataset)
            table = pd.concat([table, others], ignore_index=True) if len(table) else others

    def sort_key(column: pd.Series) -> pd.Series:  # "all" shots are NaN, which comes last
        is_number = column.name in ("shots", "seed")
        return pd.to_numeric(column, errors="coerce") if is_number else column.astype(str)

    by = [name for name in SORTED_BY if name in table]
    table = select_rows(table, conditions).sort_values(by, key=sort_key, kind="stable", ignore_index=True)
    given = [{name: str(value) for name, value in json.loads(text).items()} for text in table.settings]
    settings = pd.DataFrame(given, index=table.index).fillna("-")
    values = settings.groupby([table[name].astype(str) for name in [*by, "source"]]).nunique()
    differ = settings.loc[:, (values > 1).any()]
    return table[[name for name in COLUMNS if name in table]].assign(**differ)


def list_lines(table: pd.DataFrame) -> Iterator[str]:
    """Yield the lines that show a table of `list_runs`."""
    if table.empty:
        yield "No run meets this."
        return
    hidden = ["source"] if (table.source == table.dataset).all() else []
    same = [name for name in SHOWN_ONCE if len(table) > 1 and table[name].nunique(dropna=False) == 1]
    if same:
        yield ", ".join(f"{name} {table[name].iloc[0]}" for name in same)
    shown = table.drop(columns=hidden + same).assign(key=table.key.str[:12])
    yield from shown.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.2f}").split("\n")


def run_lines(run: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that show a run of `load_run`."""
    for name, value in run.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {one}" for key, one in value.items())
        if name not in ("tests", "losses") and value not in (None, ""):
            yield f"{name:<16} {value}"
    if losses := run["losses"]:
        yield f"{'losses':<16} {losses[0]} in the first of {len(losses)} epochs, {losses[-1]} in the last"
    for dataset, test in run["tests"].items():
        yield ""
        yield (
            f"on {dataset}: {percent(test['accuracy'])} (mean over classes {percent(test['macro_accuracy'])}, by "
            f"chance {percent(test['chance'])})"
        )
        known = {name: value for name, value in test["per_class"].items() if value is not None}
        for name, value in sorted(known.items(), key=lambda pair: pair[1]):
            yield f"{value:8.2f}  {name}"


def export_results(folder: str | Path, to: str | Path, conditions: Sequence[str] = ()) -> int:
    """Write the rows that meet all conditions to a .csv or .parquet file. Return their number.

    ``calibration_error``, in percentage points, follows the accuracies.
    """
    to = Path(to)
    if to.suffix not in (".csv", ".parquet"):
        raise UserError(
            f"Results are exported to .csv or .parquet, not to {to.name}; choose one of those endings."
        )
    table, calibration = load_results(folder), calibration_errors(folder)
    errors = [calibration[test] for test in zip(table.key, table.dataset, strict=True)]
    table.insert([*table].index("macro_accuracy") + 1, "calibration_error", errors)
    table = select_rows(table, conditions)
    for name in table:
        if table[name].dtype == "object" and table[name].dropna().map(type).nunique() > 1:
            table[name] = table[name].map(str, na_action="ignore")  # such as "all" beside numbers of shots
    try:
        with writing(to), atomic_write(to) as part:
            if to.suffix == ".csv":
                table = table.map(lambda value: escape.csv_cell(value) if isinstance(value, str) else value)
                table.to_csv(part, index=False, encoding="utf-8", lineterminator="\n")
            else:
                table.to_parquet(part, index=False)
    except ImportError:
        raise UserError(
            'Writing Parquet needs pyarrow; `pip install "fastcoop[parquet]"`, or export to a .csv file.'
        ) from None
    return len(table)
