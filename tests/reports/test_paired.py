"""The paired tests against scipy's and against hand-made differences."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from fastcoop.reports.paired import FAILS, HOLDS, UNKNOWN, alike, greater, paired_test


def differences(values: dict[str, list[float]]) -> pd.Series:
    index = [(name, seed) for name, seeds in values.items() for seed in range(len(seeds))]
    return pd.Series([v for seeds in values.values() for v in seeds], pd.MultiIndex.from_tuples(index))


def test_on_one_dataset_the_test_over_seeds_is_the_paired_t_test():
    values = [1.0, 2.5, 0.3, 1.1]
    test = paired_test(differences({"a": values}))
    assert test.p_seeds == pytest.approx(ttest_1samp(values, 0.0, alternative="greater").pvalue)
    assert math.isnan(test.p_datasets)
    assert (test.datasets, test.pairs, test.mean) == (1, 4, pytest.approx(np.mean(values)))


def test_seeds_count_within_their_dataset_only():
    # Datasets that differ a lot among themselves, each steady over seeds: the mean over these is certain.
    test = paired_test(differences({"a": [1.0, 1.1, 0.9], "b": [9.0, 9.1, 8.9]}))
    assert test.p_seeds < 1e-4
    assert ttest_1samp([1.0, 1.1, 0.9, 9.0, 9.1, 8.9], 0.0, alternative="greater").pvalue > 0.01


@pytest.mark.parametrize(("signs", "p"), [((1, 1, 1, 1, 1), 1 / 32), ((-1, 1, 1, 1, 1), 2 / 32)])
def test_over_datasets_is_the_exact_signed_rank_test(signs, p):
    values = {
        name: [sign * size] * 2 for name, sign, size in zip("abcde", signs, (1, 2, 3, 4, 5), strict=True)
    }
    assert paired_test(differences(values)).p_datasets == pytest.approx(p)


def test_many_seeds_do_not_stand_in_for_datasets():
    rng = np.random.default_rng(0)
    values = {
        name: list(mean + rng.normal(0, 0.01, 20))
        for name, mean in zip("abcde", (-9, 2, 2.1, 2.2, 2.3), strict=True)
    }
    verdict, test = greater(differences(values))
    assert test.p == test.p_datasets > 0.05
    assert verdict != HOLDS


def test_verdicts():
    assert greater(differences({"a": [3.0, 3.1, 2.9]}))[0] == HOLDS
    assert greater(differences({"a": [-3.0, -3.1, -2.9]}))[0] == FAILS
    assert greater(differences({"a": [3.0, -2.5, 0.1]}))[0] == UNKNOWN
    assert greater(differences({"a": [3.0, 3.1]}))[0] == UNKNOWN
    assert greater(differences({"a": [3.0, 3.1, 2.9]}), above=5.0)[0] == FAILS
    assert alike(differences({"a": [0.1, -0.1, 0.05]}), 1.0)[0] == HOLDS
    assert alike(differences({"a": [2.1, 1.9, 2.0]}), 1.0)[0] == FAILS
    assert alike(differences({"a": [0.9, -2.0, 1.5]}), 1.0)[0] == UNKNOWN
