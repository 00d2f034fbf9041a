"""The class names of the paper's datasets, and warnings about class names and classes without images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fastcoop.datasets.dataset import Split
from fastcoop.datasets.files import normalized, some


def paper_class_names() -> dict[str, list[str]]:
    """Return the class names of the paper's eleven datasets in label order, as prompts hold them."""
    names: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return names


def notes_on_names(
    dataset: str, class_names: Sequence[str], where: str = "under class_names of its YAML"
) -> Iterator[str]:
    """Which classes have the same prompt: one name but for case, underscores, spaces and how letters are composed."""
    read: dict[str, list[str]] = {}
    for name in class_names:
        read.setdefault(" ".join(normalized(name).replace("_", " ").lower().split()), []).append(name)
    for alike in (names for names in read.values() if len(names) > 1):
        yield (
            f"The classes {some(alike)} of {dataset} have the same prompt, which cannot tell them apart; name them "
            f"differently {where}."
        )


def notes_on_absent_classes(
    dataset: str, class_names: Sequence[str], splits: Mapping[str, Split]
) -> Iterator[str]:
    """Which classes have no validation or test images."""
    for split, words, so in (
        ("val", "validation", "what is chosen on the validation images is chosen without them"),
        ("test", "test", "accuracies say nothing about them"),
    ):
        if split in splits and len(splits[split]):
            there = set(splits[split].labels.tolist())
            absent = [name for label, name in enumerate(class_names) if label not in there]
            if absent:
                yield f"{dataset} has no {words} images of {some(absent)}: {so}."
