"""The few lines of YAML in which a user describes a dataset of their own."""

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
LONGEST_NAME = 120  # bytes: names of files are made of it, and file systems take 255
RESERVED = re.compile(
    r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE
)  # no file on Windows is called so
EXAMPLE = 'for example: template: "a photo of a {}, a type of flower."'


@dataclass(frozen=True)
class DatasetConfig:
    """What ``dataset.yaml`` may say; every key is optional.

    Attributes:
        name: short name, used as a file name; the folder's name if absent.
        template: prompt with one ``{}`` for the class name.
        class_names: nicer names, from folder (or class column, or split file) name.
        val_share: share of the images that becomes the validation set where there is none, in (0, 0.5]; a fifth
            if absent.
        source: the file that says so, if there is one.
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
        """The class names to show for ``folders``.

        Raises:
            UserError: ``class_names`` speaks of a class that does not exist.
        """
        composed = {normalized(folder): folder for folder in folders}
        names = {
            key if key in folders else composed.get(normalized(key), key): key for key in self.class_names
        }
        check_known(names, folders, f"{self.source} renames class", "there is no such class")
        return [self.class_names[names[folder]] if folder in names else folder for folder in folders]


def check_known(keys: Iterable[str], valid: Sequence[str], subject: str, verdict: str) -> None:
    """Refuse the first of ``keys`` that is not among ``valid``, naming the nearest one that is."""
    for key in keys:
        if key not in valid:
            raise UserError(f'{subject} "{key}", but {verdict}.{nearest(key, valid)}')


def check_name_and_template(name: str, template: str, where: str = "") -> None:
    """Refuse a name that cannot name files and a template without one place for the class name."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f'{where}name must be letters, digits, "_", "-" or ".", so that it can name files; got "{name}".'
        )
    if RESERVED.fullmatch(name) or name.endswith(".") or len(name.encode()) > LONGEST_NAME:
        raise UserError(
            f'{where}"{name}" cannot name files on every system: expected at most {LONGEST_NAME} bytes, no "." at the '
            "end and none of Windows' own names (con, nul, ...); give another name, for a folder or CSV under name: of "
            "its YAML."
        )
    rest = template.replace("{}", "")
    if template.count("{}") != 1 or "{" in rest or "}" in rest:
        raise UserError(
            f'{where}template must have {{}} once, where the class name goes, got "{template}"; {EXAMPLE}'
        )


def described_by(folder: Path, stem: str) -> Path:
    """The YAML file ``stem`` of ``folder``, whether it ends in ``.yaml`` or ``.yml``; it need not exist.

    Raises:
        UserError: there are both.
    """
    yaml_file, yml_file = (folder / f"{stem}.{suffix}" for suffix in ("yaml", "yml"))
    if yaml_file.is_file() and yml_file.is_file():
        raise UserError(f"There are both {yaml_file} and {yml_file.name}; leave one of them.")
    return yml_file if yml_file.is_file() else yaml_file


def read_config(path: Path, default_name: str) -> DatasetConfig:
    """Read ``path`` if it exists.

    Raises:
        UserError: malformed YAML (with the line), an unknown key (with the nearest), or a value out of range.
    """
    default_name = re.sub(r"[^\w.-]+", "-", normalized(default_name)).strip(".-") or "dataset"
    if not path.is_file():
        check_name_and_template(default_name, DEFAULT_TEMPLATE, f"{path.parent}: ")
        return DatasetConfig(name=default_name)
    values = _load(path)
    check_known(values, KEYS, f"{path} has the key", "that is not a key of a dataset's YAML")
    name = normalized(_text(values, "name", path, default_name))
    template = _text(values, "template", path, DEFAULT_TEMPLATE)
    check_name_and_template(name, template, f"{path}: ")
    names = values.get("class_names", {})
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and name.strip() for name in names.values()
    ):
        raise UserError(f"{path}: class_names must map folder names to names, such as {{n01440764: tench}}.")
    val_share: float | None = None
    if "val_share" in values:
        share = _text(values, "val_share", path, "")
        try:
            val_share = float(share)
        except ValueError:
            val_share = -1.0
        if not 0.0 < val_share <= 0.5:
            raise UserError(f'{path}: val_share must be a number above 0 and at most 0.5, got "{share}".')
    return DatasetConfig(name, template, names, val_share, path)


class _Loader(yaml.BaseLoader):
    """Leaves every scalar a string: class folders named 0, no or 1e3 stay what they are. Refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f'"{key.value}" is given twice', key.start_mark
                    )
                keys.add(key.value)
        return super().construct_mapping(node, deep)


def _load(path: Path) -> dict[str, object]:
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


def _text(values: Mapping[str, object], key: str, path: Path, default: str) -> str:
    value = values.get(key, default)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{path}: {key} must be a single value, got {reprlib.repr(value)}.")
    return value
