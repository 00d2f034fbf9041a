"""Looking at folders: classes, images, and what is missing. Everything comes back sorted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastcoop.errors import UserError

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".avif"),
}
FEWSHOT_FOLDER = "split_fewshot"


def list_folders(folder: Path) -> list[str]:
    """Names of the folders in ``folder``; hidden ones and few-shot subsets are left out."""
    names = (entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.is_dir())
    return sorted(name for name in names if not name.endswith(FEWSHOT_FOLDER))


def list_images(folder: Path) -> list[str]:
    """Names of the image files directly in ``folder``, told by their suffix."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if not entry.name.startswith(".") and os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
    )


def class_folders(folder: Path, names: Sequence[str], prefix: str = "") -> dict[str, list[str]]:
    """Paths ``{prefix}{name}/{file}`` of the images in each class folder.

    Raises:
        UserError: a class folder without images.
    """
    images = {}
    for name in names:
        files = list_images(folder / name)
        if not files:
            raise UserError(f"Class folder {folder / name} holds no images; add some or remove the folder.")
        images[name] = [f"{prefix}{name}/{file}" for file in files]
    return images


def missing_images(root: Path, paths: Iterable[str], inside: bool = True) -> list[str]:
    """Those of ``paths`` that do not exist in ``root``; each folder is read once.

    inside: whether a path that leaves ``root``, by its first or another part, counts as missing.
    """
    present: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in present:
            leaves = inside and (path.startswith("/") or ".." in folder.split("/"))
            try:
                present[folder] = set() if leaves else set(os.listdir(root / folder))
            except (OSError, ValueError):  # the latter for characters that no path can have
                present[folder] = set()
        if name not in present[folder]:
            missing.append(path)
    return missing


def some(names: Sequence[str], most: int = 3) -> str:
    """``a, b, c and 7 more``: enough of a list to act on."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
