"""How long a sweep over many runs of a method on image features takes.

    python -m tools.adapters_trial [METHOD ...] [--runs 1000] [--shots 1] [--classes 100] [--dim 512] [--jobs 2]

The methods are tip_adapter_f, task_res and clap by default, with their own defaults. Features and backbone are made up:
a class's images lie around a center near its text feature. There are 25 test images and, at most, 4 validation images
of a class, and 8 views of a training image. Each method is one sweep with as many seeds as runs: features are read from
a store, runs are learned, tested and recorded. The first figure is all of the call but the start of Python; the second
is CPU time, which says more on a busy machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

import numpy as np

import fastcoop as fc
from fastcoop.backbones import backbone_from_spec
from fastcoop.features.image_files import FILE
from fastcoop.features.plan import Encoding
from fastcoop.features.store import store_path
from fastcoop.features.store_file import SplitContent, write_store
from fastcoop.methods.text import prompt_features
from tests.small_world import write_backbone

METHODS = ("tip_adapter_f", "task_res", "clap")
VIEWS, VAL, TEST = 8, 4, 25
SPREAD = 1.2  # of images around their class's center


def write_world(folder: Path, classes: int, shots: int, dim: int) -> Path:
    """Write a backbone, a dataset of empty files and its features, and return the backbone's folder."""
    model = write_backbone(folder / "made-up", embed_dim=dim)
    for split, images in (("train", 2 * shots), ("val", VAL), ("test", TEST)):
        for label in range(classes):
            place = folder / "data" / "things" / split / f"thing {label:03d}"
            place.mkdir(parents=True)
            for image in range(images):
                (place / f"{image:02d}.png").touch()
    backbone = backbone_from_spec(str(model))
    dataset = fc.load_dataset("things", folder / "data")
    rng = np.random.default_rng(0)
    texts = prompt_features(backbone, dataset.class_names, dataset.template)
    texts = texts - texts.mean(0)
    centers = texts / np.linalg.norm(texts, axis=1, keepdims=True) + rng.normal(size=texts.shape) / dim**0.5
    common, encoding = (
        2 * rng.normal(size=dim) / dim**0.5,
        Encoding(backbone, dataset, views=VIEWS, kinds={"tip": VIEWS}),
    )
    contents = {}
    for split, part in dataset.splits.items():
        files = np.zeros(len(part), FILE)
        for row, path in enumerate(part.paths):
            stat = (dataset.root / path).stat()
            files[row]["size"], files[row]["mtime_ns"] = stat.st_size, stat.st_mtime_ns
        shared = SPREAD * rng.normal(size=(len(part), 1, dim))
        blocks = []
        for array, views in encoding.arrays(split).items():
            noise = (shared + 0.5 * rng.normal(size=(len(part), len(views), dim))) / dim**0.5
            features = (centers[part.labels][:, None] + common + noise).astype(np.float16)
            blocks.append((array, np.arange(len(part)), slice(0, len(views)), features))
        contents[split] = SplitContent(np.arange(len(part)), files, blocks)
    write_store(store_path(folder / "cache", backbone, dataset), encoding.meta({}), dataset.splits, contents)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", default=METHODS)
    for name, default in (("runs", 1000), ("shots", 1), ("classes", 100), ("dim", 512), ("jobs", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = write_world(folder, given.classes, given.shots, given.dim)
        for method in given.methods:
            grid = {
                "backbones": str(model), "datasets": "things", "views": VIEWS, "shots": given.shots,
                "seeds": list(range(1, 1 + given.runs)), "methods": method,
            }  # fmt: skip
            wall, cpu = time.perf_counter(), cpu_seconds()
            fc.sweep(
                grid,
                data_root=folder / "data",
                cache=folder / "cache",
                results=folder / method,
                jobs=given.jobs,
            )
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            runs = fc.load_results(folder / method)
            print(
                f"{method}: {len(runs)} runs, {given.classes} classes, {given.shots} shots, {given.dim} dimensions, "
                f"{given.jobs} processes: {wall:.1f} s, {cpu:.1f} s of CPU; mean accuracy {runs.accuracy.mean():.2f} %",
                flush=True,
            )


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    return sum(sum(getrusage(who)[:2]) for who in (RUSAGE_SELF, RUSAGE_CHILDREN))


if __name__ == "__main__":
    main()
