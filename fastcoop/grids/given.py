"""What a grid is given as, a YAML text or Python's values, as plain values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from datetime import date
from enum import Enum
from numbers import Number
from pathlib import PurePath
from typing import Any

from fastcoop.checks import shortened
from fastcoop.errors import UserError
from fastcoop.yaml_text import PlacedDict, PlacedList

NAMES = ("backbones", "datasets", "init")
SCALARS = (str, int, float, bool, type(None))
KINDS: Any = ((str, str), (int, int), (Number, float), ((PurePath, date), str))  # and what they become


def is_name(path: tuple[str, ...], written: str) -> bool:
    """Return whether the values, or the keys, at a path of a grid are names, which are text: "no" is not False."""
    parent, key = ("", "", *path)[-2:]
    return bool(written) and (key in NAMES or parent == "targets" or (parent == "blocks" and not key))


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
