"""What describes a dataset of the user's own: its YAML file, and class names to show in place of those of folders."""

from __future__ import annotations

import csv
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from fastcoop.datasets.dataset import EXAMPLE, check_name_and_template
from fastcoop.datasets.files import in_prompt, normalized, read_csv
from fastcoop.datasets.official import packaged_names
from fastcoop.errors import UserError, abbreviate, nearest, writing
from fastcoop.files import atomic_write, reading
from fastcoop.progress import counted
from fastcoop.yaml_text import read_yaml

COLUMNS = ("class", "name")
FORM = "a .csv with the columns class and name, as `fastcoop datasets names FOLDER` writes"
WORDNET_ID = re.compile(r"n\d{8}")  # names of ImageNet's class folders
PREFIXES = (  # suggestions leave one out where every class has it and a letter follows
    re.compile(r"n\d{8}[ _.-]+"),  # n02085620-Chihuahua
    re.compile(r"(?i:(?:class|category|label)[ _.-]*)?\d+[ _.:)-]+"),  # 001.Black_footed_Albatross
    re.compile(r"(?i:class|category|label)[ _.:-]+"),
)
CAMEL = re.compile(r"(?<=[a-z]{2})(?=[A-Z][a-z])")  # AnnualCrop, but not McDonald


def shown_names(given: str | Path | Mapping[str, str], classes: Sequence[str], place: Path) -> list[str]:
    """Return the name of each of ``classes``, which are those of ``place``, by a file or mapping of all of them.

    A UserError says which class is not there, named twice, or lacks a name of its own.
    """
    composed, names, owners = _composed(classes), dict[str, str](), dict[str, str]()
    for where, key, name in _pairs(given):
        one = composed.get(key) or composed.get(normalized(key))
        if one is None:
            near = nearest(key, classes)
            raise UserError(f'{where} names the class "{key}", which {place} does not have.{near}')
        if one in names:
            raise UserError(f'{where} names the class "{key}" a second time; leave one of them.')
        if not in_prompt(name):
            raise UserError(f'{where} has an empty name for the class "{key}"; give it one.')
        if (other := owners.setdefault(in_prompt(name), one)) != one:
            raise UserError(
                f'{where} gives "{key}" the name "{name}", which "{other}" has; give each class a name of its own.'
            )
        names[one] = name
    if missing := [one for one in classes if one not in names]:
        source = "class_names" if isinstance(given, Mapping) else given
        raise UserError(
            f"{source} has no name for {counted(len(missing), 'class')} of {place}: {abbreviate(missing)}; add them."
        )
    return [names[one] for one in classes]


def _composed(classes: Sequence[str]) -> dict[str, str]:
    """Return the classes by their names as they are, and by these with composed letters."""
    return {normalized(one): one for one in classes} | {one: one for one in classes}


def _pairs(given: str | Path | Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield where a class is named, the class and its name."""
    if isinstance(given, Mapping):
        yield from (("class_names", str(key), str(name)) for key, name in given.items())
        return
    path = Path(given)
    if path.suffix.lower() != ".csv" or not path.is_file():
        raise UserError(f"Expected the class names in {FORM}, got {path}, which is none or is not there.")
    for line, row in read_csv(path, COLUMNS, COLUMNS, FORM)[1].items():
        yield f"{path} line {line}", row["class"], row["name"].strip()


def suggest_names(classes: Sequence[str]) -> list[str]:
    """Return cleaned class names: without numbers, WordNet IDs and words like "class" in front, words apart. A bare
    WordNet ID becomes ImageNet's name of it. A name that would be empty or another's stays as it is."""
    names = list(classes)
    known = packaged_names() if any(map(WORDNET_ID.fullmatch, names)) else {}
    for prefix in PREFIXES:
        rests = [name[found.end() :] if (found := prefix.match(name)) else "" for name in names]
        if all(re.match(r"[^\W\d]", rest) for rest in rests):
            names = rests
    names = [" ".join(CAMEL.sub(" ", known.get(name, name)).replace("_", " ").split()) for name in names]
    alike = Counter(map(in_prompt, names))
    return [
        name if in_prompt(name) and alike[in_prompt(name)] == 1 else one
        for name, one in zip(names, classes, strict=True)
    ]


def save_names(classes: Sequence[str], names: Sequence[str], out: Path) -> None:
    """Write a file of class names, which must not exist."""
    if out.exists():
        raise UserError(f"{out} is already there; choose another file (--out), or remove it.")
    with (
        writing(out),
        atomic_write(out) as part,
        part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *zip(classes, names, strict=True)])


KEYS = ("name", "template", "class_names", "val_share")
DEFAULT_TEMPLATE = "a photo of a {}."


class DatasetConfig(BaseModel, frozen=True):
    """The contents of ``dataset.yaml``; every key is optional."""

    name: str  # used in file names; default: the folder's name
    template: str = DEFAULT_TEMPLATE  # prompt with one ``{}`` for the class name
    # To show, by name in the folder, CSV or split file; or a file of all.
    class_names: dict[str, str] | str = {}
    val_share: float | None = Field(None, gt=0, le=0.5)  # of the images, where there is no validation set
    source: Path | None = None  # the file

    def rename(
        self, classes: Sequence[str], place: Path, given: str | Path | Mapping[str, str] | None = None
    ) -> list[str]:
        """Return the class names to show for ``classes``, those of ``place``, by ``given`` or else by the YAML."""
        if given is not None:
            return shown_names(given, classes, place)
        if isinstance(self.class_names, str):
            return shown_names(Path(str(self.source)).parent / self.class_names, classes, place)
        composed, own = _composed(classes), self.class_names.items()
        names = {composed.get(key) or composed.get(normalized(key), key): name for key, name in own}
        _check_known(names, classes, f"{self.source} renames class", "there is no such class")
        return [names.get(name, name) for name in classes]


def config_file(place: Path) -> Path:
    """Return the YAML file that describes a folder or CSV, ``.yaml`` or ``.yml`` but not both; it may not exist."""
    stem = place / "dataset" if place.is_dir() else place.parent / place.stem
    yaml_file, yml_file = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("yaml", "yml"))
    if yaml_file.is_file() and yml_file.is_file():
        raise UserError(f"There are both {yaml_file} and {yml_file.name}; leave one of them.")
    return yml_file if yml_file.is_file() else yaml_file


def read_config(place: Path, default_name: str | None = None) -> DatasetConfig:
    """Read the YAML file of a folder or CSV if it has one, or return the defaults; refuse unknown keys and values."""
    path = config_file(place)
    source = path if path.is_file() else None
    name = default_name or (place.name if place.is_dir() else place.stem)
    name = re.sub(r"[^\w.-]+", "-", normalized(name)).strip(".-") or "dataset"
    values = _load(path) if source else {}
    _check_known(values, KEYS, f"{path} has the key", "that is not a key of a dataset's YAML")
    given = values.get("name", name)
    values["name"] = normalized(given) if isinstance(given, str) else given
    try:
        config = DatasetConfig(**values, source=source)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in wrong["loc"] if part != "dict[str,str]")  # a kind of class_names
        raise UserError(f"{path}: {key}: {wrong['msg']}, got {reprlib.repr(wrong['input'])}.") from None
    check_name_and_template(config.name, config.template, f"{source or place}: ")
    return config


def _check_known(keys: Iterable[str], valid: Sequence[str], subject: str, verdict: str) -> None:
    for key in keys:
        if key not in valid:
            raise UserError(f'{subject} "{key}", but {verdict}.{nearest(key, valid)}')


def _load(path: Path) -> dict[str, Any]:
    """Return the content with every scalar as text, since class folders may be called 0, no or 1e3."""
    with reading(path, "a YAML file"):
        text = path.read_text(encoding="utf-8-sig")
    values = read_yaml(text, str(path), lambda at, written: True, place=lambda line: f"{path} line {line}: ")
    if not isinstance(values or {}, dict):
        raise UserError(f"{path} must hold keys and values ({', '.join(KEYS)}); {EXAMPLE}")
    return values or {}
