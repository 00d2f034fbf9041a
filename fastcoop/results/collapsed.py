"""Runs that collapsed: their loss is finite, but their accuracy is far below that of the other seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

MIN_DROP = 5.0  # percentage points below the median of the seeds
MIN_RELATIVE_DROP = (
    0.25  # of the median's distance from chance; with few test images, accuracy has large steps
)
MIN_DEVIATIONS = 4.0  # scaled median absolute deviations
GROUP_COLUMNS = ("backbone", "dataset", "source", "method", "settings", "shots", "test")


def find_collapsed(runs: pd.DataFrame, group_columns: Sequence[str] = GROUP_COLUMNS) -> pd.DataFrame:
    """Return the rows of ``runs`` whose accuracy is below their group's median by more than each of the limits above.

    Args:
        runs: a results table.
        group_columns: columns that are equal for runs that differ in their seed only. Groups of fewer than three are
            left out.
    """
    import pandas as pd

    columns = [runs[name] for name in group_columns]
    groups = runs.groupby(list(group_columns), sort=False, dropna=False).accuracy
    median = groups.transform("median")
    deviations = (runs.accuracy - median).abs().groupby(columns, sort=False, dropna=False)
    deviation = 1.4826 * deviations.transform("median")
    relative = MIN_RELATIVE_DROP * (median - pd.to_numeric(runs.chance, errors="coerce").fillna(0.0))
    limit = np.maximum(np.maximum(MIN_DEVIATIONS * deviation, relative), MIN_DROP)
    return runs[(runs.accuracy < median - limit) & (groups.transform("count") >= 3)]
