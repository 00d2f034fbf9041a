"""What a figure or table of the report is: a name, a question, and a function from the study to its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastcoop.reports.study import Study
from fastcoop.reports.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


ADD = (
    "Each command adds the runs to these results; what has been run is kept. Add the --data-root and --cache of your"
    " sweep, and fill in what is in capitals."
)


@dataclass
class Part:
    """A drawing, a table, or both, made from one slice of the results. Files are named ``<item><suffix>``."""

    suffix: str
    subtitle: str
    figure: Figure | None = None
    table: Table | None = None


@dataclass(frozen=True)
class Item:
    """One figure or table. ``make`` raises `Missing` where the results lack what it needs; ``supply`` is the command
    that gives it, with ``{results}``, ``{backbone}``, ``{backbones}``, ``{dataset}`` and ``{datasets}`` for the
    study's own; words in capitals are for the user to fill in."""

    name: str
    title: str
    caption: str
    make: Callable[[Study], list[Part]]
    supply: str

    def command(self, study: Study) -> str:
        """``supply`` for a study."""
        named = study.specs("datasets", "source")
        own = list(dict.fromkeys(name.removesuffix(":base").removesuffix(":new") for name in named))
        backbones = study.specs("backbones", "backbone")
        return self.supply.format(
            results=study.folder,
            backbone=backbones[0],
            backbones=",".join(backbones),
            dataset=own[0],
            datasets=",".join(own),
        )


def sweep_of(grid: str, backbones: str = "{backbones}", datasets: str = "{datasets}", **more: str) -> str:
    """The ``supply`` of an item whose runs a grid file under ``experiments`` names."""
    given = {"backbones": backbones, "datasets": datasets, **more}
    settings = (f'--set "{name}={value}"' for name, value in given.items())
    return f"fastcoop sweep experiments/{grid}.yaml --results {{results}} {' '.join(settings)}"
