"""Grid files: lists of backbones, datasets, shots, seeds and methods' settings, crossed into runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainValidator

import fastcoop
from fastcoop.checks import several, shortened
from fastcoop.datasets.files import abbreviate
from fastcoop.errors import MissingFile, UserError, nearest
from fastcoop.files import reading
from fastcoop.grids import values
from fastcoop.grids.scopes import Scopes, join, keep_only, override, split
from fastcoop.methods import METHODS, MethodSettings, RunSpec, expand, get_method
from fastcoop.methods.base import SettingError, validate
from fastcoop.yaml_text import PlacedDict, bare, read_yaml

PACKAGE = Path(fastcoop.__path__[0])
FOLDERS = PACKAGE / "experiments", PACKAGE.parent / "experiments"  # of grids, in the package or in a checkout

log = logging.getLogger("fastcoop")


def _methods(given: Any) -> tuple[tuple[str, tuple[MethodSettings, ...]], ...]:
    """Return (name, all its settings) of each method that `split` lists, the fastest first."""
    found: dict[str, list[MethodSettings]] = {}
    for index, (name, settings) in enumerate(pair for one in given or () for pair in one.items()):
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


Methods = Annotated[tuple[tuple[str, tuple[MethodSettings, ...]], ...], PlainValidator(_methods)]


class GridBlock(BaseModel):
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

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    backbones: values.Names
    datasets: values.Names
    shots: values.Shots = (1, 2, 4, 8, 16)
    seeds: values.Seeds = (1, 2, 3)
    targets: values.Targets = {}
    views: values.Views = 8
    recipe: Literal["current", "official-2021"] = "current"
    methods: Methods

    @property
    def learns(self) -> bool:
        """Whether any of its methods learns from few-shot subsets."""
        return any(METHODS[name].learns for name, _ in self.methods)

    @property
    def augments(self) -> bool:
        """Whether any of its methods learns from augmented views."""
        return any(METHODS[name].learns and METHODS[name].augments for name, _ in self.methods)

    def uses(self, key: str, method: str = "", *inside: str) -> bool:
        """Return whether its runs use a key of the file, such as "shots" or ("methods", "coop", "epochs")."""
        if key == "methods" and inside:
            return method in dict(self.methods)
        return self.augments if key == "views" else self.learns or key not in ("shots", "seeds")

    def runs(self) -> Iterator[RunSpec[Any]]:
        """Yield its runs, backbone by backbone, method by method, dataset by dataset."""
        for backbone, (method, every) in product(self.backbones, self.methods):
            draws: Any = product(self.shots, self.seeds) if METHODS[method].learns else [(0, 0)]
            for dataset, settings, (shots, seed) in product(self.datasets, every, draws):
                yield RunSpec(method, settings, backbone, dataset, shots, seed, self.targets.get(dataset, ()))


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
        learning = [METHODS[name] for name in self.methods if METHODS[name].learns]
        kinds = {kind for one in learning for kind in one.kinds if one.augments or kind != "coop"}
        return tuple(sorted(kinds)) if any(one.augments for one in learning) else ("coop", *sorted(kinds))

    @property
    def backbones(self) -> tuple[str, ...]:
        """All backbones, each once."""
        return tuple(dict.fromkeys(name for block in self.blocks for name in block.backbones))

    @property
    def datasets(self) -> tuple[str, ...]:
        """All datasets that runs learn from, or that methods without learning are tested on."""
        return tuple(dict.fromkeys(name for block in self.blocks for name in block.datasets))

    @property
    def targets(self) -> tuple[str, ...]:
        """All datasets that are targets of another one."""
        every = (names for block in self.blocks for names in block.targets.values())
        return tuple(dict.fromkeys(name for names in every for name in names))

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
        blocks = [block for block in self.blocks if dataset in block.datasets and block.learns]
        shots = dict.fromkeys(number for block in blocks for number in block.shots)
        return tuple(shots), tuple(dict.fromkeys(seed for block in blocks for seed in block.seeds))


def read_grid(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> Grid:
    """Read and check a grid.

    Args:
        source: A YAML file, or a mapping of its content. A file that is not there may be one that comes with fastcoop.
        overrides: ``key=value`` each; dots reach inside (``methods.coop.epochs=20``), commas make lists. They hold in
            every block.
        only: Methods, or blocks, to keep.

    Raises:
        UserError: No such file, no YAML, an unknown key (with the nearest one and its line), or a value that its key
            cannot have.
    """
    overrides, only = several(overrides), several(only)
    given, name = _content(source)
    scopes = split(given, name)
    override(scopes, overrides, name)
    _fit_targets(given, scopes)
    blocks = _blocks(scopes, name)
    if only:
        scopes = keep_only(scopes, only)
        blocks = _blocks(scopes, name)
    for sentence in dict.fromkeys(_notes(given, scopes, blocks, unused=not (overrides or only))):
        log.warning(sentence)
    for one in overrides:
        if not any(block.uses(*one.partition("=")[0].split(".")) for block in blocks):
            log.warning("--set %s changes nothing: no run uses it.", one)
    return Grid(tuple(blocks), blocks[0].views, blocks[0].recipe, bare(join(scopes)))


def _content(source: Any) -> tuple[PlacedDict, str]:
    """Return the content of a grid, and what it is called in messages."""
    if not isinstance(source, str | os.PathLike | Mapping):
        raise UserError(
            f"Expected a grid as the path of a YAML file or as a mapping, got {shortened(source)}."
        )
    if isinstance(source, Mapping):
        try:
            return values.plain(source), "the grid"
        except RecursionError:
            raise UserError("A list or mapping of the grid contains itself; write its values out.") from None
    path = Path(source)
    path = path if path.is_file() else shipped_grid(path) or path
    if not path.exists():
        hint = nearest(path.stem, (grid.stem for folder in FOLDERS for grid in folder.glob("*.yaml")))
        raise MissingFile(f"There is no grid file {source}, on disk or among fastcoop's.{hint}")
    with reading(path, "a grid"):
        text = path.read_text(encoding="utf-8")
    given = read_yaml(text, str(source), values.is_name)
    if not isinstance(given, PlacedDict):
        raise UserError(f"{source} should hold keys such as backbones, datasets and methods.")
    return given, str(source)


def shipped_grid(name: str | Path) -> Path | None:
    """Return the file of a grid that comes with fastcoop; None where there is none.

    It is named "fig3", "fig3.yaml" or "experiments/fig3.yaml".
    """
    asked = Path(name)
    if asked.parent.name not in ("", "experiments") or asked.suffix not in ("", ".yaml"):
        return None
    return next((place for folder in FOLDERS if (place := folder / f"{asked.stem}.yaml").is_file()), None)


def _fit_targets(given: PlacedDict, scopes: Scopes) -> None:
    """Leave out of each block the targets that stand above it, but are of another block's datasets.

    Raises:
        UserError: Targets are of no dataset, and ``--set`` did not give the datasets.
    """
    datasets = {name: set(map(str, values.as_list(one.get("datasets")))) for name, one in scopes.items()}
    dropped: dict[str, None] = {}
    for block, content in scopes.items():
        targets = content.get("targets")
        targets = targets if isinstance(targets, PlacedDict) else PlacedDict()
        is_own = block is not None and "targets" in given["blocks"][block]
        known = datasets[block] if is_own else set[str]().union(*datasets.values())
        for name in [name for name in targets if str(name) not in datasets[block]]:
            if content.place("datasets").startswith("--set"):
                dropped[str(name)] = None
            elif str(name) not in known:
                problem = f'The grid gives targets for "{name}", which is not one of its datasets.'
                raise UserError(f"{content.place('targets', name)}{problem}")
            targets.pop(name)
    if dropped:
        log.warning("--set datasets leaves out the targets of %s.", abbreviate(list(dropped)))


def _blocks(scopes: Scopes, name: str) -> list[GridBlock]:
    """Return the blocks of a grid."""
    blocks = []
    for block, content in scopes.items():
        try:
            what = name if block is None else f'block "{block}" of {name}'
            blocks.append(validate(GridBlock, content, what).model_copy(update={"name": block}))
        except SettingError as error:
            raise UserError(f"{content.place(*error.place)}{error}") from None
    return blocks


def _notes(given: PlacedDict, scopes: Scopes, blocks: Sequence[GridBlock], unused: bool) -> Iterator[str]:
    """Yield what may be meant otherwise: numbers of seeds, and keys of a file that no run uses if ``unused``."""
    for content in scopes.values():
        if (n := values.number_of_draws(content.get("seeds")) or 0) > 1:
            meaning = f"{n} draws, of the seeds 1 to {n}; write seeds: [{n}] for this seed alone"
            yield f"{content.place('seeds')}seeds: {n} means {meaning}."
    if not unused:
        return
    own = {block.name: given["blocks"][block.name] if block.name else PlacedDict() for block in blocks}
    users = [(given, key, [one for one in blocks if key not in own[one.name]]) for key in given]
    users += [(own[one.name], key, [one]) for one in blocks for key in own[one.name]]
    for content, key, of_key in users:
        if key not in ("recipe", "blocks") and not any(block.uses(key) for block in of_key):
            yield f"{content.place(key)}No run uses {key} from here, so it changes nothing."
    shots = {number for block in blocks for number in block.shots}
    settings = [one for block in blocks for _, every in block.methods for one in every]
    schedules = [epochs for one in settings if isinstance(epochs := getattr(one, "epochs", None), dict)]
    if others := dict.fromkeys(str(number) for one in schedules for number in one if number not in shots):
        yield f"No run has {' or '.join(others)} shots, for which epochs are given."
