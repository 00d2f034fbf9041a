"""A grid as YAML with every default written out."""

from __future__ import annotations

from typing import Any

import yaml

from fastcoop import escape
from fastcoop.grids.grid import Grid, GridBlock
from fastcoop.methods import MethodSettings
from fastcoop.progress import counted


def grid_text(grid: Grid) -> str:
    """Return the YAML of a grid below the number of runs of each block. It reads back to the same runs."""
    blocks = {block.name: _content(block) for block in grid.blocks}
    content = {"views": grid.views, "recipe": grid.recipe} | blocks.get(None, {"blocks": blocks})
    style: dict[str, Any] = {"sort_keys": False, "default_flow_style": None, "width": 110}
    text: str = yaml.safe_dump(content, allow_unicode=True, **style)
    line = text.replace("\n", "")
    if escape.visible(line) != line:  # YAML folds or drops characters that are not escaped
        text = yaml.safe_dump(content, **style)
    return "\n".join([*map(_comment, grid.blocks), text.rstrip()])


def _content(block: GridBlock) -> dict[str, Any]:
    used = ["backbones", "datasets", *(["shots", "seeds"] if block.learns else [])]
    plain = {key: list(getattr(block, key)) for key in used}
    targets = {name: list(names) for name, names in block.targets.items()}
    methods = [{name: _with_defaults(one)} for name, every in block.methods for one in every]
    return plain | ({"targets": targets} if targets else {}) | {"methods": methods}


def _with_defaults(settings: MethodSettings) -> dict[str, Any]:
    """Return every setting but those that have no effect, which a grid must not give."""
    given = settings.model_fields_set
    unused = {name for name, reason in settings.unused().items() if reason is not None or name not in given}
    return dict(settings.model_dump(exclude=unused))


def _comment(block: GridBlock) -> str:
    name = f"{escape.visible(block.name)}: " if block.name else ""
    return f"# {name}{counted(len([*block.runs()]), 'run')}"
