"""From what a user calls a dataset to the dataset."""

from __future__ import annotations

from pathlib import Path

from fastcoop.datasets.dataset import Dataset
from fastcoop.datasets.files import list_folders
from fastcoop.datasets.halves import half_of, split_spec
from fastcoop.datasets.official import OFFICIAL, Official, find_official, load_official
from fastcoop.datasets.own import load_csv, load_folder
from fastcoop.errors import UserError, nearest


def load_dataset(spec: str | Path, data_root: str | Path | None = None) -> Dataset:
    """Load a dataset.

    Args:
        spec: one of the paper's fifteen by name, whose official layout is expected under ``data_root``; or
            the path of a folder or CSV of the user's own, itself or relative to ``data_root``. Either followed by
            ":base" or ":new" is the first or second half of its classes.
        data_root: the folder that holds the datasets; the current one if None.

    Raises:
        UserError: there is no such dataset (the nearest name is suggested), or its files cannot be used.
    """
    name, half = split_spec(str(spec))
    if half is not None:
        return half_of(load_dataset(name, data_root), half)
    place, row = locate(spec, data_root)
    if row is not None:
        return load_official(row, place)
    return load_folder(place) if place.is_dir() else load_csv(place)


def locate(spec: str | Path, data_root: str | Path | None) -> tuple[Path, Official | None]:
    """Where the dataset lies, and its row if it is one of the fifteen; only then it need not exist.

    A folder with a ``dataset.yaml`` or ``split.json`` is always the user's own, whatever it is called.

    Raises:
        UserError: as ``load_dataset``.
    """
    root = Path(data_root).expanduser() if data_root is not None else Path()
    if not root.is_dir() and not Path(spec).expanduser().exists():
        raise UserError(f"The data root {root} is not a folder; pass the folder that holds the datasets.")
    row = find_official(str(spec))
    if row is not None and not _is_described(root / spec):
        return root / row.folder, row
    places = list(dict.fromkeys((root / spec, Path(spec).expanduser())))
    for place in places:
        row = find_official(place.name)
        if row is not None and (place / row.images).is_dir() and not _is_described(place):
            return place, row
        if place.exists():
            return place, None
    valid = [official.name for official in OFFICIAL] + own_datasets(root)
    raise UserError(
        f"There is no dataset {spec}: looked for {' and '.join(map(str, places))}.{nearest(str(spec), valid)}"
    )


def own_datasets(root: Path) -> list[str]:
    """Names under ``root`` of what may be datasets of the user's own: folders, and CSV files."""
    folders = [name for name in list_folders(root) if name not in {row.folder for row in OFFICIAL}]
    return folders + sorted(path.name for path in root.glob("*.csv"))


def _is_described(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("dataset.yaml", "split.json"))
