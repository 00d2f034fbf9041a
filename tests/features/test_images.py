from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fastcoop.backbones import Preprocess
from fastcoop.features import images
from fastcoop.features.images import UnreadableImage, crops, normalised, read_rgb

RGB = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 37, 3), dtype=np.uint8))
BICUBIC = InterpolationMode.BICUBIC
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_view_zero_equals_open_clips_preprocessing(mode: str, interpolation: str) -> None:
    facts = Preprocess(24, MEAN, STD, interpolation, mode)
    config = open_clip.transform.PreprocessCfg(
        24, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode
    )
    theirs = open_clip.transform.image_transform_v2(config, is_train=False)(RGB)
    ours = normalised(crops(RGB, "x", [0], facts, "current", 0), facts, torch.device("cpu"))
    assert torch.equal(ours[0], theirs)


@pytest.mark.parametrize("recipe", images.RECIPES)
def test_a_view_depends_on_seed_path_and_number_alone(recipe: str) -> None:
    facts = Preprocess(24, MEAN, STD)
    together = crops(RGB, "a/b.png", range(5), facts, recipe, 3)
    for view in range(5):
        alone = crops(RGB, "a/b.png", [view], facts, recipe, 3)
        assert np.array_equal(alone[0], together[view])
    distinct = {crop.tobytes() for crop in together}
    assert len(distinct) == {"current": 5, "official-2021": 3}[recipe]  # half of the latter do not move
    assert not np.array_equal(crops(RGB, "a/c.png", [1], facts, recipe, 3)[0], together[1])
    assert not np.array_equal(crops(RGB, "a/b.png", [1], facts, recipe, 4)[0], together[1])
    assert np.array_equal(crops(RGB, "other", [0], facts, recipe, 9)[0], together[0])


def test_the_current_recipe_crops_within_its_scale_and_ratio() -> None:
    for number in range(200):
        left, top, right, bottom = images._random_box(400, 300, random.Random(number))
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        share, ratio = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
        assert 0.079 < share <= 1
        assert 0.74 < ratio < 1.35
    assert images._random_box(1000, 10, random.Random(0)) == (493, 0, 506, 10)


def plain_2021(image: Image.Image, size: int, moved: tuple[bool, tuple[int, int] | None]) -> Image.Image:
    """The pipeline before October 2021, in torchvision's functions: flip and translation as given."""
    flip, corner = moved
    image = F.resize(image, [size, size], BICUBIC)
    if flip:
        image = F.hflip(image)
    if corner is not None:
        enlarged = F.resize(image, [round(size * 1.125)] * 2, InterpolationMode.BILINEAR)
        image = F.crop(enlarged, corner[1], corner[0], size, size)
    return F.center_crop(F.resize(image, [int(size * 1.125)] * 2, BICUBIC), [size, size])


@pytest.mark.parametrize("size", [24, 64, 224])
def test_view_zero_equals_the_official_transforms(size: int) -> None:
    facts = Preprocess(size, MEAN, STD)
    now = v1.Compose([v1.Resize(size, BICUBIC), v1.CenterCrop((size, size))])(RGB)
    assert np.array_equal(crops(RGB, "x", [0], facts, "current", 0)[0], np.asarray(now))
    enlarged = int(size * 1.125)
    then = v1.Compose(
        [
            v1.Resize((size, size), BICUBIC),
            v1.Resize((enlarged, enlarged), BICUBIC),
            v1.CenterCrop((size, size)),
        ]
    )(RGB)
    assert np.array_equal(crops(RGB, "x", [0], facts, "official-2021", 0)[0], np.asarray(then))
    assert np.array_equal(np.asarray(then), np.asarray(plain_2021(RGB, size, (False, None))))


@pytest.mark.parametrize("size", [16, 33])
def test_every_current_view_is_one_of_torchvisions_random_resized_crops(size: int) -> None:
    """Told the box and the flip that a view drew, torchvision's functions give the same pixels."""
    facts = Preprocess(size, MEAN, STD)
    flips = 0
    for view in range(1, 21):
        rng = random.Random(f"5/{view}/a.png")
        left, top, right, bottom = images._random_box(*RGB.size, rng)
        expected = F.resized_crop(RGB, top, left, bottom - top, right - left, [size, size], BICUBIC)
        if rng.random() < 0.5:
            expected, flips = F.hflip(expected), flips + 1
        assert np.array_equal(crops(RGB, "a.png", [view], facts, "current", 5)[0], np.asarray(expected))
    assert 4 < flips < 16


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (900, 100)])
def test_boxes_are_drawn_as_torchvision_draws_them(shape: tuple[int, int]) -> None:
    """The two draw from different streams: their shares, ratios and corners are compared by quantiles."""
    width, height = shape
    torch.manual_seed(0)
    image = Image.new("1", shape)
    theirs, ours = [], []
    for number in range(2000):
        top, left, h, w = v1.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        theirs.append((w * h / (width * height), w / h, left / width, top / height))
        left, top, right, bottom = images._random_box(width, height, random.Random(number))
        w, h = right - left, bottom - top
        ours.append((w * h / (width * height), w / h, left / width, top / height))
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        a, b = np.quantile(theirs, quantile, axis=0), np.quantile(ours, quantile, axis=0)
        assert np.allclose(a, b, atol=0.05), (quantile, a, b)


@pytest.mark.parametrize("size", [16, 64])
def test_every_2021_view_is_one_of_the_pipelines_of_that_time(size: int) -> None:
    facts = Preprocess(size, MEAN, STD)
    furthest = round(size * 1.125) - size
    seen = set()
    for view in range(1, 41):
        rng = random.Random(f"5/{view}/a.png")
        flip, corner = rng.random() < 0.5, None
        if rng.random() < 0.5:
            corner = (round(rng.uniform(0, furthest)), round(rng.uniform(0, furthest)))
            seen |= set(corner)
        expected = plain_2021(RGB, size, (flip, corner))
        got = crops(RGB, "a.png", [view], facts, "official-2021", 5)[0]
        assert np.array_equal(got, np.asarray(expected))
    assert min(seen) == 0
    assert max(seen) == furthest


def every_kind(folder: Path) -> dict[str, Path]:
    """An image of each kind that datasets of photographs are known to hold."""
    grey16 = Image.fromarray((np.arange(600).reshape(20, 30) * 100).astype(np.uint16))
    clear = RGB.quantize(16)
    clear.info["transparency"] = 3
    rotated = Image.Exif()
    rotated[0x0112] = 6
    saved: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "greyscale": (RGB.convert("L"), "jpg", {}),
        "palette": (RGB.convert("P"), "png", {}),
        "palette with a clear colour": (clear, "png", {}),
        "gif": (RGB.quantize(32), "gif", {}),
        "alpha": (RGB.convert("RGBA"), "png", {}),
        "grey with alpha": (RGB.convert("LA"), "png", {}),
        "bilevel": (RGB.convert("1"), "png", {}),
        "CMYK JPEG": (RGB.convert("CMYK"), "jpg", {}),
        "CMYK TIFF": (RGB.convert("CMYK"), "tiff", {}),
        "YCbCr": (RGB.convert("YCbCr"), "jpg", {}),
        "16-bit": (grey16, "png", {}),
        "16-bit TIFF": (grey16, "tiff", {}),
        "progressive": (RGB, "jpg", {"progressive": True}),
        "EXIF-rotated": (RGB, "jpg", {"exif": rotated}),
        "webp": (RGB, "webp", {"lossless": True}),
    }
    for name, (image, suffix, options) in saved.items():
        image.save(folder / f"{name}.{suffix}", **options)
    return {name: folder / f"{name}.{suffix}" for name, (_, suffix, _) in saved.items()}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_kind_is_decoded_as_the_official_code_does(tmp_path: Path) -> None:
    for name, path in every_kind(tmp_path).items():
        got = read_rgb(path)
        with Image.open(path) as image:
            expected = image.convert("RGB")  # the official code's whole reader
        assert got.mode == "RGB", name
        assert np.array_equal(np.asarray(got), np.asarray(expected)), name


def test_exif_rotation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.save(tmp_path / "rotated.jpg", exif=exif)
    assert read_rgb(tmp_path / "rotated.jpg").size == (37, 50)


def damaged() -> dict[str, bytes]:
    buffer = io.BytesIO()
    RGB.save(buffer, "jpeg")
    whole = buffer.getvalue()
    buffer = io.BytesIO()
    RGB.save(buffer, "png")
    png = bytearray(buffer.getvalue())
    png[60:70] = b"\xff" * 10
    return {"zero": b"", "noise": b"no image", "truncated": whole[: len(whole) // 2], "corrupt": bytes(png)}


@pytest.mark.parametrize("kind", ["zero", "noise", "truncated", "corrupt"])
def test_damaged_files_are_unreadable(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(damaged()[kind])
    with pytest.raises(UnreadableImage):
        read_rgb(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_unreadable_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (10_000, 10_000)).save(path)
    with pytest.raises(UnreadableImage, match="10000 x 10000 pixels"):
        read_rgb(path)
    with pytest.raises(UnreadableImage, match="no such file"):
        read_rgb(tmp_path / "absent.png")
