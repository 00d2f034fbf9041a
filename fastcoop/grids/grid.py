"""The grid file: what is crossed with what."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from fastcoop.checks import MOST_VIEWS, several, shortened
from fastcoop.datasets.files import some
from fastcoop.errors import UserError, nearest
from fastcoop.grids.lines import Lines, read_yaml
from fastcoop.grids.narrow import keep, override
from fastcoop.grids.plain import plain
from fastcoop.grids.rules import Addition, Name, Names, Rule, Seeds, Shots, listed, whole, without
from fastcoop.grids.shipped import shipped_grid
from fastcoop.methods import METHODS, MethodSettings, RunSpec, expand, get_method
from fastcoop.methods.base import SettingError, validate

AXES = ("backbones", "datasets", "shots", "seeds", "targets")
IN_A_BLOCK = (*AXES, "methods", "exclude", "include")
WHOLE_GRID = ("views", "recipe", "blocks")
OTHERS, EVERY = "others", "*"  # in targets: all other datasets; each dataset

Methods = tuple[tuple[str, tuple[MethodSettings, ...]], ...]  # (name, all its settings)

log = logging.getLogger("fastcoop")


class _Axes(BaseModel):
    """What the runs of a method are crossed with, as a file gives it. A value may stand in place of any list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbones: Names
    datasets: Names
    shots: Shots = (1, 2, 4, 8, 16)
    seeds: Seeds = (1, 2, 3)
    targets: dict[Name, Names] = {}


def _views(value: Any) -> Any:
    return whole(value, 0, f"a whole number from 0 to {MOST_VIEWS}", MOST_VIEWS)


class _Features(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    views: Annotated[int, BeforeValidator(_views)] = 8
    recipe: Literal["current", "official-2021"] = "current"


@dataclass(frozen=True)
class Cross:
    """Every method with each of its settings, on every dataset by every backbone, and for methods that learn with
    every number of shots and seed; but for what the rules leave out.

    Attributes:
        block: the block of the file that it comes from; None outside of blocks.
        backbones: as ``fastcoop.backbone_from_spec`` takes them.
        datasets: names under the data root, or paths: of folders, CSV files, or stores of imported features.
        shots, seeds: what draws the few-shot subsets.
        methods: (name, all its settings).
        targets: for a dataset, further datasets that what it taught is tested on.
        exclude: rules for runs to leave out.
    """

    block: str | None
    backbones: tuple[str, ...]
    datasets: tuple[str, ...]
    shots: tuple[int | str, ...]
    seeds: tuple[int, ...]
    methods: Methods
    targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    exclude: tuple[Rule, ...] = ()

    def runs(self, backbone: str, method: str) -> Iterator[RunSpec]:
        """Its runs of one method by one backbone, dataset by dataset."""
        if backbone not in self.backbones:
            return
        draws: list[tuple[int | str, int]] = [(0, 0)]
        if METHODS[method].learns:
            draws = list(product(self.shots, self.seeds))
        every = [one for name, settings in self.methods if name == method for one in settings]
        for dataset in self.datasets:
            targets = self.targets.get(dataset, ())
            for settings in every:
                rules = [rule for rule in self.exclude if rule.touches(backbone, dataset, method, settings)]
                for shots, seed in without(draws, rules) if rules else draws:
                    yield RunSpec(method, settings, backbone, dataset, shots, seed, targets)

    def has_use_for(self, rule: Rule) -> bool:
        """Whether the rule matches any of its runs."""
        for method, settings in self.methods:
            draws = product(self.shots, self.seeds) if METHODS[method].learns else [(0, 0)]
            if any(rule.draws(*draw) for draw in draws) and any(
                rule.touches(*names, method, one)
                for names in product(self.backbones, self.datasets)
                for one in settings
            ):
                return True
        return False


@dataclass(frozen=True)
class Grid:
    """What a sweep runs.

    Attributes:
        crosses: one, or one per block; and one per ``include``.
        views: augmented views per training image.
        recipe: of the image transforms, "current" or "official-2021".
        source: the file's content as it was read, narrowed from the command line.
    """

    crosses: tuple[Cross, ...]
    views: int = 8
    recipe: str = "current"
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def backbones(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for cross in self.crosses for name in cross.backbones))

    @property
    def datasets(self) -> tuple[str, ...]:
        """Datasets that runs learn from, or are tested on without learning."""
        return tuple(dict.fromkeys(name for cross in self.crosses for name in cross.datasets))

    @property
    def targets(self) -> tuple[str, ...]:
        """Datasets that are tested on beside those that runs learn from."""
        every = (names for cross in self.crosses for names in cross.targets.values())
        return tuple(dict.fromkeys(name for names in every for name in names))

    @property
    def methods(self) -> tuple[str, ...]:
        """Names; what is quick first, whatever the order in the file."""
        named = {name for cross in self.crosses for name, _ in cross.methods}
        return tuple(name for name in METHODS if name in named)

    def runs(self) -> Iterator[RunSpec]:
        """All its runs, backbone by backbone, method by method. Blocks may share runs: those come again."""
        for backbone, method in product(self.backbones, self.methods):
            for cross in self.crosses:
                yield from cross.runs(backbone, method)

    def drawn(self, dataset: str) -> tuple[tuple[int | str, ...], tuple[int, ...]]:
        """Shots and seeds that the dataset's training images are drawn by; none if nothing learns from it."""
        crosses = [
            cross
            for cross in self.crosses
            if dataset in cross.datasets and any(METHODS[name].learns for name, _ in cross.methods)
        ]
        shots = dict.fromkeys(n for cross in crosses for n in cross.shots)
        return tuple(shots), tuple(dict.fromkeys(seed for cross in crosses for seed in cross.seeds))


def read_grid(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> Grid:
    """Read and check a grid.

    Args:
        source: a YAML file, or what one would hold. One that is not there may be one that comes with fastcoop.
        overrides: ``key=value`` each; dots reach inside (``methods.coop.epochs=20``), commas make lists. They hold in
            every block; ``blocks.NAME.key=value`` in one.
        only: methods, or blocks, to keep.

    Raises:
        UserError: no such file, no YAML, an unknown key (with the nearest one and its line), or a value that cannot
            be.
    """
    overrides, only = several(overrides), several(only)
    lines, name = Lines(), "the grid"
    if isinstance(source, Mapping):
        given: Any = plain(source)
    elif not isinstance(source, str | os.PathLike):
        raise UserError(
            f"Expected a grid as the path of a YAML file or as a mapping, got {shortened(source)}."
        )
    else:
        name = str(source)
        given, lines = read_yaml(_read(Path(source)), name)
        if not isinstance(given, dict):
            raise UserError(f"{name} should hold keys such as backbones, datasets and methods.")
        given = plain(given)
    for one in overrides:
        if not isinstance(one, str):
            raise UserError(f'Expected overrides such as "shots=1,2", got {shortened(one)}.')
    keys = [one.partition("=")[0] for one in overrides]
    if twice := [key for n, key in enumerate(keys) if key in keys[:n]]:
        raise UserError(f"--set gives {twice[0]} twice; leave one of them.")
    before = _named_targets(given)
    for one in overrides:
        override(given, one, lines)
    lost = before - _named_targets(given)
    if lost and not any("targets" in key.split(".") for key in keys):
        log.warning("--set datasets leaves out the targets of %s.", some(sorted(lost)))
    reader = _Reader(given, lines, name)
    grid = reader.grid()
    if not (overrides or only):
        reader.warn_of_idle(grid)
    if only:
        grid = _Reader(keep(given, only), Lines(), name).grid()
    for one, key in zip(overrides, keys, strict=True):
        if _is_idle(key.split("."), grid):
            log.warning("--set %s changes nothing: no run takes it.", one)
    return grid


def _named_targets(given: dict[str, Any]) -> set[str]:
    """Datasets that a grid or its blocks give targets for."""
    blocks = given.get("blocks")
    scopes = [given, *(blocks.values() if isinstance(blocks, dict) else ())]
    targets = [scope.get("targets") for scope in scopes if isinstance(scope, dict)]
    return {str(name) for one in targets if isinstance(one, dict) for name in one}


def _is_idle(keys: Sequence[str], grid: Grid) -> bool:
    """Whether no run of a grid takes what an override sets."""
    crosses: Sequence[Cross] = grid.crosses
    if keys[0] == "blocks" and len(keys) > 2:
        crosses = [cross for cross in crosses if cross.block == keys[1]]
        keys = keys[2:]
    methods = {name for cross in crosses for name, _ in cross.methods}
    if keys[0] == "methods" and len(keys) > 2:
        return keys[1] not in methods
    if keys[0] == "views":
        return not any(METHODS[name].learns and METHODS[name].augments for name in methods)
    return not methods or (
        keys[0] in ("shots", "seeds") and not any(METHODS[name].learns for name in methods)
    )


def _read(path: Path) -> str:
    try:
        return (path if path.is_file() else shipped_grid(path) or path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a grid is a YAML file.") from None
    except OSError as error:
        raise UserError(f"The grid file {path} cannot be read: {error.strerror}.") from None


class _Reader:
    """From a file's content to a grid. Knows where each thing stood, to say what is wrong with it."""

    def __init__(self, given: dict[str, Any], lines: Lines, name: str):
        self.given, self.lines, self.name = given, lines, name
        self.rules: list[tuple[Rule, str]] = []  # and where each stands

    def grid(self) -> Grid:
        known = (*IN_A_BLOCK, *WHOLE_GRID)
        self._known(self.given, known, self.name, ())
        features: dict[str, Any] = {key: self.given[key] for key in ("views", "recipe") if key in self.given}
        made = self._validated(_Features, features, self.name, ())
        shared = self._rules(self.given, (), self.name)
        if "blocks" not in self.given:
            crosses = self._crosses({}, None, (), shared)
        else:
            crosses = [
                cross
                for block, path in self._blocks()
                for cross in self._crosses(self.given["blocks"][block], block, path, shared)
            ]
            crosses += self._included(self.given, {}, None, ())
        self._refuse_lost_targets(crosses)
        grid = Grid(tuple(crosses), made.views, made.recipe, self.given)
        if next(grid.runs(), None) is None:
            raise UserError(f"The rules under exclude leave out every run of {self.name}; remove one.")
        return grid

    def warn_of_idle(self, grid: Grid) -> None:
        """Say of exclude rules, keys and schedules which of them change nothing."""
        for rule, where in self.rules:
            if not any(cross.has_use_for(rule) for cross in grid.crosses if rule in cross.exclude):
                said = ", ".join(f"{k}: {v}" for k, v in rule.model_dump(exclude_unset=True).items())
                log.warning("%sNo run matches the exclude rule (%s).", where, said)
        for path, content in self._scopes():
            for key in (*AXES, "methods", "views"):
                if key in content and not self._takers(key, path, grid):
                    where = self.lines.where((*path, key))
                    log.warning("%sNo run takes %s from here, so that it changes nothing.", where, key)
            targets = content.get("targets") or {}
            idle = [name for name, named in targets.items() if self._is_idle_target(name, named, path, grid)]
            for name in idle:
                log.warning(
                    "%sNo dataset has targets by %s.", self.lines.where((*path, "targets", name)), name
                )
        schedules: dict[str, tuple[dict[Any, Any], set[Any]]] = {}
        for cross in grid.crosses:
            for _, every in cross.methods:
                for epochs in (getattr(settings, "epochs", None) for settings in every):
                    if isinstance(epochs, dict):
                        schedules.setdefault(str(epochs), (epochs, set()))[1].update(cross.shots)
        for epochs, shots in schedules.values():
            if idle_shots := [str(number) for number in epochs if number not in shots]:
                log.warning("No run has %s shots, for which epochs are given.", " or ".join(idle_shots))

    def _scopes(self) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
        """The top of the grid and its blocks, with their places."""
        yield (), self.given
        for block, content in (self.given.get("blocks") or {}).items():
            yield ("blocks", block), content

    def _takers(self, key: str, path: tuple[str, ...], grid: Grid) -> list[Cross]:
        """Crosses for which a key at ``path`` means something."""
        if path:
            takers = [cross for cross in grid.crosses if cross.block == path[1]]
        else:
            blocks = self.given.get("blocks") or {}
            takers = [c for c in grid.crosses if c.block is None or key not in blocks[c.block]]
        if key not in ("shots", "seeds", "views"):
            return takers
        return [
            cross
            for cross in takers
            if any(
                METHODS[name].learns and (METHODS[name].augments or key != "views")
                for name, _ in cross.methods
            )
        ]

    def _is_idle_target(self, name: str, named: Any, path: tuple[str, ...], grid: Grid) -> bool:
        crosses = self._takers("targets", path, grid)
        if name == EVERY and named in (OTHERS, [OTHERS]):
            return not any(cross.targets for cross in crosses)
        targets = self.given["targets"] if not path else self.given["blocks"][path[1]]["targets"]
        return name == EVERY and all(d in map(str, targets) for cross in crosses for d in cross.datasets)

    def _blocks(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        blocks = self.given["blocks"]
        if not isinstance(blocks, dict) or not blocks:
            self._refuse(
                ("blocks",), f'"blocks" of {self.name} should name blocks, each with keys of its own.'
            )
        for block, content in blocks.items():
            path = ("blocks", block)
            if not isinstance(block, str):
                self._refuse(path, f"The name of a block should be text; {block!r} came.")
            if block in METHODS:
                self._refuse(path, f'A block cannot be called "{block}", which is a method; rename it.')
            if not isinstance(content, dict):
                self._refuse(path, f'The block "{block}" should have keys of its own, such as methods.')
            elsewhere = [key for key in WHOLE_GRID if key in content]
            if elsewhere:
                key = elsewhere[0]
                self._refuse((*path, key), f'"{key}" holds for the whole grid; put it at its top.')
            self._known(content, IN_A_BLOCK, f'block "{block}"', path)
            yield block, path

    def _crosses(
        self, block: dict[str, Any], name: str | None, path: tuple[Any, ...], shared: tuple[Rule, ...]
    ) -> list[Cross]:
        """The cross of a block, or of the file, and those of its includes."""
        what = self.name if name is None else f'block "{name}" of {self.name}'
        holder = self.given if name is None else block
        rules = shared + (self._rules(block, path, what) if name is not None else ())
        crosses = list(self._included(holder, block, name, path))
        methods = block.get("methods", self.given.get("methods"))
        if methods or not crosses:
            axes = self._axes({}, block, path, what)
            made = self._methods(methods, path if "methods" in block else (), what)
            crosses.insert(0, self._cross(name, axes, made, rules))
        return crosses

    def _cross(
        self, block: str | None, axes: _Axes, methods: Methods, exclude: tuple[Rule, ...] = ()
    ) -> Cross:
        targets = self._targets(axes)
        return Cross(block, axes.backbones, axes.datasets, axes.shots, axes.seeds, methods, targets, exclude)

    def _included(
        self, holder: dict[str, Any], block: dict[str, Any], name: str | None, path: tuple[Any, ...]
    ) -> Iterator[Cross]:
        for n, entry in enumerate(listed(holder.get("include") or [])):
            here = (*path, "include", n)
            if entry is None:  # left out by an override
                continue
            if not isinstance(entry, dict):
                self._refuse(
                    here, f"An entry under include should say backbone, dataset or method; {entry!r} came."
                )
            addition = self._validated(Addition, entry, "include", here)
            self._say_where(here, addition.check)
            axes = self._axes(dict(addition.axes()), block, path, f"include of {self.name}")
            (method,) = addition.method
            settings = self._settings(method, addition.settings, (*here, "settings"))
            yield self._cross(name, axes, ((method, settings),))

    def _axes(self, first: dict[str, Any], block: dict[str, Any], path: tuple[Any, ...], what: str) -> _Axes:
        merged = {key: self.given[key] for key in AXES if key in self.given}
        merged |= {key: block[key] for key in AXES if key in block} | first
        try:
            return validate(_Axes, merged, what)
        except SettingError as error:
            place = path if error.place[:1] and error.place[0] in block else ()
            raise UserError(f"{self.lines.where((*place, *error.place))}{error}") from None

    def _targets(self, axes: _Axes) -> dict[str, tuple[str, ...]]:
        targets = {}
        for dataset in axes.datasets:
            named = axes.targets.get(dataset, axes.targets.get(EVERY, ()))
            if dataset in named and dataset in axes.targets:
                raise UserError(
                    f'The dataset "{dataset}" is tested on itself in any case; leave it out of its own targets.'
                )
            named = tuple(
                name for name in (axes.datasets if named == (OTHERS,) else named) if name != dataset
            )
            if named:
                targets[dataset] = named
        return targets

    def _refuse_lost_targets(self, crosses: Sequence[Cross]) -> None:
        everywhere = {name for cross in crosses for name in cross.datasets}
        for path, content in self._scopes():
            own = {name for cross in crosses if path and cross.block == path[1] for name in cross.datasets}
            datasets = own if path else everywhere
            for dataset in content.get("targets") or {}:
                if str(dataset) not in datasets and dataset != EVERY:
                    message = f'The grid gives targets for "{dataset}", which is not one of its datasets.'
                    self._refuse((*path, "targets", dataset), message)

    def _methods(self, given: Any, path: tuple[Any, ...], what: str) -> Methods:
        """Names, ``{name: settings}`` or a list of either."""
        if not given:
            self._refuse(path, f'The setting "methods" of {what} is missing; it must be given.')
        found = []
        for n, entry in enumerate(listed(given)):
            here = (*path, "methods", n) if isinstance(given, list) else (*path, "methods")
            for name, settings in entry.items() if isinstance(entry, dict) else [(entry, None)]:
                there = (*here, name) if isinstance(entry, dict) else here
                self._say_where(there, get_method, str(name))
                if not isinstance(settings, dict | None):
                    self._refuse(
                        there, f"The settings of {name} should be keys and values; {settings!r} came."
                    )
                found.append((str(name), self._settings(str(name), settings or {}, there)))
        for n, pair in enumerate(found):
            if pair in found[:n]:
                self._refuse(path, f"The method {pair[0]} is listed twice with the same settings; leave one.")
        order = list(METHODS)
        return tuple(sorted(found, key=lambda pair: order.index(pair[0])))

    def _settings(
        self, method: str, given: dict[str, Any], path: tuple[Any, ...]
    ) -> tuple[MethodSettings, ...]:
        for key, values in given.items():
            for n, value in enumerate(listed(values)):
                where = f"method {method}"
                self._say_where((*path, key, n), validate, get_method(method).Settings, {key: value}, where)
        return tuple(self._say_where(path, expand, get_method(method), given))

    def _rules(self, holder: dict[str, Any], path: tuple[Any, ...], what: str) -> tuple[Rule, ...]:
        rules = []
        for n, entry in enumerate(listed(holder.get("exclude") or [])):
            here = (*path, "exclude", n)
            if not isinstance(entry, dict) or not entry:
                self._refuse(
                    here, f"An entry under exclude should say which runs to leave out; {entry!r} came."
                )
            rule = self._validated(Rule, entry, f"exclude of {what}", here)
            self._say_where(here, rule.check)
            self.rules.append((rule, self.lines.where(here)))
            rules.append(rule)
        return tuple(rules)

    def _known(self, content: dict[str, Any], known: Sequence[str], what: str, path: tuple[Any, ...]) -> None:
        for key in content:
            if key not in known:
                self._refuse((*path, key), f'Unknown setting "{key}" of {what}.{nearest(str(key), known)}')

    def _validated(self, model: type[Any], given: dict[str, Any], what: str, path: tuple[Any, ...]) -> Any:
        try:
            return validate(model, given, what)
        except SettingError as error:
            raise UserError(f"{self.lines.where((*path, *error.place))}{error}") from None

    def _say_where(self, path: tuple[Any, ...], call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except UserError as error:
            raise UserError(f"{self.lines.where(path)}{error}") from None

    def _refuse(self, path: tuple[Any, ...], message: str) -> None:
        raise UserError(f"{self.lines.where(path)}{message}")
