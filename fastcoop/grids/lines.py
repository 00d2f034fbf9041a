"""YAML as plain values, and the line of the file that each of them stands on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from fastcoop.errors import UserError

MOST_VALUES = 1_000_000  # that aliases may make of a file's text

# Keys whose values are names: read as they are written, also where YAML would see a number, a date, yes, no or null.
NAMES = ("backbones", "datasets", "backbone", "dataset", "init")
NAMED_KEYS = ("targets", "blocks")  # mappings whose keys are names, too
TEXT = "tag:yaml.org,2002:str"

Path = tuple[Any, ...]  # keys and indices from the top of the file


class Lines:
    """Where things stand in a YAML text, or in the option that replaced them."""

    def __init__(self, root: yaml.Node | None = None):
        self._root = root
        self._replaced: dict[Path, str] = {}

    def replace(self, path: Path, option: str) -> None:
        """State that an option gave the value at ``path``."""
        self._replaced[path] = option

    def where(self, path: Sequence[Any]) -> str:
        """``"Line 3: "`` for the deepest thing on ``path`` that the text has, or the option that gave it; "" where
        there is no text."""
        for replaced, option in self._replaced.items():
            if tuple(path[: len(replaced)]) == replaced:
                return f"{option}: "
        line, node = None, self._root
        for step in path:
            if isinstance(node, yaml.MappingNode):
                found = next((pair for pair in node.value if pair[0].value == str(step)), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.start_mark.line
            else:
                break
        return "" if line is None else f"Line {line + 1}: "


def read_yaml(text: str, name: str) -> tuple[Any, Lines]:
    """The values of a YAML text, built by safe means only, and their lines.

    Raises:
        UserError: it is not YAML, gives a key of a mapping twice, or its aliases make too much of it.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)  # refuses characters such as NUL at once
        root = loader.get_single_node()
        if root is None:
            return None, Lines()
        _read_names_as_text(root, set())
        _refuse_twice(root, set())
        if _size(root, {}) > MOST_VALUES:
            raise UserError(f"The aliases in {name} stand for more than {MOST_VALUES} values; write fewer.")
        return loader.construct_document(root), Lines(root)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UserError(f"{name} is not YAML{line}; check its indentation and quotes.") from None
    except UserError:
        raise
    except (ValueError, RecursionError):  # a date with a thirteenth month; an alias inside what it stands for
        raise UserError(f"{name} is not YAML that can be read; check its values and aliases.") from None
    finally:
        if loader is not None:
            loader.dispose()


def override_value(keys: Sequence[str], text: str) -> Any:
    """The value that ``--set a.b=text`` gives, with commas as a list. Raises yaml.YAMLError where it is no YAML."""
    loader = yaml.SafeLoader(f"[{text}]" if "," in text and text[:1] not in "[{\"'" else text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        for key in reversed(keys):
            name = yaml.ScalarNode(TEXT, key)
            root = yaml.MappingNode("tag:yaml.org,2002:map", [(name, root)])
        _read_names_as_text(root, set())
        value = loader.construct_document(root)
    except (ValueError, RecursionError):
        raise yaml.YAMLError from None
    finally:
        loader.dispose()
    for key in keys:
        value = value[key]
    return value


def _read_names_as_text(node: yaml.Node, seen: set[int]) -> None:
    """Make text of names, where they stand in a grid, before values are made of them."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _read_names_as_text(item, seen)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value in NAMES:
            _as_text(value)
        elif key.value in NAMED_KEYS and isinstance(value, yaml.MappingNode):
            for name, named in value.value:
                _as_text(name)
                if key.value == "targets":
                    _as_text(named)
        _read_names_as_text(value, seen)


def _as_text(node: yaml.Node) -> None:
    for one in node.value if isinstance(node, yaml.SequenceNode) else (node,):
        merge = one.tag == "tag:yaml.org,2002:merge"
        if isinstance(one, yaml.ScalarNode) and one.value and not one.style and not merge:
            one.tag = TEXT


def _refuse_twice(node: yaml.Node, seen: set[int]) -> None:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: dict[Any, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if (key.tag, key.value) in keys:
                    raise UserError(
                        f'Line {line}: "{key.value}" was given before, in line {keys[key.tag, key.value]}; '
                        "leave one."
                    )
                keys[key.tag, key.value] = line
            _refuse_twice(value, seen)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for once its aliases are written out."""
    if id(node) not in known:
        if isinstance(node, yaml.MappingNode):
            known[id(node)] = 1 + sum(_size(value, known) for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            known[id(node)] = 1 + sum(_size(item, known) for item in node.value)
        else:
            known[id(node)] = 1
    return known[id(node)]
