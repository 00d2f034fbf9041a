"""The numbers the paper prints, to show beside one's own: never averaged, ranked or tested with them.

Zhou, Yang, Loy and Liu, "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134:
Figure 1 and Tables 1, 2, 3 and 5 are in ``paper_numbers.csv`` as printed (ResNet-101's zero-shot differs
between Tables 1 and 2 there), Table 6 in ``paper_datasets.csv``. The curves of Figures 3 to 5 are not
printed as numbers."""

from __future__ import annotations

import csv
import re
from functools import cache
from pathlib import Path

from fastcoop.reports.table import Cell

UNTRAINED = ("zero_shot", "ensemble")  # what learns from no images
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
    """A backbone's or dataset's name without case and punctuation, to match spellings."""
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
    """The number printed in ``item`` for the same backbone, dataset and method, None where the paper has
    none.

    For "coop", ``length`` and ``init`` must agree where the paper gives them; for Figure 1's prompts, ``prompt``.
    What learns has learned from 16 ``shots`` in all that the paper prints."""
    if shots != 16 and method not in UNTRAINED:
        return None
    for row in _read("paper_numbers.csv"):
        if (row["item"], row["method"]) != (item, method):
            continue
        if plain(row["backbone"]) != plain(backbone) or plain(row["dataset"]) != plain(dataset):
            continue
        if method == "coop" and (length, init) != (float(row["context_length"]), row["init"]):
            continue
        if row["prompt"] and row["prompt"] != prompt:
            continue
        return Cell(float(row["accuracy"]), runs=0)
    return None


def printed_dataset(name: str) -> dict[str, str] | None:
    """Table 6's row of a dataset: classes, train, val, test, prompt."""
    return next((row for row in _read("paper_datasets.csv") if plain(row["dataset"]) == plain(name)), None)
