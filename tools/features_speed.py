"""How long caching and reading features takes, and how much memory; run by hand, never by pytest.

    python -m tools.features_speed encode PHOTOS   # the whole cache-features command against the image tower alone
    python -m tools.features_speed memory PHOTOS   # the command's memory on a small and on a large dataset
    python -m tools.features_speed read            # all of a large store into training

PHOTOS is a folder of images, side by side or in folders.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

VIEWS = 8
SMALL_VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 56},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def encode(photos: Path, images: int, model: str) -> None:
    """``fastcoop cache-features`` in a process of its own, between two halves of the same work without it."""
    import torch

    from fastcoop.backbones import load_backbone
    from fastcoop.datasets import load_dataset
    from fastcoop.features.images import crops, normalize, read_rgb

    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder) / "photos.csv", photos, images)
        backbone = load_backbone(model)
        weights = write_model(Path(folder) / model, model_config(model), backbone.model.state_dict())
        dataset, facts = load_dataset(table), backbone.preprocess
        counts = {split: len(part) for split, part in dataset.splits.items()}
        total = counts["train"] * (1 + VIEWS) + counts["val"] + counts["test"]
        some = [dataset.root / path for path in dataset.splits["train"].paths[:8]]
        pixels = np.concatenate(
            [crops(read_rgb(path), str(path), range(8), facts, "current", 0) for path in some]
        )
        batch = normalize(pixels, facts, torch.device("cpu"))
        half = max(1, round(total / len(batch) / 4))  # a quarter of the work before, a quarter after

        def tower() -> np.ndarray:
            """Seconds by the clock and of CPU that a crop takes, in batches of 64 that are in memory already."""
            begin = time.perf_counter(), time.process_time()
            for _ in range(half):
                backbone.encode_images(batch)
            return np.subtract((time.perf_counter(), time.process_time()), begin) / (half * len(batch))

        backbone.encode_images(batch)
        before = tower()
        took = command(table, weights, Path(folder) / "cache")
        clock, cpu = total * (before + tower()) / 2
        again = command(table, weights, Path(folder) / "cache")
    print(f"{torch.get_num_threads()} threads; {images} photographs, {VIEWS} views: {total} crops by {model}")
    print(f"image tower alone, tensors in memory: {clock:.1f} s, {cpu:.1f} s of CPU")
    print(f"whole command, starting and loading included: {took.seconds:.1f} s, {took.cpu:.1f} s of CPU")
    print(
        f"of which starting and loading, as a second call takes: {again.seconds:.1f} s, {again.cpu:.1f} s of CPU"
    )
    rates = clock / (took.seconds - again.seconds), cpu / (took.cpu - again.cpu)
    print("rate of caching without that, as a share of the tower's own (2 cores: at least 0.9):")
    print(f"{rates[0]:.3f} by the clock, {rates[1]:.3f} of CPU")


def memory(photos: Path, images: int) -> None:
    """Peak memory of the command on ``images`` photographs, and on eight times as many."""
    from fastcoop.backbones.load import _build

    with tempfile.TemporaryDirectory() as folder:
        weights = write_model(Path(folder) / "vit", SMALL_VIT, _build(SMALL_VIT).state_dict())
        for count in (images, 8 * images):
            table = write_table(Path(folder) / f"photos{count}.csv", photos, count)
            took = command(table, weights, Path(folder) / "cache")
            print(
                f"{count} photographs, {VIEWS} views: {took.peak_mib:.0f} MiB at most, {took.seconds:.1f} s"
            )


def read(images: int, views: int, dim: int) -> None:
    """All training features of a store into memory as training takes them."""
    from fastcoop.datasets.dataset import Split, make_dataset
    from fastcoop.features.image_files import unknown_files
    from fastcoop.features.plan import Encoding
    from fastcoop.features.store import FeatureStore
    from fastcoop.features.store_file import FEATURES, SplitContent, write_store
    from fastcoop.methods.data import Data

    with tempfile.TemporaryDirectory() as folder:
        labels = np.arange(images) % 10
        names = tuple(f"train/{row:07d}" for row in range(images))
        splits = {"train": Split(names, labels), "test": Split(names[:10], labels[:10])}
        dataset = make_dataset("made-up", Path(folder), [f"class {k}" for k in range(10)], "a {}.", splits)
        backbone: Any = SimpleNamespace(name="none", digest="", embed_dim=dim, dtype="float32")
        rng = np.random.default_rng(0)
        contents = {}
        for split, part in splits.items():
            stored = 1 + views if split == "train" else 1
            block = rng.standard_normal((min(200, len(part)), stored, dim)).astype(np.float16)
            starts = range(0, len(part), 200)
            rows = [np.arange(start, min(start + 200, len(part))) for start in starts]
            blocks = [(FEATURES, some, slice(0, stored), block[: len(some)]) for some in rows]
            contents[split] = SplitContent(np.arange(len(part)), unknown_files(len(part)), blocks)
        path = Path(folder) / "made-up.h5"
        write_store(path, Encoding(backbone, dataset, views=views).meta({}), dataset.splits, contents)
        shape = (
            f"{images} images, {1 + views} features each of {dim}, float16, {path.stat().st_size >> 20} MiB"
        )
        print(f"{shape}; all of them as float32:")
        for state in ("not in the page cache", "in the page cache"):
            if state.startswith("not"):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin, busy = time.perf_counter(), time.process_time()
            data = Data(dataset, FeatureStore.open(path, dataset=dataset), views=views)
            features, _ = data.train(data.subset("all", 1))
            took, cpu = time.perf_counter() - begin, time.process_time() - busy
            print(f"  file {state}: {took:.2f} s, {cpu:.2f} s of CPU")
            assert features.shape == (images, 1 + views, dim)
            del data, features


def write_table(path: Path, photos: Path, images: int) -> Path:
    """A dataset of so many photographs, each under as many names as it takes; ten classes in turn."""
    found = sorted(
        file
        for file in photos.rglob("*")
        if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp")
    )
    if len(found) < 30:
        raise SystemExit(f"{photos} should hold at least 30 images, found {len(found)}.")
    copies = path.parent / "copies"
    copies.mkdir(exist_ok=True)
    lines = ["path,class,split"]
    for number in range(images):
        link = copies / f"{number:06d}{found[0].suffix}"
        if not link.is_symlink():
            link.symlink_to(found[number % len(found)].resolve())
        split = "test" if number % 13 == 12 else "val" if number % 13 == 11 else "train"
        lines.append(f"copies/{link.name},{number // 13 % 10},{split}")
    path.write_text("\n".join(lines))
    return path


def write_model(folder: Path, config: dict[str, Any], state: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder


def model_config(model: str) -> dict[str, Any]:
    import open_clip

    return {"quick_gelu": False} | open_clip.get_model_config(model)


class Took(NamedTuple):
    """What a process took from start to end."""

    seconds: float
    cpu: float
    peak_mib: float


def command(table: Path, weights: Path, cache: Path) -> Took:
    told = ["cache-features", str(table), "--backbone", str(weights), "--cache", str(cache)]
    begin = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "fastcoop.cli", *told, "--shots", "all", "--views", str(VIEWS)],
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"cache-features ended with {os.waitstatus_to_exitcode(status)}")
    return Took(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("encode", "memory", "read"))
    parser.add_argument("photos", type=Path, nargs="?")
    parser.add_argument("--images", type=int, help="default: 150 to encode, 500 for memory, 16000 to read")
    parser.add_argument("--model", default="RN50", help="of open_clip, with random weights")
    told = parser.parse_args()
    if told.what == "read":
        read(told.images or 16_000, views=16, dim=1024)
        return
    if told.photos is None or not told.photos.is_dir():
        raise SystemExit(f"{told.what} needs a folder of images.")
    if told.what == "encode":
        encode(told.photos, told.images or 150, told.model)
    else:
        memory(told.photos, told.images or 500)


if __name__ == "__main__":
    main()
