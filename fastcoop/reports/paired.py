"""Tests of paired differences over datasets and seeds, and the verdict that they give on a claim.

A difference is measured once per dataset and seed. Seeds of one dataset are not independent samples of "datasets in
general", so there are two questions, each with its unit:

- datasets: is the difference positive on datasets like these? Wilcoxon's signed-rank test, exact, on one mean per
  dataset (as Demsar, 2006, advises for classifiers). It needs five datasets to reach p < 0.05.
- seeds: is it positive on these datasets, for any selection of images? A t test on the mean over datasets of the mean
  over seeds, from the seeds' variance within each dataset, with Welch's degrees of freedom (for one dataset: the usual
  paired t test). If no dataset has any spread, the exact sign test over the pairs.

Neither includes the variance from the choice of test images.
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

    Attributes:
        unit: What counts as independent for the verdict and the interval: "datasets" or "seeds".
        datasets, pairs: Number of datasets, and of datasets and seeds, that were compared.
        p_datasets, p_seeds: Of the hypothesis that the difference is not positive, for each unit.
        against: Of the hypothesis that it is not negative, for ``unit``.
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
    over_datasets, over_seeds = _over_datasets(means.to_numpy()), _over_seeds(values)
    mean = float(means.mean()) if len(means) else math.nan
    width = _half_width(*(_error_of_datasets(means) if unit == DATASETS else _error_of_seeds(values)))
    return PairedDifference(
        mean + above, mean + above - width, mean + above + width, unit, len(means), len(values),
        over_datasets[0], over_seeds[0], (over_datasets if unit == DATASETS else over_seeds)[1],
    )  # fmt: skip


def _over_datasets(means: np.ndarray) -> tuple[float, float]:
    """Return (p that the means are not positive, p that they are not negative) by Wilcoxon's signed-rank test.

    Datasets without a difference are dropped. Equal differences share their ranks, and all assignments of signs are
    counted, so that the test is exact with ties; beyond `MOST_EXACT` datasets it is scipy's.
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
    """Return (p that the mean is not positive, p that it is not negative), with the datasets held fixed."""
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
    """Return (standard error of the mean over datasets, Welch's degrees of freedom); NaN if a dataset has one seed."""
    groups = values.groupby(level=0)
    counts = groups.count()
    if counts.empty or (counts < 2).any() or (counts - 1).sum() < 2:
        return math.nan, math.nan
    parts = groups.var() / counts
    if parts.max() < 1e-18:  # up to rounding, all seeds of each dataset are equal
        return 0.0, math.nan
    freedom = float(parts.sum() ** 2 / (parts**2 / (counts - 1)).sum())
    return math.sqrt(float(parts.sum())) / len(counts), freedom


def _error_of_datasets(means: pd.Series) -> tuple[float, float]:
    return float(means.std()) / math.sqrt(len(means)), len(means) - 1


def _half_width(error: float, freedom: float) -> float:
    """Return half the width of the interval by Student's t; NaN if there is no spread."""
    from scipy.stats import t

    if math.isnan(error) or math.isnan(freedom) or error == 0:
        return math.nan
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error


def judge_greater(
    differences: pd.Series, above: float = 0.0, unit: str | None = None
) -> tuple[str, PairedDifference]:
    """Return the verdict on "greater than ``above``": it holds or fails if that is significant."""
    test = compare_pairs(differences, above, unit)
    if test.p < LEVEL and test.mean > above:
        return HOLDS, test
    return (FAILS if test.against < LEVEL and test.mean <= above else UNKNOWN), test


def judge_equal(
    differences: pd.Series, margin: float, center: float = 0.0, unit: str | None = None
) -> tuple[str, PairedDifference]:
    """Return the verdict on "within ``margin`` points of ``center``" by two one-sided tests.

    It holds if both are significant, and fails if the difference is significantly beyond the margin on either side. The
    p-values of the result are the larger ones of the two tests.
    """
    low = compare_pairs(differences, center - margin, unit)
    high = compare_pairs(-differences, -center - margin, unit)
    p_datasets, p_seeds = max(low.p_datasets, high.p_datasets), max(low.p_seeds, high.p_seeds)
    test = replace(low, p_datasets=p_datasets, p_seeds=p_seeds, against=min(low.against, high.against))
    if test.p < LEVEL:
        return HOLDS, test
    return (FAILS if test.against < LEVEL else UNKNOWN), test


def judge_all(judged: Sequence[tuple[str, PairedDifference]]) -> tuple[str, PairedDifference]:
    """Return the verdict on several statements that must all hold, and the test that it rests on.

    They hold if every test is significant at its own level, which needs no correction (an intersection-union test).
    They do not all hold if contraries are significant by Simes' correction for n tests: the k-th strongest at k/n of
    the level. The verdict rests on the strongest contrary if the whole fails, else on the weakest test.
    """

    def against(one: tuple[str, PairedDifference]) -> float:
        return 1.0 if math.isnan(one[1].against) else one[1].against

    contrary = sorted(judged, key=against)
    if any(against(one) * len(judged) / place < LEVEL for place, one in enumerate(contrary, 1)):
        return FAILS, contrary[0][1]
    verdict = HOLDS if all(own == HOLDS for own, _ in judged) else UNKNOWN
    return verdict, max((test for _, test in judged), key=lambda test: 2.0 if math.isnan(test.p) else test.p)
