"""Runs that collapsed quietly: the loss is finite, and the accuracy far below that of the other seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

FAR = 5.0  # percentage points below the sisters' median from which a run can count as collapsed
SISTERS = ("backbone", "dataset", "source", "method", "settings", "shots")


def collapsed(runs: pd.DataFrame, sisters: Sequence[str] = SISTERS) -> pd.DataFrame:
    """The rows of ``runs`` far below the other seeds of their setting: below the median by more than `FAR` points
    and by more than four times the scaled median absolute deviation.

    ``sisters``: columns whose equal values make runs each other's seeds; at least three are compared.
    """
    groups = runs.groupby(list(sisters), sort=False, dropna=False).accuracy
    median = groups.transform("median")
    columns = [runs[name] for name in sisters]
    deviation = 1.4826 * (runs.accuracy - median).abs().groupby(columns, sort=False, dropna=False).transform(
        "median"
    )
    far = runs.accuracy < median - (4 * deviation).clip(lower=FAR)
    return runs[far & (groups.transform("size") >= 3)]
