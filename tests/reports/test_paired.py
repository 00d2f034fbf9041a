"""The paired tests against scipy's, against counting by hand, and for how often they err."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t, ttest_1samp, ttest_ind, wilcoxon

from fastcoop.reports.paired import (
    DATASETS,
    FAILS,
    HOLDS,
    LEVEL,
    SEEDS,
    UNKNOWN,
    compare_pairs,
    judge_all,
    judge_equal,
    judge_greater,
)


def differences(values: dict[str, list[float]]) -> pd.Series:
    index = [(name, seed) for name, seeds in values.items() for seed in range(len(seeds))]
    return pd.Series([v for seeds in values.values() for v in seeds], pd.MultiIndex.from_tuples(index))


def test_on_one_dataset_the_test_over_seeds_is_the_paired_t_test():
    values = [1.0, 2.5, 0.3, 1.1]
    test = compare_pairs(differences({"a": values}))
    reference = ttest_1samp(values, 0.0, alternative="greater")
    assert test.p_seeds == pytest.approx(reference.pvalue)
    assert test.against == pytest.approx(1 - reference.pvalue)
    interval = ttest_1samp(values, 0.0).confidence_interval(0.90)
    assert (test.low, test.high) == pytest.approx((interval.low, interval.high))
    assert math.isnan(test.p_datasets)
    assert (test.unit, test.datasets, test.pairs, test.mean) == (SEEDS, 1, 4, pytest.approx(np.mean(values)))


def test_on_two_datasets_the_test_over_seeds_is_welchs():
    # That the mean of two datasets is above 0 is that the one is above the negative of the other.
    one, two = [1.0, 2.5, 0.3, 1.1], [9.0, -6.0, 3.0]
    test = compare_pairs(differences({"a": one, "b": two}))
    negative = [-value for value in two]
    assert test.p_seeds == pytest.approx(
        ttest_ind(one, negative, equal_var=False, alternative="greater").pvalue
    )


def test_seeds_count_within_their_dataset_only():
    # Datasets that differ a lot among themselves, each steady over seeds: the mean over these is certain.
    test = compare_pairs(differences({"a": [1.0, 1.1, 0.9], "b": [9.0, 9.1, 8.9]}))
    assert test.p_seeds < 1e-4
    assert ttest_1samp([1.0, 1.1, 0.9, 9.0, 9.1, 8.9], 0.0, alternative="greater").pvalue > 0.01


def test_a_run_counted_twice_counts_once():
    once = differences({"a": [1.0, 2.0, 0.5], "b": [0.2, 0.4, 0.1]})
    # As text, because a NaN in them equals none.
    assert repr(compare_pairs(pd.concat([once, once]))) == repr(compare_pairs(once))


@pytest.mark.parametrize("means", [(1, 2, 3, 4, 5), (-1, 2, 3, 4, 5), (3, -1, 4, -1.5, 5, 9, -2, 6, 5.3)])
def test_over_datasets_is_scipys_signed_rank_test(means):
    test = compare_pairs(differences({f"d{i}": [mean] * 2 for i, mean in enumerate(means)}))
    assert test.unit == DATASETS
    assert test.p_datasets == pytest.approx(wilcoxon(means, alternative="greater", method="exact").pvalue)
    assert test.against == pytest.approx(wilcoxon(means, alternative="less", method="exact").pvalue)
    interval = ttest_1samp(means, 0.0).confidence_interval(0.90)
    assert (test.low, test.high) == pytest.approx((interval.low, interval.high))


def test_equal_differences_are_counted_exactly_too():
    means = [1.0, 1.0, -1.0, 2.0, 2.0, 0.0, 3.0]
    ranks = [2.0, 2.0, 2.0, 4.5, 4.5, 6.0]  # of 1, 1, 1, 2, 2, 3; the dataset without a difference is dropped
    sums = [sum(r for r, up in zip(ranks, signs, strict=True) if up) for signs in product((0, 1), repeat=6)]
    expected = np.mean([one >= 2 + 2 + 4.5 + 4.5 + 6 for one in sums])
    test = compare_pairs(differences({f"d{i}": [mean] for i, mean in enumerate(means)}))
    assert test.p_datasets == pytest.approx(expected)
    assert compare_pairs(differences({f"d{i}": [1.0] for i in range(5)})).p_datasets == 1 / 32


def test_many_seeds_do_not_stand_in_for_datasets():
    rng = np.random.default_rng(0)
    values = {
        name: list(mean + rng.normal(0, 0.01, 20))
        for name, mean in zip("abcde", (-9, 2, 2.1, 2.2, 2.3), strict=True)
    }
    verdict, test = judge_greater(differences(values))
    assert test.p == test.p_datasets > LEVEL
    assert verdict == UNKNOWN
    assert test.low < 0 < test.high  # and the interval is as wide as the datasets are unlike


def test_without_any_spread_it_is_the_sign_test_over_pairs():
    assert compare_pairs(differences({"a": [100.0] * 3}), above=50).p_seeds == pytest.approx(1 / 8)
    assert judge_greater(differences({"a": [100.0] * 5}), above=50)[0] == HOLDS
    assert judge_greater(differences({"a": [0.0] * 5}), above=50)[0] == FAILS


def test_under_no_difference_either_verdict_is_rare():
    rng = np.random.default_rng(1)
    for shape in ((1, 3), (3, 3), (7, 3)):  # datasets, seeds: seeds are the unit, and datasets
        spread = rng.uniform(0.2, 3.0, shape[0])[:, None]
        found = []
        for _ in range(200):
            shift = rng.normal(0, 2, (shape[0], 1)) if shape[0] > 4 else 0.0
            drawn = shift + spread * rng.normal(size=shape)
            found.append(judge_greater(differences({str(i): list(row) for i, row in enumerate(drawn)}))[0])
        for verdict in (HOLDS, FAILS):
            assert found.count(verdict) / len(found) <= 0.095  # 0.05, and three standard errors of 200 trials


def test_verdicts():
    assert judge_greater(differences({"a": [3.0, 3.1, 2.9]}))[0] == HOLDS
    assert judge_greater(differences({"a": [-3.0, -3.1, -2.9]}))[0] == FAILS
    assert judge_greater(differences({"a": [3.0, -2.5, 0.1]}))[0] == UNKNOWN
    assert judge_greater(differences({"a": [-3.0, 2.5, -0.1]}))[0] == UNKNOWN  # a mean below 0 is no proof
    assert judge_greater(differences({"a": [3.0, 3.1]}))[0] == UNKNOWN
    assert judge_greater(differences({"a": [3.0, 3.1, 2.9]}), above=5.0)[0] == FAILS
    assert judge_equal(differences({"a": [0.1, -0.1, 0.05]}), 1.0)[0] == HOLDS
    assert judge_equal(differences({"a": [2.1, 1.9, 2.0]}), 1.0)[0] == FAILS
    assert judge_equal(differences({"a": [-2.1, -1.9, -2.0]}), 1.0)[0] == FAILS
    assert judge_equal(differences({"a": [0.9, -2.0, 1.5]}), 1.0)[0] == UNKNOWN
    assert judge_equal(differences({"a": [15.1, 14.9, 15.0]}), 1.0, center=15.0)[0] == HOLDS


def test_alike_is_two_one_sided_t_tests():
    values = np.array([0.4, -0.2, 0.3, 0.1])
    _, test = judge_equal(differences({"a": list(values)}), 1.0)
    error = values.std(ddof=1) / 2
    sides = t.sf((values.mean() + 1) / error, 3), t.sf((1 - values.mean()) / error, 3)
    assert test.p_seeds == pytest.approx(max(sides))


def test_all_must_hold():
    up, down = (
        judge_greater(differences({"a": [3.0, 3.1, 2.9]})),
        judge_greater(differences({"a": [-3.0, -3.1, -2.9]})),
    )
    open_ = judge_greater(differences({"a": [3.0, -2.5, 0.1]}))
    assert judge_all([up, up]) == up
    assert judge_all([up, open_]) == open_
    assert judge_all([open_, down, up]) == down


def test_that_one_of_several_fails_is_corrected_for_looking_at_all():
    # Against: p = 0.029. Alone that tells, beside two that hold it does not, three times over it does again.
    up, down = (
        judge_greater(differences({"a": [3.0, 3.1, 2.9]})),
        judge_greater(differences({"a": [-1.0, -1.8, -0.6]})),
    )
    assert 0.05 / 3 < down[1].against < 0.05
    assert judge_all([down]) == down
    assert judge_all([up, down, up]) == (UNKNOWN, down[1])
    assert judge_all([down, down, down]) == down
    unknown = judge_greater(differences({"a": [3.0]}))
    assert judge_all([up, unknown])[0] == UNKNOWN


def test_where_all_statements_are_just_true_their_whole_rarely_fails():
    rng = np.random.default_rng(2)
    failed = 0
    for _ in range(400):
        # Differences between five neighbours, as of Table 5's order, all of them equal in truth.
        levels = rng.normal(size=(5, 3))
        tests = [judge_greater(differences({"a": list(step)})) for step in np.diff(levels, axis=0)]
        failed += judge_all(tests)[0] == FAILS
    assert failed / 400 <= 0.083  # 0.05, and three standard errors; uncorrected it is 0.17
