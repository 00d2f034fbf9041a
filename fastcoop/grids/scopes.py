"""The blocks of a grid file with what stands above them, changed by ``--set key=value`` and ``--only NAME``."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastcoop.checks import shortened
from fastcoop.datasets.files import abbreviate
from fastcoop.errors import UserError, nearest, unknown
from fastcoop.grids.lines import Lines, OtherBase, read_yaml
from fastcoop.grids.values import as_list, plain
from fastcoop.methods import METHODS
from fastcoop.methods.base import SettingError

BLOCK_KEYS = ("backbones", "datasets", "shots", "seeds", "targets", "methods")
TOP_KEYS = ("views", "recipe", "blocks")

log = logging.getLogger("fastcoop")


@dataclass
class Scope:
    """The content of a block with what stands above it, and the keys of its own; or a grid without blocks (None)."""

    name: str | None
    content: dict[str, Any]
    own: set[str] = field(default_factory=set)

    def place(self, *path: Any) -> tuple[Any, ...]:
        """Return the path in the file of a path in this scope."""
        in_block = self.name is not None and (not path or path[0] in self.own)
        return ("blocks", self.name, *path) if in_block else path


@contextmanager
def located(place: Callable[..., tuple[Any, ...]]) -> Iterator[None]:
    """Make every UserError a SettingError at the ``place`` that contains its own."""
    try:
        yield
    except UserError as error:
        inside = error.place if isinstance(error, SettingError) else ()
        raise SettingError(str(error), place(*inside)) from None


def split(given: dict[str, Any], name: str) -> list[Scope]:
    """Return the blocks of a file's content. Raises SettingError for an unknown key, or a block that cannot be one."""
    _refuse_unknown(given, (*BLOCK_KEYS, *TOP_KEYS), name)
    shared, blocks = {key: value for key, value in given.items() if key != "blocks"}, given.get("blocks")
    if blocks is None:
        return [Scope(None, shared)]
    if not isinstance(blocks, dict) or not blocks:
        raise SettingError(f'"blocks" of {name} should be names with keys of their own.', ("blocks",))
    for block, own in blocks.items():
        with located(lambda *inside, block=block: ("blocks", block, *inside)):
            _check_block(block, own)
    return [Scope(block, plain(shared | own), set(own)) for block, own in blocks.items()]


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


def join(scopes: Sequence[Scope]) -> dict[str, Any]:
    """Return the content of a file with these blocks: what all of them have stands above them."""
    if scopes[0].name is None:
        return scopes[0].content
    first, *others = (scope.content for scope in scopes)
    shared = {key: value for key, value in first.items() if all(one.get(key) == value for one in others)}
    blocks = {one.name: {key: one.content[key] for key in one.content if key not in shared} for one in scopes}
    return shared | {"blocks": blocks}


def methods_of(given: Any) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """Yield (place, name, settings) of a name, a mapping of names to settings, or a list of either."""
    for index, entry in enumerate(as_list(given) if given else ()):
        place = (index,) if isinstance(given, list) else ()
        for name, settings in entry.items() if isinstance(entry, dict) else [(entry, None)]:
            inside = (name,) if isinstance(entry, dict) else ()
            yield (*place, *inside), str(name), {} if settings is None else settings


def override(scopes: Sequence[Scope], options: Sequence[str], lines: Lines, name: str) -> None:
    """Replace values of the grid ``name``, in the block that an option names, or else in all of them.

    Raises:
        UserError: An option is not ``key=value``, names what is not there, or is given twice.
    """
    if others := [one for one in options if not isinstance(one, str)]:
        raise UserError(f'Expected overrides such as "shots=1,2", got {shortened(others[0])}.')
    times = Counter(one.partition("=")[0] for one in options)
    if twice := [key for key in times if times[key] > 1]:
        raise UserError(f"--set gives {twice[0]} twice; leave one of them.")
    # Datasets last: they drop targets that are not set.
    for option in sorted(options, key=lambda one: "datasets=" in one):
        path, equals, text = option.partition("=")
        place, keys, chosen = tuple(path.split(".")), path.split("."), scopes
        in_block = keys[0] == "blocks"
        if not equals or not path or (in_block and len(keys) < 3):
            raise UserError(
                f'"{option}" should be KEY=VALUE, such as shots=1,2, methods.coop.epochs=20 or blocks.NAME.shots=1,2.'
            )
        if in_block:
            block, keys = keys[1], keys[2:]
            chosen = [scope for scope in scopes if scope.name == block]
            if not chosen:
                names = [scope.name for scope in scopes if scope.name]
                raise UserError(f'The grid has no block "{block}".{nearest(block, names)}')
            if keys[0] != "targets" or len(keys) == 1:  # else those above it stay
                chosen[0].own.add(keys[0])
        value = _value(keys, text, option)
        lines.set(place, option)
        with located(lambda *inside, place=place: place):
            if in_block:
                _check_block(block, {keys[0]: value})
            else:
                _refuse_unknown({keys[0]: value}, (*BLOCK_KEYS, *TOP_KEYS), name)
        _override(chosen, keys, value, option, lines)


def _override(scopes: Sequence[Scope], keys: Sequence[str], value: Any, option: str, lines: Lines) -> None:
    places = [(scope, *place) for scope in scopes for place in _places(scope, keys)]
    if not places:
        names = {name for scope in scopes for _, name, _ in methods_of(scope.content.get("methods"))}
        raise UserError(f'"{option}" sets {keys[1]}, which the grid does not run.{nearest(keys[1], names)}')
    dropped: list[str] = []
    for scope, path, content, inside in places:
        _set(content, inside, value, option)
        lines.set(scope.place(*path, *inside), option)
        if keys == ["datasets"] and isinstance(targets := content.get("targets"), dict):
            kept = set(map(str, as_list(value)))
            dropped += [str(name) for name in targets if str(name) not in kept]
            content["targets"] = {name: named for name, named in targets.items() if str(name) in kept}
    if dropped:
        log.warning("--set datasets leaves out the targets of %s.", abbreviate(list(dict.fromkeys(dropped))))


def _places(scope: Scope, keys: Sequence[str]) -> list[tuple[tuple[Any, ...], dict[str, Any], Sequence[str]]]:
    """Return what keys lead into: the content of a scope, or the settings of a method wherever it is listed.

    Each with its path, and the keys inside.
    """
    if keys[0] != "methods" or len(keys) < 3:
        return [((), scope.content, keys)]
    methods = [(name, settings) for _, name, settings in methods_of(scope.content.get("methods"))]
    named = [(index, settings) for index, (name, settings) in enumerate(methods) if name == keys[1]]
    if named:
        scope.content["methods"] = [{name: settings} for name, settings in methods]
    return [(("methods", index, keys[1]), settings, keys[2:]) for index, settings in named]


def _value(keys: Sequence[str], text: str, option: str) -> Any:
    """Return the value of ``--set a.b=text``; commas make a list. Names are text, as in a file."""
    text = f"[{text}]" if "," in text and text[:1] not in "[{\"'" else text
    nested = [" " * n + json.dumps(key) + ":" for n, key in enumerate(keys)]
    nested += [" " * len(keys) + line for line in text.splitlines()]
    try:
        value, _ = read_yaml("\n".join(nested), option)
        for key in keys:
            value = value[key]
    except OtherBase as error:
        raise OtherBase(f"--set {option}: ", error.written, error.number) from None
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


def keep_only(scopes: Sequence[Scope], only: Sequence[str]) -> list[Scope]:
    """Return these methods only, or these blocks only; with both, these methods of these blocks.

    Raises:
        UserError: The grid has none of them.
    """
    names = [scope.name for scope in scopes if scope.name]
    if others := [name for name in only if name not in METHODS and name not in names]:
        raise unknown("method or block" if names else "method", others[0], [*METHODS, *names])
    methods, blocks = ([name for name in only if name in known] for known in (METHODS, names))
    left, found = [], set[str]()
    for scope in scopes:
        every = [(name, settings) for _, name, settings in methods_of(scope.content.get("methods"))]
        found.update(name for name, _ in every)
        kept = [{name: settings} for name, settings in every if name in (methods or METHODS)]
        if kept and (not blocks or scope.name in blocks):
            left.append(Scope(scope.name, scope.content | {"methods": kept}, scope.own))
    if not left:
        raise UserError(f"The grid has no {' or '.join(only)}; its methods are {', '.join(sorted(found))}.")
    return left
