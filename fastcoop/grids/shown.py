"""A grid as YAML with every default written out."""

from __future__ import annotations

from typing import Any

import yaml

from fastcoop import escape
from fastcoop.grids.grid import Block, Grid
from fastcoop.methods import MethodSettings


def grid_text(grid: Grid) -> str:
    """Return the YAML of a grid below the number of runs of each block. It reads back to the same runs."""
    blocks = {block.name: _plain(block) for block in grid.blocks}
    content = {"views": grid.views, "recipe": grid.recipe} | blocks.get(None, {"blocks": blocks})
    return "\n".join([*map(_comment, grid.blocks), _yaml(content)])


def _plain(block: Block) -> dict[str, Any]:
    plain: dict[str, Any] = {"backbones": list(block.backbones), "datasets": list(block.datasets)}
    if block.learns:
        plain |= {"shots": list(block.shots), "seeds": list(block.seeds)}
    if block.targets:
        plain["targets"] = {name: list(targets) for name, targets in block.targets.items()}
    plain["methods"] = [{name: _with_defaults(one)} for name, settings in block.methods for one in settings]
    return plain


def _with_defaults(settings: MethodSettings) -> dict[str, Any]:
    """Return every setting but those that have no effect, which a grid must not give."""
    given = settings.model_fields_set
    unused = {name for name, reason in settings.unused().items() if reason is not None or name not in given}
    return dict(settings.model_dump(exclude=unused))


def _comment(block: Block) -> str:
    runs = sum(1 for b in block.backbones for m in dict(block.methods) for _ in block.runs(b, m))
    name = f"{escape.visible(block.name)}: " if block.name else ""
    return f"# {name}{runs:,} run{'s' * (runs != 1)}"


def _yaml(content: dict[str, Any]) -> str:
    style: dict[str, Any] = {"sort_keys": False, "default_flow_style": None, "width": 110}
    text: str = yaml.safe_dump(content, allow_unicode=True, **style)
    if (
        escape.visible(line := text.replace("\n", "")) != line
    ):  # YAML folds or drops characters that are not escaped
        text = yaml.safe_dump(content, **style)
    return text.rstrip()
