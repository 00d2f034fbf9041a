"""What a figure or table of the report is: a name, a caption, a function that makes it, and the command it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from fastcoop import escape
from fastcoop.files import shipped_grids
from fastcoop.reports.chart import Chart
from fastcoop.reports.frames import Missing
from fastcoop.reports.study import Slice, Study, listed
from fastcoop.reports.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ADD = (
    "Each command adds runs to these results and keeps the finished ones. Run it in the folder that the sweep ran in,"
    " and replace the words in capitals."
)
FEATURES = {"views": "8", "recipe": "current"}  # of grids that do not name them
LEARNING_RATE = 0.001  # of text learners without validation images to choose it
Value = Sequence[str] | Mapping[str, Sequence[str]]  # of a setting of a grid


@dataclass(eq=False)
class Exhibit:
    """A figure, a table, or both, made from one slice of the results. Its files are named ``<item><suffix>``.

    Attributes:
        suffix: Distinguishes the files of an item's exhibits.
        subtitle: What was drawn.
        figure: Static; the page shows it in print, and on screen if there are no ``charts``.
        table: Numbers or texts.
        charts: The figure's points, which the page draws so that it can be pointed at.
        html: More content of the page, such as pictures as ``data:`` addresses. All text in it must have passed through
            `fastcoop.escape.html`.
        fold: The line that the exhibit is folded behind. Successive exhibits with equal lines are folded together.
    """

    suffix: str
    subtitle: str
    figure: Figure | None = None
    table: Table | None = None
    charts: Sequence[Chart] = ()
    html: str = ""
    fold: str = ""


@dataclass(frozen=True)
class Item:
    """A figure or table of the report.

    Attributes:
        name: Begins the names of its files.
        title: Its heading on the page.
        caption: One or two sentences below the heading.
        make: Makes it, possibly in several parts. Raises `Missing` if the results lack runs that it needs.
        command: Returns the command that adds these runs; words in capitals are for the user to replace.
    """

    name: str
    title: str
    caption: str
    make: Callable[[Study], list[Exhibit]]
    command: Callable[[Study], str]


def per_slice(
    make: Callable[[Study, Slice], list[Exhibit]], paired: bool = False
) -> Callable[[Study], list[Exhibit]]:
    """Return a function that calls ``make`` for each slice; it raises Missing where no slice has what is needed.

    ``paired``: as in `Study.slices`.
    """

    def make_all(study: Study) -> list[Exhibit]:
        exhibits: list[Exhibit] = []
        reasons: dict[str, list[str]] = {}
        for piece in study.slices(paired):
            try:
                exhibits += make(study, piece)
            except Missing as missing:
                reasons.setdefault(str(missing), []).append(piece.backbone)
        if not exhibits:
            texts = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
            raise Missing("; ".join(texts if len(reasons) > 1 else reasons))
        return exhibits

    return make_all


def sweep_command(
    grid: str, settings: Callable[[Study], Mapping[str, Value]] = lambda study: {}
) -> Callable[[Study], str]:
    """Return the command of an item whose runs are those of ``experiments/<grid>.yaml``.

    ``settings`` returns settings of the grid, in addition to the study's backbones and datasets or in their place.
    """

    def command(study: Study) -> str:
        given = {"backbones": study.backbones, "datasets": study.datasets, **settings(study)}
        options = [word for name, value in given.items() for word in ("--set", f"{name}={_yaml(value)}")]
        words = ("fastcoop", "sweep", f"experiments/{grid}.yaml", "--results", study.folder)
        options += [*_feature_options(grid, study), *_method_options(grid, study)]
        return escape.shell_command(*words, *study.sweep_options, *options)

    return command


def _feature_options(grid: str, study: Study) -> list[str]:
    """Return options for the study's views and recipe where a grid has others: its runs would be further curves."""
    given, options = _content(grid), list[str]()
    for name, usual in FEATURES.items() if study.grid_text else ():
        own = listed(study.folder, name) or [usual]
        if own != [str(given.get(name, usual))]:
            options += ["--set", f"{name}={','.join(own)}"]
    return options


def _content(grid: str) -> dict[str, Any]:
    """Return the content of a grid that comes with fastcoop."""
    content: dict[str, Any] = yaml.safe_load(shipped_grids()[grid].read_text(encoding="utf-8"))
    return content


def _method_options(grid: str, study: Study) -> list[str]:
    """Return options that leave out the methods of a grid that the study's datasets do not allow.

    Without validation images nothing chooses the linear probe's C or a learning rate; behind imported features there
    are no images for fine-tuning.
    """
    given = _content(grid)["methods"]  # a mapping by name, or a list of names and such mappings
    entries = given if isinstance(given, list) else [given]
    methods = [name for one in entries for name in ([one] if isinstance(one, str) else one)]
    excluded, options = set(), []
    if any(study.known.get(name, {}).get("val", 1) is None for name in study.runs.source):
        excluded.add("linear_probe")
        learners = [name for name in ("text_transform", "text_bias") if name in methods]
        options = [("--set", f"methods.{name}.learning_rate={LEARNING_RATE}") for name in learners]
    if any(name.endswith(".h5") for name in study.datasets):
        excluded.add("finetune_image_encoder")
    only = [("--only", name) for name in methods if name not in excluded] if excluded & set(methods) else []
    return [word for option in (*only, *options) for word in option]


def _yaml(value: Value) -> str:
    """Return a value as ``--set`` takes it."""
    if isinstance(value, Mapping):
        pairs = (f"{escape.yaml_scalar(name)}: [{_yaml(values)}]" for name, values in value.items())
        return "{" + ", ".join(pairs) + "}"
    names = list(map(escape.yaml_scalar, value))
    is_plain = len(names) == 1 or names == list(value)
    return ",".join(names) if is_plain else f"[{', '.join(names)}]"
