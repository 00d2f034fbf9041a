"""The options ``--set key=value`` and ``--only NAME``, applied to a grid file's content."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from fastcoop.datasets.files import abbreviate
from fastcoop.errors import UserError, nearest, unknown
from fastcoop.grids.lines import Lines, read_yaml
from fastcoop.grids.values import as_list
from fastcoop.methods import METHODS

log = logging.getLogger("fastcoop")


def scopes_of(given: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield the top of a grid and its blocks, each with its path: () for the top."""
    yield (), given
    blocks = given.get("blocks")
    for name, block in blocks.items() if isinstance(blocks, dict) else ():
        if isinstance(block, dict):
            yield ("blocks", name), block


def methods_of(methods: Any) -> list[tuple[str, Any]]:
    """Return (name, settings) of a name, a mapping of names to settings, or a list of either."""
    entries = [one if isinstance(one, dict) else {one: None} for one in as_list(methods)] if methods else []
    pairs = [pair for entry in entries for pair in entry.items()]
    return [(str(name), {} if settings is None else settings) for name, settings in pairs]


def override(given: dict[str, Any], option: str, lines: Lines) -> None:
    """Replace a value of the grid at its top and in every block that gives it.

    Raises:
        UserError: The option is not ``key=value``, or reaches into something that has no keys.
    """
    path, equals, text = option.partition("=")
    if not equals or not path:
        raise UserError(f'"{option}" should be KEY=VALUE, such as shots=1,2 or methods.coop.epochs=20.')
    keys = path.split(".")
    if keys[0] == "blocks" and len(keys) > 2 and keys[1] not in (blocks := given.get("blocks") or {}):
        raise UserError(f'The grid has no block "{keys[1]}".{nearest(keys[1], blocks)}')
    value, found = _value(keys, text, option), False
    names: set[str] = set()  # methods of the grid
    of_method = keys[0] == "methods" and len(keys) > 2
    for place, scope in scopes_of(given):
        if of_method:
            pairs = methods_of(scope.get("methods"))
            names.update(name for name, _ in pairs)
            if keys[1] in (name for name, _ in pairs):
                scope["methods"] = [{name: settings} for name, settings in pairs]
            for index, (name, settings) in enumerate(pairs):
                if name == keys[1]:
                    _set(settings, keys[2:], value, option)
                    lines.set((*place, "methods", index, *keys[1:]), f"--set {option}")
                    found = True
        elif place == () or keys[0] in scope:
            _set(scope, keys, value, option)
            lines.set((*place, *keys), f"--set {option}")
        if keys == ["datasets"] and isinstance(scope.get("targets"), dict):
            kept, targets = set(map(str, as_list(value))), scope["targets"]
            scope["targets"] = {name: named for name, named in targets.items() if str(name) in kept}
            if dropped := [str(name) for name in targets if str(name) not in kept]:
                log.warning("--set datasets leaves out the targets of %s.", abbreviate(dropped))
    if of_method and not found:
        raise UserError(f'"{option}" sets {keys[1]}, which the grid does not run.{nearest(keys[1], names)}')


def _value(keys: Sequence[str], text: str, option: str) -> Any:
    """Return the value of ``--set a.b=text``; commas make a list. Names are text, as in a file."""
    text = f"[{text}]" if "," in text and text[:1] not in "[{\"'" else text
    nested = [" " * n + json.dumps(key) + ":" for n, key in enumerate(keys)]
    nested += [" " * len(keys) + line for line in text.splitlines()]
    try:
        value, _ = read_yaml("\n".join(nested), option)
        for key in keys:
            value = value[key]
    except (UserError, KeyError):
        raise UserError(f'The value in "{option}" is not YAML; quote it.') from None
    return value


def _set(place: dict[str, Any], keys: Sequence[str], value: Any, option: str) -> None:
    *parents, last = keys
    for parent in parents:
        place[parent] = place.get(parent) or {}
        if not isinstance(place[parent], dict):
            raise UserError(f'"{option}" reaches into {parent}, which has no keys of its own.')
        place = place[parent]
    place[last] = value


def keep_only(given: dict[str, Any], only: Sequence[str]) -> dict[str, Any]:
    """Return the grid with these methods only, or these blocks only; with both, these methods of these blocks.

    Raises:
        UserError: The grid has none of them.
    """
    blocks = given.get("blocks") or {}
    if others := [name for name in only if name not in METHODS and name not in blocks]:
        kind = "method or block" if blocks else "method"
        raise unknown(kind, others[0], [*METHODS, *blocks])
    methods = [name for name in only if name in METHODS] or list(METHODS)

    def kept(scope: dict[str, Any]) -> dict[str, Any]:
        every = methods_of(scope.get("methods", given.get("methods")))
        return scope | {"methods": [{name: own} for name, own in every if name in methods]}

    if blocks:
        named = [name for name in only if name in blocks] or list(blocks)
        left = {name: block for name in named if (block := kept(blocks[name]))["methods"]}
        rest = {key: value for key, value in given.items() if key != "methods"} | {"blocks": left}
    else:
        rest = kept(given)
    if not rest["blocks" if blocks else "methods"]:
        found = {name for _, scope in scopes_of(given) for name, _ in methods_of(scope.get("methods"))}
        raise UserError(f"The grid has no {' or '.join(only)}; its methods are {', '.join(sorted(found))}.")
    return rest
