"""The demo's datasets: a small world of pictures, written to disk as a user's own datasets would be.

``plan()`` decides which drawings go where; pretraining asks it which glyphs it must never see.
``build_world`` paints the plan and writes it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import yaml
from PIL import Image

from fastcoop.demo.glyphs import NEAR_DUPLICATE, SIZE, Glyph, blurred, draw, find_glyphs, framed
from fastcoop.demo.paint import Manner, paint
from fastcoop.demo.patterns import restyle, styles, texture, textures
from fastcoop.progress import progress

TRAIN, VAL, TEST = 16, 4, 15  # pictures per class; some classes have fewer test pictures, none fewer than 8
FEW = 3  # a target's class with fewer is left out
VERSION = 2  # of the world as written to disk

# class name -> head words of the icon names that show it
OBJECTS: dict[str, tuple[str, ...]] = {
    "arrow": ("arrow", "arrows"),
    "battery": ("battery",),
    "book": ("book", "notebook", "books"),
    "calendar": ("calendar",),
    "camera": ("camera",),
    "car": ("car",),
    "clock": ("clock", "timer", "alarm"),
    "clipboard": ("clipboard",),
    "cloud": ("cloud",),
    "database": ("database",),
    "envelope": ("email", "mail", "envelope"),
    "file": ("file",),
    "folder": ("folder",),
    "hand": ("hand", "hands"),
    "house": ("home", "house"),
    "light bulb": ("lightbulb",),
    "message": ("chat", "message", "comment", "comments"),
    "person": ("account", "human", "person", "user", "users"),
    "phone": ("phone", "cellphone", "mobile", "smartphone", "telephone"),
    "printer": ("printer",),
    "shield": ("shield",),
    "star": ("star",),
}
# class name -> last words of the icon names that wear it as a badge
BADGES: dict[str, tuple[str, ...]] = {
    "alert": ("alert",),
    "check": ("check",),
    "clock": ("clock",),
    "cog": ("cog", "settings"),
    "heart": ("heart",),
    "lock": ("lock",),
    "minus": ("minus",),
    "off": ("off",),
    "pencil": ("edit", "pencil"),
    "plus": ("plus",),
    "search": ("search",),
    "sync": ("sync", "refresh"),
}
TARGETS = ("phosphor", "remix", "awesome")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass
class DatasetPlan:
    """One dataset before painting. members: split -> class name -> keys of the drawings."""

    name: str
    template: str
    manner: Manner = field(default_factory=Manner)
    members: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def keys(self, *splits: str) -> set[str]:
        """The drawings of the splits (all of them if none is named)."""
        return {
            key
            for split, classes in self.members.items()
            if not splits or split in splits
            for keys in classes.values()
            for key in keys
        }


class Atlas:
    """All glyphs, their drawings, and which of them are near-duplicates of which."""

    def __init__(self) -> None:
        self.glyphs = find_glyphs()
        self.masks = draw(self.glyphs)
        self.vectors = blurred(self.masks)
        self.sizeless = blurred(framed(self.masks))
        self.index = {glyph.key: i for i, glyph in enumerate(self.glyphs)}

    def distinct(self, candidates: Iterable[int], limit: int, taken: list[int]) -> list[int]:
        """The first ``limit`` candidates that are near-duplicates of neither each other nor ``taken``."""
        chosen: list[int] = []
        for i in candidates:
            rivals = self.vectors[taken + chosen]
            if self.masks[i].any() and not (rivals @ self.vectors[i] > NEAR_DUPLICATE).any():
                chosen.append(i)
                if len(chosen) == limit:
                    break
        return chosen

    def unlike(self, indices: list[int], others: list[int]) -> list[int]:
        """Those of ``indices`` that are near-duplicates of none of ``others``, at whatever sizes they are drawn."""
        alike = np.asarray((self.sizeless[indices] @ self.sizeless[others].T > NEAR_DUPLICATE).any(1))
        return [i for i, found in zip(indices, alike, strict=True) if not found]

    def near(self, indices: list[int]) -> npt.NDArray[np.int64]:
        """These glyphs and all their near-duplicates."""
        found = np.asarray((self.vectors @ self.vectors[indices].T > NEAR_DUPLICATE).any(1))
        found[indices] = True
        return np.flatnonzero(found)


@lru_cache(maxsize=1)
def atlas() -> Atlas:
    return Atlas()


def plan() -> list[DatasetPlan]:
    """Which drawings make which dataset; the same on every machine.

    Of the candidates' test glyphs those stay that resemble, at whatever size, neither a glyph that pretraining was
    shown nor one that their dataset (``objects`` for its targets) trains or validates on.
    """
    world, plans = atlas(), candidates()
    unseen = held_out(plans)
    shown = [i for i, glyph in enumerate(world.glyphs) if glyph.key not in unseen]
    for one in plans:
        source = one if "train" in one.members else plans[0]
        known = shown + [world.index[g] for g in map(_glyph, source.keys("train", "val")) if g in world.index]
        for name, keys in list(one.members["test"].items()):
            glyphs = {world.index[g]: key for key in keys if (g := _glyph(key)) in world.index}
            kept = [glyphs[i] for i in world.unlike(list(glyphs), known)] if glyphs else keys
            one.members["test"][name] = kept
            if len(kept) < FEW:
                del one.members["test"][name]
    return plans


def candidates() -> list[DatasetPlan]:
    """The plan before test glyphs are dropped for their likeness to what was seen.

    Within a dataset of icons no two drawings are near-duplicates, whatever their splits; no drawing of a
    target of ``objects`` is a near-duplicate of one that ``objects`` trains or validates on.
    """
    world = atlas()
    objects = DatasetPlan("objects", "a picture of a {}.")
    badges = DatasetPlan("badges", "an icon with a {} badge.", Manner(rotation=5, scale=(0.8, 1.1)))
    _fill(objects, _by_class(world.glyphs, OBJECTS, "material", first=True))
    _fill(badges, _by_class(world.glyphs, BADGES, "material", first=False))
    targets = []
    for family in TARGETS:
        target = DatasetPlan(f"objects-{family}", objects.template)
        _fill(target, _by_class(world.glyphs, OBJECTS, family, first=True), objects.keys("train", "val"))
        targets.append(target)
    sketch = DatasetPlan("objects-sketch", objects.template, Manner(noise=0.2))
    sketch.members = {"test": {c: [f"hatched {k}" for k in ks] for c, ks in objects.members["test"].items()}}
    return [objects, badges, _styles(), _textures(), _digits(), *targets, sketch]


def held_out(plans: list[DatasetPlan]) -> set[str]:
    """Keys of the glyphs that pretraining must not see: the test glyphs of ``candidates()`` and near-duplicates."""
    world = atlas()
    tests = {_glyph(key) for one in plans for key in one.keys("test")}
    return {
        world.glyphs[i].key for i in world.near(sorted(world.index[k] for k in tests if k in world.index))
    }


def _glyph(key: str) -> str:
    """The glyph's key of a drawing's, which may have a style before it."""
    return key.split()[-1]


def _by_class(
    glyphs: list[Glyph], classes: dict[str, tuple[str, ...]], family: str, first: bool
) -> dict[str, list[int]]:
    """Glyphs of a family by class, in a fixed shuffle: their first (else last) word is one of the class's."""
    found: dict[str, list[int]] = {}
    for name, heads in classes.items():
        members = [
            i
            for i, glyph in enumerate(glyphs)
            if glyph.family == family
            and (glyph.words[0] in heads if first else len(glyph.words) > 1 and glyph.words[-1] in heads)
        ]
        found[name] = sorted(members, key=lambda i: zlib.crc32(glyphs[i].key.encode()))
    return found


def _fill(target: DatasetPlan, candidates: dict[str, list[int]], foreign: set[str] | None = None) -> None:
    """Give every class its drawings. With ``foreign`` ones to stay clear of, a dataset is for testing only."""
    world = atlas()
    taken = [world.index[key] for key in sorted(foreign or ())]
    needed = TEST if foreign else TRAIN + VAL + TEST
    for name, members in candidates.items():
        chosen = world.distinct(members, needed, taken)
        taken += chosen
        if foreign and len(chosen) < FEW:
            continue
        keys = [world.glyphs[i].key for i in chosen]
        cuts = {"test": keys} if foreign else _cut(keys)
        for split, part in cuts.items():
            target.members.setdefault(split, {})[name] = part


def _cut(keys: list[str]) -> dict[str, list[str]]:
    return {"train": keys[:TRAIN], "val": keys[TRAIN : TRAIN + VAL], "test": keys[TRAIN + VAL :]}


def _styles() -> DatasetPlan:
    """Icons of any subject, another set of them for each style."""
    world = atlas()
    solid = [
        i
        for i, glyph in enumerate(world.glyphs)
        if glyph.family in ("remix", "elusive") and 0.18 < world.masks[i].mean() / 255 < 0.5
    ]
    solid.sort(key=lambda i: zlib.crc32(world.glyphs[i].key.encode()))
    each = TRAIN + VAL + TEST
    chosen = world.distinct(solid, each * len(styles()), [])
    made = DatasetPlan("styles", "a {} drawing.", Manner(rotation=10))
    for position, style in enumerate(styles()):
        keys = [f"{style} {world.glyphs[i].key}" for i in chosen[position * each : (position + 1) * each]]
        for split, part in _cut(keys).items():
            made.members.setdefault(split, {})[style] = part
    return made


def _textures() -> DatasetPlan:
    made = DatasetPlan("textures", "a {} texture.", Manner(rotation=0, scale=(1.0, 1.0), shift=0, noise=0.12))
    for name in textures():
        for split, part in _cut([f"texture/{name}/{i}" for i in range(TRAIN + VAL + TEST)]).items():
            made.members.setdefault(split, {})[name] = part
    return made


def _digits() -> DatasetPlan:
    """Real handwritten digits; the first of each in scikit-learn's order train, later writers test."""
    from sklearn.datasets import load_digits

    made = DatasetPlan("digits", "a handwritten {}.", Manner(rotation=5))
    target = load_digits().target
    for digit, name in enumerate(DIGITS):
        rows = np.flatnonzero(target == digit)
        rows = rows[np.linspace(0, len(rows) - 1, TRAIN + VAL + TEST).astype(int)]
        for split, part in _cut([f"digit/{row}" for row in rows]).items():
            made.members.setdefault(split, {})[name] = part
    return made


def masks_of(keys: list[str]) -> npt.NDArray[np.uint8]:
    """The drawings that a plan's keys name: (n, 64, 64) uint8."""
    from sklearn.datasets import load_digits

    world, digits = atlas(), load_digits().images if any(key.startswith("digit/") for key in keys) else None
    drawings = np.zeros((len(keys), SIZE, SIZE), np.uint8)
    for drawing, key in zip(drawings, keys, strict=True):
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        if digits is not None and key.startswith("digit/"):
            small = Image.fromarray((digits[int(key[6:])] * 15.9).astype(np.uint8))
            drawing[4:60, 8:56] = np.asarray(small.resize((48, 56), Image.Resampling.BICUBIC))
        elif key.startswith("texture/"):
            drawing[:] = texture(key.split("/")[1], rng)
        elif " " in key:
            style, glyph = key.split(" ")
            drawing[:] = restyle(world.masks[world.index[glyph]], style, rng)
        else:
            drawing[:] = world.masks[world.index[key]]
    return drawings


def build_world(root: Path) -> list[str]:
    """Write the demo's datasets under ``root``, unless they are there already; returns their names.

    Each is ``<name>/images/<class>/*.png`` (64 x 64), ``<name>/split.json`` in the official format and
    ``<name>/dataset.yaml``. Deterministic; a dataset appears whole or not at all.
    """
    names = []
    with progress("Choosing the demo's drawings", 2) as advance:
        atlas()
        advance()
        plans = plan()
        advance()
    with progress("Drawing the demo's pictures", sum(len(one.keys()) for one in plans)) as advance:
        for one in plans:
            names.append(one.name)
            if not _is_written(root / one.name):
                _write(one, root)
            advance(len(one.keys()), one.name)
    return names


def _is_written(folder: Path) -> bool:
    config = folder / "dataset.yaml"
    return config.is_file() and f"version {VERSION}\n" in config.read_text(encoding="utf-8")


def _write(one: DatasetPlan, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=root, prefix=f".{one.name}-"))
    try:
        names = list(one.members["test"])
        split: dict[str, list[list[object]]] = {}
        for kind in one.members:
            split[kind] = []
            for label, name in enumerate(names):
                split[kind] += _paint_class(one, kind, name, label, part / "images")
        (part / "split.json").write_text(json.dumps(split, indent=1), encoding="utf-8")
        described = yaml.safe_dump({"name": one.name, "template": one.template})
        (part / "dataset.yaml").write_text(
            f"# drawn by fastcoop demo, version {VERSION}\n{described}", encoding="utf-8"
        )
        part.chmod(0o755)
        shutil.rmtree(root / one.name, ignore_errors=True)
        os.replace(part, root / one.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _paint_class(one: DatasetPlan, kind: str, name: str, label: int, images: Path) -> list[list[object]]:
    keys = one.members.get(kind, {}).get(name, [])
    if not keys:
        return []
    folder = images / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32(f"{one.name}/{kind}/{name}".encode())
    pictures, _ = paint(
        torch.from_numpy(masks_of(keys)), SIZE, torch.Generator().manual_seed(seed), one.manner
    )
    pixels = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    items: list[list[object]] = []
    for i, (key, picture) in enumerate(zip(keys, pixels, strict=True)):
        stem = key.split("/")[-1].replace(" ", "-")
        path = folder / f"{kind}-{i:02d}-{stem}.png"
        Image.fromarray(picture).save(path, compress_level=1)
        items.append([path.relative_to(images).as_posix(), label, name])
    return items
