"""The grid file: what is crossed with what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fastcoop.errors import UserError
from fastcoop.methods import METHODS, MethodSettings, expand, get_method
from fastcoop.methods.base import validate


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _methods(value: Any) -> Any:
    """Names, ``{name: settings}`` or a list of either, as a list of (name, settings)."""
    pairs: list[tuple[str, Any]] = []
    for entry in _listed(value):
        if isinstance(entry, Mapping):
            pairs += [(str(name), settings or {}) for name, settings in entry.items()]
        elif isinstance(entry, list | tuple):
            pairs.append((entry[0], entry[1]))
        else:
            pairs.append((str(entry), {}))
    return pairs


Names = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
Shots = Annotated[int, Field(ge=1)] | Literal["all"]


class Grid(BaseModel):
    """What a sweep runs: every method with each of its settings, on every dataset by every backbone, and for
    methods that learn with every number of shots and seed.

    A single value may stand in place of any list.

    Attributes:
        backbones: as ``fastcoop.backbone_from_spec`` takes them.
        datasets: names under the data root, or paths: of folders, CSV files, or stores of imported features.
        shots, seeds: what draws the few-shot subsets.
        methods: (name, settings), where each setting may be a list to be crossed.
        targets: for a dataset, further datasets that what it taught is tested on.
        views: augmented views per training image.
        recipe: of the image transforms, "current" or "official-2021".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbones: Names
    datasets: Names
    methods: Annotated[tuple[tuple[str, dict[str, Any]], ...], BeforeValidator(_methods), Field(min_length=1)]
    shots: Annotated[tuple[Shots, ...], BeforeValidator(_listed), Field(min_length=1)] = (1, 2, 4, 8, 16)
    seeds: Annotated[tuple[int, ...], BeforeValidator(_listed), Field(min_length=1)] = (1, 2, 3)
    targets: dict[str, Names] = {}
    views: Annotated[int, Field(ge=0)] = 8
    recipe: Literal["current", "official-2021"] = "current"

    def runs_of(self, method: str) -> list[MethodSettings]:
        """Every setting of a method that the grid names. Raises UserError for settings it does not have."""
        given = [settings for name, settings in self.methods if name == method]
        return [one for settings in given for one in expand(get_method(method), settings)]

    def narrowed(self, only: Sequence[str]) -> Grid:
        """The grid with only these methods. Raises UserError where it has none of them."""
        for name in only:
            get_method(name)
        kept = tuple(pair for pair in self.methods if pair[0] in only)
        if not kept:
            named = sorted({name for name, _ in self.methods})
            raise UserError(f"The grid has no {' or '.join(only)}; its methods are {', '.join(named)}.")
        return self.model_copy(update={"methods": kept})


def read_grid(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> Grid:
    """Read and check a grid.

    Args:
        source: a YAML file, or what one would hold.
        overrides: ``key=value`` each; dots reach inside (``methods.coop.epochs=20``), commas make lists.
        only: methods to keep.

    Raises:
        UserError: no such file, no YAML, an unknown key (with the nearest one), or a value that cannot be.
    """
    text, name = "", "the grid"
    if isinstance(source, Mapping):
        given: Any = deepcopy(dict(source))
    else:
        path, name = Path(source), str(source)
        text = _read(path)
        try:
            given = yaml.safe_load(text)
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            line = f" (line {where.line + 1})" if where else ""
            raise UserError(f"{name} is not YAML{line}; check its indentation and quotes.") from None
        if not isinstance(given, dict):
            raise UserError(f"{name} should hold keys such as backbones, datasets and methods.")
    for override in overrides:
        _override(given, override)
    try:
        grid = validate(Grid, given, name)
        for method in dict.fromkeys(method for method, _ in grid.methods):
            grid.runs_of(method)
    except UserError as error:
        raise UserError(_with_line(str(error), text)) from None
    for dataset in grid.targets:
        if dataset not in grid.datasets:
            raise UserError(f'The grid gives targets for "{dataset}", which is not one of its datasets.')
    grid = grid.narrowed(only) if only else grid
    # What is quick comes first, whatever the order in the file.
    ordered = sorted(grid.methods, key=lambda pair: list(METHODS).index(pair[0]))
    return grid.model_copy(update={"methods": tuple(ordered)})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a grid is a YAML file.") from None
    except OSError as error:
        raise UserError(f"The grid file {path} cannot be read: {error.strerror}.") from None


def _override(given: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f'"{override}" should be KEY=VALUE, such as shots=1,2 or methods.coop.epochs=20.')
    try:
        value = yaml.safe_load(f"[{text}]" if "," in text and text[:1] not in "[{\"'" else text)
    except yaml.YAMLError:
        raise UserError(f'The value in "{override}" is not YAML; quote it.') from None
    *parents, last = path.split(".")
    place = given
    for parent in parents:
        if parent == "methods" and place is given:
            place["methods"] = _one_mapping(place.get("methods", {}))
        place[parent] = place.get(parent) or {}
        if not isinstance(place[parent], dict):
            raise UserError(f'"{override}" reaches into {parent}, which has no keys of its own.')
        place = place[parent]
    place[last] = value


def _one_mapping(methods: Any) -> dict[str, Any]:
    pairs = _methods(methods)
    if len({name for name, _ in pairs}) < len(pairs):
        raise UserError("A method that stands in the grid twice cannot be overridden; edit the grid file.")
    return dict(pairs)


def _with_line(message: str, text: str) -> str:
    """Say where in the file the key stands that a message quotes."""
    quoted = re.search(r'"([^"]+)"', message)
    if not quoted:
        return message
    key = quoted[1].split(".")[0 if quoted[1].split(".")[0].isidentifier() else -1]
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(rf"(^|[\s{{,\-\[]){re.escape(key)}\s*($|[:,}}\]#])", line.split(" #")[0]):
            return f"Line {number}: {message}"
    return message
