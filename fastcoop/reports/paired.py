"""Tests of paired differences over datasets and seeds, and the verdict that they give on a claim.

docs/paper.md explains the two units. Neither test includes the variance from the choice of test images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd

LEVEL = 0.05
CONFIDENCE = 1 - 2 * LEVEL  # of intervals: each end is a one-sided bound at the level of the tests
FEWEST_DATASETS = 5  # for which datasets are the unit
MOST_EXACT = 16  # datasets up to which all assignments of signs are counted
HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "not enough runs"
DATASETS, SEEDS = "datasets", "seeds"


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference in percentage points with its 90% interval and one-sided p-values (NaN: not available).

    The interval is for ``unit``, as is ``against``, the p-value of the hypothesis that the difference is not negative;
    ``p_datasets`` and ``p_seeds`` are of the hypothesis that it is not positive.
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
        """The p-value that the verdict rests on."""
        return self.p_datasets if self.unit == DATASETS else self.p_seeds


Judgment = tuple[str, PairedDifference]  # a verdict, and the test that it rests on


def compare_pairs(differences: pd.Series, above: float = 0.0, unit: str | None = None) -> PairedDifference:
    """Test whether ``differences`` are on average greater than ``above``.

    Args:
        differences: Indexed by (dataset, seed). Several values of one dataset and seed count once, as their mean.
        above: In the unit of the differences.
        unit: "datasets" or "seeds"; by default datasets if there are at least five.
    """
    values = (differences.dropna() - above).groupby(level=[0, 1]).mean()
    means = values.groupby(level=0).mean()
    unit = unit or (DATASETS if len(means) >= FEWEST_DATASETS else SEEDS)
    tests = {DATASETS: _over_datasets(means), SEEDS: _over_seeds(values)}
    _, against, width = tests[unit]
    p_datasets, p_seeds = tests[DATASETS][0], tests[SEEDS][0]
    mean = float(means.mean()) + above if len(means) else math.nan
    ends = mean - width, mean + width
    return PairedDifference(mean, *ends, unit, len(means), len(values), p_datasets, p_seeds, against)


def _over_datasets(values: pd.Series) -> tuple[float, float, float]:
    """Return (p that the means are not positive, p that they are not negative, half the width of the interval).

    Wilcoxon's signed-rank test, without the datasets that have no difference. Counting all assignments of signs makes
    it exact with ties; beyond `MOST_EXACT` datasets it is scipy's.
    """
    from scipy.stats import rankdata, wilcoxon

    error = float(values.std()) / math.sqrt(max(len(values), 1))
    width = _half_width(error, len(values) - 1)
    if len(values) < FEWEST_DATASETS:
        return math.nan, math.nan, width
    means = values[values != 0].to_numpy()
    if not len(means):
        return 1.0, 1.0, width
    if len(means) > MOST_EXACT:
        more, less = (float(wilcoxon(means, alternative=side).pvalue) for side in ("greater", "less"))
        return more, less, width
    ranks = rankdata(np.abs(means).round(9))
    seen = ranks[means > 0].sum()
    sums = np.array(list(product((0, 1), repeat=len(ranks)))) @ ranks
    return float((sums >= seen).mean()), float((sums <= seen).mean()), width


def _over_seeds(values: pd.Series) -> tuple[float, float, float]:
    """Return the same for the mean over datasets, which are held fixed; NaN if a dataset has one seed."""
    from scipy.stats import binomtest, t

    groups = values.groupby(level=0)
    counts = groups.count()
    if counts.empty or (counts < 2).any() or (counts - 1).sum() < 2:
        return math.nan, math.nan, math.nan
    parts = groups.var() / counts
    if parts.max() < 1e-18:  # up to rounding, all seeds of each dataset are equal
        more, less = int((values > 0).sum()), int((values < 0).sum())
        if more + less == 0:
            return 1.0, 1.0, math.nan
        ps = [float(binomtest(k, more + less, alternative="greater").pvalue) for k in (more, less)]
        return ps[0], ps[1], math.nan
    freedom = float(parts.sum() ** 2 / (parts**2 / (counts - 1)).sum())
    error = math.sqrt(float(parts.sum())) / len(counts)
    ratio = float(groups.mean().mean()) / error
    return float(t.sf(ratio, freedom)), float(t.cdf(ratio, freedom)), _half_width(error, freedom)


def _half_width(error: float, freedom: float) -> float:
    """Return half the width of the interval by Student's t; NaN if there is no spread."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error if error > 0 else math.nan


def judge_greater(differences: pd.Series, above: float = 0.0) -> Judgment:
    """Return the verdict on "greater than ``above``": it holds or fails if that is significant."""
    test = compare_pairs(differences, above)
    if test.p < LEVEL and test.mean > above:
        return HOLDS, test
    return (FAILS if test.against < LEVEL and test.mean <= above else UNKNOWN), test


def judge_equal(
    differences: pd.Series, margin: float, center: float = 0.0, unit: str | None = None
) -> Judgment:
    """Return the verdict on "within ``margin`` points of ``center``" by two one-sided tests.

    It holds if both are significant, and fails if the difference is significantly beyond the margin on either side. The
    p-values of the result are the larger ones of the two tests.
    """
    low = compare_pairs(differences, center - margin, unit)
    high = compare_pairs(-differences, -center - margin, unit)
    p_datasets, p_seeds = max(low.p_datasets, high.p_datasets), max(low.p_seeds, high.p_seeds)
    test = replace(low, p_datasets=p_datasets, p_seeds=p_seeds, against=min(low.against, high.against))
    return (HOLDS if test.p < LEVEL else FAILS if test.against < LEVEL else UNKNOWN), test


def judge_all(judged: Sequence[Judgment]) -> Judgment:
    """Return the verdict on several statements that must all hold, and the test that it rests on.

    They hold if every test is significant at its own level, which needs no correction (an intersection-union test).
    They do not all hold if contraries are significant by Simes' correction for n tests: the k-th strongest at k/n of
    the level. The verdict rests on the strongest contrary if the whole fails, else on the weakest test.
    """
    tests = [test for _, test in judged]
    contrary = sorted(tests, key=lambda test: _or(test.against, 1.0))
    if any(test.against * len(tests) / place < LEVEL for place, test in enumerate(contrary, 1)):
        return FAILS, contrary[0]
    verdict = HOLDS if all(own == HOLDS for own, _ in judged) else UNKNOWN
    return verdict, max(tests, key=lambda test: _or(test.p, 2.0))


def _or(p: float, unknown: float) -> float:
    """Return a p-value, or ``unknown`` for NaN."""
    return unknown if math.isnan(p) else p
