"""Values of a grid: those of other libraries as plain ones, lists that a single value may stand for, names, numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Set
from datetime import date
from enum import Enum
from numbers import Number
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from fastcoop.checks import LARGEST, MOST_VIEWS, expand_range, shortened
from fastcoop.errors import UserError
from fastcoop.yaml_text import PlacedDict, PlacedList

MOST_DRAWS = 100  # that a single number asks for; a larger one, such as 2024, is meant as a seed
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


def as_list(value: Any) -> Any:
    """Return a list as it is, and a single value as a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def _whole(expected: str, least: int, most: int = LARGEST, word: str = "") -> BeforeValidator:
    """Return a check for whole numbers, also written as text, or one word. Yes and no are not numbers."""

    def check(value: Any) -> int | str:
        if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
            value = int(value)
        if word and value == word:
            return word
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"expected {expected}")
        return value

    return BeforeValidator(check)


def number_of_draws(value: Any) -> int | None:
    """Return n where ``seeds`` is a single whole number n, which stands for the draws 1 to n; else None."""
    text = str(value).strip()
    return None if isinstance(value, bool) or not text.isdecimal() else int(text)


def _seeds(value: Any) -> Any:
    """Return a list of seeds, with ranges such as "1-10" and a single number of draws written out."""
    draws = number_of_draws(value)
    if draws is not None and not 1 <= draws <= MOST_DRAWS:
        raise ValueError(
            f'expected 1 to {MOST_DRAWS} draws, a list of seeds such as [{draws}], or a range such as "1-10"'
        )
    if draws is not None:
        return list(range(1, draws + 1))
    ranges = [(expand_range(one) if isinstance(one, str) else None) or [one] for one in as_list(value)]
    return [seed for one in ranges for seed in one]


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if twice := [value for value, times in Counter(values).items() if times > 1]:
        raise ValueError(f"it lists {shortened(twice[0])} twice")
    return values


def _not_itself(targets: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    if own := [name for name, names in targets.items() if name in names]:
        raise ValueError(
            f'the dataset "{own[0]}" is tested on itself in any case; leave it out of its own targets'
        )
    return targets


_T = TypeVar("_T")
_List = Annotated[tuple[_T, ...], BeforeValidator(as_list), Field(min_length=1), AfterValidator(_once)]
Name = Annotated[
    str, BeforeValidator(lambda name: str(name) if type(name) is int else name), Field(min_length=1)
]
Names = _List[Name]
Targets = Annotated[dict[Name, Names], AfterValidator(_not_itself)]
Shots = _List[Annotated[int | Literal["all"], _whole('whole numbers from 1 on, or "all"', 1, word="all")]]
_Seed = Annotated[int, _whole(f'whole numbers from 0 to {LARGEST}, or a range such as "1-10"', 0)]
Seeds = Annotated[_List[_Seed], BeforeValidator(_seeds)]
Views = Annotated[int, _whole(f"a whole number from 0 to {MOST_VIEWS}", 0, MOST_VIEWS)]
