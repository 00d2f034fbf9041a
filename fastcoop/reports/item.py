"""What a figure or table of the report is: a name, a question, and a function from the study to its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastcoop import escape
from fastcoop.grids.grid import read_grid
from fastcoop.reports.study import Study, read_datasets
from fastcoop.reports.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


ADD = (
    "Each command adds the runs to these results; what has been run is kept. Run it in the folder that the sweep ran"
    " in, and fill in what is in capitals."
)
UNCHOSEN_RATE = 0.001  # learning rate of text learners where no validation images can choose one
Value = Sequence[str] | Mapping[str, Sequence[str]]  # of a setting of a grid


@dataclass
class Part:
    """A drawing, a table, or both, made from one slice of the results. Files are named ``<item><suffix>``."""

    suffix: str
    subtitle: str
    figure: Figure | None = None
    table: Table | None = None


@dataclass(frozen=True)
class Item:
    """One figure or table. ``make`` raises `Missing` where the results lack what it needs; ``command`` gives the
    command line that supplies it; words in capitals are for the user to fill in."""

    name: str
    title: str
    caption: str
    make: Callable[[Study], list[Part]]
    command: Callable[[Study], str]


def sweep_of(
    grid: str, settings: Callable[[Study], Mapping[str, Value]] = lambda study: {}
) -> Callable[[Study], str]:
    """Return the command of an item whose runs a grid file under ``experiments`` names.

    ``settings`` gives those of the grid to set beside the study's own backbones and datasets, or in place of them.
    """

    def command(study: Study) -> str:
        given = {"backbones": study.backbones, "datasets": study.datasets, **settings(study)}
        options = [("--set", f"{name}={_yaml(value)}") for name, value in given.items()]
        options += _options_for_methods(f"experiments/{grid}.yaml", study)
        words = [word for option in [*study.places, *options] for word in option]
        return escape.shell_command(
            "fastcoop", "sweep", f"experiments/{grid}.yaml", "--results", study.folder, *words
        )

    return command


def _options_for_methods(grid: str, study: Study) -> list[tuple[str, str]]:
    """Options that leave out what a grid's methods cannot do on the study's datasets: choose by validation images that
    are not there, or read images behind imported features."""
    methods, known = read_grid(grid).methods, read_datasets(study.folder)
    unchosen = any(known.get(name, {}).get("val", 1) is None for name in study.runs.source)
    barred = ["linear_probe"] * unchosen
    barred += ["finetune_image_encoder"] * any(spec.endswith(".h5") for spec in study.datasets)
    options = []
    if set(barred) & set(methods):
        options = [("--only", name) for name in methods if name not in barred]
    rated = [name for name in ("text_transform", "text_bias") if unchosen and name in methods]
    return options + [("--set", f"methods.{name}.learning_rate={UNCHOSEN_RATE}") for name in rated]


def _yaml(value: Value) -> str:
    """A value as ``--set`` takes it."""
    if isinstance(value, Mapping):
        pairs = (f"{escape.yaml_scalar(name)}: [{_yaml(values)}]" for name, values in value.items())
        return "{" + ", ".join(pairs) + "}"
    names = list(map(escape.yaml_scalar, value))
    bare = len(names) == 1 or names == list(value)
    return ",".join(names) if bare else f"[{', '.join(names)}]"
