"""Choosing rows of a results table: ``shots=16``, ``accuracy>=50``, ``dataset=dtd,eurosat``, ``init!=random``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastcoop.errors import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd

CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|=|<|>)(.*)", re.DOTALL)


def select_rows(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """The rows that meet all conditions.

    A condition is ``NAME=VALUE``, ``NAME!=VALUE``, both with one value or several separated by commas, or ``<``,
    ``<=``, ``>``, ``>=`` with a number. NAME is a column, or a setting of the runs' methods. A value with commas of
    its own, such as a label, is met as it stands.

    Raises:
        UserError: no condition, an unknown name (with the nearest one), or no number where one is needed.
    """
    for condition in conditions:
        match = CONDITION.fullmatch(condition)
        if match is None:
            raise UserError(
                f'"{condition}" should be NAME=VALUE, such as shots=16, dataset!=dtd or accuracy<20.'
            )
        name, sign, text = match[1], match[2], match[3].strip()
        met = [_meets(value, sign, text, condition) for value in _column(table, name)]
        table = table[met]
    return table


def _column(table: pd.DataFrame, name: str) -> list[Any]:
    if name in table:
        return table[name].tolist()
    settings = [json.loads(text) for text in table.settings] if "settings" in table else []
    known = {key for one in settings for key in one}
    if name not in known and len(table):
        raise UserError(f'The results have no column or setting "{name}".{nearest(name, {*table, *known})}')
    return [one.get(name) for one in settings]


def _meets(value: Any, sign: str, text: str, condition: str) -> bool:
    if sign in ("=", "!="):
        wanted = [text, *(piece.strip() for piece in text.split(","))]
        return any(_equal(value, one) for one in wanted) == (sign == "=")
    number, limit = _number(value), _number(text)
    if math.isnan(limit):
        raise UserError(
            f'"{condition}" compares with "{text}", which is not a number; give one, or use = or !=.'
        )
    return {"<": number < limit, "<=": number <= limit, ">": number > limit, ">=": number >= limit}[sign]


def _equal(value: Any, text: str) -> bool:
    if value is None or value != value:
        return text.lower() in ("", "none")
    if isinstance(value, bool):
        return str(value).lower() == text.lower()
    return str(value) == text or (not isinstance(value, str) and _number(value) == _number(text))


def _number(value: Any) -> float:
    """NaN for what is none; "all" shots are more than any number."""
    if value == "all":
        return math.inf
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
