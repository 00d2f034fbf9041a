"""One look for every figure: a color, marker and line per method, sizes for a two-column paper, files."""

from __future__ import annotations

import math
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcoop import escape
from fastcoop.files import atomic_write
from fastcoop.reports.series import ON_TEST
from fastcoop.reports.table import TEST_LABELS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ONE_COLUMN, TWO_COLUMNS = 3.4, 7.0  # inches
PNG_DOTS_PER_INCH = 220
CHARACTERS_PER_INCH = 15  # of text with narrow letters
WIDE = 13.5  # characters per inch of a title below which its letters count as wider than usual
AVERAGE = "Average"  # the first word of the titles of averages over datasets
LEGEND_HEIGHT = 0.5  # inches that figures reserve
MARGIN = 0.04  # inches around text that does not fit
# Without dates and versions.
METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None}, "svg": {"Creator": None, "Date": None},
}  # fmt: skip
RC: dict[str, Any] = {
    "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5, "legend.fontsize": 8, "figure.titlesize": 8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E3E3E3", "grid.linewidth": 0.6,
    "legend.frameon": False, "lines.linewidth": 1.2, "lines.markersize": 3.4, "pdf.fonttype": 42,
    "hatch.linewidth": 0.6, "text.parse_math": False,  # names may contain a $
    "svg.hashsalt": "fastcoop",
}  # fmt: skip
# Background of a number that a grid line would cross.
ON_GRID: dict[str, Any] = {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none"}
PAPER_MARK: dict[str, Any] = {
    "marker": "D", "facecolor": "white", "edgecolor": "#333333", "linewidth": 0.9, "s": 22, "zorder": 5,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How a series is named and drawn.

    ``weight`` scales line and marker: where two series coincide, as end and mid do, the lighter one is drawn over the
    heavier one and both are visible.
    """

    label: str
    color: str
    marker: str
    line: str
    weight: float = 1.0
    is_open: bool = False  # whether markers are outlines


# Okabe and Ito's palette for Figure 3, Tol's muted one for the others. The class at the end is warm, in the middle
# cool; unified contexts are solid lines, class-specific ones dashed, so that color is never the only difference.
LOOKS = {
    "zero_shot": Look("Zero-shot CLIP", "#2B2B2B", "*", "None"),
    "ensemble": Look("Prompt ensembling", "#009E73", "h", "None"),
    "ensemble all": Look("Prompt ensembling (80)", "#00664B", "H", "None"),
    "linear_probe": Look("Linear probe", "#767676", "v", ":"),
    "coop end": Look("CoOp (end)", "#D55E00", "o", "-"),
    "coop mid": Look("CoOp (mid)", "#0072B2", "s", "-", 1.5),
    "coop front": Look("CoOp (front)", "#CC79A7", "P", "-", 1.25),
    "coop end csc": Look("CoOp (end, CSC)", "#E69F00", "^", "--"),
    "coop mid csc": Look("CoOp (mid, CSC)", "#56B4E9", "D", "--", 1.5),
    "coop front csc": Look("CoOp (front, CSC)", "#E3B5CF", "X", "--", 1.25),
    # Methods of the field: learned prompts, caches and closed forms, adapters and probes.
    "kgcoop": Look("KgCoOp", "#6A3D9A", "v", "-"),
    "prograd": Look("ProGrad", "#CC79A7", "s", "--"),
    "cocoop": Look("CoCoOp", "#882255", "D", "-."),
    "tcp": Look("TCP", "#8C564B", "P", "-"),
    "tip_adapter": Look("Tip-Adapter", "#56B4E9", "o", "--"),
    "tip_adapter_f": Look("Tip-Adapter-F", "#0072B2", "o", "-"),
    "gda": Look("GDA", "#661100", "D", "-."),
    "proker": Look("ProKeR", "#DD4477", "P", "-"),
    "clip_adapter": Look("CLIP-Adapter", "#44AA99", "^", "--"),
    "task_res": Look("TaskRes", "#117733", "v", "-"),
    "cross_modal": Look("Cross-modal probe", "#332288", "X", "-."),
    "lp_plus_plus": Look("LP++", "#B8860B", "<", "-"),
    "zs_lp": Look("ZS-LP", "#999933", ">", "--"),
    "clap": Look("CLAP", "#AA4499", "d", "-"),
    "prolip": Look("ProLIP", "#009E73", "p", "-."),
    "text_transform": Look("Text transform", "#332288", "<", "-."),
    "text_bias": Look("Text bias", "#999933", "v", "-."),
    "finetune_image_encoder": Look("Fine-tuned image encoder", "#882255", "p", "-."),
}
# Looks of other methods and of series with unusual settings. The lengths have no common factor, so that combinations of
# color, marker and line repeat only after 8 * 7 * 3 series.
OTHER_COLORS = ("#999999", "#8C564B", "#C2185B", "#6A3D9A", "#1B9E9E", "#7A9A01", "#B8860B", "#1F3A93")
OTHER_MARKERS = ("d", "8", "^", "s", "p", "v", "o")
OTHER_LINES = ("-.", "--", ":")
BY = " by schedule "  # between a series and its schedule, in a figure of two schedules
MANY = 8  # series above which bands of deviation are faint
LEAST_SPAN = 4.0  # percentage points of an accuracy axis: differences within noise do not fill a panel
_others: list[str] = []  # the series without a look of their own in the report that is drawn


def look(series: str) -> Look:
    """Return the look of a series; those not in `LOOKS` get different ones inside ``with drawing(series)``."""
    if series in LOOKS:
        return LOOKS[series]
    series, by, schedule = series.partition(BY)
    if by:
        own = replace(look(series), label=f"{look(series).label}, {schedule}")
        return own if schedule == "paper" else replace(own, line=":", is_open=True)
    base, _, settings = series.partition(" (")
    label = LOOKS[base].label if base in LOOKS else base
    if settings:
        label += f", {settings[:-1]}" if label.endswith(")") else f" ({settings}"
    label = label.replace(ON_TEST, f"chosen on {TEST_LABELS}").replace("_", " ")
    place = _others.index(series) if series in _others else 0
    color, marker, line = (looks[place % len(looks)] for looks in (OTHER_COLORS, OTHER_MARKERS, OTHER_LINES))
    return Look(label, color, marker, line)


def name_of(series: str, length: float = 0) -> str:
    """Return a series' name in legends and tables, with CoOp's context length if it is given."""
    name = look(series).label
    return name.replace("CoOp (", f"CoOp (M={int(length)}, ") if length and series[:4] == "coop" else name


def rank(series: str) -> tuple[int, str]:
    """Return the sort key of a series; one with unusual settings follows the plain one, other methods come last."""
    series = series.removesuffix(f"{BY}paper")  # comes first
    order, base = list(LOOKS), series.partition(BY)[0].partition(" (")[0]
    return order.index(base) if base in LOOKS else len(order), series


def columns_of(entries: int, most: int) -> int:
    """Return the columns of a legend, at most ``most``, that fill its lines evenly."""
    return math.ceil(entries / math.ceil(entries / most))


def panel_figure(
    names: Iterable[str], columns: int, size: tuple[float, float], subtitle: str, xlabel: str
) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``size`` (inches) with a panel for each name, in ``columns``, and its axes.

    Draw inside ``with drawing():``.
    """
    from matplotlib.figure import Figure

    names = list(names)
    figure = Figure(figsize=size, layout="constrained")
    if subtitle:
        figure.suptitle(fitted(subtitle, size[0], lines=4), color="#444444", style="italic")
    grid = figure.subplots(math.ceil(len(names) / columns), columns, squeeze=False).ravel()
    for place, (axis, name) in enumerate(zip(grid, names, strict=False)):
        weight = "bold" if name.startswith(AVERAGE) else "normal"
        axis.set_title(fitted(name, size[0] / columns - 0.3), fontweight=weight)
        if place + columns >= len(names):
            axis.set_xlabel(xlabel)
    for axis in grid[len(names) :]:
        axis.set_visible(False)
    return figure, list(grid[: len(names)])


def draw_curves(axis: Axes, summary: pd.DataFrame, over: str, ticks: Mapping[float, str]) -> None:
    """Draw the means of each series over evenly spaced values of a column, and their standard deviations as a band.

    A single point has a bar. Methods without training (0 shots) are a star, which a thin line extends across the axes.
    ``ticks`` are the labels of the values of the column ``over``. The lines have their series as gid.
    """
    place = {value: float(at) for at, value in enumerate(ticks)}
    strength = 0.05 if summary.series.nunique() > MANY else 0.16
    for series in sorted(set(summary.series), key=rank):
        points = summary[summary.series == series].sort_values(over)
        x, mean, std = [place[value] for value in points[over]], points["mean"], points["std"].fillna(0.0)
        style = look(series)
        line: dict[str, Any] = {"marker": style.marker, "color": style.color, "gid": series}
        line |= {"markerfacecolor": "white"} if style.is_open else {}
        if set(points[over]) == {0.0}:
            axis.axhline(mean.iloc[0], color=style.color, linewidth=0.6, linestyle=(0, (1, 3)), zorder=1)
            axis.plot(x, mean, linestyle="None", markersize=8, zorder=4, clip_on=False, **line)
            continue
        axis.fill_between(x, mean - std, mean + std, color=style.color, alpha=strength, linewidth=0)
        if len(points) == 1:
            axis.errorbar(x, mean, yerr=std, fmt="none", color=style.color, linewidth=0.9, capsize=2)
        line |= {"linewidth": 1.2 * style.weight, "markersize": 3.4 * style.weight}
        axis.plot(x, mean, linestyle=style.line, zorder=4 - style.weight / 2, **line)
    axis.set_xticks(range(len(ticks)), list(ticks.values()))
    axis.set_xlim(-0.3, len(ticks) - 0.7)
    low, high = axis.get_ylim()
    room = max(0.0, LEAST_SPAN - (high - low)) / 2
    axis.set_ylim(low - room, high + room)
    axis.grid(axis="x", visible=False)


def add_series_legend(figure: Figure, name: Callable[[str], str], most: int) -> None:
    """Add a legend of the series that `draw_curves` drew, named by ``name``."""
    drawn = {str(line.get_gid()): line for axis in figure.axes for line in axis.lines if line.get_gid()}
    order = sorted(drawn, key=rank)
    # A handle is two dashes with the marker between them.
    handles, names = [drawn[series] for series in order], [name(series) for series in order]
    add_legend(figure, handles, names, most, handlelength=2.1, columnspacing=1.2)


def add_panel_legends(figure: Figure, name: Callable[[str], str]) -> None:
    """Add a legend below each panel, in one row, of the series that `draw_curves` drew in it."""
    width, height = figure.get_figwidth() / len(figure.axes) - 0.7, 0.0  # beside the handle
    for axis in figure.axes:
        drawn = [line for line in axis.lines if line.get_gid()]
        labels = [fitted(name(str(line.get_gid())), width, lines=3) for line in drawn]
        legend = axis.legend(drawn, labels, loc="upper left", bbox_to_anchor=(0, -0.2), handlelength=2.1)
        height = max(height, legend.get_window_extent().height / figure.dpi)
    figure.set_figheight(figure.get_figheight() + max(0.0, height - LEGEND_HEIGHT))


def add_legend(
    figure: Figure, handles: Sequence[Artist], labels: Sequence[str], most: int, **more: Any
) -> None:
    """Add a legend below the axes, of at most ``most`` columns that fit the figure, whose height grows with it."""
    widest = int(figure.get_figwidth() * CHARACTERS_PER_INCH) - 6  # beside the handle
    texts = [shortened(label, widest) for label in labels]
    for columns in range(columns_of(len(texts), most), 0, -1):
        legend = figure.legend(handles, texts, loc="outside lower center", ncols=columns, **more)
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + max(0.0, box.height / figure.dpi - LEGEND_HEIGHT))


def fitted(text: str, inches: float, lines: int = 2) -> str:
    """Break a text into lines of about equal length, at most ``lines``, and replace the middle of a longer one by …."""
    usual = int(inches * CHARACTERS_PER_INCH)
    text = shortened(text, int(0.85 * lines * usual))  # lines are never quite full
    widest = _as_many(text, usual)
    needed = len(textwrap.wrap(text, widest))
    longest = min(widest, max(map(len, text.split()), default=1))  # no word is broken that fits in a line
    fits = (width for width in range(longest, widest) if len(textwrap.wrap(text, width)) <= needed)
    return textwrap.fill(text, next(fits, widest))


def shortened(text: str, most: int) -> str:
    """Return a text without control characters, its middle replaced by … if it is wider than ``most`` usual letters."""
    text = escape.visible(text)
    most = _as_many(text, most)
    return text if len(text) <= most else f"{text[: most - most // 2 - 1]}…{text[-(most // 2) :]}"


def _as_many(text: str, usual: int) -> int:
    """Return how many letters as wide as those of ``text`` fit in the space of ``usual`` ones."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    size = FontProperties(size=RC["axes.titlesize"])
    width, _, _ = text_to_path.get_text_width_height_descent(text or " ", size, ismath=False)
    per_inch = 72 * max(len(text), 1) / max(width, 1e-9)
    return usual if per_inch > WIDE else max(3, int(usual * per_inch / CHARACTERS_PER_INCH))


@contextmanager
def drawing(series: Iterable[str] = ()) -> Iterator[None]:
    """Make and save the figures of ``series`` inside this context; it replaces the user's matplotlib settings."""
    import matplotlib

    before = list(_others)
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)  # type: ignore[arg-type]
        # The font draws a box for a letter that it lacks; tables and page show the letter.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        _others[:] = sorted(set(series) - set(LOOKS), key=rank)
        try:
            yield
        finally:
            _others[:] = before


@contextmanager
def saving(series: Iterable[str], jobs: int) -> Iterator[Callable[[Figure, Path], list[Path]]]:
    """Give a function like `save_figure`. With several ``jobs``, as many processes draw; files are written at the end.

    This process then draws those that no other one has begun, and those of a process that died.
    """
    if jobs == 1:
        yield save_figure
        return
    from fastcoop.processes import ProcessPoolExecutor, exit_with_parent

    pool = ProcessPoolExecutor(jobs - 1, initializer=exit_with_parent, initargs=(os.getpid(),))
    threads = ThreadPoolExecutor(jobs - 1)  # the pool itself would take figures that it cannot begin yet
    waiting: list[tuple[Figure, Path, Future[list[bytes]]]] = []
    series = list(series)

    def draw(figure: Figure) -> list[bytes]:
        contents: list[bytes] = pool.submit(_draw_in_worker, figure, series).result()
        return contents

    def submit(figure: Figure, stem: Path) -> list[Path]:
        waiting.append((figure, stem, threads.submit(draw, figure)))
        return _paths(stem)

    try:
        yield submit
        for figure, stem, drawn in reversed(waiting):
            try:
                _write(stem, _draw(figure) if drawn.cancel() else drawn.result())
            except BrokenExecutor:
                save_figure(figure, stem)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait=True, kill_workers=True)


def _draw_in_worker(figure: Figure, series: list[str]) -> list[bytes]:
    with drawing(series):
        return _draw(figure)


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png``, ``stem.pdf`` and ``stem.svg`` (vector, letters as shapes); equal figures give equal bytes."""
    return _write(stem, _draw(figure))


def _draw(figure: Figure) -> list[bytes]:
    """Return the content of the files of a figure."""
    from matplotlib.transforms import Bbox

    figure.set_dpi(PNG_DOTS_PER_INCH)
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # found above; with an engine, even "none", each file is drawn twice
    page, ink = Bbox.from_bounds(0, 0, *figure.get_size_inches()), figure.get_tightbbox()
    inside = page.x0 <= ink.x0 and page.y0 <= ink.y0 and ink.x1 <= page.x1 and ink.y1 <= page.y1
    # Text that does not fit, such as a title of wide letters, makes the picture larger instead of being cut.
    box = None if inside else Bbox.union([page, ink.padded(MARGIN)])
    contents = []
    for kind, metadata in METADATA.items():
        file = BytesIO()
        figure.savefig(file, format=kind, dpi=PNG_DOTS_PER_INCH, metadata=metadata, bbox_inches=box)
        contents.append(file.getvalue())
    return contents


def _paths(stem: Path) -> list[Path]:
    return [stem.with_name(f"{stem.name}.{kind}") for kind in METADATA]


def _write(stem: Path, contents: list[bytes]) -> list[Path]:
    for path, content in zip(_paths(stem), contents, strict=True):
        with atomic_write(path) as part:
            part.write_bytes(content)
    return _paths(stem)
