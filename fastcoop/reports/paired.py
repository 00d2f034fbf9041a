"""Paired tests over datasets and seeds, and the verdict they give on a claim.

A difference is measured once per dataset and seed. Seeds of one dataset are not independent looks at
"datasets in general", so two questions are kept apart:

- over datasets: is the difference positive on datasets like these? Wilcoxon's signed-rank test, exact,
one-sided, on one mean per dataset. Needs five datasets to ever come below 0.05.
- over seeds: is it positive on these very datasets, whatever the draw? A paired t test, one-sided, on the
mean over datasets of the mean over seeds, with the seeds' variance within each dataset (for one dataset:
the usual one)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

LEVEL = 0.05
FEWEST_DATASETS = 5
HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "not enough runs"


@dataclass(frozen=True)
class Paired:
    """A mean difference in percentage points, what it was measured on, and one-sided p-values (NaN: cannot
    be had).

    ``p`` is the one the verdict rests on: over datasets where there are enough of them, over seeds otherwise.
    """

    mean: float
    datasets: int
    pairs: int
    p_datasets: float
    p_seeds: float

    @property
    def p(self) -> float:
        return self.p_datasets if self.datasets >= FEWEST_DATASETS else self.p_seeds


def paired_test(differences: pd.Series, above: float = 0.0) -> Paired:
    """Test that ``differences``, indexed by (dataset, seed), are on average greater than ``above``."""
    values = differences.dropna() - above
    groups = values.groupby(level=0)
    means, counts = groups.mean(), groups.count()
    mean = float(means.mean()) + above if len(means) else math.nan
    return Paired(
        mean, len(means), len(values), _over_datasets(means), _over_seeds(means, groups.var(), counts)
    )


def _over_datasets(means: pd.Series) -> float:
    from scipy.stats import wilcoxon

    if len(means) < FEWEST_DATASETS:
        return math.nan
    if (means == 0).all():
        return 1.0
    return float(wilcoxon(means.to_numpy(), alternative="greater", method="auto").pvalue)


def _over_seeds(means: pd.Series, variances: pd.Series, counts: pd.Series) -> float:
    from scipy.stats import t

    freedom = int((counts - 1).sum())
    if freedom < 2 or (counts < 2).any():
        return math.nan
    error = math.sqrt(float((variances / counts).sum())) / len(means)
    mean = float(means.mean())
    if error == 0:
        return 0.0 if mean > 0 else 1.0
    return float(t.sf(mean / error, freedom))


def greater(differences: pd.Series, above: float = 0.0) -> tuple[str, Paired]:
    """The verdict on "greater than ``above``": it holds if significant, fails if the mean points the other
    way, and otherwise takes more runs to tell."""
    test = paired_test(differences, above)
    if math.isnan(test.p):
        return UNKNOWN, test
    if test.p < LEVEL and test.mean > above:
        return HOLDS, test
    return (FAILS if test.mean <= above else UNKNOWN), test


def alike(differences: pd.Series, margin: float) -> tuple[str, Paired]:
    """The verdict on "within ``margin`` points of each other": two one-sided tests, both of which must be
    significant.

    The p-values of the result are the larger of the two tests'.
    """
    low, high = paired_test(differences, -margin), paired_test(-differences, -margin)
    test = Paired(
        low.mean,
        low.datasets,
        low.pairs,
        max(low.p_datasets, high.p_datasets),
        max(low.p_seeds, high.p_seeds),
    )
    if math.isnan(test.p):
        return UNKNOWN, test
    return (HOLDS if test.p < LEVEL else FAILS if abs(test.mean) >= margin else UNKNOWN), test
