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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastcoop.errors import UserError
from fastcoop.features.image_files import find_changes, read_file, unknown_files
from fastcoop.features.images import UnreadableImage, crops, normalize, pillow_defaults, read_rgb
from fastcoop.features.plan import Chunk, Encoding
from fastcoop.features.store_file import BEFORE, unusable_rows
from fastcoop.files import atomic_write
from fastcoop.memo import memoize
from fastcoop.progress import Advance, progress

CPU_BATCH, GPU_BATCH = 64, 256  # crops encoded at once
CHUNKS_AHEAD = 2  # decoded while one is encoded; bounds the memory
PRECISIONS = ("float32", "tf32", "bfloat16")  # of the products of a float32 backbone
PRECISION_SAMPLE = 32  # images whose features are compared with float32's

T = TypeVar("T")


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
    before: np.ndarray  # (rows, views, before): the features before the projection, of size 0 if not wanted

    def failures(self, chunk: Chunk) -> dict[int, str]:
        """Return why images cannot be read, by their index in the chunk's split."""
        problems = zip(chunk.rows, self.problems.tolist(), strict=True)
        return {row: problem for row, problem in problems if problem}

    def of(self, chunk: Chunk, array: str) -> np.ndarray:
        """Return the features (rows, views, dim) that the chunk adds to an array."""
        columns = [list(chunk.views).index(view) for view in chunk.adds[array][1]]
        return (self.before if array == BEFORE else self.features)[:, columns]


def encode_chunks(
    encoding: Encoding, chunks: Sequence[Chunk], advance: Advance = lambda n=1, note=None: None
) -> Iterator[tuple[Chunk, Encoded]]:
    """Yield each chunk with its features, in order; ``advance`` receives the number of crops done."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    late = int(encoding.on_gpu)  # on a GPU a chunk's features are fetched while the next chunk is encoded
    try:
        decoding = ((chunk, pool.map(partial(decode, encoding, chunk), chunk.rows)) for chunk in chunks)
        started = (
            (chunk, start_encoding(encoding, chunk, list(images), advance))
            for chunk, images in _ahead(decoding, CHUNKS_AHEAD)
        )
        for chunk, finish in _ahead(started, late):
            yield chunk, finish()
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield each item after ``count`` more were taken."""
    taken: deque[T] = deque()
    for item in items:
        taken.append(item)
        if len(taken) > count:
            yield taken.popleft()
    yield from taken


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


def start_encoding(
    encoding: Encoding,
    chunk: Chunk,
    images: Sequence[Decoded],
    advance: Advance = lambda n=1, note=None: None,
) -> Callable[[], Encoded]:
    """Encode the decoded images of a chunk in batches, and return a function that waits for the features.

    A CPU has encoded them when this returns; a GPU may not have begun. The function raises UserError for features
    that are not finite in the store's dtype, or all zeros.
    """
    backbone, size = encoding.backbone, encoding.backbone.image_size
    readable = [row for row, image in enumerate(images) if image.crops is not None]
    advance((len(images) - len(readable)) * len(chunk.views), chunk.split)
    count, pinned = len(readable) * len(chunk.views), encoding.on_gpu
    dim = backbone.embed_dim + (backbone.image_projection.before_dim if chunk.before else 0)
    found = torch.empty(count, dim, dtype=torch.float32, device="cpu", pin_memory=pinned)
    encode = backbone.encode_images_both if chunk.before else backbone.encode_images
    if readable:
        pixels = torch.empty((count, size, size, 3), dtype=torch.uint8, device="cpu", pin_memory=pinned)
        np.concatenate([image.crops for image in images if image.crops is not None], out=pixels.numpy())
        for start in range(0, count, _crops_at_once(encoding)):
            crops = pixels[start : start + _crops_at_once(encoding)]
            batch = encode(_to_device(encoding, crops), encoding.precision or "float32")
            batch = torch.cat(batch, 1) if isinstance(batch, tuple) else batch
            found[start : start + len(crops)].copy_(batch.float(), non_blocking=True)
            advance(len(crops), chunk.split)
    fetched = torch.cuda.Event() if encoding.on_gpu else None
    if fetched is not None:
        fetched.record(torch.cuda.current_stream(backbone.device))

    def finish() -> Encoded:
        if fetched is not None:
            fetched.synchronize()
        both = np.zeros((len(images), len(chunk.views), dim), encoding.dtype)
        with np.errstate(over="ignore"):
            both[readable] = found.numpy().reshape(len(readable), *both.shape[1:])
        features, before = np.split(both, [backbone.embed_dim], axis=2)
        for kind in (features, before) if chunk.before else (features,):
            _check_usable(encoding, chunk, kind, readable)
        files = np.stack([image.file for image in images])
        problems = np.array([image.problem for image in images], np.str_)
        return Encoded(features, files, problems, before)

    return finish


def _crops_at_once(encoding: Encoding) -> int:
    return GPU_BATCH if encoding.on_gpu else CPU_BATCH


@memoize(1)
def _copy_stream(encoding: Encoding) -> torch.cuda.Stream:
    """Return the GPU's stream on which a batch is copied while the one before it is encoded."""
    return torch.cuda.Stream(encoding.backbone.device)


def _to_device(encoding: Encoding, crops: Tensor) -> Tensor:
    """Copy crops to the backbone's device and normalize them; on a GPU the tower goes on with the batch before."""
    device, preprocess = encoding.backbone.device, encoding.backbone.preprocess
    if not encoding.on_gpu:
        return normalize(crops, preprocess, device)
    main = torch.cuda.current_stream(device)
    with torch.cuda.stream(_copy_stream(encoding)):
        batch = normalize(crops, preprocess, device)
    main.wait_stream(_copy_stream(encoding))
    batch.record_stream(main)  # its memory is not used again before the tower has read it
    return batch


def _check_usable(encoding: Encoding, chunk: Chunk, features: np.ndarray, readable: Sequence[int]) -> None:
    """Raise UserError where the features of a readable image are not finite, or all zeros."""
    for row in np.array(readable, np.int64)[unusable_rows(features[readable])]:
        what = "are all zeros" if np.isfinite(features[row]).all() else f"{encoding.dtype} cannot hold"
        is_half = encoding.dtype == "float16"
        advice = "use --dtype float32, or other weights" if is_half else "use other weights"
        path = encoding.dataset.splits[chunk.split].paths[chunk.rows[row]]
        raise UserError(f"{encoding.backbone.name} gives features of {path} that {what}; {advice}.")


def precision_difference(encoding: Encoding, chunk: Chunk) -> float:
    """Return the largest difference of features of a chunk's first images from those in float32; see `difference`."""
    chunk = Chunk(chunk.split, chunk.rows[:PRECISION_SAMPLE], range(1))
    with pillow_defaults():
        images = [decode(encoding, chunk, row) for row in chunk.rows]
    ours, exact = (
        start_encoding(replace(encoding, precision=precision, dtype="float32"), chunk, images)().features
        for precision in (encoding.precision, "float32")
    )
    return difference(ours, exact)


def precision_note(precision: str, largest: float) -> str:
    """Return how far features are from float32's, as a sentence."""
    return f"Computed in {precision}, features differ from float32's by up to {largest:.1e} of their length."


def difference(features: np.ndarray, others: np.ndarray) -> float:
    """Return the largest distance between features (..., dim), relative to the length of the others."""
    length = np.maximum(np.linalg.norm(others, axis=-1), np.finfo(np.float32).tiny)
    return float((np.linalg.norm(features - others, axis=-1) / length).max(initial=0))


def encode_missing(encoding: Encoding, chunks: Sequence[Chunk], store: Path) -> None:
    """Encode the chunks of a store that have no file yet, and write each as soon as it is done."""
    dataset, total = encoding.dataset, sum(chunk.crops for chunk in chunks)
    chunks_folder(store).mkdir(parents=True, exist_ok=True)
    logging.getLogger("fastcoop").debug("%s: %d crops to encode.", store, total)

    def is_done(chunk: Chunk) -> bool:
        done, title = read_chunk(store, encoding, chunk), f"Reading image files of {dataset.name}"
        if done is None or (done.problems != "").any():
            return False
        return not find_changes(dataset.files(chunk.split, chunk.rows), done.files, title)[0].any()

    title = f"Encoding {dataset.name} with {encoding.backbone.name}"
    with pillow_defaults(), progress(title, total) as advance:
        missing = [chunk for chunk in chunks if not is_done(chunk)]
        advance(total - sum(chunk.crops for chunk in missing))
        for chunk, encoded in encode_chunks(encoding, missing, advance):
            content = io.BytesIO()  # on a full disk zipfile would print errors of its own
            np.savez(content, **encoded._asdict())
            path = _chunk_file(store, encoding, chunk)
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                file.write(content.getvalue())
                file.flush()
                os.fsync(file.fileno())


def read_chunk(store: Path, encoding: Encoding, chunk: Chunk) -> Encoded | None:
    """Return a chunk written earlier; None if there is none, or if a crash of the machine damaged its file."""
    try:
        with np.load(_chunk_file(store, encoding, chunk)) as content:
            encoded = Encoded(*(content[name] for name in Encoded._fields))
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return encoded if encoded.features.shape[:2] == (len(chunk.rows), len(chunk.views)) else None


def chunks_folder(store: Path) -> Path:
    """Return the folder of the chunks that are finished for a store."""
    return store.with_name(store.name + ".parts")


def _chunk_file(store: Path, encoding: Encoding, chunk: Chunk) -> Path:
    """Return the file of a chunk. Its name is the same for the same work only."""
    precision = encoding.compute_dtype if encoding.precision == "float32" else encoding.precision
    facts = [
        *(encoding.backbone.digest, precision, encoding.dataset.digest),
        *(chunk.split, chunk.rows, list(chunk.views), chunk.before),
        *(encoding.recipe, encoding.view_seed, encoding.dtype, _crops_at_once(encoding)),
    ]
    return chunks_folder(store) / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.npz"
