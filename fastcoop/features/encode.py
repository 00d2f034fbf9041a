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
from fastcoop.features.image_files import NO_RECORD, FileRecord, ImageFiles, find_changes, read_file
from fastcoop.features.images import UnreadableImage, crops, normalised, pillow_defaults, read_rgb
from fastcoop.features.parts import Encoded, parts_folder, read_part, write_part
from fastcoop.features.plan import Part, Plan, Settings
from fastcoop.features.store_file import unusable_rows
from fastcoop.progress import Advance, progress

PARTS_AHEAD = 2  # decoded while one is encoded: bounds the memory, whatever the size of the dataset


@dataclass(frozen=True, eq=False)
class Decoded:
    """One image: uint8 crops (views, size, size, 3), or why there are none; and its file as it was read."""

    crops: np.ndarray | UnreadableImage
    file: FileRecord


def encode_parts(backbone: Backbone, dataset: Dataset, plan: Plan, store: Path) -> None:
    """Compute every part of the plan that is not on disk yet, and write each as it is done.

    Raises UserError as ``encode`` does, OSError if the disk refuses.
    """
    parts_folder(store).mkdir(parents=True, exist_ok=True)
    total = sum(len(part.rows) * len(part.views) for part in plan.parts)
    logging.getLogger("fastcoop").debug("%s: %d crops to encode.", store, total)
    with pillow_defaults(), progress(f"Encoding {dataset.name} with {backbone.name}", total) as advance:
        missing = []
        for part in plan.parts:
            done = read_part(store, part)
            if done is None or done.failures or _has_changed(dataset, part, done):
                missing.append(part)
            else:
                advance(len(part.rows) * len(part.views))
        for part, images in _decoded(dataset, backbone, plan.settings, missing):
            write_part(store, part, encode(backbone, dataset, part, images, plan.settings, advance))


def encode(
    backbone: Backbone,
    dataset: Dataset,
    part: Part,
    images: Sequence[Decoded],
    settings: Settings,
    advance: Advance = lambda n=1, note=None: None,
) -> Encoded:
    """Features of one part's decoded images, in batches of ``settings.batch_size`` crops.

    Raises UserError for features that are not finite in the store's dtype, or all zeros.
    """
    crops = [image.crops for image in images]
    failures = {at: str(image) for at, image in enumerate(crops) if isinstance(image, UnreadableImage)}
    readable = [image for image in crops if not isinstance(image, UnreadableImage)]
    features = np.zeros((len(images), len(part.views), backbone.embed_dim), settings.dtype)
    advance(len(failures) * len(part.views), part.split)
    if readable:
        pixels, encoded = np.concatenate(readable), []
        for start in range(0, len(pixels), settings.batch_size):
            batch = normalised(
                pixels[start : start + settings.batch_size], backbone.preprocess, backbone.device
            )
            encoded.append(backbone.encode_images(batch).float().cpu().numpy())
            advance(len(batch), part.split)
        kept = [at for at in range(len(images)) if at not in failures]
        with np.errstate(over="ignore"):
            features[kept] = np.concatenate(encoded).reshape(len(kept), len(part.views), -1)
    bad = [at for at in np.flatnonzero(unusable_rows(features)) if at not in failures]
    if bad:
        path = dataset.splits[part.split].paths[part.rows[bad[0]]]
        what = "are all zeros" if np.isfinite(features[bad[0]]).all() else f"{settings.dtype} cannot hold"
        refusal = f"{backbone.name} gives features of {path} that {what}"
        if settings.dtype == "float16":
            raise UserError(f"{refusal}; use --dtype float32, or other weights.")
        raise UserError(f"{refusal}; use other weights.")
    return Encoded(features, ImageFiles.of([image.file for image in images]), failures)


def read_crops(dataset: Dataset, part: Part, row: int, backbone: Backbone, settings: Settings) -> Decoded:
    """Read one image of a part's split once, and cut the part's views out of it."""
    name = dataset.splits[part.split].paths[row]
    file = NO_RECORD
    try:
        content, file = read_file(dataset.root / name)
        image = read_rgb(dataset.root / name, content)
    except FileNotFoundError:
        return Decoded(UnreadableImage("no such file"), file)
    except OSError as error:
        return Decoded(UnreadableImage(f"{type(error).__name__}: {error.strerror or error}"), file)
    except UnreadableImage as error:
        return Decoded(error, file)
    views = crops(image, name, part.views, backbone.preprocess, settings.recipe, settings.view_seed)
    return Decoded(views, file)


def _has_changed(dataset: Dataset, part: Part, done: Encoded) -> bool:
    """Whether a file of a part that an earlier process encoded holds other bytes now."""
    paths = [dataset.root / dataset.splits[part.split].paths[row] for row in part.rows]
    return bool(find_changes(paths, done.files, f"Reading image files of {dataset.name}")[0].any())


def _decoded(
    dataset: Dataset, backbone: Backbone, settings: Settings, parts: Sequence[Part]
) -> Iterator[tuple[Part, list[Decoded]]]:
    """Each part with its decoded images, in order, a few parts being decoded ahead."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    ahead: deque[tuple[Part, list[Future[Decoded]]]] = deque()
    try:
        for part in parts:
            futures = [pool.submit(read_crops, dataset, part, row, backbone, settings) for row in part.rows]
            ahead.append((part, futures))
            if len(ahead) > PARTS_AHEAD:
                yield _collected(ahead.popleft())
        while ahead:
            yield _collected(ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _collected(item: tuple[Part, list[Future[Decoded]]]) -> tuple[Part, list[Decoded]]:
    part, futures = item
    return part, [future.result() for future in futures]
