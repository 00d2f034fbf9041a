"""Images through the image tower: decoded and cropped in threads while the encoder works on what is ready."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastcoop.backbones import Backbone
from fastcoop.datasets import Dataset
from fastcoop.errors import UserError
from fastcoop.features.images import UnreadableImage, crops, normalised, read_rgb
from fastcoop.features.parts import Encoded, parts_folder, read_part, write_part
from fastcoop.features.plan import Part, Plan, Settings
from fastcoop.progress import Advance, progress

PARTS_AHEAD = 2  # decoded while one is encoded: bounds the memory, whatever the size of the dataset

Crops = np.ndarray | UnreadableImage  # uint8 (views, size, size, 3)


def encode_parts(backbone: Backbone, dataset: Dataset, plan: Plan, store: Path) -> None:
    """Compute every part of the plan that is not on disk yet, and write each as it is done.

    Raises UserError for features that are not finite in the store's dtype, OSError if the disk refuses.
    """
    parts_folder(store).mkdir(parents=True, exist_ok=True)
    total = sum(len(part.rows) * len(part.views) for part in plan.parts)
    logging.getLogger("fastcoop").debug("%s: %d crops to encode.", store, total)
    with progress(f"Encoding {dataset.name} with {backbone.name}", total) as advance:
        missing = []
        for part in plan.parts:
            done = read_part(store, part)
            if done is None or done.failures:
                missing.append(part)
            else:
                advance(len(part.rows) * len(part.views))
        for part, images in _decoded(dataset, backbone, plan.settings, missing):
            write_part(store, part, encode(backbone, dataset, part, images, plan.settings, advance))


def encode(
    backbone: Backbone,
    dataset: Dataset,
    part: Part,
    images: Sequence[Crops],
    settings: Settings,
    advance: Advance = lambda n=1, note=None: None,
) -> Encoded:
    """Features of one part's decoded images, in batches of ``settings.batch_size`` crops."""
    failures = {at: str(image) for at, image in enumerate(images) if isinstance(image, UnreadableImage)}
    readable = [image for image in images if not isinstance(image, UnreadableImage)]
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
    bad = np.flatnonzero(~np.isfinite(features).all(axis=(1, 2)))
    if len(bad):
        path = dataset.splits[part.split].paths[part.rows[bad[0]]]
        raise UserError(
            f"{backbone.name} gives features of {path} that {settings.dtype} cannot hold; "
            "use --dtype float32, or check the weights."
        )
    return Encoded(features, failures)


def read_crops(dataset: Dataset, part: Part, row: int, backbone: Backbone, settings: Settings) -> Crops:
    """The part's views of one image of its split, or the reason why there are none."""
    name = dataset.splits[part.split].paths[row]
    try:
        image = read_rgb(dataset.root / name)
    except UnreadableImage as error:
        return error
    return crops(image, name, part.views, backbone.preprocess, settings.recipe, settings.view_seed)


def _decoded(
    dataset: Dataset, backbone: Backbone, settings: Settings, parts: Sequence[Part]
) -> Iterator[tuple[Part, list[Crops]]]:
    """Each part with its decoded images, in order, a few parts being decoded ahead."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    ahead: deque[tuple[Part, list[Future[Crops]]]] = deque()
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


def _collected(item: tuple[Part, list[Future[Crops]]]) -> tuple[Part, list[Crops]]:
    part, futures = item
    return part, [future.result() for future in futures]
