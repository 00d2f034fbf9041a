"""The paper's figures and tables, one file each. A new one is a file here and its name below.

An installed package adds items, `fastcoop.reports.item.Item` objects, by the entry point group "fastcoop.report_items".
"""

from __future__ import annotations

from importlib import import_module

from fastcoop.plugins import Registry
from fastcoop.reports.item import Item

NAMES = (
    "figure3", "figure1", "figure4", "figure5a", "figure5b", "table1", "table2", "table3", "table4", "table5", "table6",
    "base_to_new", "cross_dataset", "field_fewshot",
    "mistakes",
)  # fmt: skip


def _checked(name: str, item: object) -> Item:
    if not isinstance(item, Item):
        raise TypeError(f"expected a fastcoop.reports.item.Item, got {type(item).__name__}")
    return item


OWN: dict[str, Item] = {name: import_module(f"{__name__}.{name}").ITEM for name in NAMES}
ITEMS = Registry("fastcoop.report_items", "figure or table", OWN, _checked)
