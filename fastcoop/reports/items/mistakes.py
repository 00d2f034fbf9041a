"""What went wrong: per dataset one run's confusions, its accuracy by class, its calibration and its wrong pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fastcoop import escape, results
from fastcoop.errors import UserError
from fastcoop.progress import counted
from fastcoop.reports import chart, frames
from fastcoop.reports.item import Exhibit, Item
from fastcoop.reports.series import plain_dataset
from fastcoop.reports.study import Study, evaluate_targets
from fastcoop.reports.style import TWO_COLUMNS, shortened
from fastcoop.reports.table import DASH, Table, text_table
from fastcoop.results.predictions import MOST_CLASSES, Predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PICTURES = 160  # of all datasets together, under 1 MB
PICTURES = 12  # of one list
PAIRS = 10  # of the table
PAIR_COLUMNS = {
    "first": "first class", "second": "second class", "first_as_second": "first taken for second",
    "second_as_first": "second taken for first", "share": "share of both (%)",
}  # fmt: skip
COUNTED = 16  # classes, above which a matrix has small letters
NAME_LENGTH = 18  # characters of a class in a figure


def make(study: Study) -> list[Exhibit]:
    shown = _shown_runs(study)
    pictures = min(PICTURES, max(3, MOST_PICTURES // (2 * max(len(shown), 1))))
    names = escape.file_names(run.dataset for run, _ in shown)
    exhibits: list[Exhibit] = []
    for run, rival in shown:
        try:
            predictions = results.load_predictions(study.folder, run.key, plain_dataset(run.dataset))
        except UserError:
            continue
        exhibits += _of_run(study, run, rival, predictions, f"-{names[run.dataset]}", pictures)
    if not exhibits:
        which = "the runs named have no accuracy and" if study.chosen else "the runs have"
        raise frames.Missing(f"{which} no predictions on a dataset")
    return exhibits


def _shown_runs(study: Study) -> list[tuple[Any, Any]]:
    """Return (run, the run it is compared with or None), rows of the study's table, one per tested dataset."""
    if study.chosen:
        keys = list(study.chosen)
        every = pd.concat([study.runs, study.repeated])
        rows = every[every.key.isin(keys)]
        rows = rows.assign(place=rows.key.map(keys.index)).sort_values("place", kind="stable")
        groups = (list(frames.rows_of(frame)) for _, frame in rows.groupby("dataset", sort=False))
        return [(first, others[0] if others else None) for first, *others in groups]
    own = frames.own_prompt(study.runs[study.runs.dataset == study.runs.source])
    found = []
    for _, frame in own.groupby("dataset", sort=False):
        run = results.representative_run(frame)
        others = frame[(frame.backbone == run.backbone) & (frame.label != run.label)]
        plain = others[others.method == "zero_shot"]
        others = plain if len(plain) else others
        found.append((run, results.representative_run(others) if len(others) else None))
    return found


def _of_run(
    study: Study, run: Any, rival: Any, predictions: Predictions, suffix: str, pictures: int
) -> Iterator[Exhibit]:
    table = results.confusion_matrix(predictions)
    pairs, wrong = results.confused_pairs(table), results.wrong_images(predictions)
    title, error = _title(run), results.calibration_error(predictions)
    fold = (
        f"{run.dataset}: {len(wrong):,} of {counted(len(predictions.labels), 'test image')} wrong by {title}"
    )
    if len(pairs):
        first = pairs.iloc[0]
        names = f"{first['first']} and {first['second']}"
        fold += f"; most confused: {names} ({counted(first['images'], 'image')})"
    where, html = f"{run.dataset} ({title})", _gallery_html(study, run, rival, predictions, wrong, pictures)
    yield Exhibit(f"{suffix}-pairs", title, table=_pair_table(where, pairs, run.key), html=html, fold=fold)
    matrix, curve = results.group_confusion(table), results.calibration_curve(predictions)
    grouped = f", the most confused of {len(table)}" if len(matrix) < len(table) else ""
    titles = f"Confusions{grouped}", f"Calibration (error {error:.1f} points)"
    charts = chart.confusions(titles[0], matrix), chart.calibration(titles[1], curve)
    figure = _figure(charts[0], curve, f"{run.dataset}: {title}", titles)
    yield Exhibit(suffix, title, figure, _class_table(where, table, error), charts, fold=fold)


def _title(run: Any) -> str:
    parts = [run.label, run.backbone]
    return ", ".join([*parts, frames.in_shots(run.shots), f"seed {run.seed}"] if run.shots else parts)


def _pair_table(where: str, pairs: pd.DataFrame, key: str) -> Table:
    most = pairs.head(PAIRS)
    texts = most.assign(share=most.share.map("{:.1f}".format)).astype(str).rename(columns=PAIR_COLUMNS)
    note = f"The {len(most)} most frequent of {len(pairs)} confused pairs, {where}, key {key[:12]}."
    heads = [PAIR_COLUMNS["first"], PAIR_COLUMNS["second"]]
    return text_table(f"Most confused pairs of classes, {where}", texts.set_index(heads), notes=[note])


def _class_table(where: str, confusions: pd.DataFrame, error: float) -> Table:
    found = results.class_accuracies(confusions)
    mistaken = found.mistaken_for + " (" + found.times.astype(str) + ")"
    texts = pd.DataFrame({
        "test images": found.images.astype(str), "correct": found.correct.astype(str),
        "accuracy (%)": found.accuracy.map("{:.1f}".format).where(found.images > 0, DASH),
        "most often taken for": mistaken.where(found.times > 0, ""),
    })  # fmt: skip
    note = f"Expected calibration error: {error:.1f} percentage points."
    return text_table(f"Accuracy by class, {where}", texts, notes=[note])


def _figure(confusions: chart.Chart, curve: pd.DataFrame, title: str, titles: tuple[str, str]) -> Figure:
    """Draw the confusion matrix and the calibration curve side by side."""
    from matplotlib.figure import Figure

    height = float(np.clip(1.3 + 0.14 * len(confusions.ticks), 2.6, 4.9))
    figure = Figure(figsize=(TWO_COLUMNS, height), layout="constrained")
    figure.suptitle(shortened(title, 100), color="#444444", style="italic")
    axes = figure.subplots(1, 2, width_ratios=(1.4, 1) if len(confusions.ticks) <= COUNTED else (2.2, 1))
    _draw_confusions(axes[0], confusions)
    _draw_calibration(axes[1], curve)
    for axis, name in zip(axes, titles, strict=True):
        axis.set_title(name)
    return figure


def _draw_confusions(axis: Axes, drawn: chart.Chart) -> None:
    """Draw what the page draws: what is right in gray, what is wrong in orange."""
    from matplotlib.colors import to_rgba

    (points,) = drawn.panels.values()
    places = {name: place for place, name in enumerate(drawn.ticks)}
    size = 7 if len(places) <= COUNTED else 5.5
    colors = np.ones((len(places), len(places), 4))
    for point in points:
        row, column, count = places[point["y"]], places[point["x"]], point["images"]
        colors[row, column] = to_rgba(point["color"], point["strength"])
        text = str(count) if count < 1000 else f"{count / 1000:.0f}k"
        axis.text(column, row, text, ha="center", va="center", fontsize=size - 0.5)
    axis.imshow(colors, interpolation="nearest", aspect="auto")
    names = [shortened(name, NAME_LENGTH) for name in places]
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axis.set_yticks(range(len(names)), names, fontsize=size)
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.set_xlabel(drawn.xlabel)
    axis.set_ylabel(drawn.ylabel)


def _draw_calibration(axis: Axes, curve: pd.DataFrame) -> None:
    """Draw accuracy over confidence, and which share of the images has this confidence as bars."""
    width = curve.high - curve.low
    share = 100 * curve.images / curve.images.sum()
    bars = axis.bar(curve.low, share, width, align="edge", color="#DDDDDD", edgecolor="white")
    axis.plot([0, 100], [0, 100], color="#999999", linewidth=0.8, linestyle="--")
    known = curve[curve.images > 0]
    line = axis.plot(known.confidence, known.accuracy, color="#0072B2", marker="o", clip_on=False)
    axis.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence (%)", ylabel="%")
    axis.legend([bars, *line], ["share of images", "accuracy"], loc="upper left")


def _gallery_html(
    study: Study, run: Any, rival: Any, predictions: Predictions, wrong: pd.DataFrame, most: int
) -> str:
    """Return the HTML of the run's wrong pictures, and of those that only it or only its rival gets right."""
    if not len(wrong):
        return _note("No test image is wrong.")
    if study.pictures is None:
        command = escape.shell_command("fastcoop", "report", study.folder, "--gallery", *study.places)
        return _note(f"To see the pictures: {command}")
    name = plain_dataset(run.dataset)
    images = run.images if isinstance(run.images, str) else None
    try:
        source = study.pictures.find(name, run.test, images, study.datasets)
    except UserError as problem:
        return _note(f"No pictures are shown. {problem}")
    parts = [_grid(source, f"The surest of {counted(len(wrong), 'mistake')}", wrong, most)]
    if images is None:
        parts.append(_note("Whether the pictures have changed since the test is not known."))
    if rival is not None:
        with suppress(UserError):  # the rival was tested on other images, or diverged
            differ = results.disagreements(
                predictions, results.load_predictions(study.folder, rival.key, name)
            )
            names = (run.label, rival.label) if run.label != rival.label else (_title(run), _title(rival))
            for right, (good, bad) in (("first", names), ("second", names[::-1])):
                found = differ[differ.right == right]
                title = f"Right by {good}, wrong by {bad}: {counted(len(found), 'image')}"
                parts.append(_grid(source, title, found, most // 2))
    return "".join(parts)


def _note(text: str) -> str:
    return f"<p class=note>{escape.html(text)}</p>"


def _grid(source: Any, title: str, images: pd.DataFrame, most: int) -> str:
    """Return the HTML of the first ``most`` images, with what they are and what they were taken for."""
    tiles = []
    for one in frames.rows_of(images.head(most)):
        try:
            jpeg = base64.b64encode(source.thumbnail(int(one.image))).decode()
            alt = escape.html(f"{one.true}, taken for {one.predicted}")
            shown = f'<img width=96 height=96 loading=lazy alt="{alt}" src="data:image/jpeg;base64,{jpeg}">'
        except UserError as problem:
            shown = _note(str(problem))
        true, predicted, path = map(escape.html, (one.true, one.predicted, source.paths[one.image]))
        words = f"<b>{true}</b><br>taken for {predicted}, {100 * one.probability:.0f}%"
        tiles.append(f'<div title="{path}">{shown}<div class=note>{words}</div></div>')
    title += f" ({len(tiles)} shown)" * (len(tiles) < len(images))
    return f"<h3>{escape.html(title)}</h3><div class=grid>{''.join(tiles)}</div>"


def _command(study: Study) -> str:
    """Return the command that tests runs on their own datasets, which stores predictions."""
    words = ("fastcoop", "evaluate", study.folder, "--targets", evaluate_targets(study.runs))
    return escape.shell_command(*words, *study.sweep_options)


ITEM = Item(
    "mistakes",
    "What went wrong",
    "One run per dataset: of the runs with the most shots, those of the method with the highest mean accuracy over "
    "seeds, and of these the one with the median accuracy. It is selected by test accuracy, so compare methods in the "
    f"tables. With more than {MOST_CLASSES} classes, the matrix has the most confused ones; the others are one row. "
    "Confidence is the softmax probability of the prediction.",
    make,
    _command,
)
