"""Choose the drawings of the demo's datasets and write ``fastcoop/demo/plan.json``: ``python -m tools.pretrain.plan``.

Pretraining excludes the glyphs in ``held_out()``. The result is the same on every machine; a test compares it with the
file.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastcoop.demo import world
from fastcoop.demo.glyphs import FONT_SIZE, SIZE, Drawing, Glyph, draw, find_glyphs
from fastcoop.demo.paint import Variation
from fastcoop.demo.patterns import STYLES, TEXTURES
from fastcoop.demo.world import DatasetPlan
from tools.pretrain.captions import words_of

FILE = Path(world.__file__).parent / "plan.json"
TRAIN, VAL, TEST = 16, 4, 15  # pictures per class; some classes have fewer test pictures, none fewer than 8
EACH = TRAIN + VAL + TEST
MIN_TARGET_IMAGES = 3  # a target's class with fewer is left out
NEAR_DUPLICATE = 0.95  # cosine similarity of two downsampled drawings
INK = 40  # gray level above which a pixel belongs to the drawing

OBJECTS: dict[str, tuple[str, ...]] = {  # class name -> first words of the icons' names
    "arrow": ("arrow", "arrows"), "battery": ("battery",), "book": ("book", "notebook", "books"),
    "calendar": ("calendar",), "camera": ("camera",), "car": ("car",), "clock": ("clock", "timer", "alarm"),
    "clipboard": ("clipboard",), "cloud": ("cloud",), "database": ("database",),
    "envelope": ("email", "mail", "envelope"), "file": ("file",), "folder": ("folder",), "hand": ("hand", "hands"),
    "house": ("home", "house"), "light bulb": ("lightbulb",),
    "message": ("chat", "message", "comment", "comments"),
    "person": ("account", "human", "person", "user", "users"),
    "phone": ("phone", "cellphone", "mobile", "smartphone", "telephone"), "printer": ("printer",),
    "shield": ("shield",), "star": ("star",),
}  # fmt: skip
BADGES: dict[str, tuple[str, ...]] = {  # class name -> last words of the icons' names
    "alert": ("alert",), "check": ("check",), "clock": ("clock",), "cog": ("cog", "settings"), "heart": ("heart",),
    "lock": ("lock",), "minus": ("minus",), "off": ("off",), "pencil": ("edit", "pencil"), "plus": ("plus",),
    "search": ("search",), "sync": ("sync", "refresh"),
}  # fmt: skip
TARGETS = ("phosphor", "remix", "awesome")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Atlas:
    """All glyphs, their drawings, and which of them are near-duplicates of each other."""

    def __init__(self) -> None:
        self.glyphs = find_glyphs()
        self.drawings = draw(self.glyphs)
        self.vectors = unit_vectors(self.drawings)
        self.framed_vectors = unit_vectors(framed(self.drawings))  # equal for two sizes of one drawing
        self.index = {glyph.key: i for i, glyph in enumerate(self.glyphs)}

    def distinct(self, candidates: Iterable[int], limit: int, taken: list[int]) -> list[int]:
        """Return the first ``limit`` candidates that are near-duplicates of neither each other nor ``taken``."""
        chosen: list[int] = []
        for i in candidates:
            rivals = self.vectors[taken + chosen]
            if self.drawings[i].any() and not (rivals @ self.vectors[i] > NEAR_DUPLICATE).any():
                chosen.append(i)
                if len(chosen) == limit:
                    break
        return chosen

    def unlike(self, indices: list[int], others: list[int]) -> list[int]:
        """Return those of ``indices`` that are near-duplicates of none of ``others`` at any size."""
        similarity = self.framed_vectors[indices] @ self.framed_vectors[others].T
        alike = np.asarray((similarity > NEAR_DUPLICATE).any(1))
        return [i for i, found in zip(indices, alike, strict=True) if not found]

    def near(self, indices: list[int]) -> npt.NDArray[np.int64]:
        """Return these glyphs and all their near-duplicates."""
        found = np.asarray((self.vectors @ self.vectors[indices].T > NEAR_DUPLICATE).any(1))
        found[indices] = True
        return np.flatnonzero(found)


@cache
def atlas() -> Atlas:
    return Atlas()


def choose() -> list[DatasetPlan]:
    """Return which drawings form which dataset.

    A candidate stays in a test set only if it resembles, at any size, neither a glyph used in pretraining nor one in
    the training or validation set of its dataset (of ``objects`` for its targets).
    """
    world, plans = atlas(), candidates()
    excluded = held_out(plans)
    shown = [i for i, glyph in enumerate(world.glyphs) if glyph.key not in excluded]
    for one in plans:
        source = one if "train" in one.members else plans[0]
        known = shown + [
            world.index[g] for g in map(_glyph_key, source.keys("train", "val")) if g in world.index
        ]
        for name, keys in list(one.members["test"].items()):
            glyphs = {world.index[g]: key for key in keys if (g := _glyph_key(key)) in world.index}
            kept = [glyphs[i] for i in world.unlike(list(glyphs), known)] if glyphs else keys
            one.members["test"][name] = kept
            if len(kept) < MIN_TARGET_IMAGES:
                del one.members["test"][name]
    return plans


def candidates() -> list[DatasetPlan]:
    """Return the plan before test glyphs that resemble seen ones are removed.

    Within a dataset of icons no two drawings are near-duplicates, in any splits; no drawing of a target of
    ``objects`` is a near-duplicate of one in the training or validation set of ``objects``.
    """
    objects = DatasetPlan("objects", "a picture of a {}.")
    badges = DatasetPlan("badges", "an icon with a {} badge.", Variation(rotation=5, scale=(0.8, 1.1)))
    _fill(objects, _by_class(OBJECTS, "material", first=True))
    _fill(badges, _by_class(BADGES, "material", first=False))
    targets = []
    for family in TARGETS:
        target = DatasetPlan(f"objects-{family}", objects.template)
        _fill(target, _by_class(OBJECTS, family, first=True), objects.keys("train", "val"))
        targets.append(target)
    sketch = DatasetPlan("objects-sketch", objects.template, Variation(noise=0.2))
    for name, keys in objects.members["test"].items():
        _add(sketch, name, [f"hatched {key}" for key in keys], test_only=True)
    return [objects, badges, _styles(), _textures(), _digits(), *targets, sketch]


def held_out(plans: list[DatasetPlan]) -> set[str]:
    """Return the keys of the glyphs that pretraining must not use: the plans' test glyphs and near-duplicates."""
    world = atlas()
    tests = {_glyph_key(key) for one in plans for key in one.keys("test")}
    indices = sorted(world.index[key] for key in tests if key in world.index)
    return {world.glyphs[i].key for i in world.near(indices)}


def _glyph_key(key: str) -> str:
    """Return the glyph's key from a drawing's, which may begin with a style."""
    return key.split()[-1]


def _shuffled(indices: Iterable[int]) -> list[int]:
    return sorted(indices, key=lambda i: zlib.crc32(atlas().glyphs[i].key.encode()))


def _add(dataset: DatasetPlan, name: str, keys: list[str], test_only: bool = False) -> None:
    """Add a class: its first drawings for training, the next for validation, the rest for the test."""
    cut = {"train": keys[:TRAIN], "val": keys[TRAIN : TRAIN + VAL], "test": keys[TRAIN + VAL :]}
    for split, part in ({"test": keys} if test_only else cut).items():
        dataset.members.setdefault(split, {})[name] = part


def _by_class(classes: dict[str, tuple[str, ...]], family: str, first: bool) -> dict[str, list[int]]:
    """Return a family's glyphs by class, shuffled: those whose first (else last) word is one of the class's."""

    def belongs(glyph: Glyph, words: tuple[str, ...]) -> bool:
        if glyph.family != family:
            return False
        return (
            words_of(glyph)[0] in words
            if first
            else len(words_of(glyph)) > 1 and words_of(glyph)[-1] in words
        )

    glyphs = atlas().glyphs
    return {
        name: _shuffled(i for i, glyph in enumerate(glyphs) if belongs(glyph, words))
        for name, words in classes.items()
    }


def _fill(
    dataset: DatasetPlan, candidates: dict[str, list[int]], source_keys: set[str] | None = None
) -> None:
    """Choose the drawings of every class. With ``source_keys`` to stay clear of, a dataset is for testing only."""
    world = atlas()
    taken = [world.index[key] for key in sorted(source_keys or ())]
    for name, members in candidates.items():
        chosen = world.distinct(members, TEST if source_keys else EACH, taken)
        taken += chosen
        if not source_keys or len(chosen) >= MIN_TARGET_IMAGES:
            _add(dataset, name, [world.glyphs[i].key for i in chosen], test_only=bool(source_keys))


def _styles() -> DatasetPlan:
    """Icons of any subject, different ones for each style."""
    world = atlas()
    solid = _shuffled(
        i
        for i, glyph in enumerate(world.glyphs)
        if glyph.family in ("remix", "elusive") and 0.18 < world.drawings[i].mean() / 255 < 0.5
    )
    chosen = world.distinct(solid, EACH * len(STYLES), [])
    made = DatasetPlan("styles", "a {} drawing.", Variation(rotation=10))
    for position, style in enumerate(STYLES):
        part = chosen[position * EACH : (position + 1) * EACH]
        _add(made, style, [f"{style} {world.glyphs[i].key}" for i in part])
    return made


def _textures() -> DatasetPlan:
    variation = Variation(rotation=0, scale=(1.0, 1.0), shift=0, noise=0.12)
    made = DatasetPlan("textures", "a {} texture.", variation)
    for name in TEXTURES:
        _add(made, name, [f"texture/{name}/{i}" for i in range(EACH)])
    return made


def _digits() -> DatasetPlan:
    """Real handwritten digits; the first of each in scikit-learn's order train, those of later writers test."""
    from sklearn.datasets import load_digits

    made = DatasetPlan("digits", "a handwritten {}.", Variation(rotation=5))
    target = load_digits().target
    for digit, name in enumerate(DIGITS):
        rows = np.flatnonzero(target == digit)
        rows = rows[np.linspace(0, len(rows) - 1, EACH).astype(int)]
        _add(made, name, [f"digit/{row}" for row in rows])
    return made


def framed(drawings: Drawing) -> Drawing:
    """Crop drawings (n, 64, 64) to their ink and scale them to one size, so that two sizes of a glyph are equal."""
    return np.stack([_framed(drawing) for drawing in drawings])


def _framed(drawing: Drawing) -> Drawing:
    rows, columns = np.nonzero(drawing > INK)
    if not len(rows):
        return drawing
    ink = Image.fromarray(drawing).crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    scale = FONT_SIZE / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    frame = Image.new("L", (SIZE, SIZE))
    scaled = ink.resize((width, height), Image.Resampling.BICUBIC)
    frame.paste(scaled, ((SIZE - width) // 2, (SIZE - height) // 2))
    return np.asarray(frame)


def unit_vectors(drawings: Drawing) -> npt.NDArray[np.float32]:
    """Downsample drawings to 16 x 16 and normalize them: (n, 256), to find near-duplicates by their products."""
    n = len(drawings)
    small = drawings.reshape(n, 16, SIZE // 16, 16, SIZE // 16).mean((2, 4), dtype=np.float32).reshape(n, 256)
    norms = np.linalg.norm(small, axis=1, keepdims=True)
    vectors: npt.NDArray[np.float32] = small / np.maximum(norms, 1e-6)
    return vectors


def main() -> None:
    """Write the plan."""
    plans = [dataclasses.asdict(one) for one in choose()]
    FILE.write_text(json.dumps(plans, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
