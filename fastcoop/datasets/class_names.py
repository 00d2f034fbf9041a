"""The class names of the paper's datasets."""

from __future__ import annotations

import json
from pathlib import Path


def paper_class_names() -> dict[str, list[str]]:
    """Return the class names of the paper's eleven datasets in label order, as prompts have them."""
    names: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return names
