from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fastcoop.backbones import Preprocess
from fastcoop.features import images
from fastcoop.features.images import UnreadableImage, crops, normalize, read_rgb

RGB = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 37, 3), dtype=np.uint8))
BICUBIC = InterpolationMode.BICUBIC
COOP, TIP = (0.08, 1.0), (0.5, 1.0)  # share of the area that a random crop keeps
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_view_zero_equals_open_clips_preprocessing(mode: str, interpolation: str) -> None:
    facts = Preprocess(24, MEAN, STD, interpolation, mode, fill_color=7)
    config = open_clip.transform.PreprocessCfg(
        24, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode, fill_color=7
    )
    for image in (RGB, RGB.rotate(90, expand=True), RGB.resize((20, 9))):
        theirs = open_clip.transform.image_transform_v2(config, is_train=False)(image)
        ours = normalize(crops(image, "x", [0], facts, "current", 0), facts, torch.device("cpu"))
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
        left, top, right, bottom = images._random_box(400, 300, random.Random(number), COOP)
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        share, ratio = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
        assert 0.079 < share <= 1
        assert 0.74 < ratio < 1.35
    assert images._random_box(1000, 10, random.Random(0), COOP) == (493, 0, 506, 10)


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
    """Given the box and the flip that a view drew, torchvision's functions give the same pixels."""
    facts = Preprocess(size, MEAN, STD)
    flips = 0
    for number, scale in [(number, scale) for number in range(1, 11) for scale in (COOP, TIP)]:
        view = f"tip {number}" if scale == TIP else number
        rng = random.Random(f"5/{view}/a.png")
        left, top, right, bottom = images._random_box(*RGB.size, rng, scale)
        expected = F.resized_crop(RGB, top, left, bottom - top, right - left, [size, size], BICUBIC)
        if rng.random() < 0.5:
            expected, flips = F.hflip(expected), flips + 1
        assert np.array_equal(crops(RGB, "a.png", [view], facts, "current", 5)[0], np.asarray(expected))
    assert 4 < flips < 16


@pytest.mark.parametrize("scale", [COOP, TIP])
@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (900, 100)])
def test_boxes_are_drawn_as_torchvision_draws_them(
    shape: tuple[int, int], scale: tuple[float, float]
) -> None:
    """The two draw from different streams: their shares, ratios and corners are compared by quantiles."""
    width, height = shape
    torch.manual_seed(0)
    image = Image.new("1", shape)
    theirs, ours = [], []
    for number in range(2000):
        top, left, h, w = v1.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
        theirs.append((w * h / (width * height), w / h, left / width, top / height))
        left, top, right, bottom = images._random_box(width, height, random.Random(number), scale)
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
    """An image of each kind of at most 8 bits that datasets of photographs are known to hold."""
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
        "progressive": (RGB, "jpg", {"progressive": True}),
        "EXIF-rotated": (RGB, "jpg", {"exif": rotated}),
        "webp": (RGB, "webp", {"lossless": True}),
    }
    for name, (image, suffix, options) in saved.items():
        image.save(folder / f"{name}.{suffix}", **options)
    return {name: folder / f"{name}.{suffix}" for name, (_, suffix, _) in saved.items()}


def test_every_kind_is_decoded_as_the_official_code_does(tmp_path: Path) -> None:
    for name, path in every_kind(tmp_path).items():
        got = read_rgb(path)
        with Image.open(path) as image:
            expected = image.convert("RGB")  # the official code's whole reader
        assert got.mode == "RGB", name
        assert np.array_equal(np.asarray(got), np.asarray(expected)), name


EIGHT = np.random.default_rng(2).integers(0, 256, (20, 30), dtype=np.uint8)
EIGHT[0, :2] = 0, 255
WIDE = {
    "16-bit.png": EIGHT.astype(np.uint16) * 257,
    "16-bit.jp2": EIGHT.astype(np.uint16) * 257,
    "16-bit.tiff": EIGHT.astype(np.uint16) * 257,
    "big-endian.tiff": (EIGHT.astype(np.uint16) * 257).astype(">u2"),
    "int32 up to 255.tiff": EIGHT.astype(np.int32),
    "int32 up to 65535.tiff": EIGHT.astype(np.int32) * 257,
    "int32 beyond.tiff": EIGHT.astype(np.int32) * 100_000,
    "int32 from below 0.tiff": EIGHT.astype(np.int32) * 100 - 9000,
    "float up to 1.tiff": EIGHT.astype(np.float32) / 255,
    "float up to 255.tiff": EIGHT.astype(np.float32),
    "float up to 65535.tiff": EIGHT.astype(np.float32) * 257,
    "float beyond.tiff": EIGHT.astype(np.float32) * 1e6,
    "float from -1 to 1.tiff": EIGHT.astype(np.float32) / 127.5 - 1,
}


@pytest.mark.parametrize("kind", WIDE)
def test_pixels_of_more_than_8_bits_are_scaled_not_clipped(kind: str, tmp_path: Path) -> None:
    Image.fromarray(WIDE[kind]).save(tmp_path / kind)
    got = np.asarray(read_rgb(tmp_path / kind))
    assert np.array_equal(got, np.repeat(EIGHT[..., None], 3, axis=2))


def test_a_dark_16_bit_picture_stays_dark(tmp_path: Path) -> None:
    for suffix in ("png", "tiff"):
        Image.fromarray(np.full((4, 4), 257 * 9, np.uint16)).save(tmp_path / f"dark.{suffix}")
        assert np.asarray(read_rgb(tmp_path / f"dark.{suffix}")).tolist() == [[[9] * 3] * 4] * 4
    wide = (EIGHT.astype(">u2") * 257).tobytes()
    (tmp_path / "grey.pgm").write_bytes(b"P5 30 20 65535\n" + wide)
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "grey.pgm"))[..., 0], EIGHT)


def test_pixels_that_are_not_finite_are_black_and_nothing_else_is_unreadable(tmp_path: Path) -> None:
    pixels = np.array([[np.nan, 0.5], [np.inf, 1.0]], np.float32)
    Image.fromarray(pixels).save(tmp_path / "holes.tiff")
    assert np.asarray(read_rgb(tmp_path / "holes.tiff"))[..., 0].tolist() == [[0, 128], [0, 255]]
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "empty.tiff")
    with pytest.raises(UnreadableImage, match="finite"):
        read_rgb(tmp_path / "empty.tiff")


def png16(colour_type: int, channels: int, pixels: np.ndarray) -> bytes:
    """A 16-bit PNG of several channels, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[0], pixels.shape[1] // channels
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_pngs_of_all_channels_are_those_of_8_bits(
    colour_type: int, channels: int, tmp_path: Path
) -> None:
    pixels = EIGHT[:, : 30 // channels * channels]
    (tmp_path / "wide.png").write_bytes(png16(colour_type, channels, pixels.astype(np.uint16) * 257))
    eight = pixels.reshape(20, -1, channels)
    expected = Image.fromarray(eight[..., 0] if channels == 1 else eight).convert("RGB")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "wide.png")), np.asarray(expected))


def test_a_callers_picture_keeps_its_transparency() -> None:
    image = RGB.quantize(16)
    image.info["transparency"] = bytes(range(16))
    assert images.to_rgb(image).mode == "RGB"
    assert image.info["transparency"] == bytes(range(16))


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


def test_postscript_under_a_picture_s_name_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **options: ran.append(given) or RGB.im)
    path = tmp_path / "cat.jpg"
    RGB.save(path, "EPS")
    with pytest.raises(UnreadableImage, match="PostScript, a program"):
        read_rgb(path)
    assert not ran


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_unreadable_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (10_000, 10_000)).save(path)
    with pytest.raises(UnreadableImage, match="10000 x 10000 pixels"):
        read_rgb(path)
    with pytest.raises(UnreadableImage, match="no such file"):
        read_rgb(tmp_path / "absent.png")


def tiff(bits: int, photometric: int, pixels: bytes, width: int, height: int) -> bytes:
    """An uncompressed grey TIFF of one strip, of kinds that Pillow reads and does not write."""
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(pixels),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    at = 8 + len(pixels) + len(pixels) % 2
    head = struct.pack("<2sHI", b"II", 42, at) + pixels.ljust(at - 8, b"\0")
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_tiffs_of_12_bits_and_those_that_store_white_as_zero_are_scaled(tmp_path: Path) -> None:
    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x07, 0xFF])  # 4095, 0, 2048, 2047
    (tmp_path / "12.tiff").write_bytes(tiff(12, 1, packed, 4, 1))
    assert np.asarray(read_rgb(tmp_path / "12.tiff"))[0, :, 0].tolist() == [255, 0, 128, 127]
    wide = np.array([0, 257 * 9, 65535], "<u2").tobytes()
    (tmp_path / "inverted.tiff").write_bytes(tiff(16, 0, wide, 3, 1))
    assert np.asarray(read_rgb(tmp_path / "inverted.tiff"))[0, :, 0].tolist() == [255, 246, 0]
