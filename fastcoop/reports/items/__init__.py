"""The paper's figures and tables, one file each; a new one is a file here and a line below."""

from __future__ import annotations

from fastcoop.reports.item import Item
from fastcoop.reports.items import figure3, table4

ITEMS: tuple[Item, ...] = (figure3.ITEM, table4.ITEM)
