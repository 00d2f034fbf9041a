"""The test images that a run predicted, found again under a data folder and shown as small pictures."""

from __future__ import annotations

import glob
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcoop.datasets import Dataset
from fastcoop.datasets.dataset import test_digest
from fastcoop.datasets.load import ClassNames, own_specs
from fastcoop.errors import MissingFile, UserError
from fastcoop.features.image_files import files_digest, read_file, unknown_files
from fastcoop.features.images import UnreadableImage, pillow_defaults, read_rgb
from fastcoop.features.store import FeatureStore, find_dataset
from fastcoop.progress import progress

PIXELS = 96  # of the longer side of a small picture
QUALITY = 80  # of its JPEG


@dataclass(frozen=True, eq=False)
class Pictures:
    """The test images of one dataset, in the order of a run's predictions."""

    root: Path  # the dataset's folder
    paths: tuple[str, ...]  # posix paths relative to ``root``
    # `FILE` records of the images that the run was tested on; those of unknown files have size -1.
    files: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def thumbnail(self, row: int) -> bytes:
        """Return an image as JPEG, at most `PIXELS` wide and high.

        Raises:
            UserError: The image is missing, cannot be decoded, or is not the one that the run was tested on.
        """
        path = self.root / self.paths[row]
        try:
            content, record = read_file(path)
            if self.files["size"][row] >= 0 and (record["sha256"] != self.files["sha256"][row]).any():
                raise UserError(f"{self.paths[row]} has changed since the run was tested.")
            with pillow_defaults():
                image = read_rgb(path, content)
        except FileNotFoundError:
            raise MissingFile(f"{self.paths[row]} is missing.") from None
        except (OSError, UnreadableImage) as error:
            raise UserError(f"{self.paths[row]} cannot be read ({error}).") from None
        image.thumbnail((PIXELS, PIXELS))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=QUALITY, optimize=True)
        return out.getvalue()


@dataclass(frozen=True)
class PictureFinder:
    """Find the test images of runs again, to pass to `fastcoop.reports.report`.

    Attributes:
        data_root: The folder of the datasets.
        cache: The folder of their feature stores, which record what the image files were.
        class_names: What the sweep took, for a dataset of the user's own.
    """

    data_root: str | Path
    cache: str | Path = "cache"
    class_names: ClassNames | None = None

    def find(self, name: str, test: str, images: str | None, specs: Iterable[str] = ()) -> Pictures:
        """Return the test images of a dataset as a run was tested on them.

        Args:
            name: The dataset's name in results.
            test: Digest of the test (`fastcoop.results.load_results`).
            images: Digest of the test images' files; None: not known, and whether they have changed is not checked.
            specs: Names or paths of datasets, as `find_dataset` takes them, where ``name`` is not one.

        Raises:
            UserError: The dataset is not there, or its images are not those of the test.
        """
        problem = f"There is no dataset {name} under {self.data_root}."
        for spec in dict.fromkeys((name, *specs)):
            try:
                names = self.class_names if own_specs([spec], self.data_root) else None
                dataset = find_dataset(spec, self.data_root, names)
            except UserError:
                continue
            if dataset.name != name:
                continue
            if dataset.store is not None:
                raise UserError(f"{dataset.store} holds features of {name} and no pictures.")
            stores = list(self._stores(dataset))
            for skipped in {(), *(tuple(store.skipped("test").tolist()) for store in stores)}:
                if test_digest(dataset, skipped) == test:
                    return _pictures(dataset, skipped, images, [store.files("test") for store in stores])
            problem = f"The test images in {dataset.root} are not those that these runs were tested on."
        raise UserError(problem)

    def _stores(self, dataset: Dataset) -> Iterator[FeatureStore]:
        """Yield the stores of a dataset, of any backbone, that can be read."""
        name = glob.escape(f"{(dataset.whole or dataset).name}.h5")
        for path in sorted(Path(self.cache).glob(f"*/{name}")):
            with suppress(UserError):
                yield FeatureStore.open(path, dataset=dataset)


def _pictures(
    dataset: Dataset, skipped: Sequence[int], images: str | None, recorded: Iterable[np.ndarray]
) -> Pictures:
    """Return a dataset's test images, with the first of the ``recorded`` files whose digest is ``images``."""
    paths = tuple(np.delete(np.array(dataset.splits["test"].paths, dtype=object), skipped))
    if images is None:
        return Pictures(dataset.root, paths, unknown_files(len(paths)))
    for files in recorded:
        if files_digest(files) == images:
            return Pictures(dataset.root, paths, files)
    files = unknown_files(len(paths))
    with progress(f"Reading test images of {dataset.name}", len(paths)) as advance:
        for row, path in enumerate(paths):
            with suppress(OSError):
                files[row] = read_file(dataset.root / path)[1]
            advance()
    if files_digest(files) != images:
        raise UserError(
            f"Test images in {dataset.root} have changed since these runs were tested, and no feature store records "
            "which; name the folder of the stores (--cache), or run the sweep again."
        )
    return Pictures(dataset.root, paths, files)
