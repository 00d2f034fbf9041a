"""A grid given from Python, as the plain values that its YAML file would hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from datetime import date
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from typing import Any

from fastcoop.checks import shortened
from fastcoop.errors import UserError

SCALARS = (str, int, float, bool, type(None))


def plain(value: Any) -> Any:
    """Return a copy of plain lists, dictionaries, numbers and text.

    NumPy's, pandas' and torch's numbers and arrays become numbers and lists, other collections lists (sets in order),
    paths and dates text, enumerations their values, exact fractions floats.

    Raises UserError for anything else, bytes and generators among it.
    """
    try:
        return _plain(value)
    except RecursionError:
        raise UserError("A list or mapping of the grid contains itself; write its values out.") from None


def _plain(value: Any) -> Any:
    if type(value) in SCALARS:
        return value
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {_key(key): _plain(one) for key, one in value.items()}
    if callable(getattr(value, "tolist", None)) and not isinstance(value, bytes | memoryview):
        return _plain(value.tolist())
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, PurePath | date):
        return str(value)
    if isinstance(value, Decimal | Fraction):
        return float(value)
    if isinstance(value, Set):
        return sorted(map(_plain, value), key=lambda one: (str(type(one)), one))
    if isinstance(value, Collection) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(one) for one in value]
    raise UserError(
        f"A grid holds text, numbers, yes and no, lists and mappings of these; {shortened(value)}, "
        f"a {type(value).__name__}, came. Convert it, to a list or to text."
    )


def _key(key: Any) -> Any:
    made = _plain(key)
    if type(made) not in SCALARS:
        raise UserError(
            f"A mapping of the grid has the key {shortened(key)}; give it keys that are text or numbers."
        )
    return made
