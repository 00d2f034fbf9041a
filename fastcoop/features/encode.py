"""Encode images chunk by chunk: threads decode and crop the next chunks while the image tower encodes one.

The features of a finished chunk are an immutable file in a folder next to the store, renamed into place: a killed
process repeats one chunk at most.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError
from fastcoop.features.image_files import find_changes, read_file, unknown_files
from fastcoop.features.images import UnreadableImage, crops, normalize, pillow_defaults, read_rgb
from fastcoop.features.store_file import StoreMeta, unusable_rows
from fastcoop.files import atomic_write
from fastcoop.progress import Advance, progress

CROPS_PER_CHUNK = 256
CHUNKS_AHEAD = 2  # decoded while one is encoded; bounds the memory
PACKAGES = ("fastcoop", "torch", "open_clip_torch", "pillow", "numpy", "h5py")  # that features depend on


@dataclass(frozen=True, eq=False)
class Encoding:
    """How the images of a dataset are encoded; see `cache_features`."""

    backbone: Backbone
    dataset: Dataset
    recipe: str = "current"
    view_seed: int = 0
    views: int = 0
    dtype: str = "float16"
    batch_size: int = 64

    @property
    def compute_dtype(self) -> str:
        """The dtype that the backbone computes in, such as "float32"."""
        return str(self.backbone.dtype).removeprefix("torch.")

    def meta(self, skipped: Mapping[str, Sequence[int]]) -> StoreMeta:
        """Return the description of a store of these features, without digests of its contents."""
        backbone, dataset = self.backbone, self.dataset
        return StoreMeta(
            backbone=backbone.name, backbone_digest=backbone.digest, dim=backbone.embed_dim,
            dataset=dataset.name, dataset_digest=dataset.digest,
            class_names=dataset.class_names, template=dataset.template,
            recipe=self.recipe, view_seed=self.view_seed, views=self.views, dtype=self.dtype,
            expected={split: len(images) for split, images in dataset.splits.items()},
            skipped=skipped, sha256={},
            versions={name: metadata.version(name) for name in PACKAGES}, compute_dtype=self.compute_dtype,
        )  # fmt: skip


class Chunk(NamedTuple):
    """Images of one split, and the views of them to encode."""

    split: str
    rows: tuple[int, ...]  # ascending indices into the split
    views: range  # consecutive view numbers

    @property
    def crops(self) -> int:
        """Number of crops to encode."""
        return len(self.rows) * len(self.views)

    def files(self, dataset: Dataset) -> list[Path]:
        """Return the image files."""
        return [dataset.root / dataset.splits[self.split].paths[row] for row in self.rows]


class Decoded(NamedTuple):
    """One image."""

    file: np.ndarray  # `FILE` record
    crops: np.ndarray | None = None  # uint8 (views, size, size, 3); None: the image cannot be read
    problem: str = ""  # why it cannot be read


class Encoded(NamedTuple):
    """The features of a chunk."""

    features: np.ndarray  # (rows, views, dim) in the store's dtype; zeros for unreadable images
    files: np.ndarray  # `FILE` records (rows,) of the images as they were read
    problems: np.ndarray  # text (rows,): why an image cannot be read, "" if it can

    def failures(self, chunk: Chunk) -> dict[int, str]:
        """Return why images cannot be read, by their index in the chunk's split."""
        problems = zip(chunk.rows, self.problems.tolist(), strict=True)
        return {row: problem for row, problem in problems if problem}


def cut_chunks(split: str, rows: np.ndarray, views: range) -> list[Chunk]:
    """Cut images of a split into chunks of at most `CROPS_PER_CHUNK` crops, or of one image."""
    size = max(1, CROPS_PER_CHUNK // len(views))
    return [
        Chunk(split, tuple(rows[start : start + size].tolist()), views) for start in range(0, len(rows), size)
    ]


def encode_chunks(
    encoding: Encoding, chunks: Sequence[Chunk], advance: Advance = lambda n=1, note=None: None
) -> Iterator[tuple[Chunk, Encoded]]:
    """Yield each chunk with its features, in order; ``advance`` receives the number of crops done.

    Raises:
        UserError: As `encode`.
    """
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    decoding: deque[tuple[Chunk, Iterator[Decoded]]] = deque()
    try:
        for chunk in chunks:
            decoding.append((chunk, pool.map(partial(decode, encoding, chunk), chunk.rows)))
            if len(decoding) > CHUNKS_AHEAD:
                first, images = decoding.popleft()
                yield first, encode(encoding, first, list(images), advance)
        for first, images in decoding:
            yield first, encode(encoding, first, list(images), advance)
    finally:
        pool.shutdown(cancel_futures=True)


def decode(encoding: Encoding, chunk: Chunk, row: int) -> Decoded:
    """Read an image of a chunk's split once, and crop the chunk's views."""
    name, preprocess = encoding.dataset.splits[chunk.split].paths[row], encoding.backbone.preprocess
    path, file = encoding.dataset.root / name, unknown_files(1)[0]
    try:
        content, file = read_file(path)
        image = read_rgb(path, content)
    except FileNotFoundError:
        return Decoded(file, problem="no such file")
    except OSError as error:
        return Decoded(file, problem=f"{type(error).__name__}: {error.strerror or error}")
    except UnreadableImage as error:
        return Decoded(file, problem=str(error))
    return Decoded(file, crops(image, name, chunk.views, preprocess, encoding.recipe, encoding.view_seed))


def encode(
    encoding: Encoding,
    chunk: Chunk,
    images: Sequence[Decoded],
    advance: Advance = lambda n=1, note=None: None,
) -> Encoded:
    """Encode the decoded images of a chunk, in batches of ``encoding.batch_size`` crops.

    Raises:
        UserError: Features are not finite in the store's dtype, or all zeros.
    """
    backbone, size = encoding.backbone, encoding.batch_size
    features = np.zeros((len(images), len(chunk.views), backbone.embed_dim), encoding.dtype)
    readable = [row for row, image in enumerate(images) if image.crops is not None]
    advance((len(images) - len(readable)) * len(chunk.views), chunk.split)
    if readable:
        pixels, encoded = np.concatenate([image.crops for image in images if image.crops is not None]), []
        for start in range(0, len(pixels), size):
            batch = normalize(pixels[start : start + size], backbone.preprocess, backbone.device)
            encoded.append(backbone.encode_images(batch).float().cpu().numpy())
            advance(len(batch), chunk.split)
        with np.errstate(over="ignore"):
            features[readable] = np.concatenate(encoded).reshape(len(readable), len(chunk.views), -1)
    for row in readable:
        if unusable_rows(features[row : row + 1]).any():
            what = "are all zeros" if np.isfinite(features[row]).all() else f"{encoding.dtype} cannot hold"
            advice = (
                "use --dtype float32, or other weights"
                if encoding.dtype == "float16"
                else "use other weights"
            )
            path = encoding.dataset.splits[chunk.split].paths[chunk.rows[row]]
            raise UserError(f"{backbone.name} gives features of {path} that {what}; {advice}.")
    files = np.stack([image.file for image in images])
    return Encoded(features, files, np.array([image.problem for image in images], np.str_))


def encode_missing(encoding: Encoding, chunks: Sequence[Chunk], store: Path) -> None:
    """Encode the chunks of a store that have no file yet, and write each as soon as it is done.

    Raises:
        UserError: As `encode`.
        OSError: A chunk cannot be written.
    """
    dataset, total = encoding.dataset, sum(chunk.crops for chunk in chunks)
    chunks_folder(store).mkdir(parents=True, exist_ok=True)
    logging.getLogger("fastcoop").debug("%s: %d crops to encode.", store, total)
    with (
        pillow_defaults(),
        progress(f"Encoding {dataset.name} with {encoding.backbone.name}", total) as advance,
    ):
        missing = []
        for chunk in chunks:
            done = read_chunk(store, encoding, chunk)
            title = f"Reading image files of {dataset.name}"
            if (
                done is None
                or (done.problems != "").any()
                or find_changes(chunk.files(dataset), done.files, title)[0].any()
            ):
                missing.append(chunk)
            else:
                advance(chunk.crops)
        for chunk, encoded in encode_chunks(encoding, missing, advance):
            content = (
                io.BytesIO()
            )  # on a full disk zipfile itself would print errors in addition to our message
            np.savez(content, **encoded._asdict())
            path = _chunk_file(store, encoding, chunk)
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())


def read_chunk(store: Path, encoding: Encoding, chunk: Chunk) -> Encoded | None:
    """Return a chunk written earlier; None if there is none, or if a crash of the machine damaged its file."""
    try:
        with np.load(_chunk_file(store, encoding, chunk)) as content:
            encoded = Encoded(*(content[field] for field in Encoded._fields))
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return encoded if encoded.features.shape[:2] == (len(chunk.rows), len(chunk.views)) else None


def chunks_folder(store: Path) -> Path:
    """Return the folder of the chunks that are finished for a store."""
    return store.with_name(store.name + ".parts")


def _chunk_file(store: Path, encoding: Encoding, chunk: Chunk) -> Path:
    """Return the file of a chunk. Its name is the same for the same work only."""
    facts = [
        *(encoding.backbone.digest, encoding.compute_dtype, encoding.dataset.digest),
        *(chunk.split, chunk.rows, list(chunk.views)),
        *(encoding.recipe, encoding.view_seed, encoding.dtype, encoding.batch_size),
    ]
    return chunks_folder(store) / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.npz"
