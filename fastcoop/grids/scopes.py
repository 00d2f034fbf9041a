"""The blocks of a grid file with what stands above them, changed by ``--set key=value`` and ``--only NAME``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from fastcoop.errors import UserError, nearest, unknown
from fastcoop.grids.values import as_list, is_name
from fastcoop.methods import METHODS
from fastcoop.yaml_text import PlacedDict, read_yaml

BLOCK_KEYS: tuple[str, ...] = ("backbones", "datasets", "shots", "seeds", "targets", "methods")
TOP_KEYS = ("views", "recipe", "blocks")

# The content of each block, by name, with what stands above it; of a grid without blocks, by None.
Scopes = dict[str | None, PlacedDict]


def split(given: PlacedDict, name: str) -> Scopes:
    """Return the blocks of a file's content. Raises UserError for an unknown key, or a block that cannot be one."""
    _check_keys(given, (*BLOCK_KEYS, *TOP_KEYS), name)
    if "blocks" not in given:
        return {None: _listing_methods(given)}
    shared, blocks = {key: given[key] for key in given if key != "blocks"}, given["blocks"]
    if not isinstance(blocks, PlacedDict) or not blocks:
        raise UserError(f'{given.place("blocks")}"blocks" of {name} should be names with keys of their own.')
    scopes: Scopes = {}
    for block, own in blocks.items():
        place = blocks.place(block)
        if not isinstance(block, str):
            raise UserError(f"{place}Expected the name of a block to be text, got {block!r}.")
        if block in METHODS:
            raise UserError(f'{place}A block cannot be called "{block}", which is a method; rename it.')
        if not isinstance(own, PlacedDict):
            raise UserError(f'{place}The block "{block}" should have keys of its own, such as methods.')
        _check_keys(own, BLOCK_KEYS, f'block "{block}"')
        scopes[block] = _listing_methods(PlacedDict(deepcopy(shared | own), given.places | own.places))
    return scopes


def _check_keys(content: PlacedDict, known: Sequence[str], what: str) -> None:
    for key in content:
        if key not in known:
            problem = f'Unknown setting "{key}" of {what}.{nearest(str(key), known)}'
            if key in TOP_KEYS:
                problem = f'"{key}" holds for the whole grid; put it at its top.'
            raise UserError(f"{content.place(key)}{problem}")


def _listing_methods(content: PlacedDict) -> PlacedDict:
    """Make the methods a list of mappings, each of one name to its settings. They may be names, and one mapping."""
    found = []
    for index, entry in enumerate(as_list(content.get("methods") or [])):
        if not isinstance(entry, PlacedDict):
            entry = PlacedDict({str(entry): None}, {str(entry): content.place("methods", index)})
        for name, settings in entry.items():
            places = {name: entry.place(name)}
            found.append(PlacedDict({name: PlacedDict() if settings is None else settings}, places))
    if found:
        content["methods"] = found
    return content


def join(scopes: Scopes) -> dict[str, Any]:
    """Return the content of a file with these blocks: what all of them have stands above them."""
    if None in scopes:
        return scopes[None]
    first, *others = scopes.values()
    shared = {key: value for key, value in first.items() if all(one.get(key) == value for one in others)}
    own = {name: {key: one[key] for key in one if key not in shared} for name, one in scopes.items()}
    return shared | {"blocks": own}


def override(scopes: Scopes, options: Sequence[str], name: str) -> None:
    """Replace values of the grid ``name``, in the block that an option names, or else in all of them.

    Raises:
        UserError: An option is not ``key=value``, names what is not there, or is given twice.
    """
    times = Counter(str(one).partition("=")[0] for one in options)
    if twice := [key for key in times if times[key] > 1]:
        raise UserError(f"--set gives {twice[0]} twice; leave one of them.")
    for option in options:
        path, equals, text = str(option).partition("=")
        keys, chosen, known, what = path.split("."), scopes, (*BLOCK_KEYS, *TOP_KEYS), name
        if keys[0] == "blocks" and len(keys) > 2:
            _, block, *keys = keys
            if block not in scopes:
                raise UserError(f'The grid has no block "{block}".{nearest(block, filter(None, scopes))}')
            chosen, known, what = {block: scopes[block]}, BLOCK_KEYS, f'block "{block}"'
        if not (equals and path) or keys[0] == "blocks":
            raise UserError(
                f'"{option}" should be KEY=VALUE, such as shots=1,2, methods.coop.epochs=20 or blocks.NAME.shots=1,2.'
            )
        _check_keys(PlacedDict({keys[0]: None}, {keys[0]: f"--set {option}: "}), known, what)
        _override([*chosen.values()], keys, text, option)


def _override(scopes: Sequence[PlacedDict], keys: Sequence[str], text: str, option: str) -> None:
    """Set the value that keys lead to in each scope; of a method, wherever it is listed."""
    places, inside = scopes, keys
    if keys[0] == "methods" and len(keys) > 1:
        entries = [one for scope in scopes for one in scope.get("methods") or ()]
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
        if keys == ["methods"]:
            _listing_methods(place)


def keep_only(scopes: Scopes, only: Sequence[str]) -> Scopes:
    """Return these methods only, or these blocks only; with both, these methods of these blocks.

    Raises:
        UserError: The grid has none of them.
    """
    names = [name for name in scopes if name]
    if others := [name for name in only if name not in METHODS and name not in names]:
        raise unknown("method or block" if names else "method", others[0], [*METHODS, *names])
    methods, blocks = ([name for name in only if name in known] for known in (METHODS, names))
    left, found = Scopes(), set[str]()
    for name, content in scopes.items():
        if name not in (blocks or scopes):
            continue
        found.update(method for one in content["methods"] for method in one)
        kept = [one for one in content["methods"] if set(one) & set(methods or METHODS)]
        if kept:
            left[name] = PlacedDict(content | {"methods": kept}, content.places)
    if not left:
        where = f"Block {' and '.join(blocks)} of the grid" if blocks else "The grid"
        raise UserError(f"{where} has no {' or '.join(methods)}; its methods are {', '.join(sorted(found))}.")
    return left
