"""Splits from the datasets' own annotation files, by the official rules, for users without the split file.

Each function takes the dataset's folder and returns items by split, with paths relative to its image folder.
Random splits are ours (``splits.SPLIT_SEED``): the official ones cannot be made again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fastcoop.datasets.dataset import Item
from fastcoop.datasets.files import class_folders, list_folders, reading
from fastcoop.datasets.splits import read_json, split_by_class, split_train_val
from fastcoop.errors import MissingFile, UserError

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


def caltech101(home: Path) -> dict[str, list[Item]]:
    return _random_split(home / "101_ObjectCategories", CALTECH101_NAMES, CALTECH101_IGNORED)


def eurosat(home: Path) -> dict[str, list[Item]]:
    return _random_split(home / "2750", EUROSAT_NAMES)


def dtd(home: Path) -> dict[str, list[Item]]:
    return _random_split(home / "images")


def food101(home: Path) -> dict[str, list[Item]]:
    return _random_split(home / "images")


def _random_split(
    images: Path, new_names: Mapping[str, str] = MappingProxyType({}), ignored: Collection[str] = ()
) -> dict[str, list[Item]]:
    folders = [name for name in list_folders(images) if name not in ignored]
    paths = class_folders(images, folders)
    return split_by_class([(new_names.get(name, name), paths[name]) for name in folders], str(images))


def oxford_flowers(home: Path) -> dict[str, list[Item]]:
    labels = np.atleast_1d(_read_mat(home / "imagelabels.mat", "labels"))
    names_file = _required(home / "cat_to_name.json")
    names = read_json(names_file)
    numbers = [str(number) for number in sorted({int(label) for label in labels})]
    if not isinstance(names, dict) or not all(isinstance(names.get(number), str) for number in numbers):
        raise UserError(f"{names_file} must map every class number in imagelabels.mat to a flower's name.")
    paths: dict[str, list[str]] = {number: [] for number in numbers}
    for index, label in enumerate(labels, start=1):
        paths[str(int(label))].append(f"image_{index:05d}.jpg")
    return split_by_class([(names[number], paths[number]) for number in numbers], str(home))


def oxford_pets(home: Path) -> dict[str, list[Item]]:
    def read(path: Path) -> list[Item]:
        def parse(line: str) -> Item:
            image, label, _species, _breed_number = line.split(" ")
            return f"{image}.jpg", int(label) - 1, image.rpartition("_")[0].lower()

        return _parsed(path, "image, class, species and breed number", parse)

    return _train_val_test(
        read(home / "annotations" / "trainval.txt"), read(home / "annotations" / "test.txt")
    )


def stanford_cars(home: Path) -> dict[str, list[Item]]:
    meta = np.atleast_1d(_read_mat(home / "devkit" / "cars_meta.mat", "class_names"))
    names = []
    for model in meta:
        words = str(model).split(" ")
        names.append(" ".join([words[-1], *words[:-1]]))  # the year first

    def read(path: Path, folder: str) -> list[Item]:
        try:
            rows = [
                (str(row["fname"]), int(row["class"]) - 1)
                for row in np.atleast_1d(_read_mat(path, "annotations"))
            ]
            return [(f"{folder}/{file}", label, names[label]) for file, label in rows]
        except UserError:
            raise
        except (ValueError, IndexError, TypeError) as error:
            raise _no_mat(path, "annotations of this dataset", error) from None

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
        key: _parsed(home / f"images_variant_{key}.txt", "an image and a variant of variants.txt", parse)
        for key in ("train", "val", "test")
    }


def sun397(home: Path) -> dict[str, list[Item]]:
    labels = {line[1:]: label for label, (_, line) in enumerate(_lines(home / "ClassName.txt"))}

    def parse(line: str) -> Item:
        image = line[1:]
        scene = image.rpartition("/")[0]
        # "a/apartment_building/outdoor" reads "outdoor apartment_building": without its letter, and backwards
        return image, labels[scene], " ".join(reversed(scene.split("/")[1:]))

    expected = "an image in a class of ClassName.txt"
    return _train_val_test(
        _parsed(home / "Training_01.txt", expected, parse), _parsed(home / "Testing_01.txt", expected, parse)
    )


def ucf101(home: Path) -> dict[str, list[Item]]:
    lists = home / "ucfTrainTestlist"

    def parse_class(line: str) -> tuple[str, int]:
        label, action = line.split(" ")
        return action, int(label) - 1

    labels = dict(_parsed(lists / "classInd.txt", "a class number and an action", parse_class))

    def parse(line: str) -> Item:
        action, video = line.split(" ")[0].split("/")
        name = "_".join(re.findall("[A-Z][^A-Z]*", action))
        return f"{name}/{video.removesuffix('.avi')}.jpg", labels[action], name

    expected = "Action/video.avi with an action of classInd.txt"
    return _train_val_test(
        _parsed(lists / "trainlist01.txt", expected, parse),
        _parsed(lists / "testlist01.txt", expected, parse),
    )


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
    with reading(_required(path), "a list"):
        text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def _parsed(path: Path, expected: str, parse: Callable[[str], Any]) -> list[Any]:
    parsed = []
    for number, line in _lines(path):
        try:
            parsed.append(parse(line))
        except (ValueError, KeyError):
            raise UserError(f'{path} line {number}: expected {expected}, got "{line}".') from None
    return parsed


def _read_mat(path: Path, key: str) -> np.ndarray:
    import scipy.io

    try:
        with reading(_required(path), "a MATLAB file"):
            return scipy.io.loadmat(path, squeeze_me=True)[key]
    except UserError:
        raise
    except Exception as error:  # damaged files may raise any exception
        raise _no_mat(path, key, error) from None


def _no_mat(path: Path, content: str, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as a MATLAB file with {content} ({error}); download it again.")
