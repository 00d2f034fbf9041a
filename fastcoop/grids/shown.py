"""A grid as it is understood: every default written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from fastcoop import escape
from fastcoop.grids.grid import Cross, Grid
from fastcoop.methods import METHODS, MethodSettings


def grid_text(grid: Grid) -> str:
    """YAML of what is crossed with what, with the number of runs of each cross. It reads back to the same runs, except
    that settings which were crossed are lists of them."""
    crosses = [(cross, sum(1 for b in cross.backbones for m, _ in cross.methods for _ in cross.runs(b, m)))
               for cross in grid.crosses]  # fmt: skip
    parts = [f"views: {grid.views}", f"recipe: {grid.recipe}"]
    if len(crosses) == 1 and crosses[0][0].block is None:
        parts.append(_comment(crosses[0][1]) + _yaml(_plain(crosses[0][0])))
        return "\n".join(parts)
    parts.append("blocks:")
    names: dict[str, int] = {}
    for cross, runs in crosses:
        name = cross.block or "grid"
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}-{names[name]}"
        body = _comment(runs) + _yaml(_plain(cross))
        parts.append(
            f"  {escape.yaml_scalar(name)}:\n" + "\n".join(f"    {line}" for line in body.splitlines())
        )
    return "\n".join(parts)


def _plain(cross: Cross) -> dict[str, Any]:
    plain: dict[str, Any] = {"backbones": list(cross.backbones), "datasets": list(cross.datasets)}
    if any(METHODS[name].learns for name, _ in cross.methods):
        plain |= {"shots": list(cross.shots), "seeds": list(cross.seeds)}
    if cross.targets:
        plain["targets"] = {name: list(targets) for name, targets in cross.targets.items()}
    plain["methods"] = [
        {name: _crossed(alike)} for name, settings in cross.methods for alike in _of_equal_use(settings)
    ]
    if cross.exclude:
        plain["exclude"] = [rule.model_dump(mode="json", exclude_unset=True) for rule in cross.exclude]
    return plain


def _of_equal_use(settings: Sequence[MethodSettings]) -> list[list[MethodSettings]]:
    """Settings by which of them are left out."""
    groups: dict[frozenset[str], list[MethodSettings]] = {}
    for one in settings:
        groups.setdefault(frozenset(_left_out(one)), []).append(one)
    return list(groups.values())


def _left_out(settings: MethodSettings) -> set[str]:
    """What changes nothing, and would be refused where it is given."""
    given = settings.model_fields_set
    return {name for name, reason in settings.unused().items() if reason is not None or name not in given}


def _crossed(settings: Sequence[MethodSettings]) -> dict[str, Any]:
    """All settings of a method's cross, with defaults: a value where all have the same, otherwise a list."""
    dumps = [one.model_dump(exclude=_left_out(one)) for one in settings]
    found = {}
    for name in dumps[0]:
        every = [dump[name] for dump in dumps]
        values = [value for n, value in enumerate(every) if value not in every[:n]]
        found[name] = values[0] if len(values) == 1 else values
    return found


def _comment(runs: int) -> str:
    return f"# {runs:,} run{'s' * (runs != 1)}\n"


class _Dumper(yaml.SafeDumper):
    """Escapes control characters, line separators among them, which would be folded or lost as they are."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if escape.visible(text) == text else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def _yaml(plain: dict[str, Any]) -> str:
    return yaml.dump(
        plain, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    ).rstrip()
