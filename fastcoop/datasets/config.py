"""The YAML file that describes a dataset of the user's own."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastcoop.datasets.files import normalized, reading
from fastcoop.errors import UserError, nearest

KEYS = ("name", "template", "class_names", "val_share")
DEFAULT_TEMPLATE = "a photo of a {}."
DEFAULT_VAL_SHARE = 0.2
MAX_NAME_BYTES = 120  # files are named after it, and file systems allow 255
WINDOWS_NAMES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # no names for files
EXAMPLE = 'for example: template: "a photo of a {}, a type of flower."'


@dataclass(frozen=True)
class DatasetConfig:
    """The contents of ``dataset.yaml``; every key is optional.

    Attributes:
        name: Short name, used in file names; default: the folder's name.
        template: Prompt with one ``{}`` for the class name.
        class_names: Nicer class names by folder (or class column, or split file) name.
        val_share: Share of the images for the validation set where there is none, in (0, 0.5]; None: a fifth.
        source: The file, if there is one.
    """

    name: str
    template: str = DEFAULT_TEMPLATE
    class_names: Mapping[str, str] = field(default_factory=dict)
    val_share: float | None = None
    source: Path | None = None

    @property
    def share_of_val(self) -> float:
        """``val_share``, or its default."""
        return DEFAULT_VAL_SHARE if self.val_share is None else self.val_share

    def rename(self, folders: Sequence[str]) -> list[str]:
        """Return the class names to show for ``folders``.

        Raises:
            UserError: ``class_names`` has a class that does not exist.
        """
        composed = {normalized(folder): folder for folder in folders} | {folder: folder for folder in folders}
        names = {
            composed.get(key) or composed.get(normalized(key), key): name
            for key, name in self.class_names.items()
        }
        _check_known(names, folders, f"{self.source} renames class", "there is no such class")
        return [names.get(folder, folder) for folder in folders]


def _check_known(keys: Iterable[str], valid: Sequence[str], subject: str, verdict: str) -> None:
    for key in keys:
        if key not in valid:
            raise UserError(f'{subject} "{key}", but {verdict}.{nearest(key, valid)}')


def check_name_and_template(name: str, template: str, where: str = "") -> None:
    """Raise a UserError for a name that cannot name files, or a template without one ``{}``."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f'{where}name must be letters, digits, "_", "-" or ".", so that it can name files; got "{name}".'
        )
    if WINDOWS_NAMES.fullmatch(name) or name.endswith(".") or len(name.encode()) > MAX_NAME_BYTES:
        raise UserError(
            f'{where}"{name}" cannot name files on every system: expected at most {MAX_NAME_BYTES} bytes, no "." at '
            "the end and none of Windows' own names (con, nul, ...); give another name, for a folder or CSV under "
            "name: of its YAML."
        )
    before, braces, after = template.partition("{}")
    if not braces or re.search("[{}]", before + after):
        raise UserError(
            f'{where}template must have {{}} once, where the class name goes, got "{template}"; {EXAMPLE}'
        )


def described_by(folder: Path, stem: str) -> Path:
    """Return the YAML file ``stem`` of ``folder``, with the ending ``.yaml`` or ``.yml``; it may not exist.

    Raises:
        UserError: There are both.
    """
    yaml_file, yml_file = (folder / f"{stem}.{suffix}" for suffix in ("yaml", "yml"))
    if yaml_file.is_file() and yml_file.is_file():
        raise UserError(f"There are both {yaml_file} and {yml_file.name}; leave one of them.")
    return yml_file if yml_file.is_file() else yaml_file


def read_config(path: Path, default_name: str) -> DatasetConfig:
    """Read ``path`` if it exists, or return the defaults.

    Raises:
        UserError: Malformed YAML (with the line), an unknown key (with the nearest), or a value out of range.
    """
    default_name = re.sub(r"[^\w.-]+", "-", normalized(default_name)).strip(".-") or "dataset"
    if not path.is_file():
        check_name_and_template(default_name, DEFAULT_TEMPLATE, f"{path.parent}: ")
        return DatasetConfig(default_name)
    values = _load(path)
    _check_known(values, KEYS, f"{path} has the key", "that is not a key of a dataset's YAML")
    names = values.pop("class_names", {})
    for key, value in values.items():
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{path}: {key} must be a single value, got {reprlib.repr(value)}.")
    name, template = normalized(values.get("name", default_name)), values.get("template", DEFAULT_TEMPLATE)
    check_name_and_template(name, template, f"{path}: ")
    if not isinstance(names, dict) or not all(isinstance(to, str) and to.strip() for to in names.values()):
        raise UserError(f"{path}: class_names must map folder names to names, such as {{n01440764: tench}}.")
    share = values.get("val_share")
    try:
        val_share = None if share is None else float(share)
    except ValueError:
        val_share = -1.0
    if val_share is not None and not 0.0 < val_share <= 0.5:
        raise UserError(f'{path}: val_share must be a number above 0 and at most 0.5, got "{share}".')
    return DatasetConfig(name, template, names, val_share, path)


class _Loader(yaml.BaseLoader):
    """Reads every scalar as text, since class folders may be called 0, no or 1e3. Refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    problem = f'"{key.value}" is given twice'
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                keys.add(key.value)
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
    if values in (None, ""):
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values ({', '.join(KEYS)}); {EXAMPLE}")
    return values
