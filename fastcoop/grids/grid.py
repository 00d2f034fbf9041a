"""Grid files: what stands in one, changed by ``--set key=value`` and ``--only NAME``, as a grid."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from fastcoop.checks import several
from fastcoop.errors import MissingFile, UserError, abbreviate, nearest, unknown
from fastcoop.files import reading, shipped_grid, shipped_grids
from fastcoop.grids.block import Grid, GridBlock, number_of_draws
from fastcoop.methods import METHODS
from fastcoop.methods.base import SettingError, validate
from fastcoop.yaml_text import PlacedDict, bare, plain, read_yaml

BLOCK_KEYS: tuple[str, ...] = ("backbones", "datasets", "shots", "seeds", "targets", "methods")
TOP_KEYS = ("views", "recipe", "blocks")

log = logging.getLogger("fastcoop")


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
    given, name = _content(source)
    _check(given, name)
    _override(given, overrides, name)
    blocks = _blocks(given, name)
    other_targets = _drop_targets(given, blocks)
    if other_targets and any(str(one).partition("=")[0].endswith("datasets") for one in overrides):
        log.warning("--set datasets leaves out the targets of %s.", abbreviate(list(other_targets)))
    elif other_targets:
        dataset, place = next(iter(other_targets.items()))
        raise UserError(f'{place}The grid gives targets for "{dataset}", which is not one of its datasets.')
    if only:
        _keep_only(given, blocks, only)
        blocks = _blocks(given, name)
        _drop_targets(given, blocks)
    for sentence in _notes(given, blocks, unused=not (overrides or only)):
        log.warning(sentence)
    for one in overrides:
        if not any(block.uses(*one.partition("=")[0].split(".")) for block in blocks):
            log.warning("--set %s changes nothing: no run uses it.", one)
    return Grid(tuple(blocks), blocks[0].views, blocks[0].recipe, bare(given))


def _content(source: Any) -> tuple[PlacedDict, str]:
    """Return the content of a grid, and what it is called in messages."""
    if isinstance(source, Mapping):
        return plain(source), "the grid"
    path = Path(source)
    path = path if path.is_file() else shipped_grid(path) or path
    if not path.exists():
        hint = nearest(path.stem, shipped_grids())
        raise MissingFile(f"There is no grid file {source}, on disk or among fastcoop's.{hint}")
    with reading(path, "a grid"):
        given = read_yaml(path.read_text(encoding="utf-8"), str(source), is_name)
    if not isinstance(given, PlacedDict):
        raise UserError(f"{source} should hold keys such as backbones, datasets and methods.")
    return given, str(source)


def is_name(path: tuple[str, ...], written: str) -> bool:
    """Return whether the values, or the keys, at a path of a grid are names, which are text: "no" is not False."""
    parent, key = ("", "", *path)[-2:]
    is_list = key in ("backbones", "datasets", "init")
    return bool(written) and (is_list or parent == "targets" or (parent == "blocks" and not key))


def _own_keys(given: PlacedDict) -> dict[str | None, PlacedDict]:
    """Return what stands in each block of a grid, by name; for a grid without blocks, nothing, by None.

    A key that does not stand in a block is read from above the blocks.
    """
    return given["blocks"] if "blocks" in given else {None: PlacedDict()}


def _check(given: PlacedDict, name: str) -> None:
    """Refuse unknown keys, and blocks that cannot be blocks. Makes lists of all methods, as `_list_methods` does."""
    _check_keys(given, (*BLOCK_KEYS, *TOP_KEYS), name)
    _list_methods(given)
    blocks = given.get("blocks", PlacedDict())
    if not isinstance(blocks, PlacedDict) or (not blocks and "blocks" in given):
        raise UserError(f'{given.place("blocks")}"blocks" of {name} should be names with keys of their own.')
    for block, own in blocks.items():
        place = blocks.place(block)
        if block in METHODS:
            raise UserError(f'{place}A block cannot be called "{block}", which is a method; rename it.')
        if not isinstance(own, PlacedDict):
            raise UserError(f'{place}The block "{block}" should have keys of its own, such as methods.')
        _check_keys(own, BLOCK_KEYS, f'block "{block}"')
        _list_methods(own)


def _check_keys(content: PlacedDict, known: Sequence[str], what: str) -> None:
    for key in [one for one in content if one not in known]:
        problem = f'Unknown setting "{key}" of {what}.{nearest(str(key), known)}'
        if key in TOP_KEYS:
            problem = f'"{key}" holds for the whole grid; put it at its top.'
        raise UserError(f"{content.place(key)}{problem}")


def _list_methods(content: PlacedDict) -> None:
    """Make the methods a list of mappings, each of one name to its settings. They may be names, and one mapping."""
    found = []
    for index, entry in enumerate(several(content.get("methods") or [])):
        if not isinstance(entry, PlacedDict):
            entry = PlacedDict({str(entry): None}, {str(entry): content.place("methods", index)})
        for name, settings in entry.items():
            places = {name: entry.place(name)}
            found.append(PlacedDict({name: PlacedDict() if settings is None else settings}, places))
    if found:
        content["methods"] = found


def _override(given: PlacedDict, options: Sequence[str], name: str) -> None:
    """Replace values of the grid ``name``, in the block that an option names, or else wherever they stand.

    Raises:
        UserError: An option is not ``key=value``, names what is not there, or is given twice.
    """
    times = Counter(str(one).partition("=")[0] for one in options)
    if twice := [key for key in times if times[key] > 1]:
        raise UserError(f"--set gives {twice[0]} twice; leave one of them.")
    for option in options:
        path, equals, text = str(option).partition("=")
        keys, blocks = path.split("."), _own_keys(given)
        if not (equals and path) or (keys[0] == "blocks" and len(keys) < 3):
            raise UserError(
                f'"{option}" should be KEY=VALUE, such as shots=1,2, methods.coop.epochs=20 or blocks.NAME.shots=1,2.'
            )
        if keys[0] == "blocks":
            _, block, *keys = keys
            if block not in blocks:
                raise UserError(f'The grid has no block "{block}".{nearest(block, filter(None, blocks))}')
            blocks[block].setdefault(keys[0], deepcopy(given.get(keys[0])))
            contents = [blocks[block]]
        else:
            owners = [own for own in blocks.values() if keys[0] in own]
            contents = owners if len(owners) == len(blocks) else [given, *owners]
        _set(contents, keys, text, option)
        _check(given, name)


def _set(contents: Sequence[PlacedDict], keys: Sequence[str], text: str, option: str) -> None:
    """Set the value that keys lead to in each content; of a method, wherever it is listed."""
    places, inside = contents, keys
    if keys[0] == "methods" and len(keys) > 1:
        entries = [one for content in contents for one in content.get("methods") or ()]
        places, inside = [one for one in entries if keys[1] in one], keys[1:]
        if not places:
            names = {name for one in entries for name in one}
            raise UserError(
                f'"{option}" sets {keys[1]}, which the grid does not run.{nearest(keys[1], names)}'
            )
    (*parents, last), where = inside, f"--set {option}: "
    text = f"[{text}]" if "," in text and text[:1] not in "[{\"'" else text  # commas make a list
    for place in places:
        for parent in parents:
            if place.get(parent) is None:
                place[parent], place.places[parent] = PlacedDict(), where
            if not isinstance(place[parent], PlacedDict):
                raise UserError(f'"{option}" reaches into {parent}, which has no keys of its own.')
            place = place[parent]
        place[last] = read_yaml(text, f"--set {option}", is_name, tuple(keys), place=lambda line: where)
        place.places[last] = where


def _blocks(given: PlacedDict, name: str) -> list[GridBlock]:
    """Return the blocks of a grid, each with what stands above it."""
    blocks = []
    shared = {key: value for key, value in given.items() if key != "blocks"}
    for block, own in _own_keys(given).items():
        content = PlacedDict(shared | own | {"name": block}, given.places | own.places)
        try:
            blocks.append(validate(GridBlock, content, f'block "{block}" of {name}' if block else name))
        except SettingError as error:
            raise UserError(f"{content.place(*error.place)}{error}") from None
    return blocks


def _keep_only(given: PlacedDict, blocks: Sequence[GridBlock], only: Sequence[str]) -> None:
    """Leave these methods only, or these blocks only; with both, these methods of these blocks."""
    names = [block.name for block in blocks if block.name]
    if others := [name for name in only if name not in METHODS and name not in names]:
        raise unknown("method or block" if names else "method", others[0], [*METHODS, *names])
    methods, chosen = ([name for name in only if name in known] for known in (METHODS, names))
    blocks = [block for block in blocks if not chosen or block.name in chosen]
    kept = [block.name for block in blocks if not methods or not set(methods).isdisjoint(dict(block.methods))]
    if not kept:
        where = f"Block {' and '.join(chosen)} of the grid" if chosen else "The grid"
        found = sorted({name for block in blocks for name, _ in block.methods})
        raise UserError(f"{where} has no {' or '.join(methods)}; its methods are {', '.join(found)}.")
    if names:
        given["blocks"] = PlacedDict({name: given["blocks"][name] for name in kept}, given["blocks"].places)
        for key in set(given).intersection(*given["blocks"].values()):  # which only other blocks read
            del given[key]
    for content in (given, *_own_keys(given).values()):
        if methods and "methods" in content:
            content["methods"] = [one for one in content["methods"] if set(one) & set(methods)]


def _levels(
    given: PlacedDict, blocks: Sequence[GridBlock]
) -> Iterator[tuple[PlacedDict, Sequence[GridBlock]]]:
    """Yield what stands above the blocks, with all of them, and what stands in each, with the block."""
    yield given, blocks
    yield from ((_own_keys(given)[block.name], [block]) for block in blocks)


def _drop_targets(given: PlacedDict, blocks: Sequence[GridBlock]) -> dict[str, str]:
    """Take out targets of datasets that no block below has. Return those that no block uses, with their places."""
    used, dropped = set[tuple[str, str]](), dict[str, str]()
    for content, below in _levels(given, blocks):
        datasets = {name for block in below for name in block.datasets}
        for name in [*content.get("targets", ())]:
            entry = name, content.place("targets", name)  # a copy that an option made has the same
            if name in datasets:
                used.add(entry)
            else:
                dropped.update([entry])
                del content["targets"][name]
    return {name: place for name, place in dropped.items() if (name, place) not in used}


def _notes(given: PlacedDict, blocks: Sequence[GridBlock], unused: bool) -> Iterator[str]:
    """Yield what may be meant otherwise: numbers of seeds, and keys of a file that no run uses if ``unused``."""
    for content, below in _levels(given, blocks):
        for key in content:
            if key == "seeds" and (n := number_of_draws(content[key]) or 0) > 1:
                meaning = f"{n} draws, of the seeds 1 to {n}; write seeds: [{n}] for this seed alone"
                yield f"{content.place(key)}seeds: {n} means {meaning}."
            readers = [one for one in below if content is not given or key not in _own_keys(given)[one.name]]
            if unused and key not in ("recipe", "blocks") and not any(one.uses(key) for one in readers):
                yield f"{content.place(key)}No run uses {key} from here, so it changes nothing."
    shots = {number for block in blocks for number in block.shots}
    settings = [one for block in blocks for _, every in block.methods for one in every]
    schedules = [epochs for one in settings if isinstance(epochs := getattr(one, "epochs", None), dict)]
    others = dict.fromkeys(str(number) for one in schedules for number in one if number not in shots)
    if unused and others:
        yield f"No run has {' or '.join(others)} shots, for which epochs are given."
