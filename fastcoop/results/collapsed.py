"""Runs that collapsed quietly: the loss is finite, and the accuracy far below that of the other seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

FAR = 5.0  # percentage points below the sisters' median from which a run can count as collapsed
LOST = 0.25  # and the share of what the sisters' median has above chance
SISTERS = ("backbone", "dataset", "source", "method", "settings", "shots", "test")


def collapsed(runs: pd.DataFrame, sisters: Sequence[str] = SISTERS) -> pd.DataFrame:
    """The rows of ``runs`` far below the other seeds of their setting: below the median by more than `FAR` points,
    by more than `LOST` of what the median is above chance (few test images make big steps), and by more than four times
    the scaled median absolute deviation.

    ``sisters``: columns whose equal values make runs each other's seeds; at least three are compared.
    """
    import pandas as pd

    groups = runs.groupby(list(sisters), sort=False, dropna=False).accuracy
    median = groups.transform("median")
    columns = [runs[name] for name in sisters]
    deviation = 1.4826 * (runs.accuracy - median).abs().groupby(columns, sort=False, dropna=False).transform(
        "median"
    )
    lost = LOST * (median - pd.to_numeric(runs.chance, errors="coerce").fillna(0.0))
    far = runs.accuracy < median - np.maximum(np.maximum(4 * deviation, lost), FAR)
    return runs[far & (groups.transform("count") >= 3)]
