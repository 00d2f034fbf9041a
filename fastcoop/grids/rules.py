"""``exclude`` and ``include``: runs left out of a grid's cross, and runs added to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fastcoop.checks import LARGEST, shortened
from fastcoop.errors import UserError, nearest
from fastcoop.methods import METHODS, MethodSettings, get_method


def listed(value: Any) -> Any:
    """A single value as a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def whole(value: Any, least: int, expected: str, most: int = LARGEST) -> int:
    """Also what is written as text. Yes and no, which Python counts as 1 and 0, are no numbers."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"expected {expected}")
    return value


def _shots(value: Any) -> int | str:
    return "all" if value == "all" else whole(value, 1, 'whole numbers from 1 on, or "all"')


def _seed(value: Any) -> int:
    return whole(value, 0, f"whole numbers from 0 to {LARGEST}")


def _name(value: Any) -> Any:
    return str(value) if type(value) is int else value


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if twice := [value for value, times in Counter(values).items() if times > 1]:
        raise ValueError(f"it lists {shortened(twice[0])} twice")
    return values


Name = Annotated[str, BeforeValidator(_name), Field(min_length=1)]
Names = Annotated[
    tuple[Name, ...],
    BeforeValidator(listed),
    Field(min_length=1),
    AfterValidator(_once),
]
Shots = Annotated[
    tuple[Annotated[int | Literal["all"], BeforeValidator(_shots)], ...],
    BeforeValidator(listed),
    Field(min_length=1),
    AfterValidator(_once),
]
Seeds = Annotated[
    tuple[Annotated[int, BeforeValidator(_seed)], ...],
    BeforeValidator(listed),
    Field(min_length=1),
    AfterValidator(_once),
]


class Rule(BaseModel):
    """Runs by what they are: those that match all that the rule says, of each any value that it lists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: Names | None = None
    dataset: Names | None = None
    method: Names | None = None
    shots: Shots | None = None
    seed: Seeds | None = None
    settings: dict[str, Any] = {}

    @cached_property
    def understood(self) -> dict[str, dict[str, list[Any]]]:
        """{method: {setting: values}} for the methods that have these settings."""
        found = {}
        for name in self.method or METHODS:
            pairs = [
                _understood(name, key, one) for key, given in self.settings.items() for one in listed(given)
            ]
            if None not in pairs:
                found[name] = {
                    field: [v for f, v in filter(None, pairs) if f == field]
                    for field, _ in filter(None, pairs)
                }
        return found

    def check(self) -> None:
        """Raises UserError for a method or a setting that does not exist, with the nearest one."""
        for name in self.method or ():
            get_method(name)
        if self.understood:
            return
        names = self.method or tuple(METHODS)
        fields = [field for name in names for field in METHODS[name].Settings.model_fields]
        for key, given in self.settings.items():
            if not any(_understood(name, key, one) for name in names for one in listed(given)):
                where = " or ".join(self.method) if self.method else "any method"
                if key in fields:
                    raise UserError(f'The setting "{key}" of {where} cannot be {given!r}.')
                raise UserError(f'Unknown setting "{key}" of {where}.{nearest(key, fields)}')
        raise UserError(f"No method has all of the settings {', '.join(self.settings)} with these values.")

    def touches(self, backbone: str, dataset: str, method: str, settings: MethodSettings) -> bool:
        """Whether such runs match, but for their shots and seeds."""
        return (
            (self.backbone is None or backbone in self.backbone)
            and (self.dataset is None or dataset in self.dataset)
            and (self.method is None or method in self.method)
            and method in self.understood
            and all(getattr(settings, key) in values for key, values in self.understood[method].items())
        )

    def draws(self, shots: int | str, seed: int) -> bool:
        """Whether a run of these shots and seed matches, as far as they go."""
        return (self.shots is None or shots in self.shots) and (self.seed is None or seed in self.seed)


def _understood(method: str, key: str, value: Any) -> tuple[str, Any] | None:
    """A setting's field and value as the method's model has them; None where it does not take it."""
    try:
        model = METHODS[method].Settings.model_validate({key: value})
    except ValidationError:
        return None
    (field,) = model.model_fields_set
    return field, getattr(model, field)


def without(draws: Iterable[tuple[int | str, int]], rules: Iterable[Rule]) -> list[tuple[int | str, int]]:
    """The (shots, seed) that none of the rules matches."""
    rules = list(rules)
    return [draw for draw in draws if not any(rule.draws(*draw) for rule in rules)]


class Addition(Rule):
    """Runs added to a cross: each of a method's settings (lists are crossed) on what is named; what is not named
    is the cross's own."""

    method: Annotated[tuple[str], BeforeValidator(listed)]

    def axes(self) -> Mapping[str, Any]:
        """What it says in place of the cross, by the cross's names."""
        given = {
            "backbones": self.backbone,
            "datasets": self.dataset,
            "shots": self.shots,
            "seeds": self.seed,
        }
        return {name: value for name, value in given.items() if value is not None}
