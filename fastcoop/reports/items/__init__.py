"""The paper's figures and tables, one file each; a new one is a file here and a name below."""

from __future__ import annotations

from fastcoop.reports.item import Item
from fastcoop.reports.items import (
    base_to_new,
    cross_dataset,
    figure1,
    figure3,
    figure4,
    figure5a,
    figure5b,
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
)

ITEMS: tuple[Item, ...] = tuple(
    module.ITEM
    for module in (
        figure3,
        figure1,
        figure4,
        figure5a,
        figure5b,
        table1,
        table2,
        table3,
        table4,
        table5,
        table6,
        base_to_new,
        cross_dataset,
    )
)
