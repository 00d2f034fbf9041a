"""The demo's datasets: small pictures of icons, textures and digits, written to disk as a user's own datasets are.

``plan.json`` lists which drawings form which dataset; ``tools/pretrain/plan.py`` chose them, so that no test picture
resembles one that the demo's backbones were trained on.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import yaml
from PIL import Image

from fastcoop.demo.glyphs import SIZE, Drawing, Glyph, draw, find_glyphs
from fastcoop.demo.paint import Variation, paint
from fastcoop.demo.patterns import restyle, texture
from fastcoop.errors import UserError
from fastcoop.files import begins_with
from fastcoop.progress import progress

DRAWN = "# drawn by fastcoop demo"
HEADER = f"{DRAWN}, version 2\n"  # of dataset.yaml; another version is drawn again


@dataclass
class DatasetPlan:
    """One dataset before painting. ``members``: split -> class name -> keys of the drawings."""

    name: str
    template: str
    variation: Variation = field(default_factory=Variation)
    members: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def keys(self, *splits: str) -> set[str]:
        """Return the drawings of the splits, of all of them if none is given."""
        chosen = splits or tuple(self.members)
        classes = (self.members[split] for split in chosen if split in self.members)
        return {key for one in classes for keys in one.values() for key in keys}


def plan() -> list[DatasetPlan]:
    """Return which drawings form which dataset."""
    stored = json.loads((Path(__file__).parent / "plan.json").read_text(encoding="utf-8"))
    for one in stored:
        low, high = one["variation"].pop("scale")
        one["variation"] = Variation(**one["variation"], scale=(low, high))
    return [DatasetPlan(**one) for one in stored]


@cache
def _glyphs() -> dict[str, Glyph]:
    return {glyph.key: glyph for glyph in find_glyphs()}


@cache
def _digits() -> npt.NDArray[np.float64]:
    """Return scikit-learn's handwritten digits: (1797, 8, 8), 0 to 16."""
    from sklearn.datasets import load_digits

    digits: npt.NDArray[np.float64] = load_digits().images
    return digits


def drawings_of(keys: list[str]) -> Drawing:
    """Return the drawings with these keys: (n, 64, 64) uint8.

    A key is ``texture/NAME/NUMBER``, ``digit/ROW`` (of scikit-learn's handwritten digits), a glyph's key, or a style
    and a glyph's key with a space between.
    """
    named = [key.rpartition(" ") for key in keys if not key.startswith(("digit/", "texture/"))]
    drawn = draw([_glyphs()[glyph] for _, _, glyph in named])  # at once: opening a font takes longest
    icons = zip(drawn, (style for style, _, _ in named), strict=True)
    drawings = np.zeros((len(keys), SIZE, SIZE), np.uint8)
    for drawing, key in zip(drawings, keys, strict=True):
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        if key.startswith("digit/"):
            small = Image.fromarray((_digits()[int(key[6:])] * 15.9).astype(np.uint8))
            drawing[4:60, 8:56] = np.asarray(small.resize((48, 56), Image.Resampling.BICUBIC))
        elif key.startswith("texture/"):
            drawing[:] = texture(key.split("/")[1], rng)
        else:
            icon, style = next(icons)
            drawing[:] = restyle(icon, style, rng) if style else icon
    return drawings


def build_world(root: Path) -> list[str]:
    """Write the demo's datasets under ``root``, unless they exist; return their names.

    Each is ``<name>/images/<class>/*.png`` (64 x 64), ``<name>/split.json`` in the official format and
    ``<name>/dataset.yaml``. Deterministic; a dataset appears whole or not at all.

    Raises:
        UserError: a folder of one of these names is there that the demo did not draw.
    """
    plans = plan()
    for one in plans:
        _refuse_foreign(root / one.name)
    with progress("Drawing the demo's pictures", sum(len(one.keys()) for one in plans)) as advance:
        for one in plans:
            config = root / one.name / "dataset.yaml"
            if not config.is_file() or HEADER not in config.read_text(encoding="utf-8"):
                _write(one, root)
            advance(len(one.keys()), one.name)
    return [one.name for one in plans]


def _refuse_foreign(folder: Path) -> None:
    """Raise UserError for a folder that the demo did not draw, by its YAML and the names of its pictures."""
    config = folder / "dataset.yaml"
    is_own = config.is_file() and begins_with(config, DRAWN)
    if folder.exists() and not is_own and not any(folder.glob("images/*/t*-00-*.png")):
        raise UserError(
            f"{folder} is already there and was not drawn by `fastcoop demo`; choose another folder (--out), or move "
            "it away."
        )


def _write(one: DatasetPlan, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=root, prefix=f".{one.name}-"))
    try:
        split = {
            kind: [
                line
                for label, name in enumerate(one.members["test"])
                for line in _paint_class(one, kind, name, label, part / "images")
            ]
            for kind in one.members
        }
        (part / "split.json").write_text(json.dumps(split, indent=1), encoding="utf-8")
        config = yaml.safe_dump({"name": one.name, "template": one.template})
        (part / "dataset.yaml").write_text(HEADER + config, encoding="utf-8")
        part.chmod(0o755)
        shutil.rmtree(root / one.name, ignore_errors=True)
        os.replace(part, root / one.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _paint_class(one: DatasetPlan, kind: str, name: str, label: int, images: Path) -> Iterator[list[object]]:
    """Write the pictures of a class; yield their lines of the split file."""
    keys = one.members[kind].get(name, [])
    if not keys:
        return
    folder = images / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{one.name}/{kind}/{name}".encode()))
    pictures, _ = paint(torch.from_numpy(drawings_of(keys)), SIZE, generator, one.variation)
    pixels = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i, (key, picture) in enumerate(zip(keys, pixels, strict=True)):
        path = folder / f"{kind}-{i:02d}-{key.split('/')[-1].replace(' ', '-')}.png"
        Image.fromarray(picture).save(path, compress_level=0)
        yield [path.relative_to(images).as_posix(), label, name]
