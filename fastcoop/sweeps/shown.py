"""A grid as it is understood: every default written out."""

from __future__ import annotations

from typing import Any

import yaml

from fastcoop.methods import MethodSettings
from fastcoop.sweeps.grid import Cross, Grid


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
        parts.append(f"  {name}:\n" + "\n".join(f"    {line}" for line in body.splitlines()))
    return "\n".join(parts)


def _plain(cross: Cross) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "backbones": list(cross.backbones), "datasets": list(cross.datasets), "shots": list(cross.shots),
        "seeds": list(cross.seeds),
    }  # fmt: skip
    if cross.targets:
        plain["targets"] = {name: list(targets) for name, targets in cross.targets.items()}
    plain["methods"] = [{name: _crossed(settings)} for name, settings in cross.methods]
    if cross.exclude:
        plain["exclude"] = [rule.model_dump(mode="json", exclude_unset=True) for rule in cross.exclude]
    return plain


def _crossed(settings: tuple[MethodSettings, ...]) -> dict[str, Any]:
    """All settings of a method's cross, with defaults: a value where all have the same, otherwise a list."""
    dumps = [one.model_dump() for one in settings]
    found = {}
    for name in dumps[0]:
        every = [dump[name] for dump in dumps]
        values = [value for n, value in enumerate(every) if value not in every[:n]]
        found[name] = values[0] if len(values) == 1 else values
    return found


def _comment(runs: int) -> str:
    return f"# {runs:,} run{'s' * (runs != 1)}\n"


def _yaml(plain: dict[str, Any]) -> str:
    return yaml.safe_dump(
        plain, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    ).rstrip()
