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
from fastcoop.errors import MissingFile, UserError, nearest
from fastcoop.grids.lines import Lines, located, read_yaml
from fastcoop.grids.options import keep_only, methods_of, override, scopes_of
from fastcoop.grids.values import Name, Names, Seeds, Shots, Views, as_list, plain
from fastcoop.methods import METHODS, MethodSettings, RunSpec, expand, get_method
from fastcoop.methods.base import SettingError, validate

BLOCK_KEYS = ("backbones", "datasets", "shots", "seeds", "targets", "methods")
TOP_KEYS = ("views", "recipe", "blocks")

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
        source: The content of the file, changed by command-line options.
    """

    blocks: tuple[GridBlock, ...]
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def views(self) -> int:
        """Augmented views per training image."""
        return self.blocks[0].views

    @property
    def recipe(self) -> str:
        """Recipe of the image transforms, "current" or "official-2021"."""
        return self.blocks[0].recipe

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
    for one in overrides:
        if not isinstance(one, str):
            raise UserError(f'Expected overrides such as "shots=1,2", got {shortened(one)}.')
    keys = [one.partition("=")[0] for one in overrides]
    if twice := [key for n, key in enumerate(keys) if key in keys[:n]]:
        raise UserError(f"--set gives {twice[0]} twice; leave one of them.")
    try:
        # Datasets last: they drop targets that are not set.
        for one in sorted(overrides, key=lambda one: "datasets=" in one):
            override(given, one, lines)
        grid = _checked(given, name)
        if only:
            grid = _checked(keep_only(given, only), name)
    except SettingError as error:
        raise UserError(f"{lines.where(error.place)}{error}") from None
    if not (overrides or only):
        _warn_of_unused_keys(grid, lines)
    for path, content in scopes_of(given):
        seed = str(content.get("seeds", "")).strip()
        if seed.isdecimal() and int(seed) > 3:
            where = lines.where((*path, "seeds"))
            log.warning(
                f"{where}This is the one seed {seed}; write seeds: 1-{seed} for that many draws, or seeds: [{seed}] "
                "for this one."
            )
    for one, key in zip(overrides, keys, strict=True):
        if not _users(grid.blocks, key.split(".")):
            log.warning("--set %s changes nothing: no run uses it.", one)
    return grid


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


def _checked(given: dict[str, Any], name: str) -> Grid:
    """Return the grid of a file's content. Raises SettingError, with the place in it, for what is wrong."""
    _refuse_unknown(given, (*BLOCK_KEYS, *TOP_KEYS), name)
    blocks = given.get("blocks")
    if blocks is None:
        made = [_block(None, given, name)]
    elif not isinstance(blocks, dict) or not blocks:
        raise SettingError(f'"blocks" of {name} should be names with keys of their own.', ("blocks",))
    else:
        shared = {key: value for key, value in given.items() if key != "blocks"}
        made = []
        for block, content in blocks.items():
            with located("blocks", block):
                _check_block(block, content)
                made.append(_block(block, shared | content, f'block "{block}" of {name}'))
    for path, content in scopes_of(given):
        datasets = {one for block in made if not path or block.name == path[1] for one in block.datasets}
        for dataset in content.get("targets") or {}:
            if str(dataset) not in datasets:
                message = f'The grid gives targets for "{dataset}", which is not one of its datasets.'
                raise SettingError(message, (*path, "targets", dataset))
    return Grid(tuple(made), given)


def _check_block(name: Any, content: Any) -> None:
    if not isinstance(name, str):
        raise UserError(f"Expected the name of a block to be text, got {name!r}.")
    if name in METHODS:
        raise UserError(f'A block cannot be called "{name}", which is a method; rename it.')
    if not isinstance(content, dict):
        raise UserError(f'The block "{name}" should have keys of its own, such as methods.')
    for key in TOP_KEYS:
        if key in content:
            raise SettingError(f'"{key}" holds for the whole grid; put it at its top.', (key,))
    _refuse_unknown(content, BLOCK_KEYS, f'block "{name}"')


def _refuse_unknown(content: dict[str, Any], known: Sequence[str], what: str) -> None:
    for key in content:
        if key not in known:
            raise SettingError(f'Unknown setting "{key}" of {what}.{nearest(str(key), known)}', (key,))


def _block(name: str | None, content: dict[str, Any], what: str) -> GridBlock:
    """Return a block of its content and what it shares with the others."""
    block = validate(GridBlock, {key: value for key, value in content.items() if key != "methods"}, what)
    methods = _methods(content.get("methods"), what)
    targets = {name: names for name, names in block.targets.items() if name in block.datasets}
    if own := [name for name, names in targets.items() if name in names]:
        raise UserError(
            f'The dataset "{own[0]}" is tested on itself in any case; leave it out of its own targets.'
        )
    return block.model_copy(update={"name": name, "methods": methods, "targets": targets})


def _methods(given: Any, what: str) -> Methods:
    if not given:
        raise UserError(f'The setting "methods" of {what} is missing; it must be given.')
    found: list[tuple[str, tuple[MethodSettings, ...]]] = []
    for index, entry in enumerate(as_list(given)):
        for name, settings in methods_of(entry):
            inside = (
                *([index] if isinstance(given, list) else []),
                *([name] if isinstance(entry, dict) else []),
            )
            with located("methods", *inside):
                method = get_method(name)
                if not isinstance(settings, dict):
                    raise UserError(
                        f"Expected keys and values as settings of {name}, got {shortened(settings)}."
                    )
                found.append((name, tuple(expand(method, settings))))
            if found[-1] in found[:-1]:
                raise UserError(f"The method {name} is listed twice with the same settings; leave one.")
    order = list(METHODS)
    return tuple(sorted(found, key=lambda pair: order.index(pair[0])))


def _users(blocks: Sequence[GridBlock], keys: Sequence[str]) -> list[GridBlock]:
    """Return the blocks with runs that use a key, such as ``["shots"]`` or ``["methods", "coop", "epochs"]``."""
    if keys[0] == "methods" and len(keys) > 2:
        return [block for block in blocks if keys[1] in dict(block.methods)]
    if keys[0] == "views":
        return [block for block in blocks if block.augments]
    return [block for block in blocks if block.learns or keys[0] not in ("shots", "seeds")]


def _warn_of_unused_keys(grid: Grid, lines: Lines) -> None:
    """Log the keys of a file that no run uses, and the epochs of shots that no run has."""
    scopes = dict(scopes_of(dict(grid.source)))
    for path, content in scopes.items():
        for key in content:
            # A key at the top holds in the blocks that have none of their own.
            own = [one for one in grid.blocks if one.name and key in scopes["blocks", one.name]]
            blocks = [one for one in grid.blocks if (one.name == path[1] if path else one not in own)]
            if key not in ("recipe", "blocks") and not _users(blocks, [key]):
                where = lines.where((*path, key))
                log.warning("%sNo run uses %s from here, so it changes nothing.", where, key)
    schedules: dict[str, tuple[dict[Any, Any], set[Any]]] = {}
    for block in grid.blocks:
        for settings in (one for _, every in block.methods for one in every):
            epochs = getattr(settings, "epochs", None)
            if isinstance(epochs, dict):
                schedules.setdefault(str(epochs), (epochs, set()))[1].update(block.shots)
    for epochs, shots in schedules.values():
        if unused := [str(number) for number in epochs if number not in shots]:
            log.warning("No run has %s shots, for which epochs are given.", " or ".join(unused))
