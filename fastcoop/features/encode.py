"""Images through the image tower: decoded and cropped in threads while the encoder works on what is ready."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError
from fastcoop.features.chunks import (
    Chunk,
    Encoded,
    EncodingPlan,
    EncodingSettings,
    chunks_folder,
    read_chunk,
    write_chunk,
)
from fastcoop.features.image_files import find_changes, read_file, unknown_files
from fastcoop.features.images import UnreadableImage, crops, normalize, pillow_defaults, read_rgb
from fastcoop.features.store_file import unusable_rows
from fastcoop.progress import Advance, progress

CHUNKS_AHEAD = 2  # decoded while one is encoded; bounds the memory


@dataclass(frozen=True, eq=False)
class Decoded:
    """One image: uint8 crops (views, size, size, 3), or why there are none; and the `FILE` record of its file."""

    crops: np.ndarray | UnreadableImage
    file: np.ndarray


def encode_chunks(backbone: Backbone, dataset: Dataset, plan: EncodingPlan, store: Path) -> None:
    """Encode every chunk of the plan that is not on disk yet, and write each as soon as it is done.

    Raises:
        UserError: As `encode`.
        OSError: A chunk cannot be written.
    """
    chunks_folder(store).mkdir(parents=True, exist_ok=True)
    logging.getLogger("fastcoop").debug("%s: %d crops to encode.", store, plan.crops)
    with pillow_defaults(), progress(f"Encoding {dataset.name} with {backbone.name}", plan.crops) as advance:
        missing = []
        for chunk in plan.chunks:
            done = read_chunk(store, chunk)
            if done is None or done.failures or _has_changed(dataset, chunk, done):
                missing.append(chunk)
            else:
                advance(chunk.crops)
        for chunk, images in _decode_ahead(dataset, backbone, plan.settings, missing):
            write_chunk(store, chunk, encode(backbone, dataset, chunk, images, plan.settings, advance))


def encode(
    backbone: Backbone,
    dataset: Dataset,
    chunk: Chunk,
    images: Sequence[Decoded],
    settings: EncodingSettings,
    advance: Advance = lambda n=1, note=None: None,
) -> Encoded:
    """Encode one chunk's decoded images, in batches of ``settings.batch_size`` crops.

    Raises:
        UserError: Features are not finite in the store's dtype, or all zeros.
    """
    failures = {
        at: str(image.crops) for at, image in enumerate(images) if isinstance(image.crops, UnreadableImage)
    }
    readable = [image.crops for image in images if not isinstance(image.crops, UnreadableImage)]
    features = np.zeros((len(images), len(chunk.views), backbone.embed_dim), settings.dtype)
    advance(len(failures) * len(chunk.views), chunk.split)
    if readable:
        pixels, encoded = np.concatenate(readable), []
        for start in range(0, len(pixels), settings.batch_size):
            batch = normalize(
                pixels[start : start + settings.batch_size], backbone.preprocess, backbone.device
            )
            encoded.append(backbone.encode_images(batch).float().cpu().numpy())
            advance(len(batch), chunk.split)
        kept = [at for at in range(len(images)) if at not in failures]
        with np.errstate(over="ignore"):
            features[kept] = np.concatenate(encoded).reshape(len(kept), len(chunk.views), -1)
    bad = [at for at in np.flatnonzero(unusable_rows(features)) if at not in failures]
    if bad:
        path = dataset.splits[chunk.split].paths[chunk.rows[bad[0]]]
        what = "are all zeros" if np.isfinite(features[bad[0]]).all() else f"{settings.dtype} cannot hold"
        refusal = f"{backbone.name} gives features of {path} that {what}"
        if settings.dtype == "float16":
            raise UserError(f"{refusal}; use --dtype float32, or other weights.")
        raise UserError(f"{refusal}; use other weights.")
    return Encoded(features, np.stack([image.file for image in images]), failures)


def read_crops(
    dataset: Dataset, chunk: Chunk, row: int, backbone: Backbone, settings: EncodingSettings
) -> Decoded:
    """Read one image of a chunk's split once, and cut the chunk's views out of it."""
    name = dataset.splits[chunk.split].paths[row]
    file = unknown_files(1)[0]
    try:
        content, file = read_file(dataset.root / name)
        image = read_rgb(dataset.root / name, content)
    except FileNotFoundError:
        return Decoded(UnreadableImage("no such file"), file)
    except OSError as error:
        return Decoded(UnreadableImage(f"{type(error).__name__}: {error.strerror or error}"), file)
    except UnreadableImage as error:
        return Decoded(error, file)
    views = crops(image, name, chunk.views, backbone.preprocess, settings.recipe, settings.view_seed)
    return Decoded(views, file)


def _has_changed(dataset: Dataset, chunk: Chunk, done: Encoded) -> bool:
    """Whether a file of a chunk that an earlier process encoded holds other bytes now."""
    paths = [dataset.root / dataset.splits[chunk.split].paths[row] for row in chunk.rows]
    return bool(find_changes(paths, done.files, f"Reading image files of {dataset.name}")[0].any())


def _decode_ahead(
    dataset: Dataset, backbone: Backbone, settings: EncodingSettings, chunks: Sequence[Chunk]
) -> Iterator[tuple[Chunk, list[Decoded]]]:
    """Yield each chunk with its decoded images, in order, while the next chunks are being decoded."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    ahead: deque[tuple[Chunk, list[Future[Decoded]]]] = deque()
    try:
        for chunk in chunks:
            futures = [pool.submit(read_crops, dataset, chunk, row, backbone, settings) for row in chunk.rows]
            ahead.append((chunk, futures))
            if len(ahead) > CHUNKS_AHEAD:
                first, decoding = ahead.popleft()
                yield first, [future.result() for future in decoding]
        for first, decoding in ahead:
            yield first, [future.result() for future in decoding]
    finally:
        pool.shutdown(cancel_futures=True)
