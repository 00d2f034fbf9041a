"""One look for every figure: a colour, marker and line per method, sizes for a two-column paper, PNG and
PDF."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcoop import escape
from fastcoop.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

ONE_COLUMN, TWO_COLUMNS = 3.4, 7.0  # inches
PNG_DOTS_PER_INCH = 220
CHARACTERS_PER_INCH = 15  # of text, at the narrowest
WIDE = 13.5  # characters per inch of a title, from which on its letters count as wider than usual
LEGEND_HEIGHT = 0.5  # inches that figures reserve
MARGIN = 0.04  # inches around what would not fit
RC: dict[str, Any] = {
    "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5, "legend.fontsize": 8, "figure.titlesize": 8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#E3E3E3", "grid.linewidth": 0.6, "legend.frameon": False,
    "lines.linewidth": 1.2, "lines.markersize": 3.4, "pdf.fonttype": 42, "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a $ in a name is a $
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How a series is named and drawn. ``line`` is a matplotlib line style; ``weight`` scales line and
    marker: where two series coincide, as end and mid do, the lighter one is drawn over the heavier and both
    are seen."""

    label: str
    color: str
    marker: str
    line: str
    weight: float = 1.0


# Okabe and Ito's palette for what Figure 3 draws, Tol's muted one beyond. The class at the end is warm, in
# the middle cool; unified contexts are solid lines, class-specific ones dashed: colour never stands alone.
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
    "text_transform": Look("Text transform", "#332288", "<", "-."),
    "text_bias": Look("Text bias", "#999933", ">", "-."),
    "finetune_image_encoder": Look("Fine-tuned image encoder", "#882255", "p", "-."),
}
OVER_GRID: dict[str, Any] = {
    "boxstyle": "square,pad=0.05",
    "facecolor": "white",
    "edgecolor": "none",
}  # behind a number that a grid line would cross
PAPER_MARK: dict[str, Any] = {
    "marker": "D",
    "facecolor": "white",
    "edgecolor": "#333333",
    "linewidth": 0.9,
    "s": 22,
    "zorder": 5,
}


def look(series: str) -> Look:
    """The look of a series; a method this file does not know is drawn in grey under its own name."""
    return LOOKS.get(series, Look(series.replace("_", " "), "#999999", "d", "-."))


def name_of(series: str, length: float) -> str:
    """A series' name in legends and tables, with the context length for CoOp."""
    name = look(series).label
    return name.replace("CoOp (", f"CoOp (M={int(length)}, ") if series.startswith("coop") else name


def rank(series: str) -> int:
    """Where a series stands in legends and tables."""
    order = list(LOOKS)
    return order.index(series) if series in LOOKS else len(order)


def signed(number: float) -> str:
    """A difference to one decimal, with its sign as axes write it."""
    return f"{number:+.1f}".replace("-", "−")


def columns_of(entries: int, most: int) -> int:
    """Columns of a legend, at most ``most``, that fill its lines evenly."""
    return math.ceil(entries / math.ceil(entries / most))


def new_figure(width: float, height: float, subtitle: str) -> Figure:
    """An empty figure (inches) that says ``subtitle`` above everything. Draw inside ``with drawing():``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if subtitle:
        figure.suptitle(fitted(subtitle, width, lines=4), color="#444444", style="italic")
    return figure


def fitted(text: str, inches: float, lines: int = 2) -> str:
    """``text`` on as few lines as a width holds, all about equally long; at most ``lines``, the rest cut from its
    middle."""
    widest = int(inches * CHARACTERS_PER_INCH)
    text = shortened(text, int(0.85 * lines * widest))  # lines are never quite full
    return balanced(text, _as_many(text, widest))


def _as_many(text: str, usual: int) -> int:
    """How many letters as wide as those of ``text`` take the room of ``usual`` ones: fewer capitals, say."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    size = FontProperties(size=RC["axes.titlesize"])
    width, _, _ = text_to_path.get_text_width_height_descent(text or " ", size, ismath=False)
    per_inch = 72 * max(len(text), 1) / max(width, 1e-9)
    return usual if per_inch > WIDE else max(3, int(usual * per_inch / CHARACTERS_PER_INCH))


def shortened(text: str, most: int) -> str:
    """``text`` without control characters, and where it is longer than ``most`` usual letters without its middle."""
    text = escape.visible(text)
    most = _as_many(text, most)
    return text if len(text) <= most else f"{text[: most - most // 2 - 1]}…{text[-(most // 2) :]}"


def balanced(text: str, widest: int) -> str:
    """``text`` on as few lines of at most ``widest`` characters as hold it, all about equally long."""
    lines = len(textwrap.wrap(text, widest))
    longest = min(widest, max(map(len, text.split()), default=1))  # no word is broken that fits in a line
    fits = (width for width in range(longest, widest) if len(textwrap.wrap(text, width)) <= lines)
    return textwrap.fill(text, next(fits, widest))


def add_legend(
    figure: Figure, handles: Sequence[Artist], labels: Sequence[str], most: int, **more: Any
) -> None:
    """A legend below the axes of at most ``most`` columns, and of fewer where they are wider than the figure, which
    grows by what a long one needs."""
    widest = int(figure.get_figwidth() * CHARACTERS_PER_INCH) - 6  # beside the handle
    texts = [shortened(label, widest) for label in labels]
    for columns in range(columns_of(len(texts), most), 0, -1):
        legend = figure.legend(handles, texts, loc="outside lower center", ncols=columns, **more)
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + max(0.0, box.height / figure.dpi - LEGEND_HEIGHT))


@contextmanager
def drawing() -> Iterator[None]:
    """The context in which figures are made and saved: this project's sizes and lines, whatever the user's
    own."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)  # type: ignore[arg-type]
        # A letter that the font lacks is drawn as a box; tables and page have it.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        yield


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.pdf`` (vector, fonts embedded), the same bytes for the same figure."""
    from matplotlib.transforms import Bbox

    figure.set_dpi(PNG_DOTS_PER_INCH)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the places are found; finding them is most of the time
    page, ink = Bbox.from_bounds(0, 0, *figure.get_size_inches()), figure.get_tightbbox()
    inside = page.x0 <= ink.x0 and page.y0 <= ink.y0 and ink.x1 <= page.x1 and ink.y1 <= page.y1
    # What does not fit, such as a title of wide letters, makes the picture larger instead of being cut.
    box = None if inside else Bbox.union([page, ink.padded(MARGIN)])
    written = []
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
        path = stem.with_name(f"{stem.name}.{kind}")
        with atomic_write(path) as part:
            figure.savefig(part, format=kind, dpi=PNG_DOTS_PER_INCH, metadata=metadata, bbox_inches=box)
        written.append(path)
    return written
