"""What a run got wrong: tables against scikit-learn and against counting, in the orders that are promised."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import calibration_curve as sklearn_curve
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import recall_score

import fastcoop as fc
from fastcoop import results as read
from fastcoop.cli import main
from fastcoop.errors import UserError
from fastcoop.results import Predictions
from tests.advice import follows


def drawn(seed: int, images: int = 400, classes: int = 5, names: tuple[str, ...] = ()) -> Predictions:
    """Predictions of a test set whose last class has no images."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes - 1, size=images)
    confidence = rng.uniform(0.2, 1, images).astype(np.float16)
    predicted = np.where(rng.random(images) < confidence, labels, rng.integers(classes, size=images))
    return Predictions(names or tuple(map(str, range(classes))), labels, predicted, confidence)


@pytest.mark.parametrize("seed", range(3))
def test_the_tables_are_scikit_learns_numbers(seed: int) -> None:
    one = drawn(seed)
    table = read.confusion_matrix(one)
    assert (table == sklearn_confusion(one.labels, one.predicted, labels=range(5))).all(axis=None)
    assert (table.index.name, table.columns.name) == ("true", "predicted")
    classes = read.class_accuracies(table)
    recall = 100 * recall_score(one.labels, one.predicted, labels=range(4), average=None)
    np.testing.assert_allclose(classes.accuracy[:4], recall)
    assert np.isnan(classes.accuracy["4"])
    assert classes.images["4"] == 0
    assert (classes.mistaken_for["4"], classes.times["4"]) == ("", 0)

    curve = read.calibration_curve(one, bins=10)
    right, confidence = one.predicted == one.labels, one.confidence.astype(np.float64)
    accuracy, mean = sklearn_curve(right, confidence, n_bins=10)
    known = curve[curve.images > 0]
    np.testing.assert_allclose(known.accuracy, 100 * accuracy)
    np.testing.assert_allclose(known.confidence, 100 * mean)
    assert curve.images.sum() == len(one.labels)
    gaps = (known.images * (known.accuracy - known.confidence).abs()).sum() / len(one.labels)
    assert read.calibration_error(one, bins=10) == pytest.approx(gaps)


def test_pairs_are_counted_both_ways_and_sorted_by_images_then_share() -> None:
    counts = [[50, 3, 0, 0], [2, 60, 0, 0], [0, 0, 9, 4], [0, 1, 1, 10]]
    names = pd.Index(list("abcd"))
    pairs = read.confused_pairs(pd.DataFrame(counts, names, names))
    assert pairs[["first", "second", "images"]].to_numpy().tolist() == [
        ["c", "d", 5],
        ["a", "b", 5],
        ["b", "d", 1],
    ]
    assert pairs.share.tolist() == pytest.approx([500 / 25, 500 / 115, 100 / 74])
    assert pairs[["first_as_second", "second_as_first"]].to_numpy().tolist() == [[4, 1], [3, 2], [0, 1]]
    assert read.confused_pairs(pd.DataFrame(np.eye(3, dtype=int))).empty


@pytest.mark.parametrize(("classes", "most"), [(40, 30), (31, 30), (6, 3), (6, 2)])
def test_many_classes_are_the_most_confused_ones_and_all_others_together(classes: int, most: int) -> None:
    one = drawn(1, 3000, classes)
    table = read.confusion_matrix(one)
    shown = read.group_confusion(table, most)
    assert shown.shape == (most, most)
    assert shown.index[-1] == f"{classes - most + 1} other classes"
    named = list(shown.index[:-1])
    assert (shown.loc[named, named] == table.loc[named, named]).all(axis=None)
    assert shown.to_numpy().sum() == 3000
    assert (shown.sum(axis=1)[named] == table.sum(axis=1)[named]).all()
    first = read.confused_pairs(table).iloc[0]
    assert named[: min(2, most - 1)] == [first["first"], first["second"]][: most - 1]
    assert read.group_confusion(table, classes) is table


def test_wrong_images_come_surest_first_and_keep_their_positions() -> None:
    one = drawn(2, names=("cat", "cat", "dog", "owl", "elk"))
    wrong = read.wrong_images(one)
    assert sorted(wrong.image) == np.flatnonzero(one.labels != one.predicted).tolist()
    assert wrong.probability.is_monotonic_decreasing
    same = wrong.groupby("probability").image
    assert same.apply(lambda rows: rows.is_monotonic_increasing).all()
    names = np.array(["cat (class 0)", "cat (class 1)", "dog", "owl", "elk"])
    assert wrong.true.tolist() == names[one.labels[wrong.image]].tolist()
    assert wrong.predicted.tolist() == names[one.predicted[wrong.image]].tolist()


def test_two_runs_are_compared_image_by_image() -> None:
    one, other = drawn(3), drawn(3)
    rng = np.random.default_rng(0)
    other = replace(other, predicted=np.where(rng.random(400) < 0.3, other.labels, other.predicted),
                    confidence=rng.uniform(0, 1, 400).astype(np.float16))  # fmt: skip
    other.predicted[:9] = (other.labels[:9] + 1) % 5
    found = read.disagreements(one, other)
    test = read.paired_test(one, other)
    assert found.right.value_counts().to_dict() == {"first": test.only_first, "second": test.only_second}
    for right, bad in (("first", other), ("second", one)):
        side = found[found.right == right]
        assert side.probability.is_monotonic_decreasing
        assert (side.predicted.astype(int) == bad.predicted[side.image]).all()
        assert (bad.predicted[side.image] != bad.labels[side.image]).all()
    with pytest.raises(UserError, match="other images"):
        read.disagreements(one, replace(other, labels=1 - other.labels.clip(max=1)))


def test_a_diverged_run_has_no_tables() -> None:
    one = drawn(4)
    lost = replace(one, predicted=np.full_like(one.predicted, -1))
    for table in (read.confusion_matrix, read.wrong_images, read.calibration_curve):
        with pytest.raises(UserError, match="diverged"):
            table(lost)


def test_a_run_is_shown_for_its_mean_over_seeds_and_its_median_seed() -> None:
    rows = [
        ("few", 1, 1, 99.0),  # fewer shots
        *(("best", 16, seed, accuracy) for seed, accuracy in ((1, 70.0), (2, 80.0), (3, 72.0), (4, 90.0))),
        *(("lucky", 16, seed, accuracy) for seed, accuracy in ((1, 95.0), (2, 10.0), (3, 96.0), (4, np.nan))),
    ]
    table = pd.DataFrame(rows, columns=["label", "shots", "seed", "accuracy"])
    table = table.assign(backbone="b", settings="{}")
    shown = read.representative_run(table)
    assert (shown.label, shown.seed) == ("best", 3)
    assert read.representative_run(table.replace({"shots": {1: "all"}})).label == "few"
    best, lucky = table.label == "best", table.label == "lucky"
    for column, other in (("backbone", "a"), ("settings", '{"epochs": 3}')):  # nor are these in one mean
        mixed = table.assign(label="one", **{column: table[column].where(lucky, other)})
        assert read.representative_run(mixed[best | lucky]).accuracy == 72
    with pytest.raises(UserError, match="diverged"):
        read.representative_run(table.assign(accuracy=np.nan))


@follows(
    "All of these runs diverged and predicted nothing; choose others",
    "Expected at least 2 rows of a confusion matrix",
    "name a run or one dataset that was tested",
    "was not tested on {}; run `{}`",
)
def test_a_results_folder_is_asked_by_run_or_dataset(grid: dict, run, world: Path, tmp_path: Path) -> None:
    methods = {"coop": {"context_length": 2, "epochs": 2}, "zero_shot": None}
    run(grid | {"methods": methods, "shots": [1]}, results=tmp_path / "r")
    folder, frame = tmp_path / "r", fc.load_results(tmp_path / "r")
    own = frame[(frame.dataset == "colours") & (frame.source == "colours")]
    shown = read.representative_run(own)
    table = fc.confusion(folder)
    assert table.equals(read.confusion_matrix(fc.load_predictions(folder, shown.key)))
    assert table.equals(fc.confusion(folder, shown.key[:10]))
    assert list(table.index) == ["dark red", "green", "grey", "sky blue"]
    with pytest.raises(UserError, match="was not tested on shifted") as refused:
        fc.confusion(folder, shown.key, "shifted")
    with pytest.raises(SystemExit) as stopped:
        main([*shlex.split(str(refused.value).split("`")[1])[1:], "--backbone", str(world / "tiny")])
    assert not stopped.value.code
    assert fc.confusion(folder, shown.key, "shifted").shape == (2, 2)
    assert fc.confusion(folder, dataset="shifted").shape == (2, 2)
    assert fc.confusion(folder, most=3).index[-1] == "2 other classes"
    wrong = fc.mistakes(folder, shown.key)
    assert len(wrong) == 20 - np.trace(table)
    zero = own[own.method == "zero_shot"].key.iloc[0]
    assert set(fc.mistakes(folder, shown.key, other=zero).columns) >= {"right", "image"}
    with pytest.raises(UserError, match="has no test on nothing; name a run"):
        fc.confusion(folder, dataset="nothing")
    with pytest.raises(UserError, match="Expected at least 2 rows"):
        fc.confusion(folder, most=1)
