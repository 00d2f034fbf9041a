"""Reading YAML: plain values, and the line of the file that each of them is on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from fastcoop.errors import UserError

MAX_VALUES = 100_000  # values of a file, with its aliases written out

# Keys whose values are names: read as they are written, also where YAML would see a number, a date, yes, no or null.
NAMES = ("backbones", "datasets", "init")
NAMED_KEYS = ("targets", "blocks")  # mappings whose keys are names
TEXT, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|.*:.*)")  # numbers that YAML 1.1 reads in base 8 or 60


class OtherBase(UserError):
    """A number that YAML 1.1 reads in base 8 or 60, such as 010 and 1:30."""

    def __init__(self, place: str, written: str, number: float):
        super().__init__(
            f"{place}YAML reads {written} as {number}; write {number}, or the number that is meant."
        )
        self.written, self.number = written, number


class Lines(dict[tuple[str, ...], str]):
    """Where every value is, such as "Line 3: ", by its path: the keys and indices that lead to it from the top."""

    def where(self, path: Sequence[Any]) -> str:
        """Return the place of the longest part of ``path`` that is known; "" for none."""
        whole = tuple(map(str, path))
        return next((self[whole[:n]] for n in range(len(whole), 0, -1) if whole[:n] in self), "")

    def set(self, path: Sequence[Any], option: str) -> None:
        """Record that ``--set`` gave the value at ``path`` and everything in it."""
        whole = tuple(map(str, path))
        for one in [one for one in self if one[: len(whole)] == whole]:
            del self[one]
        self[whole] = f"--set {option}: "


def read_yaml(text: str, name: str) -> tuple[Any, Lines]:
    """Return the values of a YAML text, built by safe means only, and their lines.

    Raises:
        UserError: It is not YAML, gives a key of a mapping twice, has a number like 010 or 1:30, or its aliases stand
            for too many values.
    """
    lines = Lines()
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            return None, lines
        _visit(root, (), lines)
        return SafeConstructor().construct_document(root), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{name} is not YAML{line}; check its indentation and quotes.") from None
    except UserError:
        raise
    except (ValueError, RecursionError):  # a date with a thirteenth month; an alias inside what it stands for
        raise UserError(f"{name} is not YAML that can be read; check its dates and aliases.") from None


def _visit(node: yaml.Node, path: tuple[str, ...], lines: Lines) -> None:
    """Note the lines of a node's values, make text of names, and refuse keys that are given twice."""
    if len(lines) > MAX_VALUES:
        raise UserError(f"The aliases of the grid stand for more than {MAX_VALUES} values; write fewer.")
    inside: list[tuple[str, yaml.Node, yaml.Node]] = []  # name, where it starts, value
    if isinstance(node, yaml.SequenceNode):
        inside = [(str(index), item, item) for index, item in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        inside = [(str(key.value), key, value) for key, value in node.value]
        parent = path[-1] if path else ""
        first: dict[tuple[str, str], int] = {}
        for name, key, value in inside:
            if parent in NAMED_KEYS:
                _as_text(key)
            if name in NAMES or parent == "targets":
                _as_text(value)
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                line = key.start_mark.line + 1
                if before := first.get((key.tag, name)):
                    raise UserError(f'Line {line}: "{name}" was given before, in line {before}; leave one.')
                first[key.tag, name] = line
    for name, start, value in inside:
        lines[(*path, name)] = f"Line {start.start_mark.line + 1}: "
        for one in (start, value):
            if one.tag in NUMBERS and OTHER_BASE.fullmatch(one.value):
                number = SafeConstructor().construct_document(one)
                raise OtherBase(lines[(*path, name)], one.value, number)
        _visit(value, (*path, name), lines)


def _as_text(node: yaml.Node) -> None:
    for one in node.value if isinstance(node, yaml.SequenceNode) else (node,):
        if isinstance(one, yaml.ScalarNode) and one.value and not one.style and one.tag != MERGE:
            one.tag = TEXT
