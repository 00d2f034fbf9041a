"""The fifteen datasets of the paper: a row each, after its Table 6 and the official instructions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcoop.datasets import annotation_files, imagenet
from fastcoop.datasets.dataset import Dataset, Item, make_dataset, make_splits, warn_once
from fastcoop.datasets.files import FEWSHOT_FOLDER
from fastcoop.datasets.splits import find_items, names_by_label, read_items
from fastcoop.errors import MissingFile

PHOTO = "a photo of a {}."
Items = dict[str, list[Item]]
VGG = "https://www.robots.ox.ac.uk/~vgg/data"
CARS = "https://ai.stanford.edu/~jkrause"
SUN = "https://vision.princeton.edu/projects/2010/SUN"
UCF = "https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip"
UCF_SPLIT = ("split_zhou_UCF101.json", "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y")


@dataclass(frozen=True)
class Download:
    """Something to get.

    Attributes:
        what: its address, in words.
        into: the folder it goes to, relative to the data root.
        makes: what is there once it is done, relative to the data root.
        archive: whether it is to be extracted.
    """

    what: str
    into: str
    makes: str
    archive: bool = True

    def sentence(self, root: Path) -> str:
        """What to do, in one sentence."""
        into, makes = root / self.into, root / self.makes
        if self.archive:
            return f"get {self.what} and extract it in {into}, which makes {makes}"
        return f"get {self.what} and put it in {into}, as {makes}"


@dataclass(frozen=True)
class Official:
    """A row of Table 6, and where its files lie.

    Attributes:
        name: what grid files and result tables call it.
        title: what the paper calls it.
        folder: its folder under the data root.
        images: the folder of its images, under ``folder``; split files are relative to it.
        template: hand-crafted prompt with one ``{}``.
        counts: classes, train, val and test images; None where Table 6 says N/A.
        build: makes the splits from the dataset's own files, given ``folder``; paths relative to ``images``.
        split_file: the official split file in ``folder``, where there is one.
        downloads: what to get and where to put it.
        class_folders: the folders that ``images`` should have, given ``folder``, where that is known.
    """

    name: str
    title: str
    folder: str
    images: str
    template: str
    counts: tuple[int, int | None, int | None, int]
    build: Callable[[Path], Items]
    downloads: tuple[Download, ...]
    split_file: str | None = None
    class_folders: Callable[[Path], list[str]] | None = None


def _drive(file_id: str) -> str:
    return f"https://drive.google.com/file/d/{file_id}/view"


def _row(
    name: str,
    title: str,
    images: str,
    template: str,
    counts: tuple[int, int | None, int | None, int],
    build: Callable[[Path], Items],
    downloads: Sequence[tuple[Any, ...]],
    split: tuple[str, str] | None = None,
    class_folders: Callable[[Path], list[str]] | None = None,
) -> Official:
    folder, _, images = images.partition("/")
    extra = ((f"{split[0]} from {_drive(split[1])}", folder, f"{folder}/{split[0]}", False),) if split else ()
    return Official(
        name,
        title,
        folder,
        images,
        template,
        counts,
        build,
        tuple(Download(*one) for one in (*downloads, *extra)),
        split[0] if split else None,
        class_folders,
    )


OFFICIAL = (
    _row(
        "imagenet",
        "ImageNet",
        "imagenet/images",
        PHOTO,
        (1000, 1_281_167, None, 50_000),
        imagenet.train_and_val,
        [
            (
                f"the ILSVRC2012 {what} images from https://image-net.org/index.php, a folder per class "
                "(n01440764, ...)",
                "imagenet/images",
                f"imagenet/images/{folder}",
                False,
            )
            for what, folder in (("training", "train"), ("validation", "val"))
        ],
        class_folders=imagenet.folders_of_train_and_val,
    ),
    _row(
        "caltech101",
        "Caltech101",
        "caltech-101/101_ObjectCategories",
        PHOTO,
        (100, 4128, 1649, 2465),
        annotation_files.caltech101,
        [
            (
                "101_ObjectCategories.tar.gz from https://data.caltech.edu/records/mzrjq-6wc02",
                "caltech-101",
                "caltech-101/101_ObjectCategories",
            )
        ],
        ("split_zhou_Caltech101.json", "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN"),
    ),
    _row(
        "oxford_pets",
        "OxfordPets",
        "oxford_pets/images",
        "a photo of a {}, a type of pet.",
        (37, 2944, 736, 3669),
        annotation_files.oxford_pets,
        [
            (f"{VGG}/pets/data/images.tar.gz", "oxford_pets", "oxford_pets/images"),
            (f"{VGG}/pets/data/annotations.tar.gz", "oxford_pets", "oxford_pets/annotations"),
        ],
        ("split_zhou_OxfordPets.json", "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs"),
    ),
    _row(
        "stanford_cars",
        "StanfordCars",
        "stanford_cars/",
        PHOTO,
        (196, 6509, 1635, 8041),
        annotation_files.stanford_cars,
        [
            (f"{CARS}/car196/cars_train.tgz", "stanford_cars", "stanford_cars/cars_train"),
            (f"{CARS}/car196/cars_test.tgz", "stanford_cars", "stanford_cars/cars_test"),
            (f"{CARS}/cars/car_devkit.tgz", "stanford_cars", "stanford_cars/devkit"),
            (
                f"{CARS}/car196/cars_test_annos_withlabels.mat",
                "stanford_cars",
                "stanford_cars/cars_test_annos_withlabels.mat",
                False,
            ),
        ],
        ("split_zhou_StanfordCars.json", "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT"),
    ),
    _row(
        "oxford_flowers",
        "Flowers102",
        "oxford_flowers/jpg",
        "a photo of a {}, a type of flower.",
        (102, 4093, 1633, 2463),
        annotation_files.oxford_flowers,
        [
            (f"{VGG}/flowers/102/102flowers.tgz", "oxford_flowers", "oxford_flowers/jpg"),
            (f"{VGG}/flowers/102/imagelabels.mat", "oxford_flowers", "oxford_flowers/imagelabels.mat", False),
            (
                f"cat_to_name.json from {_drive('1AkcxCXeK_RCGCEC_GvmWxjcjaNhu-at0')}",
                "oxford_flowers",
                "oxford_flowers/cat_to_name.json",
                False,
            ),
        ],
        ("split_zhou_OxfordFlowers.json", "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT"),
    ),
    _row(
        "food101",
        "Food101",
        "food-101/images",
        "a photo of {}, a type of food.",
        (101, 50_500, 20_200, 30_300),
        annotation_files.food101,
        [
            (
                "food-101.tar.gz from https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
                "",
                "food-101/images",
            )
        ],
        ("split_zhou_Food101.json", "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl"),
    ),
    _row(
        "fgvc_aircraft",
        "FGVCAircraft",
        "fgvc_aircraft/images",
        "a photo of a {}, a type of aircraft.",
        (100, 3334, 3333, 3333),
        annotation_files.fgvc_aircraft,
        [
            (
                f"the folder data/ of {VGG}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz, rename it to "
                "fgvc_aircraft",
                "",
                "fgvc_aircraft",
                False,
            )
        ],
    ),
    _row(
        "sun397",
        "SUN397",
        "sun397/SUN397",
        PHOTO,
        (397, 15_880, 3970, 19_850),
        annotation_files.sun397,
        [
            (f"{SUN}/SUN397.tar.gz", "sun397", "sun397/SUN397"),
            (f"{SUN}/download/Partitions.zip", "sun397", "sun397/ClassName.txt"),
        ],
        ("split_zhou_SUN397.json", "1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq"),
    ),
    _row(
        "dtd",
        "DTD",
        "dtd/images",
        "{} texture.",
        (47, 2820, 1128, 1692),
        annotation_files.dtd,
        [(f"{VGG}/dtd/download/dtd-r1.0.1.tar.gz", "", "dtd/images")],
        ("split_zhou_DescribableTextures.json", "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x"),
    ),
    _row(
        "eurosat",
        "EuroSAT",
        "eurosat/2750",
        "a centered satellite photo of {}.",
        (10, 13_500, 5400, 8100),
        annotation_files.eurosat,
        [("http://madm.dfki.de/files/sentinel/EuroSAT.zip", "eurosat", "eurosat/2750")],
        ("split_zhou_EuroSAT.json", "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o"),
    ),
    _row(
        "ucf101",
        "UCF101",
        "ucf101/UCF-101-midframes",
        "a photo of a person doing {}.",
        (101, 7639, 1898, 3783),
        annotation_files.ucf101,
        [
            (
                f"UCF-101-midframes.zip from {_drive('10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O')}",
                "ucf101",
                "ucf101/UCF-101-midframes",
            ),
            (f"{UCF}, needed only without {UCF_SPLIT[0]},", "ucf101", "ucf101/ucfTrainTestlist"),
        ],
        UCF_SPLIT,
    ),
    _row(
        "imagenetv2",
        "ImageNetV2",
        "imagenetv2/imagenetv2-matched-frequency-format-val",
        PHOTO,
        (1000, None, None, 10_000),
        imagenet.numbered("imagenetv2-matched-frequency-format-val"),
        [
            (
                "https://s3-us-west-2.amazonaws.com/imagenetv2public/imagenetv2-matched-frequency.tar.gz",
                "imagenetv2",
                "imagenetv2/imagenetv2-matched-frequency-format-val",
            )
        ],
        class_folders=imagenet.numbered_folders,
    ),
    _row(
        "imagenet_sketch",
        "ImageNet-Sketch",
        "imagenet-sketch/images",
        PHOTO,
        (1000, None, None, 50_889),
        imagenet.shifted("images"),
        [
            (
                "the images, a folder per class (n01440764, ...), from "
                "https://github.com/HaohanWang/ImageNet-Sketch",
                "imagenet-sketch",
                "imagenet-sketch/images",
                False,
            )
        ],
        class_folders=imagenet.wordnet_folders,
    ),
    _row(
        "imagenet_a",
        "ImageNet-A",
        "imagenet-adversarial/imagenet-a",
        PHOTO,
        (200, None, None, 7500),
        imagenet.shifted("imagenet-a"),
        [
            (
                "imagenet-a.tar from https://github.com/hendrycks/natural-adv-examples",
                "imagenet-adversarial",
                "imagenet-adversarial/imagenet-a",
            )
        ],
    ),
    _row(
        "imagenet_r",
        "ImageNet-R",
        "imagenet-rendition/imagenet-r",
        PHOTO,
        (200, None, None, 30_000),
        imagenet.shifted("imagenet-r"),
        [
            (
                "imagenet-r.tar from https://github.com/hendrycks/imagenet-r",
                "imagenet-rendition",
                "imagenet-rendition/imagenet-r",
            )
        ],
    ),
)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_BY_NAME = {_plain(alias): row for row in OFFICIAL for alias in (row.folder, row.title, row.name)}


def find_official(name: str) -> Official | None:
    """The row called ``name``: its name, title or folder, in any case, separators or not."""
    return None if "/" in name or "\\" in name else _BY_NAME.get(_plain(name))


def read_official(row: Official, home: Path) -> tuple[list[str], Items, Path | None]:
    """Class names, items by split, and the official split file if that is where they came from.

    Args:
        home: the folder that should be ``<data root>/<row.folder>``.

    Raises:
        UserError: files are missing (what to download is named) or malformed.
    """
    if not home.is_dir() or not (home / row.images).is_dir():
        todo = "; ".join(download.sentence(home.parent) for download in row.downloads)
        raise MissingFile(f"{row.title} is not in {home / row.images}; {todo}.")
    split_file = home / row.split_file if row.split_file else None
    if split_file is not None and split_file.is_file():
        items = read_items(split_file, required=("train", "val", "test"))
        return names_by_label(items, str(split_file)), items, split_file
    items = row.build(home)
    return names_by_label(items, str(home)), items, None


def load_official(row: Official, home: Path) -> Dataset:
    """Load one of the fifteen from ``home``; a warning says when the split is not the official one.

    Raises:
        UserError: files are missing (what to download is named) or malformed.
    """
    names, items, split_file = read_official(row, home)
    items = find_items(items, home / row.images, str(split_file or home))
    if row.split_file and split_file is None:
        warn_once(
            f"{row.title}: {home / row.split_file} is not there, so the split was made from the "
            f"dataset's own files and is not the official one; numbers will not compare exactly. "
            f"Get {row.downloads[-1].what}."
        )
    if len(names) != row.counts[0]:
        warn_once(f"{row.title}: {len(names)} of its {row.counts[0]} classes are in {home / row.images}.")
    return make_dataset(
        row.name,
        home / row.images,
        names,
        row.template,
        make_splits(items),
        title=row.title,
        fewshot_dir=home / FEWSHOT_FOLDER,
        class_ids=imagenet.class_ids(home, items) if row.name.startswith("imagenet") else (),
    )
