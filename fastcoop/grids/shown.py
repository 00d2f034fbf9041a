"""A grid as YAML with every default written out."""

from __future__ import annotations

from typing import Any

import yaml

from fastcoop import escape
from fastcoop.grids.grid import Block, Grid
from fastcoop.methods import MethodSettings


def grid_text(grid: Grid) -> str:
    """Return the YAML of a grid, with the number of runs of each block. It reads back to the same runs."""
    parts = [f"views: {grid.views}", f"recipe: {grid.recipe}"]
    texts = [_comment(block) + _yaml(_plain(block)) for block in grid.blocks]
    if grid.blocks[0].name is None:
        return "\n".join([*parts, *texts])
    parts.append("blocks:")
    for block, text in zip(grid.blocks, texts, strict=True):
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        parts.append(f"  {escape.yaml_scalar(str(block.name))}:\n{indented}")
    return "\n".join(parts)


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
    return f"# {runs:,} run{'s' * (runs != 1)}\n"


class _Dumper(yaml.SafeDumper):
    """Escapes control characters and line separators, which YAML would fold or drop."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if escape.visible(text) == text else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def _yaml(plain: dict[str, Any]) -> str:
    return yaml.dump(
        plain, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    ).rstrip()
