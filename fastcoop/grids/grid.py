"""Grid files: lists of backbones, datasets, shots, seeds and methods' settings, crossed into runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

import fastcoop
from fastcoop.checks import several, shortened
from fastcoop.errors import MissingFile, UserError
from fastcoop.grids.lines import Lines, read_yaml
from fastcoop.grids.scopes import Scope, join, keep_only, located, methods_of, override, split
from fastcoop.grids.values import Name, Names, Seeds, Shots, Views, number_of_draws, plain
from fastcoop.methods import METHODS, MethodSettings, RunSpec, expand, get_method
from fastcoop.methods.base import SettingError, validate

Methods = tuple[tuple[str, tuple[MethodSettings, ...]], ...]  # (name, all its settings)

log = logging.getLogger("fastcoop")


class GridBlock(BaseModel):
    """Every method with each of its settings, on every dataset by every backbone; methods that learn also with every
    number of shots and every seed.

    Attributes:
        name: Name in the grid file; None for a file without blocks.
        backbones: As ``fastcoop.backbone_from_spec`` takes them.
        datasets: Names under the data root, or paths of folders, CSV files or stores of imported features.
        shots, seeds: Images per class, and seeds, of the few-shot subsets.
        methods: (name, all its settings), the fastest first.
        targets: For a dataset, further datasets to test its runs on.
        views: Augmented views per training image, the same in all blocks.
        recipe: Recipe of the image transforms, the same in all blocks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    backbones: Names
    datasets: Names
    shots: Shots = (1, 2, 4, 8, 16)
    seeds: Seeds = (1, 2, 3)
    methods: Methods = ()
    targets: dict[Name, Names] = {}
    views: Views = 8
    recipe: Literal["current", "official-2021"] = "current"

    @property
    def learns(self) -> bool:
        """Whether any of its methods learns from few-shot subsets."""
        return any(METHODS[name].learns for name, _ in self.methods)

    @property
    def augments(self) -> bool:
        """Whether any of its methods learns from augmented views."""
        return any(METHODS[name].learns and METHODS[name].augments for name, _ in self.methods)

    def runs(self, backbone: str, method: str) -> Iterator[RunSpec[Any]]:
        """Yield its runs of one method by one backbone, dataset by dataset."""
        if backbone not in self.backbones:
            return
        draws: Any = product(self.shots, self.seeds) if METHODS[method].learns else [(0, 0)]
        every = [one for name, settings in self.methods if name == method for one in settings]
        for dataset, settings, (shots, seed) in product(self.datasets, every, draws):
            yield RunSpec(method, settings, backbone, dataset, shots, seed, self.targets.get(dataset, ()))


@dataclass(frozen=True)
class Grid:
    """The runs of a sweep.

    Attributes:
        blocks: The blocks of the file, or one for a file without blocks.
        views: Augmented views per training image.
        recipe: Recipe of the image transforms, "current" or "official-2021".
        source: The content of the file, changed by command-line options.
    """

    blocks: tuple[GridBlock, ...]
    views: int
    recipe: str
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of training features that methods read; "coop" if none of them learns from augmented views."""
        learning = [METHODS[name] for name in self.methods if METHODS[name].learns]
        kinds = {kind for one in learning for kind in one.kinds if one.augments or kind != "coop"}
        return tuple(sorted(kinds)) if any(one.augments for one in learning) else ("coop", *sorted(kinds))

    @property
    def backbones(self) -> tuple[str, ...]:
        """All backbones, each once."""
        return tuple(dict.fromkeys(name for block in self.blocks for name in block.backbones))

    @property
    def datasets(self) -> tuple[str, ...]:
        """All datasets that runs learn from, or that methods without learning are tested on."""
        return tuple(dict.fromkeys(name for block in self.blocks for name in block.datasets))

    @property
    def targets(self) -> tuple[str, ...]:
        """All datasets that are targets of another one."""
        every = (names for block in self.blocks for names in block.targets.values())
        return tuple(dict.fromkeys(name for names in every for name in names))

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of all methods, the fastest first, whatever their order in the file."""
        named = {name for block in self.blocks for name, _ in block.methods}
        return tuple(name for name in METHODS if name in named)

    def runs(self) -> Iterator[RunSpec[Any]]:
        """Yield all runs, backbone by backbone, method by method; a run of several blocks is yielded for each."""
        for backbone, method, block in product(self.backbones, self.methods, self.blocks):
            yield from block.runs(backbone, method)

    def drawn(self, dataset: str) -> tuple[tuple[int | str, ...], tuple[int, ...]]:
        """Return the shots and seeds of a dataset's few-shot subsets; none if nothing learns from it."""
        blocks = [block for block in self.blocks if dataset in block.datasets and block.learns]
        shots = dict.fromkeys(number for block in blocks for number in block.shots)
        return tuple(shots), tuple(dict.fromkeys(seed for block in blocks for seed in block.seeds))


def read_grid(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> Grid:
    """Read and check a grid.

    Args:
        source: A YAML file, or a mapping of its content. A file that is not there may be one that comes with fastcoop.
        overrides: ``key=value`` each; dots reach inside (``methods.coop.epochs=20``), commas make lists. They hold in
            every block.
        only: Methods, or blocks, to keep.

    Raises:
        UserError: No such file, no YAML, an unknown key (with the nearest one and its line), or a value that its key
            cannot have.
    """
    overrides, only = several(overrides), several(only)
    given, lines, name = _content(source)
    try:
        scopes = split(given, name)
        override(scopes, overrides, lines, name)
        blocks = _blocks(scopes, name)
        if only:
            scopes = keep_only(scopes, only)
            blocks = _blocks(scopes, name)
    except SettingError as error:
        raise UserError(f"{lines.where(error.place)}{error}") from None
    _warn_of_draws(scopes, lines)
    if not (overrides or only):
        _warn_of_unused_keys(given, scopes, blocks, lines)
    for one in overrides:
        if not _users(blocks, one.partition("=")[0].split(".")):
            log.warning("--set %s changes nothing: no run uses it.", one)
    return Grid(tuple(blocks), blocks[0].views, blocks[0].recipe, join(scopes))


def _content(source: Any) -> tuple[dict[str, Any], Lines, str]:
    """Return a grid's content as plain values, their lines, and what the grid is called in messages."""
    if isinstance(source, Mapping):
        return plain(source), Lines(), "the grid"
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"Expected a grid as the path of a YAML file or as a mapping, got {shortened(source)}."
        )
    path = Path(source)
    try:
        text = (path if path.is_file() else shipped_grid(path) or path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a grid is a YAML file.") from None
    except FileNotFoundError:
        raise MissingFile(f"There is no grid file {path}, nor does fastcoop contain one.") from None
    except OSError as error:
        raise UserError(f"The grid file {path} cannot be read: {error.strerror}.") from None
    given, lines = read_yaml(text, str(source))
    if not isinstance(given, dict):
        raise UserError(f"{source} should hold keys such as backbones, datasets and methods.")
    return plain(given), lines, str(source)


def shipped_grid(name: str | Path) -> Path | None:
    """Return the file of a grid that comes with fastcoop; None where there is none.

    It is named "fig3", "fig3.yaml" or "experiments/fig3.yaml", and lies in the package or in a checkout.
    """
    asked, package = Path(name), Path(fastcoop.__path__[0])
    if asked.parent.name not in ("", "experiments") or asked.suffix not in ("", ".yaml"):
        return None
    places = (folder / "experiments" / f"{asked.stem}.yaml" for folder in (package, package.parent))
    return next((place for place in places if place.is_file()), None)


def _blocks(scopes: Sequence[Scope], name: str) -> list[GridBlock]:
    """Return the blocks of a grid. Raises SettingError, with the place in it, for what is wrong."""
    blocks = []
    for scope in scopes:
        with located(scope.place):
            blocks.append(_block(scope, f'block "{scope.name}" of {name}' if scope.name else name))
    datasets = {one for block in blocks for one in block.datasets}
    for scope, block in zip(scopes, blocks, strict=True):
        known = block.datasets if "targets" in scope.own else datasets
        for dataset in scope.content.get("targets") or {}:
            if str(dataset) not in known:
                message = f'The grid gives targets for "{dataset}", which is not one of its datasets.'
                raise SettingError(message, scope.place("targets", dataset))
        if targets := scope.content.get("targets"):  # without those of other blocks, which may be left out
            scope.content["targets"] = {
                name: targets[name] for name in targets if str(name) in block.datasets
            }
    return blocks


def _block(scope: Scope, what: str) -> GridBlock:
    content = {key: value for key, value in scope.content.items() if key != "methods"}
    block, methods = validate(GridBlock, content, what), _methods(scope.content.get("methods"), what)
    targets = {name: names for name, names in block.targets.items() if name in block.datasets}
    if own := [name for name, names in targets.items() if name in names]:
        raise UserError(
            f'The dataset "{own[0]}" is tested on itself in any case; leave it out of its own targets.'
        )
    return block.model_copy(update={"name": scope.name, "methods": methods, "targets": targets})


def _methods(given: Any, what: str) -> Methods:
    if not given:
        raise UserError(f'The setting "methods" of {what} is missing; it must be given.')
    found: list[tuple[str, tuple[MethodSettings, ...]]] = []
    for place, name, settings in methods_of(given):
        with located(lambda *inside, place=place: ("methods", *place, *inside)):
            method = get_method(name)
            if not isinstance(settings, dict):
                raise UserError(f"Expected keys and values as settings of {name}, got {shortened(settings)}.")
            one = name, tuple(expand(method, settings))
        if one in found:
            raise UserError(f"The method {name} is listed twice with the same settings; leave one.")
        found.append(one)
    return tuple(sorted(found, key=lambda pair: list(METHODS).index(pair[0])))


def _users(blocks: Sequence[GridBlock], keys: Sequence[str]) -> list[GridBlock]:
    """Return the blocks with runs that use a key, such as ``["shots"]`` or ``["methods", "coop", "epochs"]``."""
    if keys[0] == "methods" and len(keys) > 2:
        return [block for block in blocks if keys[1] in dict(block.methods)]
    if keys[0] == "views":
        return [block for block in blocks if block.augments]
    return [block for block in blocks if block.learns or keys[0] not in ("shots", "seeds")]


def _warn_of_draws(scopes: Sequence[Scope], lines: Lines) -> None:
    """Log the numbers of draws that may be meant as one seed."""
    draws = {scope.place("seeds"): number_of_draws(scope.content.get("seeds")) for scope in scopes}
    for place, number in draws.items():
        if number and number > 1:
            log.warning(
                f"{lines.where(place)}These are {number} draws, of the seeds 1 to {number}; write seeds: [{number}] "
                "for this seed alone."
            )


def _warn_of_unused_keys(
    given: dict[str, Any], scopes: Sequence[Scope], blocks: Sequence[GridBlock], lines: Lines
) -> None:
    """Log the keys of a file that no run uses, and the shots of epochs that no run has."""
    pairs = list(zip(scopes, blocks, strict=True))
    users = {(key,): [block for scope, block in pairs if key not in scope.own] for key in given}
    users |= {scope.place(key): [block] for scope, block in pairs for key in scope.own}
    for place, of_key in users.items():
        if place[-1] not in ("recipe", "blocks") and not _users(of_key, [place[-1]]):
            log.warning("%sNo run uses %s from here, so it changes nothing.", lines.where(place), place[-1])
    shots = {number for block in blocks for number in block.shots}
    settings = [one for block in blocks for _, every in block.methods for one in every]
    schedules = [epochs for one in settings if isinstance(epochs := getattr(one, "epochs", None), dict)]
    if unused := dict.fromkeys(str(number) for one in schedules for number in one if number not in shots):
        log.warning("No run has %s shots, for which epochs are given.", " or ".join(unused))
