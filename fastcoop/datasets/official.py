"""The datasets of the paper, and those of installed packages, in their official layouts.

Readers of the datasets' own files serve users without the split file. Each takes the dataset's folder and returns items
by split, with paths relative to the folder of its images. Random splits use fastcoop's own seed (``SPLIT_SEED``): the
official ones cannot be drawn again.
"""

from __future__ import annotations

import functools
import posixpath
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from fastcoop.datasets import splits as rules
from fastcoop.datasets.dataset import (
    SPLITS,
    Dataset,
    Item,
    Items,
    check_name_and_template,
    make_dataset,
    warn_once,
)
from fastcoop.datasets.files import FEWSHOT_FOLDER, Tree
from fastcoop.errors import MissingFile, UserError, abbreviate
from fastcoop.files import read_json, reading
from fastcoop.plugins import Registry


@dataclass(frozen=True)
class Download:
    """Something to download."""

    what: str  # its address, in words
    makes: str  # the path that it makes, relative to the data root
    put_into: str | None = None  # the folder to put it in, relative to the data root; None: that of ``makes``
    extract: bool = True  # whether it is an archive

    def sentence(self, root: Path) -> str:
        """Return what to do, for the data root ``root``."""
        makes = root / self.makes
        into = makes.parent if self.put_into is None else root / self.put_into
        if self.extract:
            return f"get {self.what} and extract it in {into}, which makes {makes}"
        return f"get {self.what} and put it in {into}, as {makes}"


@dataclass(frozen=True)
class OfficialDataset:
    """A dataset with a known layout: one of the paper's Table 6, or one that an installed package provides.

    Attributes:
        name: Its name in grid files and result tables.
        title: Its name in tables and figures.
        folder: Its folder under the data root.
        images: The folder of its images in ``folder``; split files are relative to it.
        template: The hand-written prompt, with one ``{}`` for the class name.
        counts: Classes, training, validation and test images; None where Table 6 has N/A.
        read: Reads the items by split from the dataset's own files, given ``folder``; paths are relative to ``images``.
        downloads: What to download, and where to put it.
        split_file: The official split file in ``folder``, if there is one.
        class_folders: Lists the folders that ``images`` should have, given ``folder``, where that is known.
        class_ids: Returns the WordNet IDs in label order, given ``folder`` and the items, where classes have them.
    """

    name: str
    title: str
    folder: str
    images: str
    template: str
    counts: tuple[int, int | None, int | None, int]
    read: Callable[[Path], Items]
    downloads: tuple[Download, ...]
    split_file: str | None = None
    class_folders: Callable[[Path], list[str]] | None = None
    class_ids: Callable[[Path, Items], tuple[str, ...]] | None = None

    def missing(self, home: Path) -> str:
        """Return a sentence on images that are not there: where they should be, and what to download."""
        todo = "; ".join(download.sentence(home.parent) for download in self.downloads)
        return f"{self.title} is not in {home / self.images}; {todo}."


def _paper_datasets() -> Iterator[OfficialDataset]:
    rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for name, row in rows.items():
        row["folder"], _, images = row.pop("images").partition("/")
        row["counts"] = tuple(row["counts"])
        row["downloads"] = tuple(Download(**one) for one in row["downloads"])
        if (options := row.pop("random_split", None)) is not None:
            row["read"] = partial(random_split, images=images, **options)
        elif name.startswith("imagenet") and name != "imagenet":
            row["read"] = partial(imagenet_target, images=images)
        else:
            row["read"] = globals()[name]
        if name.startswith("imagenet"):
            row["class_ids"] = imagenet_ids
        if forms := row.get("class_folders"):
            row["class_folders"] = partial(class_folders, forms=forms)
        yield OfficialDataset(name, images=images, **row)


def _check(name: str, provided: Any) -> OfficialDataset:
    """Check a dataset of an installed package."""
    if not isinstance(provided, OfficialDataset):
        raise TypeError(f"expected a fastcoop.datasets.OfficialDataset, got {provided!r}")
    if provided.name != name:
        raise ValueError(f'its attribute name is "{provided.name}"')
    check_name_and_template(name, provided.template)
    return provided


def find_official(name: str) -> OfficialDataset | None:
    """Return the official dataset of this name, if any. The paper's datasets also have their title or folder as a
    name, in any case, with or without separators."""
    if "/" in name or "\\" in name:
        return None
    return _BY_ALIAS.get(re.sub(SEPARATORS, "", name.lower())) or OFFICIAL.get(name)


def read_official(row: OfficialDataset, home: Path) -> tuple[list[str], Items, Path | None]:
    """Return class names, items by split, and the official split file if they come from it.

    ``home`` is the dataset's folder, usually ``<data root>/<row.folder>``; if it is missing, a UserError says what to
    get.
    """
    if not (home / row.images).is_dir():
        raise MissingFile(row.missing(home))
    split_file = home / row.split_file if row.split_file else None
    if split_file is not None and split_file.is_file():
        items = rules.read_items(split_file, required=SPLITS)
    else:
        split_file, items = None, row.read(home)
    return rules.names_by_label(items, split_file or home), items, split_file


def load_official(row: OfficialDataset, home: Path) -> Dataset:
    """Load an official dataset from ``home``, with a warning where the split is not the official one."""
    names, items, split_file = read_official(row, home)
    root = home / row.images
    items = rules.find_items(items, root, split_file or home)
    if row.split_file and split_file is None:
        warn_once(
            f"{row.title}: {home / row.split_file} is missing, so the split was made from the dataset's own files and "
            f"is not the official one; numbers will not compare exactly. Get {row.downloads[-1].what}."
        )
    if len(names) != row.counts[0]:
        warn_once(f"{row.title}: {len(names)} of its {row.counts[0]} classes are in {root}.")
    ids = row.class_ids(home, items) if row.class_ids else ()
    others = {"title": row.title, "fewshot_dir": home / FEWSHOT_FOLDER, "class_ids": ids}
    return make_dataset(row.name, root, names, row.template, rules.make_splits(items), **others)


SEPARATORS = "[^a-z0-9]"  # left out of names in lower case, where these are compared
HELD_OUT = 4  # validation images per class of ImageNet, the most that a few-shot validation set has
T = TypeVar("T")


def random_split(
    home: Path, images: str, renamed: Mapping[str, str] | None = None, ignored: Collection[str] = ()
) -> Items:
    """Split the class folders of ``images`` at random: 50% train, 20% val, 30% test."""
    tree = Tree(home / images)
    folders = [name for name in tree.listing().folders if name not in ignored]
    classes = [(name, label, (renamed or {}).get(name, name)) for label, name in enumerate(folders)]
    return rules.split_by_class(rules.class_items(tree, classes), tree.root)


def oxford_flowers(home: Path) -> Items:
    numbers = _read_mat(home / "imagelabels.mat", "labels", int)
    names_file = _required(home / "cat_to_name.json")
    names = read_json(names_file)
    labels = {number: label for label, number in enumerate(sorted(set(numbers)))}
    if not isinstance(names, dict) or not all(isinstance(names.get(str(number)), str) for number in labels):
        raise UserError(f"{names_file} must map every class number in imagelabels.mat to a flower's name.")
    items = [
        (f"image_{image:05d}.jpg", labels[number], names[str(number)])
        for image, number in enumerate(numbers, start=1)
    ]
    return rules.split_by_class(items, home)


def oxford_pets(home: Path) -> Items:
    def parse(line: str) -> Item:
        image, label, _species, _breed_number = line.split(" ")
        return f"{image}.jpg", int(label) - 1, image.rpartition("_")[0].lower()

    folder, expected = home / "annotations", "image, class, species and breed number"
    return _train_and_test(folder / "trainval.txt", folder / "test.txt", expected, parse)


def stanford_cars(home: Path) -> Items:
    def year_first(model: str) -> str:
        *words, year = str(model).split(" ")
        return " ".join([year, *words])

    names = _read_mat(home / "devkit" / "cars_meta.mat", "class_names", year_first)

    def read(path: Path, folder: str) -> list[Item]:
        def parse(row: Any) -> Item:
            label = int(row["class"]) - 1
            return f"{folder}/{row['fname']}", label, names[label]

        return _read_mat(path, "annotations", parse)

    train, val = rules.split_train_val(read(home / "devkit" / "cars_train_annos.mat", "cars_train"))
    test = read(home / "cars_test_annos_withlabels.mat", "cars_test")
    return {"train": train, "val": val, "test": test}


def fgvc_aircraft(home: Path) -> Items:
    labels = {name: label for label, name in enumerate(read_list(home / "variants.txt", "a variant", str))}

    def parse(line: str) -> Item:
        image, _, variant = line.partition(" ")
        return f"{image}.jpg", labels[variant], variant

    expected = "an image and a variant of variants.txt"
    return {key: read_list(home / f"images_variant_{key}.txt", expected, parse) for key in SPLITS}


def sun397(home: Path) -> Items:
    classes = read_list(home / "ClassName.txt", "a class", str)
    labels = {name[1:]: label for label, name in enumerate(classes)}

    def parse(line: str) -> Item:
        image = line[1:]
        scene = image.rpartition("/")[0]
        # The class "a/apartment_building/outdoor" is called "outdoor apartment_building".
        return image, labels[scene], " ".join(reversed(scene.split("/")[1:]))

    expected = "an image in a class of ClassName.txt"
    return _train_and_test(home / "Training_01.txt", home / "Testing_01.txt", expected, parse)


def ucf101(home: Path) -> Items:
    def parse_class(line: str) -> tuple[str, int]:
        label, action = line.split(" ")
        return action, int(label) - 1

    folder, expected = home / "ucfTrainTestlist", "Action/video.avi with an action of classInd.txt"
    labels = dict(read_list(folder / "classInd.txt", "a class number and an action", parse_class))

    def parse(line: str) -> Item:
        action, video = line.split(" ")[0].split("/")
        name = "_".join(re.findall("[A-Z][^A-Z]*", action))
        return f"{name}/{video.removesuffix('.avi')}.jpg", labels[action], name

    return _train_and_test(folder / "trainlist01.txt", folder / "testlist01.txt", expected, parse)


def imagenet(home: Path) -> Items:
    """Read ImageNet: its validation images are the test set; ``HELD_OUT`` training images per class validate.

    The held-out images stay in train, which is the official list; few-shot sampling leaves them out.
    """
    tree = Tree(home / "images")
    train, test = (_imagenet_items(tree, home, folder) for folder in ("train", "val"))
    folders = [{path.split("/")[1] for path, _, _ in part} for part in (train, test)]
    if folders[0] != folders[1]:
        odd = abbreviate(sorted(folders[0] ^ folders[1]))
        raise UserError(f"Expected the same class folders in {tree.root}/train and /val; only one has {odd}.")
    rng = random.Random(rules.SPLIT_SEED)
    val = [
        item
        for members in rules.by_class(train)
        for item in rng.sample(members, min(HELD_OUT, max(1, len(members) // 5), len(members) - 1))
    ]
    return {"train": train, "val": val, "test": test}


def imagenet_target(home: Path, images: str) -> Items:
    """Read a test set with a folder per class of ImageNet; classes without a folder are left out."""
    return {"test": _imagenet_items(Tree(home / images), home)}


def imagenet_ids(home: Path, items: Items) -> tuple[str, ...]:
    """Return WordNet IDs in label order, from the folders of the test images."""
    folders = {label: path.split("/")[-2] for path, label, _ in reversed(items["test"])}
    ids = list(wordnet_names(home))
    ordered = [folders[label] for label in range(len(folders))]
    return tuple(ids[int(folder)] if folder.isdecimal() else folder for folder in ordered)


def class_folders(home: Path, forms: Collection[str]) -> list[str]:
    """Return the class folders of a complete copy of ImageNet or a target, by their forms in ``official.yaml``."""
    names = list(enumerate(wordnet_names(home)))
    return [form.format(id=id, number=number) for form in forms for number, id in names]


def wordnet_names(home: Path) -> dict[str, str]:
    """Return ImageNet's class names by WordNet ID, in label order: of ``classnames.txt`` in ``home`` or in
    ImageNet's own folder beside it, else of ``class_names.json``."""

    def parse(line: str) -> tuple[str, str]:
        folder, name = line.split(" ", 1)
        return folder, name

    for path in (home / "classnames.txt", home.parent / "imagenet" / "classnames.txt"):
        if path.is_file():
            return dict(read_list(path, "a folder and a class name", parse))
    return packaged_names()


@functools.cache
def packaged_names() -> dict[str, str]:
    """Return ImageNet's class names by WordNet ID, as open_clip has them."""
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), paper_class_names()["imagenet"], strict=True))


def paper_class_names() -> dict[str, list[str]]:
    """Return the class names of the paper's eleven datasets in label order, as prompts have them."""
    names: dict[str, list[str]] = read_json(Path(__file__).with_name("class_names.json"))
    return names


def _imagenet_items(tree: Tree, home: Path, inside: str = "") -> list[Item]:
    """Return the images of the class folders in ``inside``, labeled in the order of their numbers or WordNet IDs."""
    folder, names = tree.root / inside, wordnet_names(home)
    numbered = dict(enumerate(names.values()))
    if not folder.is_dir():
        raise MissingFile(f"{folder} is missing; it should hold a folder per class (n01440764, ...).")
    if not (folders := tree.listing(inside).folders):
        raise UserError(
            f"{folder} holds no folders; sort its images into a folder per class (n01440764, ...)."
        )
    known = {name: names.get(name) or numbered.get(int(name) if name.isdecimal() else -1) for name in folders}
    if unknown := abbreviate([name for name in folders if not known[name]]):
        raise UserError(f"{folder} holds folders that are none of ImageNet's 1,000 classes: {unknown}.")
    ordered = sorted(folders, key=lambda name: (int(name) if name.isdecimal() else 0, name))
    places = [(posixpath.join(inside, name), label, known[name] or "") for label, name in enumerate(ordered)]
    return rules.class_items(tree, places)


def _train_and_test(train_list: Path, test_list: Path, expected: str, parse: Callable[[str], Item]) -> Items:
    train, val = rules.split_train_val(read_list(train_list, expected, parse))
    return {"train": train, "val": val, "test": read_list(test_list, expected, parse)}


def _required(path: Path) -> Path:
    if not path.is_file():
        raise MissingFile(
            f"{path} is missing: without the official split file the dataset's own annotations are needed; "
            "`fastcoop datasets check NAME --data-root FOLDER` says where to get both."
        )
    return path


def read_list(path: Path, expected: str, parse: Callable[[str], T]) -> list[T]:
    """Parse the lines of a file that are not empty; ``expected`` says what a line should contain."""
    with reading(_required(path), "a list"):
        text = path.read_text(encoding="utf-8-sig")
    parsed = []
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        try:
            parsed += [parse(line)] if line else []
        except (ValueError, KeyError):
            raise UserError(f'{path} line {number}: expected {expected}, got "{line}".') from None
    return parsed


def _read_mat(path: Path, key: str, parse: Callable[[Any], T]) -> list[T]:
    import scipy.io

    _required(path)
    try:
        rows = np.atleast_1d(scipy.io.loadmat(path, squeeze_me=True)[key])
        return [parse(row) for row in rows]
    except Exception as error:  # damaged files may raise any exception
        message = f"{path} cannot be read as a MATLAB file with {key} ({error}); download it again."
        raise UserError(message) from None


_PAPER = {row.name: row for row in _paper_datasets()}
_ALIASES = ((alias.lower(), row) for row in _PAPER.values() for alias in (row.folder, row.title, row.name))
_BY_ALIAS = {re.sub(SEPARATORS, "", alias): row for alias, row in _ALIASES}
OFFICIAL = Registry("fastcoop.datasets", "dataset", _PAPER, _check)
