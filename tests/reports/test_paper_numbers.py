"""Every number kept as the paper's against the paper's own tables, where its text lies beside the checkout."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastcoop.reports import paper

TEXT = Path(__file__).resolve().parents[3] / "shared" / "paper" / "learning_to_prompt.md"
BACKBONES = {"ResNet-50": "RN50", "ResNet-101": "RN101", "ViT-B/32": "ViT-B-32", "ViT-B/16": "ViT-B-16"}
TARGETS = ("imagenet", "imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
FIGURE1 = {"Caltech101": "caltech101", "Flowers102": "oxford_flowers", "EuroSAT": "eurosat",
           "Describable Textures (DTD)": "dtd"}  # fmt: skip
METHODS = {
    "Zero": "zero_shot", "Prompt engineering": "zero_shot", "Prompt ensembling": "ensemble", "Linear": "linear_probe",
    "Fine-tuning": "finetune_image_encoder", "Optimizing trans": "text_transform", "Optimizing bias": "text_bias",
}  # fmt: skip
Number = tuple[str, ...]  # item, backbone, dataset, method, context length, init, prompt, accuracy

pytestmark = pytest.mark.skipif(not TEXT.is_file(), reason="the paper's text is not beside the checkout")


def lines(start: str, end: str = "\n\n**Table") -> list[list[str]]:
    """The cells of the lines between two marks."""
    text = re.sub(r"</?b>", "", TEXT.read_text(encoding="utf-8"))
    part = text[text.index(start) :] if start else text
    return [[cell.strip() for cell in line.split("\t")] for line in part[: part.index(end)].splitlines()]


def row(item: str, backbone: str, dataset: str, title: str, accuracy: str, prompt: str = "") -> Number:
    known = next((name for words, name in METHODS.items() if title.startswith(words)), None)
    if known:
        return item, backbone, dataset, known, "", "", prompt, accuracy
    return item, backbone, dataset, "coop", "4" if "M=4" in title else "16", "random", "", accuracy


def as_printed() -> Iterator[Number]:
    dataset = backbone = ""
    for *names, prompt, number in (line for line in lines("", "**Table 1**") if len(line) in (2, 3)):
        if re.fullmatch(r"\d\d\.\d\d", number):
            dataset = FIGURE1.get(names[0], dataset) if names else dataset
            title = "CoOp" if "[V]" in prompt else "Zero"
            yield row("figure1", "RN50", dataset, title, number, prompt.replace("[CLASS]", "{}"))
    for title, *numbers in lines("**Table 1**", "can beat the linear"):
        backbone = BACKBONES.get(title, backbone)
        if len(numbers) == 5 and all(numbers) and title not in ("Method", ""):
            for name, number in zip(TARGETS, numbers, strict=True):
                yield row("table1", backbone, name, title, number)
    for title, *numbers in lines("**Table 2**"):
        if len(numbers) == 4 and title != "Method":
            for name, number in zip(BACKBONES.values(), numbers, strict=True):
                yield row("table2", name, "imagenet", title, number)
    (_, vectors), (_, words) = (
        line for line in lines("**Table 3**", "**Results**") if len(line) == 2 and line[0]
    )
    for init, number in (("random", vectors), ("a photo of a", words)):
        yield "table3", "RN50", "average of 11 datasets", "coop", "4", init, "", number
    for title, *numbers in lines("**Table 5**", "###"):
        if len(numbers) == 2 and title:
            yield row("table5", "RN50", "imagenet", title, numbers[0])


def test_every_number_is_the_papers_and_none_is_left_out() -> None:
    with (Path(paper.__file__).parent / "paper_numbers.csv").open(encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    kept = [(item, backbone, *rest) for item, backbone, _, *rest in rows]
    assert sorted(kept) == sorted(as_printed())
    assert len(kept) == 116


def test_table6_is_the_papers() -> None:
    with (Path(paper.__file__).parent / "paper_datasets.csv").open(encoding="utf-8") as file:
        _, *kept = csv.reader(file)
    printed = [line for line in lines("**Table 6**", "Jia C") if len(line) == 6][1:]
    assert [line[1:] for line in kept] == [[*line[1:5], line[5].strip("“”")] for line in printed]
    assert [paper.plain(line[0]) for line in kept] == [paper.plain(line[0]) for line in printed]
