"""Two results folders, or two labels of one, compared run by run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcoop.errors import UserError
from fastcoop.progress import counted
from fastcoop.reports.paired import compare_pairs
from fastcoop.results.read import load_results
from fastcoop.results.tables import pair_folders, pair_labels, select_rows

if TYPE_CHECKING:
    import pandas as pd


def compare_results(
    folder: str | Path,
    other: str | Path | None = None,
    labels: tuple[str, str] | None = None,
    conditions: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Compare the runs of two folders, or of two labels within one.

    Args:
        folder: A results folder.
        other: The folder to compare with.
        labels: Or the two labels to compare, the second against the first.
        conditions: Only rows that meet all of them (see `fastcoop.results.tables.select_rows`).

    Returns:
        A group per label, backbone and shots: differences in percentage points by dataset and in all, and their
        two-sided p-value.

    Raises:
        UserError: Neither or both of ``other`` and ``labels`` are given, or there are no pairs of runs.
    """
    if (other is None) == (labels is None):
        raise UserError("Give either a second results folder to compare with, or --labels FIRST SECOND.")
    first = select_rows(load_results(folder), conditions)
    if labels is not None:
        pairs = pair_labels(first, *labels, where=folder)
    else:
        pairs = pair_folders(first, select_rows(load_results(str(other)), conditions))
    pairs["order"] = pairs.shots.replace("all", math.inf).astype(float)
    groups: Any = pairs.groupby(["label", "backbone", "order"])
    return [_compared(label, backbone, frame) for (label, backbone, _), frame in groups]


def _compared(label: str, backbone: str, pairs: pd.DataFrame) -> dict[str, Any]:
    pairs = pairs.assign(
        difference=pairs["second"] - pairs["first"],
        place=[d if d == s else f"{s} > {d}" for s, d in zip(pairs.source, pairs.dataset, strict=True)],
    )
    # All targets of a source test the same runs: they are no further datasets.
    differences = pairs.groupby(["source", "seed"], sort=False).difference.mean()
    more, less = (compare_pairs(sign * differences) for sign in (1, -1))
    p = None if math.isnan(more.p) else min(1.0, 2 * min(more.p, less.p))
    groups = pairs.groupby("place", sort=False)
    means = groups[["first", "second", "difference"]].mean().assign(runs=groups.size())
    datasets = means.rename_axis("dataset").reset_index().to_dict("records")
    shots = pairs.shots.iloc[0]
    return {
        "label": label, "backbone": backbone, "shots": shots if isinstance(shots, str) else int(shots),
        "difference": float(means.difference.mean()), "pairs": len(pairs), "p": p, "over": more.unit,
        "datasets": datasets,
    }  # fmt: skip


def comparison_lines(groups: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines that show groups of `compare_results`."""
    for group in groups:
        yield f"{group['label']}, {group['backbone']}, {counted(group['shots'], 'shot')}"
        width = max(len(row["dataset"]) for row in group["datasets"])
        for row in group["datasets"]:
            numbers = f"{row['first']:8.2f} {row['second']:8.2f} {row['difference']:+8.2f}"
            yield f"  {row['dataset']:<{width}} {numbers}  ({counted(row['runs'], 'run')})"
        p = "too few runs for a test" if group["p"] is None else f"p = {group['p']:.3g} over {group['over']}"
        yield f"  {'mean':<{width}} {'':8} {'':8} {group['difference']:+8.2f}  ({p})"
