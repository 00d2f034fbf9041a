"""Splits from the datasets' own annotation files, by the official rules, for users without the split file.

Each reader has the name of its dataset; it takes the dataset's folder and returns items by split, with paths relative
to the folder of its images.
Random splits use fastcoop's own seed (``splits.SPLIT_SEED``): the official ones cannot be drawn again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from fastcoop.datasets.dataset import Item
from fastcoop.datasets.files import class_folders, list_folder, reading
from fastcoop.datasets.splits import read_json, split_by_class, split_train_val
from fastcoop.errors import MissingFile, UserError

T = TypeVar("T")

CALTECH101_IGNORED = {"BACKGROUND_Google", "Faces_easy"}
CALTECH101_NAMES = {
    "airplanes": "airplane",
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
}
EUROSAT_NAMES = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}


def random_split(
    images: str, renamed: Mapping[str, str] = MappingProxyType({}), ignored: Collection[str] = ()
) -> Callable[[Path], dict[str, list[Item]]]:
    """Return a reader that splits the class folders of ``images`` at random: 50% train, 20% val, 30% test."""

    def read(home: Path) -> dict[str, list[Item]]:
        folders = [name for name in list_folder(home / images).folders if name not in ignored]
        paths = class_folders(home / images, folders)
        return split_by_class(
            [(renamed.get(name, name), paths[name]) for name in folders], str(home / images)
        )

    return read


caltech101 = random_split("101_ObjectCategories", CALTECH101_NAMES, CALTECH101_IGNORED)
eurosat = random_split("2750", EUROSAT_NAMES)
dtd = food101 = random_split("images")


def oxford_flowers(home: Path) -> dict[str, list[Item]]:
    labels = _read_mat(home / "imagelabels.mat", "labels", int)
    names_file = _required(home / "cat_to_name.json")
    names = read_json(names_file)
    paths: dict[str, list[str]] = {str(label): [] for label in sorted(set(labels))}
    if not isinstance(names, dict) or not all(isinstance(names.get(number), str) for number in paths):
        raise UserError(f"{names_file} must map every class number in imagelabels.mat to a flower's name.")
    for index, label in enumerate(labels, start=1):
        paths[str(label)].append(f"image_{index:05d}.jpg")
    return split_by_class([(names[number], paths[number]) for number in paths], str(home))


def oxford_pets(home: Path) -> dict[str, list[Item]]:
    def parse(line: str) -> Item:
        image, label, _species, _breed_number = line.split(" ")
        return f"{image}.jpg", int(label) - 1, image.rpartition("_")[0].lower()

    lists = home / "annotations" / "trainval.txt", home / "annotations" / "test.txt"
    return _train_val_test(
        *(_read_list(path, "image, class, species and breed number", parse) for path in lists)
    )


def stanford_cars(home: Path) -> dict[str, list[Item]]:
    def year_first(model: str) -> str:
        *words, year = str(model).split(" ")
        return " ".join([year, *words])

    names = _read_mat(home / "devkit" / "cars_meta.mat", "class_names", year_first)

    def read(path: Path, folder: str) -> list[Item]:
        def parse(row: Any) -> Item:
            label = int(row["class"]) - 1
            return f"{folder}/{row['fname']}", label, names[label]

        return _read_mat(path, "annotations", parse)

    return _train_val_test(
        read(home / "devkit" / "cars_train_annos.mat", "cars_train"),
        read(home / "cars_test_annos_withlabels.mat", "cars_test"),
    )


def fgvc_aircraft(home: Path) -> dict[str, list[Item]]:
    labels = {line: label for label, (_, line) in enumerate(_lines(home / "variants.txt"))}

    def parse(line: str) -> Item:
        image, _, variant = line.partition(" ")
        return f"{image}.jpg", labels[variant], variant

    return {
        key: _read_list(home / f"images_variant_{key}.txt", "an image and a variant of variants.txt", parse)
        for key in ("train", "val", "test")
    }


def sun397(home: Path) -> dict[str, list[Item]]:
    labels = {line[1:]: label for label, (_, line) in enumerate(_lines(home / "ClassName.txt"))}

    def parse(line: str) -> Item:
        image = line[1:]
        scene = image.rpartition("/")[0]
        # The class "a/apartment_building/outdoor" is called "outdoor apartment_building".
        return image, labels[scene], " ".join(reversed(scene.split("/")[1:]))

    lists = home / "Training_01.txt", home / "Testing_01.txt"
    return _train_val_test(
        *(_read_list(path, "an image in a class of ClassName.txt", parse) for path in lists)
    )


def ucf101(home: Path) -> dict[str, list[Item]]:
    folder = home / "ucfTrainTestlist"

    def parse_class(line: str) -> tuple[str, int]:
        label, action = line.split(" ")
        return action, int(label) - 1

    labels = dict(_read_list(folder / "classInd.txt", "a class number and an action", parse_class))

    def parse(line: str) -> Item:
        action, video = line.split(" ")[0].split("/")
        name = "_".join(re.findall("[A-Z][^A-Z]*", action))
        return f"{name}/{video.removesuffix('.avi')}.jpg", labels[action], name

    lists = folder / "trainlist01.txt", folder / "testlist01.txt"
    expected = "Action/video.avi with an action of classInd.txt"
    return _train_val_test(*(_read_list(path, expected, parse) for path in lists))


def _train_val_test(trainval: list[Item], test: list[Item]) -> dict[str, list[Item]]:
    train, val = split_train_val(trainval)
    return {"train": train, "val": val, "test": test}


def _required(path: Path) -> Path:
    if not path.is_file():
        raise MissingFile(
            f"{path} is missing: without the official split file the dataset's own annotations are needed; "
            "`fastcoop datasets check NAME --data-root FOLDER` says where to get both."
        )
    return path


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty, with their numbers."""
    with reading(_required(path), "a list"):
        text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def _read_list(path: Path, expected: str, parse: Callable[[str], T]) -> list[T]:
    parsed = []
    for number, line in _lines(path):
        try:
            parsed.append(parse(line))
        except (ValueError, KeyError):
            raise UserError(f'{path} line {number}: expected {expected}, got "{line}".') from None
    return parsed


def _read_mat(path: Path, key: str, parse: Callable[[Any], T]) -> list[T]:
    import scipy.io

    try:
        with reading(_required(path), "a MATLAB file"):
            rows = np.atleast_1d(scipy.io.loadmat(path, squeeze_me=True)[key])
            return [parse(row) for row in rows]
    except UserError:
        raise
    except Exception as error:  # damaged files may raise any exception
        raise UserError(
            f"{path} cannot be read as a MATLAB file with {key} ({error}); download it again."
        ) from None
