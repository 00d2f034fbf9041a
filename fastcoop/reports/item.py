"""What a figure or table of the report is: a name, a question, and a function from the study to its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastcoop.reports.study import Study
from fastcoop.reports.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Part:
    """A drawing, a table, or both, made from one slice of the results. Files are named ``<item><suffix>``."""

    suffix: str
    subtitle: str
    figure: Figure | None = None
    table: Table | None = None


@dataclass(frozen=True)
class Item:
    """One figure or table of the paper. ``make`` raises `Missing` where the results lack what it needs."""

    name: str
    title: str
    caption: str
    make: Callable[[Study], list[Part]]
