"""Paired tests over datasets and seeds, and the verdict they give on a claim.

A difference is measured once per dataset and seed. Seeds of one dataset are not independent looks at
"datasets in general", so two questions are kept apart, each with its unit:

- datasets: is the difference positive on datasets like these? Wilcoxon's signed-rank test, exact, on one mean
  per dataset (as Demsar, 2006, advises for classifiers). Needs five datasets to ever come below 0.05.
- seeds: is it positive on these very datasets, whatever the draw? A paired t test on the mean over datasets of
  the mean over seeds, from the seeds' variance within each dataset, with Welch's degrees of freedom (for one
  dataset: the usual paired t test). Where no dataset shows any spread, the exact sign test over the pairs.

Neither counts what drawing other test images would change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd

LEVEL = 0.05
CONFIDENCE = 1 - 2 * LEVEL  # of intervals: each end is a one-sided bound at the level of the tests
FEWEST_DATASETS = 5
MOST_EXACT = 16  # datasets up to which every assignment of signs is counted
HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "not enough runs"
DATASETS, SEEDS = "datasets", "seeds"


@dataclass(frozen=True)
class Paired:
    """A mean difference in percentage points, its 90% interval, what it was measured on, and one-sided p-values
    (NaN: cannot be had).

    ``p`` is the one the verdict rests on, ``against`` the same test's in the other direction. ``unit`` is what was
    counted as independent for them and for the interval.
    """

    mean: float
    low: float
    high: float
    unit: str
    datasets: int
    pairs: int
    p_datasets: float
    p_seeds: float
    against: float

    @property
    def p(self) -> float:
        return self.p_datasets if self.unit == DATASETS else self.p_seeds


def paired_test(differences: pd.Series, above: float = 0.0, unit: str | None = None) -> Paired:
    """Test that ``differences``, indexed by (dataset, seed), are on average greater than ``above``.

    ``unit`` is "datasets" where there are five, else "seeds", unless it is given. Several values of one dataset
    and seed count once, as their mean.
    """
    values = (differences.dropna() - above).groupby(level=[0, 1]).mean()
    means = values.groupby(level=0).mean()
    unit = unit or (DATASETS if len(means) >= FEWEST_DATASETS else SEEDS)
    over_datasets, over_seeds = _over_datasets(means.to_numpy()), _over_seeds(values)
    mean = float(means.mean()) if len(means) else math.nan
    error, freedom = _error_of_datasets(means) if unit == DATASETS else _error_of_seeds(values)
    reach = _t(error, freedom)
    return Paired(
        mean + above, mean + above - reach, mean + above + reach, unit, len(means), len(values),
        over_datasets[0], over_seeds[0], (over_datasets if unit == DATASETS else over_seeds)[1],
    )  # fmt: skip


def _over_datasets(means: np.ndarray) -> tuple[float, float]:
    """(p of being greater than 0, p of being less) by Wilcoxon's signed-rank test.

    Datasets without a difference are dropped. Equal differences share their ranks, and all assignments of signs
    to these are counted, so the test stays exact with ties; beyond `MOST_EXACT` datasets it is
    scipy's.
    """
    from scipy.stats import rankdata, wilcoxon

    if len(means) < FEWEST_DATASETS:
        return math.nan, math.nan
    means = means[means != 0]
    if not len(means):
        return 1.0, 1.0
    if len(means) > MOST_EXACT:
        more, less = (float(wilcoxon(means, alternative=side).pvalue) for side in ("greater", "less"))
        return more, less
    ranks = rankdata(np.abs(means).round(9))
    seen = ranks[means > 0].sum()
    sums = np.array(list(product((0, 1), repeat=len(ranks)))) @ ranks
    return float((sums >= seen).mean()), float((sums <= seen).mean())


def _over_seeds(values: pd.Series) -> tuple[float, float]:
    """(p of a mean greater than 0, p of one less) with the datasets held fixed."""
    from scipy.stats import binomtest, t

    error, freedom = _error_of_seeds(values)
    if math.isnan(error):
        return math.nan, math.nan
    if error == 0:
        ahead, behind = int((values > 0).sum()), int((values < 0).sum())
        if not ahead + behind:
            return 1.0, 1.0
        pairs = ahead + behind
        more, less = (float(binomtest(k, pairs, alternative="greater").pvalue) for k in (ahead, behind))
        return more, less
    ratio = float(values.groupby(level=0).mean().mean()) / error
    return float(t.sf(ratio, freedom)), float(t.cdf(ratio, freedom))


def _error_of_seeds(values: pd.Series) -> tuple[float, float]:
    """(standard error of the mean over datasets, Welch's degrees of freedom); NaN where a dataset has one seed."""
    groups = values.groupby(level=0)
    counts = groups.count()
    if counts.empty or (counts < 2).any() or (counts - 1).sum() < 2:
        return math.nan, math.nan
    parts = groups.var() / counts
    if parts.max() < 1e-18:  # rounding apart, all seeds of a dataset gave the same
        return 0.0, math.nan
    freedom = float(parts.sum() ** 2 / (parts**2 / (counts - 1)).sum())
    return math.sqrt(float(parts.sum())) / len(counts), freedom


def _error_of_datasets(means: pd.Series) -> tuple[float, float]:
    return float(means.std()) / math.sqrt(len(means)), len(means) - 1


def _t(error: float, freedom: float) -> float:
    """Half the width of the interval by Student's t; NaN where no spread was seen."""
    from scipy.stats import t

    if math.isnan(error) or math.isnan(freedom) or error == 0:
        return math.nan
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error


def greater(differences: pd.Series, above: float = 0.0, unit: str | None = None) -> tuple[str, Paired]:
    """The verdict on "greater than ``above``": it holds where that is significant, fails where the contrary is,
    and otherwise takes more runs to tell."""
    test = paired_test(differences, above, unit)
    if test.p < LEVEL and test.mean > above:
        return HOLDS, test
    return (FAILS if test.against < LEVEL and test.mean <= above else UNKNOWN), test


def alike(
    differences: pd.Series, margin: float, centre: float = 0.0, unit: str | None = None
) -> tuple[str, Paired]:
    """The verdict on "within ``margin`` points of ``centre``": two one-sided tests, both of which must be
    significant. It fails where the difference is significantly beyond the margin on either side.

    The p-values of the result are the larger of the two tests'.
    """
    low = paired_test(differences, centre - margin, unit)
    high = paired_test(-differences, -centre - margin, unit)
    p_datasets, p_seeds = (max(a, b) for a, b in zip(_ps(low), _ps(high), strict=True))
    test = replace(low, p_datasets=p_datasets, p_seeds=p_seeds, against=min(low.against, high.against))
    if test.p < LEVEL:
        return HOLDS, test
    return (FAILS if test.against < LEVEL else UNKNOWN), test


def _ps(test: Paired) -> tuple[float, float]:
    return test.p_datasets, test.p_seeds


def every(judged: Sequence[tuple[str, Paired]]) -> tuple[str, Paired]:
    """The verdict on several statements at once, all of which must hold, and the test that it rests on: the strongest
    contrary where the whole fails, else the weakest.

    That all hold is concluded if every test says so at its own level, which needs no correction (an intersection-union
    test). That not all hold is concluded from whichever contraries came out strongest, which takes Simes' correction
    for looking at several: alone, one of n must be significant at 1/n of the level; together, all n at the level."""
    contrary = sorted(judged, key=lambda one: _or_one(one[1].against))
    if any(
        _or_one(test.against) * len(judged) / place < LEVEL for place, (_, test) in enumerate(contrary, 1)
    ):
        return FAILS, contrary[0][1]
    verdict = HOLDS if all(own == HOLDS for own, _ in judged) else UNKNOWN
    return verdict, max((test for _, test in judged), key=lambda test: 2.0 if math.isnan(test.p) else test.p)


def _or_one(p: float) -> float:
    return 1.0 if math.isnan(p) else p
