"""The YAML file that describes a dataset of the user's own."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from fastcoop.datasets.files import normalized, reading
from fastcoop.datasets.names import shown_names
from fastcoop.errors import UserError, nearest

KEYS = ("name", "template", "class_names", "val_share")
DEFAULT_TEMPLATE = "a photo of a {}."
MAX_NAME_BYTES = 120  # files are named after it, and file systems allow 255
WINDOWS_NAMES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # no names for files
EXAMPLE = 'for example: template: "a photo of a {}, a type of flower."'


class DatasetConfig(BaseModel, frozen=True):
    """The contents of ``dataset.yaml``; every key is optional."""

    name: str  # used in file names; default: the folder's name
    template: str = DEFAULT_TEMPLATE  # prompt with one ``{}`` for the class name
    class_names: (
        dict[str, str] | str
    ) = {}  # to show, by the name in the folder, CSV or split file; or a file of all
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
        composed = {normalized(name): name for name in classes} | {name: name for name in classes}
        found = {key: composed.get(key) or composed.get(normalized(key), key) for key in self.class_names}
        names = {found[key]: name for key, name in self.class_names.items()}
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


def check_name_and_template(name: str, template: str, where: str = "") -> None:
    """Raise a UserError for a name that cannot name files, or a template without one ``{}``."""
    too_long = len(name.encode()) > MAX_NAME_BYTES
    if too_long or not re.fullmatch(r"\w([\w.-]*[\w-])?", name) or WINDOWS_NAMES.fullmatch(name):
        raise UserError(
            f'{where}name must be letters, digits, "_", "-" or ".", so that it can name files on every system: at most '
            f'{MAX_NAME_BYTES} bytes, no "." at the end and none of Windows\' own names (con, nul, ...); got "{name}". '
            "Give another name, for a folder or CSV under name: of its YAML."
        )
    before, braces, after = template.partition("{}")
    if not braces or re.search("[{}]", before + after):
        place = "where the class name goes"
        raise UserError(f'{where}template must have {{}} once, {place}, got "{template}"; {EXAMPLE}')


def _check_known(keys: Iterable[str], valid: Sequence[str], subject: str, verdict: str) -> None:
    for key in keys:
        if key not in valid:
            raise UserError(f'{subject} "{key}", but {verdict}.{nearest(key, valid)}')


class _Loader(yaml.BaseLoader):
    """Reads every scalar as text, since class folders may be called 0, no or 1e3. Refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if keys.setdefault(str(key.value), key) is not key:
                problem = f'"{key.value}" is given twice'
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def _load(path: Path) -> dict[str, Any]:
    try:
        with reading(path, "a YAML file"):
            values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{path}{line} is not valid YAML: {problem}.") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply for a dataset's YAML.") from None
    if not isinstance(values or {}, dict):
        raise UserError(f"{path} must hold keys and values ({', '.join(KEYS)}); {EXAMPLE}")
    return values or {}
