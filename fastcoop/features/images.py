"""From an image file to the crops that are encoded: the test-time crop and seeded training augmentations."""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from fastcoop.backbones import Backbone, Preprocess
from fastcoop.datasets.files import IMAGE_SUFFIXES
from fastcoop.features.store_file import FLIP, View

MAX_PIXELS = 89_478_485  # above, Pillow warns of a decompression bomb; a quarter of a gigabyte as RGB
FORMATS_16_BIT = {"PNG", "PPM", "JPEG2000"}  # 16-bit images of these formats may open in mode I
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
CROP_SCALE = (0.08, 1.0)  # share of the area kept by the current recipe's random resized crop
TIP_SCALE = (0.5, 1.0)  # and by Tip-Adapter's
CROP_RATIO = (3 / 4, 4 / 3)
ENLARGE = 1.125  # of the recipe in use before October 2021
PICTURES_AT_ONCE = 32  # outside of datasets


@contextmanager
def pillow_defaults() -> Iterator[None]:
    """Use Pillow's default settings in the block: refuse truncated files, accept images of up to `MAX_PIXELS`."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, MAX_PIXELS
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message is the reason, without the path."""


def read_rgb(path: Path, content: bytes | None = None) -> Image.Image:
    """Decode an image of any mode and convert it to 8-bit RGB, without EXIF rotation.

    Images of up to 8 bits are converted as by the official code. Pixels of more bits, and floats, are scaled to 8 bits;
    Pillow's own conversion would clip them to white or black. ``content`` is that of the file if it was read already.

    Raises:
        UnreadableImage: The file is missing, damaged, truncated or implausibly large.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            if image.format == "EPS":  # Pillow would let Ghostscript run it
                raise UnreadableImage("it is PostScript, a program that draws a picture, which is not run")
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableImage(f"{width} x {height} pixels is more than the {MAX_PIXELS} allowed")
            return to_rgb(image)
    except UnreadableImage:
        raise
    except FileNotFoundError as error:
        raise UnreadableImage("no such file") from error
    except UnidentifiedImageError as error:
        if path.suffix.lower() in IMAGE_SUFFIXES - set(Image.registered_extensions()):
            raise UnreadableImage(f"this Pillow has no decoder for {path.suffix} files") from error
        raise UnreadableImage("no image, or its beginning is damaged") from error
    except Exception as error:  # damaged files may raise any exception
        raise UnreadableImage(f"{type(error).__name__}: {error}".replace(f"{str(path)!r}", "it")) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, as `read_rgb` does."""
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.copy()  # the caller's stays as it is
        del image.info["transparency"]  # RGB has none; Pillow would warn of dropping it
    return (_to_8_bits(image) if image.mode == "F" or image.mode[0] == "I" else image).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale an image of one wide channel (modes I, I;16 and F) to 8 bits.

    16-bit pixels are divided by 257, as if the image had been saved with 8 bits. Where the format does not state the
    range (32-bit integers, floats), it is the first of 0..1 (floats), 0..255, 0..65535 that holds all pixels, else
    from 0 or the smallest pixel to the largest. Pixels that are not finite become black.
    """
    values = np.asarray(image).astype(np.float32)
    broken = ~np.isfinite(values)
    if broken.all():
        raise UnreadableImage("none of its pixels is a finite number")
    low = min(0.0, float(values.min(where=~broken, initial=np.inf)))
    high = float(values.max(where=~broken, initial=-np.inf))
    if image.mode.startswith("I;16") or image.format in FORMATS_16_BIT:
        high = 65535.0
        if image.format == "TIFF":
            high = 2.0 ** image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] - 1  # type: ignore[attr-defined]
    elif low == 0:
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        high = next((limit for limit in ranges if high <= limit), high)
    values[broken] = low
    values -= low  # in place: images may be large, and many are decoded at once
    values *= 255 / ((high - low) or 1.0)
    scaled = np.rint(values, out=values).clip(0, 255, out=values).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:  # type: ignore[attr-defined]
        scaled = 255 - scaled  # white is stored as zero; Pillow inverts 8-bit images only
    return Image.fromarray(scaled)


def crops(
    image: Image.Image, name: str, views: Sequence[View], preprocess: Preprocess, recipe: str, seed: int
) -> np.ndarray:
    """Return views of an RGB image, uint8 (len(views), size, size, 3), by a recipe of `RECIPES`.

    View 0 is the test-time crop, and `FLIP` its mirror image. Any other is an augmentation that depends on (seed, name,
    view) only, where ``name`` is the path of the image in its dataset. Tip-Adapter's ("tip 1") are random resized crops
    that keep at least half of the area, in every recipe.
    """

    def crop(view: View) -> Image.Image:
        if view in (0, FLIP):
            test_crop = RECIPES[recipe](image, preprocess, None)
            return test_crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view else test_crop
        rng = random.Random(f"{seed}/{view}/{name}".encode("utf-8", "surrogateescape"))
        if isinstance(view, str):
            return _random_resized_crop(image, preprocess, rng, TIP_SCALE)
        return RECIPES[recipe](image, preprocess, rng)

    return np.stack([np.asarray(crop(view)) for view in views])


def encode_pictures(
    backbone: Backbone, images: Iterable[Any], recipe: str = "current", before: bool = False
) -> Iterator[np.ndarray | UnreadableImage]:
    """Encode the test-time crops of pictures (paths, or PIL images) that belong to no dataset.

    Yields:
        For each picture, its raw features float32 (dim,), or those ``before`` the image tower's projection; or why it
        cannot be decoded.
    """

    def crop(image: Any) -> np.ndarray | UnreadableImage:
        try:
            rgb = read_rgb(Path(image)) if isinstance(image, str | os.PathLike) else to_rgb(image)
        except UnreadableImage as error:
            return error
        return crops(rgb, "", [0], backbone.preprocess, recipe, 0)

    waiting = iter(images)
    while batch := [crop(image) for image in islice(waiting, PICTURES_AT_ONCE)]:
        rows: Iterator[np.ndarray] = iter(())
        if pixels := [one for one in batch if isinstance(one, np.ndarray)]:
            inputs = normalize(np.concatenate(pixels), backbone.preprocess, backbone.device)
            found = backbone.encode_images_both(inputs)[1] if before else backbone.encode_images(inputs)
            rows = iter(found.float().cpu().numpy())
        yield from (one if isinstance(one, UnreadableImage) else next(rows) for one in batch)


def normalize(images: np.ndarray | Tensor, preprocess: Preprocess, device: torch.device) -> Tensor:
    """Scale and standardize uint8 images (b, size, size, 3) to float32 (b, 3, size, size) on ``device``."""
    here = torch.as_tensor(images, device="cpu")
    there = here.to(device, non_blocking=True)  # nothing waits for a copy from pinned memory
    pixels = there.permute(0, 3, 1, 2).contiguous().float().div_(255)
    mean, std = (
        torch.tensor(x, dtype=torch.float32, device=device).view(3, 1, 1)
        for x in (preprocess.mean, preprocess.std)
    )
    return pixels.sub_(mean).div_(std)


def _current(image: Image.Image, preprocess: Preprocess, rng: random.Random | None) -> Image.Image:
    """Resize and crop the center; an augmentation is a random resized crop (scale 0.08 to 1, ratio 3/4 to 4/3) and
    flip."""
    from torchvision.transforms import functional as F  # imported late: torchvision takes seconds

    size, mode = preprocess.size, F.InterpolationMode(preprocess.interpolation)
    if rng is not None:
        return _random_resized_crop(image, preprocess, rng, CROP_SCALE)
    if preprocess.resize_mode == "squash":
        return F.resize(image, [size, size], mode)
    if preprocess.resize_mode == "longest":
        ratio = max(image.size) / size
        width, height = (max(1, round(side / ratio)) for side in image.size)
        left, top = (size - width) // 2, (size - height) // 2
        padding = [left, top, size - width - left, size - height - top]
        return F.pad(F.resize(image, [height, width], mode), padding, preprocess.fill_color)
    return F.center_crop(F.resize(image, [size], mode), [size, size])


def _official_2021(image: Image.Image, preprocess: Preprocess, rng: random.Random | None) -> Image.Image:
    """Squash, enlarge by an eighth and crop the center; an augmentation is flipped and translated before that. A
    translation (p = 0.5) enlarges by an eighth and crops at random, always with bilinear interpolation."""
    from torchvision.transforms import functional as F

    size, interpolation = preprocess.size, preprocess.interpolation
    out = _resize(image, size, interpolation)
    if rng is not None:
        out, enlarged = _flip(out, rng), round(size * ENLARGE)
        if rng.random() < 0.5:
            left, top = (round(rng.uniform(0, enlarged - size)) for _ in range(2))
            out = _resize(out, enlarged, "bilinear").crop((left, top, left + size, top + size))
    return F.center_crop(_resize(out, int(size * ENLARGE), interpolation), [size, size])


# The image transforms of views by name. A recipe gets no generator for view 0, the test-time crop.
RECIPES: dict[str, Callable[[Image.Image, Preprocess, random.Random | None], Image.Image]] = {
    "current": _current,
    "official-2021": _official_2021,
}


def _random_resized_crop(
    image: Image.Image, preprocess: Preprocess, rng: random.Random, scale: tuple[float, float]
) -> Image.Image:
    """Crop at random, with ``scale`` the share of the area and a ratio of 3/4 to 4/3, and flip half of the time."""
    box = _random_box(*image.size, rng, scale)
    return _flip(_resize(image.crop(box), preprocess.size, preprocess.interpolation), rng)


def _random_box(
    width: int, height: int, rng: random.Random, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w = min(width, round(height * CROP_RATIO[1]))  # as torchvision: the largest central box of a legal ratio
    h = min(height, round(width / CROP_RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _resize(image: Image.Image, size: int, interpolation: str) -> Image.Image:
    return image.resize((size, size), Image.Resampling[interpolation.upper()])


def _flip(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
