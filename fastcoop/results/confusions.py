"""What a run got wrong on a test set, as pandas tables: confusions, classes, calibration and single images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastcoop.errors import UserError
from fastcoop.results.predictions import (
    BINS,
    Predictions,
    binned,
    confusion_matrix,
    load_predictions,
    refuse_diverged,
    refuse_other_images,
)
from fastcoop.results.read import find_key, load_results, unique_names

if TYPE_CHECKING:
    import pandas as pd

MOST_CLASSES = 30  # of a confusion matrix that is drawn


def confusion(
    results: str | Path, run: str | None = None, dataset: str | None = None, most: int | None = None
) -> pd.DataFrame:
    """Return the confusion matrix of a run: the number of test images by true class (rows) and predicted class.

    Args:
        results: a results folder.
        run: the run's key, or its beginning; None: the one that `representative_run` selects for ``dataset``.
        dataset: name of the tested dataset; None: the one that the run learned.
        most: the most rows and columns, as `group_confusion` takes them; None: all classes.

    Raises:
        UserError: there is no such run or test, the run diverged, or neither a run nor a dataset is named and the
            results have several datasets.
    """
    table = confusion_table(load_predictions(results, _key(results, run, dataset), dataset))
    return table if most is None else group_confusion(table, most)


def mistakes(
    results: str | Path, run: str | None = None, dataset: str | None = None, other: str | None = None
) -> pd.DataFrame:
    """Return the test images that a run got wrong, or with ``other`` those that exactly one of two runs got right.

    Args:
        results, run, dataset: as `confusion` takes them.
        other: key of a second run, tested on the same images, or its beginning.

    Returns:
        As `wrong_images`, or as `disagreements` with the second run.

    Raises:
        UserError: as `confusion`, or the two runs were tested on other images.
    """
    predictions = load_predictions(results, _key(results, run, dataset), dataset)
    if other is None:
        return wrong_images(predictions)
    return disagreements(predictions, load_predictions(results, find_key(results, other), dataset))


def representative_run(table: pd.DataFrame) -> pd.Series:
    """Return the row of the run that stands for a dataset where one must be shown.

    It is among the runs with the most shots. Of these, the settings (and backbone) with the highest mean accuracy over
    seeds are taken, and of their seeds the one with the median accuracy (of two, the lower). This selects what to look
    at. Its accuracy is selected on test images, so it is no estimate: the mean over all seeds is.

    Args:
        table: rows of a results table, of one tested dataset.
    """
    import pandas as pd

    table = table[table.accuracy.notna()]
    if table.empty:
        raise UserError("All of these runs diverged and predicted nothing; choose others.")
    shots = pd.to_numeric(table.shots.replace("all", np.inf))
    table = table[shots == shots.max()]
    names = [table[name].astype(str) for name in ("backbone", "label", "settings")]
    means = table.groupby(names).accuracy.mean()
    best = means.index[int(means.to_numpy().argmax())]
    same = np.all([column == value for column, value in zip(names, best, strict=True)], axis=0)
    seeds = table[same].sort_values(["accuracy", "seed"], kind="stable")
    return seeds.iloc[(len(seeds) - 1) // 2]


def confusion_table(predictions: Predictions) -> pd.DataFrame:
    """Return `confusion_matrix` with class names: true classes in rows, predicted ones in columns."""
    import pandas as pd

    names = unique_names(predictions.class_names)
    rows, columns = pd.Index(names, name="true"), pd.Index(names, name="predicted")
    return pd.DataFrame(confusion_matrix(predictions), rows, columns)


def confused_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of classes that are confused, most images first.

    Args:
        table: a confusion matrix with class names, int (classes, classes).

    Returns:
        ``first``, ``second``: the classes; ``images``: number of images of either that were taken for the other;
        ``first_as_second``, ``second_as_first``: its parts; ``share``: in percent of the images of both classes. Equal
        numbers are sorted by share.
    """
    import pandas as pd

    counts, names = table.to_numpy(), table.index.to_numpy(dtype=object)
    one, other = np.nonzero(np.triu(counts + counts.T, 1))
    there, back, support = counts[one, other], counts[other, one], counts.sum(1)
    found = pd.DataFrame(
        {
            "first": names[one], "second": names[other], "images": there + back, "first_as_second": there,
            "second_as_first": back, "share": 100 * (there + back) / (support[one] + support[other]),
        }
    )  # fmt: skip
    return found.sort_values(["images", "share"], ascending=False, kind="stable", ignore_index=True)


def class_accuracies(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per class of a confusion matrix, in label order.

    Returns:
        ``images``: its test images (its support); ``correct``; ``accuracy`` in percent, NaN without images;
        ``mistaken_for``: the class that most of its wrong images were taken for, "" without any; ``times``: how many.
    """
    counts = table.to_numpy()
    images, correct = counts.sum(1), np.diag(counts)
    wrong = counts - np.diag(correct)
    most, times = wrong.argmax(1), wrong.max(1)
    accuracy = np.divide(100.0 * correct, images, out=np.full(len(counts), np.nan), where=images > 0)
    found = table.iloc[:, :0].assign(images=images, correct=correct, accuracy=accuracy)
    names = table.columns.to_numpy(dtype=object)
    return found.assign(mistaken_for=np.where(times > 0, names[most], ""), times=times).rename_axis("class")


def group_confusion(table: pd.DataFrame, most: int = MOST_CLASSES) -> pd.DataFrame:
    """Return a confusion matrix of at most ``most`` rows: the most confused classes, and the sum of all others.

    Classes enter by pairs, those of `confused_pairs` first, so that classes that are confused stand side by side; then
    in label order. The last row and column are the others together, "71 other classes": what is confused among them
    is on its diagonal with what is right.
    """
    import pandas as pd

    if most < 2:
        raise UserError(f"Expected at least 2 rows of a confusion matrix, got {most}; ask for more.")
    if len(table) <= most:
        return table
    pairs = confused_pairs(table)
    ranked = dict.fromkeys([*pairs[["first", "second"]].to_numpy().ravel(), *table.index])
    shown = list(ranked)[: most - 1]
    place = {name: row for row, name in enumerate(shown)}
    group = np.array([place.get(name, most - 1) for name in table.index])
    member = np.eye(most, dtype=np.int64)[group]  # (classes, groups)
    names = [*shown, f"{len(table) - len(shown)} other classes"]
    rows, columns = pd.Index(names, name="true"), pd.Index(names, name="predicted")
    return pd.DataFrame(member.T @ table.to_numpy() @ member, rows, columns)


def calibration_curve(predictions: Predictions, bins: int = BINS) -> pd.DataFrame:
    """Return a row per bin of confidence, those of `calibration_error`; all but counts in percent.

    Returns:
        ``low``, ``high``: edges of the bin; ``images``: in it; ``confidence``: mean probability of their predictions;
        ``accuracy``. The last two are NaN in empty bins.

    Raises:
        UserError: the run diverged and predicted nothing.
    """
    import pandas as pd

    images, confidence, correct = binned(predictions, bins)
    edges = 100 * np.linspace(0, 1, bins + 1)
    with np.errstate(invalid="ignore"):
        means = {"confidence": 100 * confidence / images, "accuracy": 100 * correct / images}
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "images": images, **means})


def wrong_images(predictions: Predictions) -> pd.DataFrame:
    """Return the images whose prediction is wrong, the most confident first.

    Returns:
        ``image``: position among the test images that could be read, in the dataset's order;
        ``true``, ``predicted``: class names; ``probability`` of the prediction, 0 to 1.

    Raises:
        UserError: the run diverged and predicted nothing.
    """
    import pandas as pd

    refuse_diverged(predictions)
    rows = np.flatnonzero(predictions.predicted != predictions.labels)
    rows = rows[np.argsort(-predictions.confidence[rows].astype(np.float64), kind="stable")]
    names = np.array(unique_names(predictions.class_names), dtype=object)
    return pd.DataFrame(
        {
            "image": rows, "true": names[predictions.labels[rows]], "predicted": names[predictions.predicted[rows]],
            "probability": predictions.confidence[rows].astype(np.float64),
        }
    )  # fmt: skip


def disagreements(first: Predictions, second: Predictions) -> pd.DataFrame:
    """Return the images that exactly one of two runs got right: the first's, then the second's.

    Returns:
        ``image``, ``true``; ``right``: "first" or "second", the run that is right; ``predicted`` and ``probability``:
        of the run that is wrong, the most confident first.

    Raises:
        UserError: the runs were tested on other images, or one diverged.
    """
    import pandas as pd

    refuse_other_images(first, second)
    parts = []
    for right, good, bad in (("first", first, second), ("second", second, first)):
        wrong = wrong_images(bad)
        is_right = good.predicted[wrong.image] == good.labels[wrong.image]
        parts.append(wrong[is_right].assign(right=right))
    columns = ["image", "true", "right", "predicted", "probability"]
    found: pd.DataFrame = pd.concat(parts, ignore_index=True)[columns]
    return found


def _key(results: str | Path, run: str | None, dataset: str | None) -> str:
    if run is not None:
        return find_key(results, run)
    table = load_results(results)
    table = table[table.dataset == (table.source if dataset is None else dataset)]
    names = table.dataset.unique()
    if len(names) != 1:
        known = f"has tests on {', '.join(names)}" if len(names) else f"has no test on {dataset}"
        raise UserError(f"{results} {known}; name a run or one dataset that was tested.")
    return str(representative_run(table).key)
