"""Grids: lists of backbones, datasets, shots, seeds and methods' settings, crossed into runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationInfo

from fastcoop.checks import LARGEST, MOST_VIEWS, expand_range, several, shortened
from fastcoop.errors import UserError
from fastcoop.methods import METHODS, Method, MethodSettings, RunSpec, expand, get_method
from fastcoop.methods.base import SettingError

MOST_DRAWS = 100  # that a single number asks for; a larger one, such as 2024, is meant as a seed


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
    if draws is None:
        return [seed for one in several(value) for seed in expand_range(str(one)) or [one]]
    if not 1 <= draws <= MOST_DRAWS:
        raise ValueError(
            f'expected 1 to {MOST_DRAWS} draws, a list of seeds such as [{draws}], or a range such as "1-10"'
        )
    return list(range(1, draws + 1))


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if twice := [value for value, times in Counter(values).items() if times > 1]:
        raise ValueError(f"it lists {shortened(twice[0])} twice")
    return values


def _of_own_datasets(targets: dict[str, tuple[str, ...]], info: ValidationInfo) -> dict[str, tuple[str, ...]]:
    if own := [name for name, names in targets.items() if name in names]:
        raise ValueError(
            f'the dataset "{own[0]}" is tested on itself in any case; leave it out of its own targets'
        )
    return {name: names for name, names in targets.items() if name in info.data.get("datasets", ())}


T = TypeVar("T")
_List = Annotated[tuple[T, ...], BeforeValidator(several), Field(min_length=1), AfterValidator(_once)]
Name = Annotated[str, Field(min_length=1)]
Names = _List[Name]
Targets = Annotated[dict[Name, Names], AfterValidator(_of_own_datasets)]
Shots = _List[Annotated[int | Literal["all"], _whole('whole numbers from 1 on, or "all"', 1, word="all")]]
_Seed = Annotated[int, _whole(f'whole numbers from 0 to {LARGEST}, or a range such as "1-10"', 0)]
Seeds = Annotated[_List[_Seed], BeforeValidator(_seeds)]
Views = Annotated[int, _whole(f"a whole number from 0 to {MOST_VIEWS}", 0, MOST_VIEWS)]


def _methods(given: Any) -> tuple[tuple[str, tuple[MethodSettings, ...]], ...]:
    """Return (name, all its settings) of each method that the file lists, the fastest first."""
    found: dict[str, list[MethodSettings]] = {}
    for index, entry in enumerate(given or ()):
        ((name, settings),) = entry.items()
        try:
            method, every = get_method(name), found.setdefault(name, [])
            if not isinstance(settings, dict):
                raise UserError(f"Expected keys and values as settings of {name}, got {shortened(settings)}.")
            new = [one for one in expand(method, settings) if one not in every]
            if not new:
                raise UserError(f"The method {name} is listed twice with the same settings; leave one.")
        except UserError as error:
            raise SettingError(str(error), (index, name, *getattr(error, "place", ()))) from None
        every += new
    if not found:
        raise ValueError("expected at least one method")
    return tuple((name, tuple(found[name])) for name in METHODS if name in found)


Methods = Annotated[tuple[tuple[str, tuple[MethodSettings, ...]], ...], BeforeValidator(_methods)]


class GridBlock(BaseModel, extra="forbid", frozen=True):
    """Every method with each of its settings, on every dataset by every backbone; methods that learn also with every
    number of shots and every seed.

    Attributes:
        name: Name in the grid file; None for a file without blocks.
        backbones: As ``fastcoop.backbone_from_spec`` takes them.
        datasets: Names under the data root, or paths of folders, CSV files or stores of imported features.
        shots, seeds: Images per class, and seeds, of the few-shot subsets.
        targets: For a dataset, further datasets to test its runs on.
        views: Augmented views per training image, the same in all blocks.
        recipe: Recipe of the image transforms, the same in all blocks.
        methods: (name, all its settings), the fastest first.
    """

    name: str | None = None
    backbones: Names
    datasets: Names
    shots: Shots = (1, 2, 4, 8, 16)
    seeds: Seeds = (1, 2, 3)
    targets: Targets = {}
    views: Views = 8
    recipe: Literal["current", "official-2021"] = "current"
    methods: Methods

    @property
    def learning(self) -> list[Method]:
        """Its methods that learn from few-shot subsets."""
        return [METHODS[name] for name, _ in self.methods if METHODS[name].learns]

    def uses(self, key: str, method: str = "", *inside: str) -> bool:
        """Return whether its runs use a key of the file, such as "shots" or ("methods", "coop", "epochs")."""
        if key == "methods" and inside:
            return method in dict(self.methods)
        users = [one for one in self.learning if key != "views" or one.augments]
        return bool(users) or key not in ("shots", "seeds", "views")

    def runs(self) -> Iterator[RunSpec[Any]]:
        """Yield its runs, backbone by backbone, method by method, dataset by dataset."""
        for backbone, (method, every) in product(self.backbones, self.methods):
            draws: Any = product(self.shots, self.seeds) if METHODS[method].learns else [(0, 0)]
            for dataset, settings, (shots, seed) in product(self.datasets, every, draws):
                yield RunSpec(method, settings, backbone, dataset, shots, seed, self.targets.get(dataset, ()))


def _distinct(lists: Iterable[Iterable[T]]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(chain.from_iterable(lists)))


@dataclass(frozen=True)
class Grid:
    """The runs of a sweep.

    Attributes:
        blocks: The blocks of the file, or one for a file without blocks.
        views: Augmented views per training image.
        recipe: Recipe of the image transforms, "current" or "official-2021".
        source: The content of the file, changed by command-line options.
    """

    blocks: tuple[GridBlock, ...]
    views: int
    recipe: str
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of training features that methods read; "coop" if none of them learns from augmented views."""
        learning = [method for block in self.blocks for method in block.learning]
        kinds = {kind for one in learning for kind in one.kinds if one.augments or kind != "coop"}
        return tuple(sorted(kinds if any(one.augments for one in learning) else {"coop", *kinds}))

    @property
    def backbones(self) -> tuple[str, ...]:
        """All backbones, each once."""
        return _distinct(block.backbones for block in self.blocks)

    @property
    def datasets(self) -> tuple[str, ...]:
        """All datasets that runs learn from, or that methods without learning are tested on."""
        return _distinct(block.datasets for block in self.blocks)

    @property
    def targets(self) -> tuple[str, ...]:
        """All datasets that are targets of another one."""
        return _distinct(names for block in self.blocks for names in block.targets.values())

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of all methods, the fastest first, whatever their order in the file."""
        named = {name for block in self.blocks for name, _ in block.methods}
        return tuple(name for name in METHODS if name in named)

    def runs(self) -> Iterator[RunSpec[Any]]:
        """Yield all runs, backbone by backbone, method by method; a run of several blocks is yielded for each."""
        backbones, methods = self.backbones, self.methods
        every = [run for block in self.blocks for run in block.runs()]
        yield from sorted(every, key=lambda run: (backbones.index(run.backbone), methods.index(run.method)))

    def drawn(self, dataset: str) -> tuple[tuple[int | str, ...], tuple[int, ...]]:
        """Return the shots and seeds of a dataset's few-shot subsets; none if nothing learns from it."""
        blocks = [block for block in self.blocks if dataset in block.datasets and block.learning]
        return _distinct(block.shots for block in blocks), _distinct(block.seeds for block in blocks)
