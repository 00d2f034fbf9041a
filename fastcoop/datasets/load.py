"""From what a user calls a dataset to the dataset."""

from __future__ import annotations

from pathlib import Path

from fastcoop.datasets.dataset import Dataset, list_folders
from fastcoop.datasets.own import load_csv, load_folder
from fastcoop.errors import UserError, nearest


def load_dataset(spec: str | Path, data_root: str | Path | None = None) -> Dataset:
    """Load a dataset.

    Args:
        spec: a known name, whose official layout is expected under ``data_root``; or the path of a folder or
            CSV of the user's own; or the name of such a folder or CSV under ``data_root``.

    Raises:
        UserError: there is no such dataset (the nearest name is suggested), or its files cannot be used.
    """
    root = Path(data_root).expanduser() if data_root is not None else None
    places = [Path(spec).expanduser()]
    if root is not None and not places[0].is_absolute():
        places.insert(0, root / spec)
    for place in places:
        if place.is_dir():
            return load_folder(place)
        if place.is_file() and place.suffix.lower() == ".csv":
            return load_csv(place)
        if place.is_file():
            raise UserError(
                f"{place} is a file; a dataset is a folder, or a .csv with the columns path, class, split."
            )
    names = list_folders(root) if root is not None and root.is_dir() else []
    if root is not None and not root.is_dir():
        raise UserError(f"The data root {root} is not a folder; pass the folder that holds the datasets.")
    raise UserError(
        f"There is no dataset {spec}: looked for {' and '.join(map(str, places))}.{nearest(str(spec), names)}"
    )
