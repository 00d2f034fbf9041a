"""The numbers that the paper prints, shown beside the results; they are never averaged, ranked or tested with them.

Zhou, Yang, Loy and Liu, "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134. Figure 1 and
Tables 1, 2, 3 and 5 are in ``paper_numbers.csv`` as printed (ResNet-101's zero-shot differs between Tables 1 and 2
there), Table 6 in ``paper_datasets.csv``. The curves of Figures 3 to 5 are not printed as numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from fastcoop.reports.frames import Setting
from fastcoop.reports.table import Cell, Cells, Table

WITHOUT_IMAGES = ("zero_shot", "ensemble")  # methods that learn nothing
ALIASES = {
    "flowers102": "oxfordflowers",
    "imagenetv2matchedfrequency": "imagenetv2",
    "resnet50": "rn50",
    "resnet101": "rn101",
}
AS_PRINTED = "as printed in the paper"
NOTE = f"Rows “{AS_PRINTED}” are from Zhou et al. (2022): another implementation, not runs of these results."


@cache
def read_numbers(name: str) -> pd.DataFrame:
    """Return a CSV file of this package as texts, with what `plain` makes of backbones and datasets."""
    table = pd.read_csv(Path(__file__).parent / name, dtype=str, keep_default_na=False)
    return table.assign(
        **{column: table[column].map(plain) for column in ("backbone", "dataset") if column in table}
    )


@cache
def _numbers() -> dict[tuple[str, ...], Cell]:
    """Return the paper's accuracies by item, backbone, dataset, method, context length, initialization and prompt."""
    keys = ["item", "backbone", "dataset", "method", "context_length", "init", "prompt"]
    accuracies: Any = read_numbers("paper_numbers.csv").set_index(keys).accuracy
    return {key: Cell(float(value), runs=0) for key, value in accuracies.items()}


def plain(name: str) -> str:
    """Return a backbone's or dataset's name without case and punctuation, to match spellings."""
    bare = re.sub(r"[^a-z0-9]", "", name.lower())
    return ALIASES.get(bare, bare)


def printed(
    item: str, backbone: str, dataset: str, series: str, setting: Setting, prompt: str = ""
) -> Cell | None:
    """Return the number printed in ``item`` for a backbone, dataset and series, None if there is none.

    Methods that learn must have the paper's setting; ``prompt`` is that of a zero-shot number of Figure 1.
    """
    method = series.split()[0]
    if setting.shots != 16 and method not in WITHOUT_IMAGES:
        return None
    length, init = (f"{setting.length:g}", setting.init) if method == "coop" else ("", "")
    return _numbers().get((item, plain(backbone), plain(dataset), method, length, init, prompt))


def add_printed(table: Table, names: tuple[str, ...], numbers: Mapping[str, Cell | None]) -> None:
    """Add a row of printed numbers by column, if there are any, and the note on them."""
    cells: Cells = {column: number for column, number in numbers.items() if number}
    if cells:
        table.add((*names[:-1], f"{names[-1]}, {AS_PRINTED}"), cells)
        table.notes += [NOTE] * (NOTE not in table.notes)


def printed_dataset(name: str) -> dict[Any, str] | None:
    """Return Table 6's row of a dataset: classes, train, val, test, prompt."""
    rows = read_numbers("paper_datasets.csv")
    return next(iter(rows[rows.dataset == plain(name)].to_dict("records")), None)
