"""What a grid is given as, YAML or Python's values: read as plain values that know where each of them was given."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence, Set
from contextlib import suppress
from datetime import date
from enum import Enum
from numbers import Number
from pathlib import PurePath
from typing import Any

import yaml

from fastcoop.checks import shortened
from fastcoop.errors import UserError

MAX_VALUES = 100_000  # of a file, with its aliases written out
NAMES = ("backbones", "datasets", "init")  # keys whose values are names, which are read as they are written,
NAMED_KEYS = ("targets", "blocks")  # and mappings whose keys are names: "no" is not False there
OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|.*:.*)")  # numbers that YAML 1.1 reads in base 8 or 60
TAGS = "tag:yaml.org,2002:"
SCALARS = (str, int, float, bool, type(None))
KINDS: Any = ((str, str), (int, int), (Number, float), ((PurePath, date), str))  # and what they become


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
    """A mapping with the ``places`` where its values were given, by key: such as "Line 3: " and "--set shots=1: "."""


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


def read_yaml(text: str, name: str, keys: Sequence[str] = ()) -> Any:
    """Return the values of a YAML text, built by safe means only.

    Args:
        text: The text.
        name: What it is called in messages: a file, or the ``--set`` option that gives it.
        keys: Keys of the grid that lead to the value of an option.

    Raises:
        UserError: It is not YAML, gives a key of a mapping twice, has a number like 010 or 1:30, or its aliases stand
            for too many values.
    """
    try:
        loader = _Loader(text)
        loader.option = f"--set {name}: " if keys else ""
        node = loader.get_single_node()
        return loader.build(node, keys[-1] if keys else "", "targets" in keys) if node else None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        if keys:
            raise UserError(f'The value in "{name}" is not YAML; quote it.') from None
        raise UserError(f"{name} is not YAML{line}; check its indentation and quotes.") from None


class _Loader(yaml.SafeLoader):
    """Builds a value for each place that an alias stands at, so that one can be changed without the others."""

    option = ""
    values = 0
    yaml_implicit_resolvers = {  # noqa: RUF012 (as the base class has it) dates stay text
        first: [one for one in resolvers if one[0] != f"{TAGS}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if before := first.get(one := (key.tag, str(key.value))):
                raise UserError(f'Line {line}: "{key.value}" was given before, in line {before}; leave one.')
            first[one] = line
        return node

    def build(self, node: yaml.Node, key: str = "", as_text: bool = False) -> Any:
        """Return the value of a node at ``key`` of a mapping; ``as_text``: names are not numbers, dates, yes or no."""
        self.values += 1
        if self.values > MAX_VALUES:
            raise UserError(f"The aliases of the grid stand for more than {MAX_VALUES} values; write fewer.")
        if isinstance(node, yaml.ScalarNode):
            if (as_text or key in NAMES) and node.value and not node.style:
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
            return PlacedList([self.build(item, key, as_text) for item in node.value], places)
        if not isinstance(node, yaml.MappingNode) or node.tag != f"{TAGS}map":
            raise yaml.YAMLError
        self.flatten_mapping(node)  # of merge keys
        found = PlacedDict()
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.YAMLError
            inside = self.build(name, as_text=key in NAMED_KEYS)
            found.places[inside] = self._place(name)
            found[inside] = self.build(value, str(name.value), key == "targets")
        return found

    def _place(self, node: yaml.Node) -> str:
        return self.option or f"Line {node.start_mark.line + 1}: "
