"""The predictions of a run, and pandas tables of them: confusions, classes, calibration and single images."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastcoop import escape
from fastcoop.errors import UserError
from fastcoop.results.database import decoding, reading
from fastcoop.results.metadata import recorded_places
from fastcoop.results.read import find_key, load_results, unique_names
from fastcoop.results.records import NO_CLASS
from fastcoop.results.tables import plain_texts

if TYPE_CHECKING:
    import pandas as pd

BINS = 15  # of the calibration error, the usual number
MOST_CLASSES = 30  # of a confusion matrix that is drawn


@dataclass(frozen=True, eq=False)
class Predictions:
    """A run's predictions on a test set.

    Attributes:
        class_names: in label order.
        labels: int64 (images,), the true labels.
        predicted: int64 (images,); -1 where the run's outputs are not finite.
        confidence: float16 (images,), the softmax probability of the prediction; NaN where there is none.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray

    @property
    def is_right(self) -> np.ndarray:
        """Whether each prediction is right, bool (images,)."""
        right: np.ndarray = self.predicted == self.labels
        return right

    def refuse_diverged(self) -> None:
        """Raise UserError where the run predicted nothing."""
        if (self.predicted < 0).any():
            raise UserError(
                "The run diverged: its outputs are not finite, so it predicted nothing; choose another run."
            )

    def refuse_other_images(self, other: Predictions) -> None:
        """Raise UserError where two runs were tested on different images, or one diverged."""
        self.refuse_diverged()
        other.refuse_diverged()
        if self.class_names != other.class_names or not np.array_equal(self.labels, other.labels):
            raise UserError(
                "The two runs were tested on other images; compare runs tested on the same dataset."
            )


def load_predictions(folder: str | Path, key: str, dataset: str | None = None) -> Predictions:
    """Return a run's predictions on a dataset that it was tested on.

    Args:
        folder: a results folder.
        key: the run's whole key.
        dataset: name of the tested dataset; None: the one that the run learned.

    Raises:
        UserError: there is no such run or test.
    """
    query = (
        "SELECT class_names, labels, predictions, confidence FROM scores JOIN runs USING (key) JOIN tests ON "
        "test = digest WHERE key = ? AND scores.dataset = coalesce(?, runs.dataset)"
    )
    with reading(Path(folder)) as db:
        row = db.execute(query, (key, dataset)).fetchone()
        known = db.execute("SELECT dataset FROM runs WHERE key = ?", (key,)).fetchone()
    if row is not None:
        with decoding(Path(folder)):
            return _decoded(*row)
    if known is None:
        raise UserError(f"{folder} has no run {key}.")
    target = dataset or known[0]
    words = ("fastcoop", "evaluate", Path(folder), "--targets", target, "--run", key[:12])
    command = escape.shell_command(*words, *recorded_places(folder))
    raise UserError(f"The run {key[:12]} was not tested on {target}; run `{command}`.")


def _decoded(class_names: str, *blobs: bytes) -> Predictions:
    labels, predicted = (np.frombuffer(blob, dtype="<u2").astype(np.int64) for blob in blobs[:2])
    predicted[predicted == NO_CLASS] = -1
    names, confidence = tuple(json.loads(class_names)), np.frombuffer(blobs[2], dtype="<f2")
    highest = max(labels.max(), predicted.max())
    if not len(labels) == len(predicted) == len(confidence) or highest >= len(names):
        raise ValueError("predictions that do not fit their test")
    return Predictions(names, labels, predicted, confidence)


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
    table = confusion_matrix(load_predictions(results, _key(results, run, dataset), dataset))
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
    groups = table.groupby([*(table[name].astype(str) for name in ("backbone", "label")), plain_texts(table)])
    best: pd.DataFrame = groups.get_group(groups.accuracy.mean().idxmax())
    seeds = best.sort_values(["accuracy", "seed"], kind="stable")
    return seeds.iloc[(len(seeds) - 1) // 2]


def confusion_matrix(predictions: Predictions) -> pd.DataFrame:
    """Return the number of images, int64 (classes, classes), by true class (rows) and predicted class (columns).

    Raises:
        UserError: the run diverged and predicted nothing.
    """
    import pandas as pd

    predictions.refuse_diverged()
    names = unique_names(predictions.class_names)
    pairs = len(names) * predictions.labels + predictions.predicted
    counts = np.bincount(pairs, minlength=len(names) ** 2).reshape(len(names), len(names))
    return pd.DataFrame(counts, pd.Index(names, name="true"), pd.Index(names, name="predicted"))


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
    images, correct = table.sum(axis=1), np.diag(table)
    wrong = table - np.diag(correct)
    found = images.to_frame("images").assign(correct=correct, accuracy=100 * correct / images)
    times = wrong.max(axis=1)
    return found.assign(mistaken_for=wrong.idxmax(axis=1).where(times > 0, ""), times=times).rename_axis(
        "class"
    )


def group_confusion(table: pd.DataFrame, most: int = MOST_CLASSES) -> pd.DataFrame:
    """Return a confusion matrix of at most ``most`` rows: the most confused classes, and the sum of all others.

    Classes enter by pairs, those of `confused_pairs` first, so that classes that are confused stand side by side; then
    in label order. The last row and column are the others together, "71 other classes": what is confused among them
    is on its diagonal with what is right.
    """
    if most < 2:
        raise UserError(f"Expected at least 2 rows of a confusion matrix, got {most}; ask for more.")
    if len(table) <= most:
        return table
    pairs = confused_pairs(table)
    ranked = dict.fromkeys([*pairs[["first", "second"]].to_numpy().ravel(), *table.index])
    shown, others = list(ranked)[: most - 1], f"{len(table) - most + 1} other classes"
    groups = np.array([name if name in shown else others for name in table.index])
    grouped = table.groupby(groups).sum().T.groupby(groups).sum().T
    return grouped.loc[[*shown, others], [*shown, others]].rename_axis(index="true", columns="predicted")


def calibration_error(predictions: Predictions, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean distance between confidence and accuracy.

    Confidence is stored in float16, so a few predictions may fall into a neighboring bin.

    Args:
        predictions: of a run.
        bins: number of bins of equal width, into which predictions are sorted by confidence.

    Returns:
        The error in percentage points, each bin weighted by its number of images.

    Raises:
        UserError: the run diverged and predicted nothing.
    """
    images, confidence, correct = _binned(predictions, bins)
    return float(100 * np.abs(correct - confidence).sum() / images.sum())


def _binned(predictions: Predictions, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the images, the sum of their confidence and the correct ones, (bins,) each, by confidence."""
    predictions.refuse_diverged()
    confidence = predictions.confidence.astype(np.float64)
    index = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    weights = None, confidence, predictions.is_right
    images, total, correct = (np.bincount(index, weights=one, minlength=bins) for one in weights)
    return images, total, correct


def calibration_errors(folder: str | Path) -> dict[tuple[str, str], float]:
    """Return the `calibration_error` of every test of a results folder, by key and tested dataset.

    Tests of runs that diverged have NaN.
    """
    query = (
        "SELECT key, scores.dataset, class_names, labels, predictions, confidence FROM scores JOIN tests "
        "ON test = digest"
    )
    errors = {}
    with reading(Path(folder)) as db, decoding(Path(folder)):
        for key, dataset, *stored in db.execute(query):
            found = _decoded(*stored)
            diverged = (found.predicted < 0).any()
            errors[key, dataset] = math.nan if diverged else calibration_error(found)
    return errors


def calibration_curve(predictions: Predictions, bins: int = BINS) -> pd.DataFrame:
    """Return a row per bin of confidence, those of `calibration_error`; all but counts in percent.

    Returns:
        ``low``, ``high``: edges of the bin; ``images``: in it; ``confidence``: mean probability of their predictions;
        ``accuracy``. The last two are NaN in empty bins.

    Raises:
        UserError: the run diverged and predicted nothing.
    """
    import pandas as pd

    images, confidence, correct = _binned(predictions, bins)
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

    predictions.refuse_diverged()
    rows = np.flatnonzero(~predictions.is_right)
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

    first.refuse_other_images(second)
    parts = []
    for right, good, bad in (("first", first, second), ("second", second, first)):
        wrong = wrong_images(bad)
        parts.append(wrong[good.is_right[wrong.image]].assign(right=right))
    return pd.concat(parts, ignore_index=True)[["image", "true", "right", "predicted", "probability"]]


class PairedTest(NamedTuple):
    """McNemar's exact test of two runs on the same images.

    Attributes:
        only_first, only_second: number of images that only the first run, or only the second, classified correctly.
        p: two-sided p value of this difference, under the hypothesis that both runs are equally good.
    """

    only_first: int
    only_second: int
    p: float


def paired_test(first: Predictions, second: Predictions) -> PairedTest:
    """Test whether two runs differ by more than chance, with McNemar's exact test over the images.

    Raises:
        UserError: the runs were tested on different images, or one diverged and predicted nothing.
    """
    from scipy.stats import binomtest

    first.refuse_other_images(second)
    one, other = first.is_right, second.is_right
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    differ = only_first + only_second
    return PairedTest(only_first, only_second, float(binomtest(only_first, differ).pvalue) if differ else 1.0)


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
