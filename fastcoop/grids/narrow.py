"""Narrowing a grid from the command line: ``--set key=value`` and ``--only NAME``, on the file's content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from fastcoop.errors import UserError, nearest
from fastcoop.grids.lines import Lines, override_value
from fastcoop.grids.rules import listed
from fastcoop.methods import METHODS

SINGULAR = {
    "backbones": "backbone",
    "datasets": "dataset",
    "shots": "shots",
    "seeds": "seed",
}  # as include has them


def override(given: dict[str, Any], option: str, lines: Lines) -> None:
    """Put a ``key=value`` in place of what the grid and its blocks say.

    Runs under ``include`` that it does not allow are left out. ``blocks.NAME.key=value`` changes one block.

    Raises:
        UserError: it is no ``key=value``, or reaches into something that has no keys.
    """
    path, equals, text = option.partition("=")
    if not equals or not path:
        raise UserError(f'"{option}" should be KEY=VALUE, such as shots=1,2 or methods.coop.epochs=20.')
    keys = path.split(".")
    try:
        value = override_value(keys, text)
    except yaml.YAMLError:
        raise UserError(f'The value in "{option}" is not YAML; quote it.') from None
    if keys[0] == "blocks" and len(keys) > 2:
        scopes = [_block(given, keys[1])]
        keys = keys[2:]
    else:
        scopes = list(_scopes(given))
    if keys[0] == "methods" and len(keys) > 2:
        _set_method(given, scopes, keys[1:], value, option, lines)
        return
    for place, scope in scopes:
        if place == () or keys[0] in scope:
            _set(scope, keys, value, option)
            lines.replace((*place, *keys), f"--set {option}")
        if keys == ["datasets"] and isinstance(scope.get("targets"), dict):
            kept = {*map(str, listed(value)), "*"}
            scope["targets"] = {name: named for name, named in scope["targets"].items() if name in kept}
        if keys[0] in SINGULAR and len(keys) == 1 and isinstance(scope.get("include"), list):
            scope["include"] = [
                _allowed(entry, SINGULAR[keys[0]], listed(value)) for entry in scope["include"]
            ]


def keep(given: dict[str, Any], only: Sequence[str]) -> dict[str, Any]:
    """The grid with only these methods, or only these blocks; with both, the methods of the blocks.

    Raises:
        UserError: it has none of them.
    """
    blocks = given.get("blocks") or {}
    unknown = [name for name in only if name not in METHODS and name not in blocks]
    if unknown:
        kind = "method or block" if blocks else "method"
        raise UserError(f'There is no {kind} "{unknown[0]}".{nearest(unknown[0], [*METHODS, *blocks])}')
    methods = [name for name in only if name in METHODS] or list(METHODS)
    named = [name for name in only if name in blocks]
    kept = {key: value for key, value in given.items() if key != "blocks"}
    if named:
        kept.pop("include", None)
    _keep_methods(kept, methods)
    if blocks:
        inherited = "methods" in kept
        kept["blocks"] = {}
        for name, block in blocks.items():
            left = dict(block)
            _keep_methods(left, methods)
            has = "methods" in left or "include" in left or ("methods" not in block and inherited)
            if has and (not named or name in named):
                if "methods" not in left and "methods" in block:
                    left["methods"] = None  # or it would take the grid's
                kept["blocks"][name] = left
    if not kept.get("blocks") and "include" not in kept and (blocks or "methods" not in kept):
        found = sorted({name for _, scope in _scopes(given) for name, _ in _pairs(scope.get("methods"))})
        raise UserError(f"The grid has no {' or '.join(only)}; its methods are {', '.join(found)}.")
    return kept


def _scopes(given: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The top of a grid and its blocks, with their places."""
    yield (), given
    blocks = given.get("blocks")
    for name, block in blocks.items() if isinstance(blocks, dict) else ():
        if isinstance(block, dict):
            yield ("blocks", name), block


def _block(given: dict[str, Any], name: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    blocks = given.get("blocks")
    if not isinstance(blocks, dict) or not isinstance(blocks.get(name), dict):
        hint = nearest(name, map(str, blocks)) if isinstance(blocks, dict) else ""
        raise UserError(f'The grid has no block "{name}".{hint}')
    return ("blocks", name), blocks[name]


def _set(place: dict[str, Any], keys: Sequence[str], value: Any, option: str) -> None:
    *parents, last = keys
    for parent in parents:
        place[parent] = place.get(parent) or {}
        if not isinstance(place[parent], dict):
            raise UserError(f'"{option}" reaches into {parent}, which has no keys of its own.')
        place = place[parent]
    place[last] = value


def _set_method(
    given: dict[str, Any],
    scopes: Sequence[tuple[tuple[str, ...], dict[str, Any]]],
    keys: Sequence[str],
    value: Any,
    option: str,
    lines: Lines,
) -> None:
    """Set a setting of a method wherever the method stands; a grid without blocks gains the method."""
    method, found = keys[0], False
    for place, scope in scopes:
        pairs = _pairs(scope.get("methods"))
        for n, (name, settings) in enumerate(pairs):
            if name == method:
                _set(settings, keys[1:], value, option)
                lines.replace((*place, "methods", n, *keys), f"--set {option}")
                found = True
        if any(name == method for name, _ in pairs):
            scope["methods"] = [{name: settings} for name, settings in pairs]
        for n, entry in enumerate(listed(scope.get("include") or [])):
            if isinstance(entry, dict) and entry.get("method") == method:
                entry["settings"] = entry.get("settings") or {}
                _set(entry["settings"], keys[1:], value, option)
                lines.replace((*place, "include", n, "settings", *keys[1:]), f"--set {option}")
                found = True
    if not found:
        if "blocks" in given:
            raise UserError(f'"{option}" sets {method}, which none of the blocks runs.')
        new: dict[str, Any] = {}
        _set(new, keys[1:], value, option)
        given["methods"] = [*({name: own} for name, own in _pairs(given.get("methods"))), {method: new}]
        lines.replace(("methods", len(given["methods"]) - 1), f"--set {option}")


def _pairs(methods: Any) -> list[tuple[str, Any]]:
    """Names, ``{name: settings}`` or a list of either, as (name, settings)."""
    pairs: list[tuple[str, Any]] = []
    for entry in listed(methods) if methods else ():
        if isinstance(entry, dict):
            pairs += [(str(name), {} if settings is None else settings) for name, settings in entry.items()]
        else:
            pairs.append((str(entry), {}))
    return pairs


def _keep_methods(scope: dict[str, Any], methods: Sequence[str]) -> None:
    left = [{name: settings} for name, settings in _pairs(scope.pop("methods", None)) if name in methods]
    if left:
        scope["methods"] = left
    added = [e for e in listed(scope.pop("include", None) or []) if e and e.get("method") in methods]
    if added:
        scope["include"] = added


def _allowed(entry: Any, key: str, values: Sequence[Any]) -> Any:
    """An entry of include with those of its values that an override allows; None if none is left."""
    if not isinstance(entry, dict) or entry.get(key) is None:
        return entry
    left = [value for value in listed(entry[key]) if value in values]
    return {**entry, key: left} if left else None
