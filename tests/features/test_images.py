from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from fastcoop.backbones import Preprocess
from fastcoop.features import images
from fastcoop.features.images import UnreadableImage, crops, normalised, read_rgb

RGB = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 37, 3), dtype=np.uint8))
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


def test_the_2021_recipe_squashes_then_crops_the_centre_of_an_eighth_more() -> None:
    facts = Preprocess(224, MEAN, STD)
    expected = RGB.resize((224, 224), Image.Resampling.BICUBIC).resize((252, 252), Image.Resampling.BICUBIC)
    view = crops(RGB, "x", [0], facts, "official-2021", 0)[0]
    assert np.array_equal(view, np.asarray(expected.crop((14, 14, 238, 238))))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "I;16"])
def test_every_mode_becomes_rgb_as_pillow_converts_it(mode: str, tmp_path: Path) -> None:
    if mode == "I;16":
        image = Image.fromarray((np.arange(600).reshape(20, 30) * 100).astype(np.uint16))
        path = tmp_path / "image.png"
    else:
        image = RGB.convert(mode)
        path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    image.save(path)
    got = read_rgb(path)
    assert got.mode == "RGB"
    with Image.open(path) as again:
        assert np.array_equal(np.asarray(got), np.asarray(again.convert("RGB")))


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
