"""The numbers that the paper prints, shown beside the results; they are never averaged, ranked or tested with them.

Zhou, Yang, Loy and Liu, "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134. Figure 1 and
Tables 1, 2, 3 and 5 are in ``paper_numbers.csv`` as printed (ResNet-101's zero-shot differs between Tables 1 and 2
there), Table 6 in ``paper_datasets.csv``. The curves of Figures 3 to 5 are not printed as numbers.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from fastcoop.reports.table import Cell, Table

WITHOUT_IMAGES = ("zero_shot", "ensemble")  # methods that learn nothing
HERE = Path(__file__).parent
ALIASES = {
    "flowers102": "oxfordflowers",
    "imagenetv2matchedfrequency": "imagenetv2",
    "resnet50": "rn50",
    "resnet101": "rn101",
}
AS_PRINTED = "as printed in the paper"
NOTE = f"Rows “{AS_PRINTED}” are from Zhou et al. (2022): another implementation, not runs of these results."


@cache
def _read(name: str) -> tuple[dict[str, str], ...]:
    with (HERE / name).open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def plain(name: str) -> str:
    """Return a backbone's or dataset's name without case and punctuation, to match spellings."""
    bare = re.sub(r"[^a-z0-9]", "", name.lower())
    return ALIASES.get(bare, bare)


def printed(
    item: str,
    backbone: str,
    dataset: str,
    method: str,
    *,
    length: float = 0,
    init: str = "",
    prompt: str = "",
    shots: float = 16,
) -> Cell | None:
    """Return the number printed in ``item`` for a backbone, dataset and method, None if there is none.

    For "coop", ``length`` and ``init`` must be the paper's; for Figure 1's prompts, ``prompt``. All printed numbers of
    methods that learn are at 16 shots. ``method`` may be a series, such as "coop end".
    """
    method = method.split()[0]
    if shots != 16 and method not in WITHOUT_IMAGES:
        return None
    for row in _read("paper_numbers.csv"):
        if (row["item"], row["method"]) != (item, method):
            continue
        if plain(row["backbone"]) != plain(backbone) or plain(row["dataset"]) != plain(dataset):
            continue
        if method == "coop" and (length, init) != (float(row["context_length"]), row["init"]):
            continue
        if not row["prompt"] or row["prompt"] == prompt:
            return Cell(float(row["accuracy"]), runs=0)
    return None


def add_printed(table: Table, names: tuple[str, ...], numbers: Mapping[str, Cell | None]) -> None:
    """Add a row of printed numbers by column, if there are any, and the note on them."""
    cells: dict[str, Cell | str] = {column: number for column, number in numbers.items() if number}
    if cells:
        table.add((*names[:-1], f"{names[-1]}, {AS_PRINTED}"), cells)
        table.notes += [NOTE] * (NOTE not in table.notes)


def printed_dataset(name: str) -> dict[str, str] | None:
    """Return Table 6's row of a dataset: classes, train, val, test, prompt."""
    return next((row for row in _read("paper_datasets.csv") if plain(row["dataset"]) == plain(name)), None)
