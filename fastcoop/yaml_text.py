"""YAML that people write: plain values, each with the line that it is on, and one sentence for a mistake."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Set
from contextlib import suppress
from datetime import date
from enum import Enum
from numbers import Number
from pathlib import PurePath
from typing import Any

import yaml

from fastcoop.checks import shortened
from fastcoop.errors import UserError

MAX_VALUES = 100_000  # of a text with its aliases written out; of a longer text, its length
SCALARS = (str, int, float, bool, type(None))
KINDS: Any = ((str, str), (int, int), (Number, float), ((PurePath, date), str))  # and what they become
OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|.*:.*)")  # numbers that YAML 1.1 reads in base 8 or 60
TAGS = "tag:yaml.org,2002:"

Keys = tuple[str, ...]  # keys that lead to a value; with "" at its end, to the keys of a mapping


class _Placed:
    def __init__(self, content: Any = (), places: Mapping[Any, str] | None = None):
        super().__init__(content)  # type: ignore[call-arg]
        self.places = dict(places or {})

    def place(self, *path: Any) -> str:
        """Return the place of the value that keys and indices lead to, or of what is known on the way; "" for none."""
        content: Any = self
        place = ""
        for step in path:
            place = getattr(content, "places", {}).get(step, place)
            with suppress(LookupError, TypeError):
                content = content[step]
        return place


class PlacedDict(_Placed, dict[Any, Any]):
    """A mapping with the ``places`` where its values were given, by key, such as "Line 3: "."""


class PlacedList(_Placed, list[Any]):
    """A list with the places of its values, by index."""


def bare(content: Any) -> Any:
    """Return a copy as built-in dictionaries and lists."""
    if isinstance(content, dict):
        return {key: bare(value) for key, value in content.items()}
    return [bare(value) for value in content] if isinstance(content, list) else content


def plain(value: Any) -> Any:
    """Return a copy of values from Python as plain lists, dictionaries, numbers and text.

    NumPy's, pandas' and torch's numbers and arrays become numbers and lists, other collections lists (sets in order),
    paths and dates text, enumerations their values, exact fractions floats.

    Raises:
        UserError: Anything else, such as bytes and generators.
    """
    if type(value) in SCALARS:
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        if odd := [key for key in value if type(plain(key)) not in SCALARS]:
            raise UserError(
                f"Expected text or a number as a key of a mapping in a grid, got {shortened(odd[0])}; change the key."
            )
        return PlacedDict({plain(key): plain(one) for key, one in value.items()})
    if callable(getattr(value, "tolist", None)) and not isinstance(value, memoryview):
        return plain(value.tolist())
    if made := next((made for kind, made in KINDS if isinstance(value, kind)), None):
        return made(value)
    if isinstance(value, Set):
        return PlacedList(sorted(map(plain, value), key=lambda one: (str(type(one)), one)))
    if isinstance(value, Collection) and not isinstance(value, bytes | bytearray | memoryview):
        return PlacedList(map(plain, value))
    raise UserError(
        "Expected text, numbers, yes or no, and lists and mappings of these in a grid, got "
        f"{shortened(value)} of type {type(value).__name__}; convert it to a list or to text."
    )


def read_yaml(
    text: str,
    name: str,
    is_text: Callable[[Keys, str], bool],
    path: Keys = (),
    place: Callable[[int], str] = "Line {}: ".format,
) -> Any:
    """Return the values of a YAML text, built by safe means only; dates are text.

    Args:
        text: The text.
        name: What it is called in messages.
        is_text: Whether what is written at a path without quotes is text, whatever YAML takes it for.
        path: Where the text itself is.
        place: Returns the place of a value by its line.

    Raises:
        UserError: It is not YAML or nested too deeply, gives a key of a mapping twice, has a number like 010 or 1:30,
            or its aliases stand for too many values.
    """
    try:
        loader = _Loader(text)
        loader.name, loader.is_text, loader.place = name, is_text, place
        loader.most = max(MAX_VALUES, len(text))  # without aliases, a value has a character or more
        node = loader.get_single_node()
        return loader.build(node, path) if node else None
    except UserError:
        raise
    except RecursionError:
        raise UserError(
            f"{name} is nested too deeply, or an alias is in what it stands for; write its values out."
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = f": {problem or getattr(error, 'reason', '')}".rstrip(": ")
        raise UserError(
            f"{name}{line} is not valid YAML{problem}; check its indentation and quotes."
        ) from None


class _Loader(yaml.SafeLoader):
    """Builds a value for each place that an alias stands at, so that one can be changed without the others."""

    name: str
    is_text: Callable[[Keys, str], bool]
    place: Callable[[int], str]
    most: int  # values
    values = 0
    yaml_implicit_resolvers = {  # noqa: RUF012 (as the base class has it)
        first: [one for one in resolvers if one[0] != f"{TAGS}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}  # of the keys as written: where keys are text, 1 and "1" are one
        for key, _ in node.value:
            if before := first.get(one := str(key.value)):
                problem = f'"{key.value}" was given before, in line {before}; leave one.'
                raise UserError(f"{self._place(key)}{problem}")
            first[one] = key.start_mark.line + 1
        return node

    def build(self, node: yaml.Node, path: Keys) -> Any:
        """Return the value of a node."""
        self.values += 1
        if self.values > self.most:
            raise UserError(
                f"The aliases of {self.name} stand for more than {self.most} values; write fewer."
            )
        if isinstance(node, yaml.ScalarNode):
            if not node.style and self.is_text(path, node.value):
                return node.value
            value = self.construct_object(node)
            if isinstance(value, int | float) and OTHER_BASE.fullmatch(node.value):
                place, written = self._place(node), node.value
                raise UserError(
                    f"{place}YAML reads {written} as {value}; write {value}, or the number that is meant."
                )
            return value
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{TAGS}seq":
            places = {n: self._place(item) for n, item in enumerate(node.value)}
            return PlacedList([self.build(item, path) for item in node.value], places)
        if not isinstance(node, yaml.MappingNode) or node.tag != f"{TAGS}map":
            raise yaml.YAMLError
        self.flatten_mapping(node)  # of merge keys
        found = PlacedDict()
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.YAMLError
            key = self.build(name, (*path, ""))
            found.places[key] = self._place(name)
            found[key] = self.build(value, (*path, str(name.value)))
        return found

    def _place(self, node: yaml.Node) -> str:
        return self.place(node.start_mark.line + 1)
