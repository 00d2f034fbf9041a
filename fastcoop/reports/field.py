"""What tables of the field's methods have in common: families, protocols, cost, calibration, published numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fastcoop.errors import UserError
from fastcoop.reports import frames
from fastcoop.reports.paper import plain, read_numbers
from fastcoop.reports.series import plain_dataset
from fastcoop.reports.study import Study
from fastcoop.reports.table import TEST_LABELS, Cell, Cells, Table
from fastcoop.results.parameters import load_parameters
from fastcoop.results.predictions import calibration_error, load_predictions

FAMILIES = {  # methods of the panels of a figure
    "Learned prompts": ("coop", "kgcoop", "prograd", "cocoop", "tcp"),
    "Caches and closed forms": ("tip_adapter", "tip_adapter_f", "gda", "proker"),
    "Adapters and probes": (
        "clip_adapter", "task_res", "cross_modal", "lp_plus_plus", "zs_lp", "clap", "prolip", "linear_probe",
    ),
}  # fmt: skip
PAPER = (
    "zero_shot", "ensemble", "linear_probe", "coop", "text_transform", "text_bias", "finetune_image_encoder",
)  # fmt: skip
FIELD = tuple(name for family in FAMILIES.values() for name in family if name not in PAPER)
CHOSEN, ECE, PARAMETERS, SECONDS, SOURCE = "chosen on", "ECE", "parameters", "seconds", "source"
FACTS = (CHOSEN, ECE, PARAMETERS, SECONDS)  # columns after the accuracies
OFFICIAL = f"{TEST_LABELS} (official)"
PUBLISHED = "published, 11 datasets"
NOTES = (
    "Chosen on: the images that values of a method were chosen on, its selection: few_val (at most four validation"
    " images per class), shots_val (as many as training images), full_val, imagenet_val, or fixed (nothing was chosen)."
    f" {OFFICIAL}: as in the official code, which looks at the test labels; such rows are not ranked.",
    "ECE: expected calibration error in percentage points, over 15 bins, of the runs at the most shots. Parameters:"
    " numbers trained by steps; closed forms train none. Seconds: of a run, with its tests; of runs that train together"
    " its share.",
)


def fact_columns(runs: pd.DataFrame) -> tuple[str, ...]:
    """Return the columns after the accuracies: none for a table of the paper's methods only."""
    return FACTS if set(runs.method) - set(PAPER) else ()


def facts(study: Study, runs: pd.DataFrame) -> Cells:
    """Return what runs of one method and number of shots were chosen on, their calibration error and cost."""
    if runs.empty:
        return {}
    errors = [_calibration(study.folder, row.key, row.dataset) for row in frames.rows_of(runs)]
    found = np.array([one for one in errors if one is not None])
    cells: Cells = {CHOSEN: chosen_on(runs), PARAMETERS: _parameters(study, runs)}
    if len(found) == len(runs):
        cells[ECE] = f"{found.mean():.2f}"
    if (runs.shots > 0).all():
        cells[SECONDS] = f"{runs.seconds.mean():.2g}"
    return {name: value for name, value in cells.items() if value}


def chosen_on(runs: pd.DataFrame) -> str:
    """Return what the values of runs of one method were chosen on."""
    method = str(runs.method.iloc[0])
    if "selection" in runs and runs.selection.notna().any():
        return ", ".join(runs.selection.dropna().replace("official", OFFICIAL).unique())
    if method in ("zero_shot", "ensemble"):
        return ""
    values = {"select": "best_val", "learning_rate": "validation"}
    chosen = any(one.get(name) == value for one in runs.settings for name, value in values.items())
    return "few_val" if chosen or method == "linear_probe" else "fixed"


def _calibration(folder: Path, key: str, dataset: str) -> float | None:
    try:
        return calibration_error(load_predictions(folder, key, plain_dataset(dataset)))
    except UserError:  # results without predictions, or a run that diverged
        return None


def _parameters(study: Study, runs: pd.DataFrame) -> str:
    """Return how many numbers a run trains, as text; of several datasets the range; "" if it is not known."""
    counts = set()
    for row in frames.rows_of(runs.drop_duplicates(["source"])):
        extra = json.loads(row.extra) if isinstance(getattr(row, "extra", None), str) else {}
        if "trained_parameters" in extra:
            counts.add(int(extra["trained_parameters"]))
        elif learned := study.read(load_parameters, row.key):
            weights = learned.weights or {} if learned.contexts is None else {"contexts": learned.contexts}
            counts.add(sum(array.size for array in weights.values() if array.dtype.kind == "f"))
    return " to ".join(f"{count:,}" for count in dict.fromkeys((min(counts), max(counts)))) if counts else ""


def add_published(table: Table, protocol: str, backbone: str, columns: dict[str, str]) -> None:
    """Add gray rows of what others published for a backbone, with their sources.

    Args:
        table: Of the names (dataset, method), or (method,).
        protocol: "few-shot" or "base-to-new", whose numbers are means over the 11 datasets, or "shift".
        backbone: Name of the backbone.
        columns: The table's columns, by those of ``field_numbers.csv``.
    """
    numbers = read_numbers("field_numbers.csv")
    rows = numbers[
        (numbers.protocol == protocol) & (numbers.backbone == plain(backbone)) & numbers.column.isin(columns)
    ]
    groups: Any = rows.groupby(["method", "source"], sort=False)
    for (method, source), own in groups:
        values = zip(own.column, own.accuracy, strict=True)
        cells: Cells = {columns[column]: Cell(float(value), runs=0) for column, value in values}
        _, first = next(own.iterrows())
        chosen = OFFICIAL if first.chosen_on == "official" else first.chosen_on
        shown = method + ", trains the image tower" * bool(first.tuned_tower)
        names = (f"{shown}, published",) if len(table.heads) == 1 else (PUBLISHED, shown)
        table.add(names, cells | ({CHOSEN: chosen} if CHOSEN in table.columns else {}) | {SOURCE: source})
    if len(rows):
        table.columns = (*table.columns, SOURCE)
        what = "what" if protocol == "shift" else "means over CoOp's 11 datasets that"
        table.notes.append(
            f"Gray rows are {what} others published, by the named source: other implementations, splits, prompts and"
            " protocols. A source that is not the method's own is second-hand."
        )
