"""All of the paper's Figure 3 on this machine: the work of each part is counted, and its rate is measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from fastcoop.backbones import Backbone
from fastcoop.backbones.precision import Precision
from fastcoop.bench.gpu import PRECISIONS
from fastcoop.bench.measure import CONTEXT_LENGTH, LAYOUTS, step_seconds, timed
from fastcoop.bench.tables import Bench
from fastcoop.datasets import Split
from fastcoop.datasets.dataset import make_dataset
from fastcoop.datasets.official import OFFICIAL, paper_class_names
from fastcoop.engine import FastSchedule, Run, RunShape, plan_training, train
from fastcoop.engine.schedule import BATCH_SIZE, steps_per_epoch
from fastcoop.features.encode import encode_chunks
from fastcoop.features.images import pillow_defaults
from fastcoop.features.plan import Encoding, cut_chunks
from fastcoop.methods.estimators import LinearProbe
from fastcoop.methods.schedule import PAPER_EPOCHS, paper_epochs
from fastcoop.methods.scores import LinearClassifier, score_all
from fastcoop.reports.report import report
from fastcoop.results.records import RunRecord, ScoreInputs, ScoreRecord
from fastcoop.results.store import open_store

VIEWS, VAL_SHOTS = 8, 4
PHOTOS, PHOTO_SIZE = 64, (500, 375)
FAST_RUNS = 2  # that train together where the fast schedule is timed
PROBE_CLASSES, PROBE_SHOTS = 20, 4
SCORED = 4096, 1000  # images and classes
SEEDS = 3
# The class in the middle with class-specific contexts has at most one node less than at the end, and counts the same.
VARIANTS = ("end", "mid", "class-specific", "class-specific")
OURS = ["paper", "fast"]  # schedules of fastcoop


def project_figure(backbone: Backbone, bench: Bench) -> pd.DataFrame:
    """Return the expected hours of Figure 3's parts, and their shares, by the paper's schedule and by the fast one.

    Args:
        backbone: Its rates are measured; its weights may be random.
        bench: Measured training steps, of any class names; on a GPU each of their precisions is projected.
    """
    seconds = {
        "crop": _crop_seconds(backbone), "probe": _probe_seconds(backbone), "logit": _logit_seconds(backbone),
        "report": _report_seconds(),
    }  # fmt: skip
    frames = []
    for precision in dict.fromkeys(row.get("precision") for row in bench.rows):
        rows = [row for row in bench.rows if row.get("precision") == precision]
        hours = _seconds_of_parts(backbone, rows, PRECISIONS[precision or "float32"], seconds) / 3600
        hours.loc["all"] = hours.sum()
        shares = {f"share, {name}": hours[name] / hours[name]["all"] for name in OURS}
        frame = hours.assign(**shares).reset_index()
        frames.append(frame if precision is None else frame.assign(precision=precision))
    return pd.concat(frames, ignore_index=True)


def _seconds_of_parts(
    backbone: Backbone,
    rows: Sequence[Mapping[str, Any]],
    precision: Precision | None,
    seconds: Mapping[str, float],
) -> pd.DataFrame:
    """Return the seconds of each part, from measured steps (``rows``) and the ``seconds`` of an item of other parts."""
    rates = {name: median(row["flops_per_s"] for row in rows if row["layout"] == name) for name in LAYOUTS}
    largest, names = max(rows, key=lambda row: row["classes"]), paper_class_names()
    image_s = largest["official_image_s"] / BATCH_SIZE
    class_s = largest["official_text_s"] / largest["classes"]
    fast_rate = _fast_rate(backbone, names["eurosat"], precision)
    index = pd.Index(["caching", "linear probes", "trainings", "tests", "report"], name="part")
    total = pd.DataFrame(0.0, index, [*OURS, "official"])
    for dataset, class_names in names.items():
        train_images, val_images, test_images = (count or 0 for count in OFFICIAL[dataset].counts[1:])
        classes, runs = len(class_names), SEEDS * len(PAPER_EPOCHS)
        crops = min(train_images, SEEDS * max(PAPER_EPOCHS) * classes) * (1 + VIEWS) + test_images
        crops += min(val_images, SEEDS * VAL_SHOTS * classes)
        total.loc["caching", OURS] += crops * seconds["crop"]
        total.loc["linear probes", OURS] += SEEDS * sum(PAPER_EPOCHS) * classes * classes * seconds["probe"]
        total.loc["tests", "official"] += runs * len(VARIANTS) * test_images * image_s
        for layout in VARIANTS:
            shapes = [_shape(class_names, layout, shots, dataset) for shots in PAPER_EPOCHS]
            fast = [_shape(class_names, layout, shots, dataset, fast=True) for shots in PAPER_EPOCHS]
            plan, fast_plan = (plan_training(backbone, some, precision=precision) for some in (shapes, fast))
            steps = sum(shape.steps for shape in shapes)
            step_s = BATCH_SIZE * image_s + classes * class_s
            by_schedule = [plan.flops / rates[layout], fast_plan.flops / fast_rate, steps * step_s]
            total.loc["trainings"] += SEEDS * np.array(by_schedule)
            forward_s = plan.runs[0].tree.flops / 2 / rates[layout]  # half of a step
            total.loc["tests", OURS] += runs * (forward_s + test_images * classes * seconds["logit"])
    total.loc["report", OURS] = seconds["report"]
    return total


def _shape(names: Sequence[str], layout: str, shots: int, dataset: str, fast: bool = False) -> RunShape:
    images = shots * len(names)
    if fast:
        steps = round(15 * shots**0.5)
        return RunShape(names, LAYOUTS[layout], steps, images, VIEWS, images * VIEWS, is_fast=True)
    steps = paper_epochs(dataset, shots) * steps_per_epoch(images, BATCH_SIZE)
    return RunShape(names, LAYOUTS[layout], steps, images, VIEWS)


def _fast_rate(backbone: Backbone, names: Sequence[str], precision: Precision | None) -> float:
    """Return the operations per second of steps of the fast schedule."""
    draw = torch.Generator().manual_seed(0)
    images, layout, steps = 16 * len(names), LAYOUTS["end"], 8 if backbone.device.type == "cpu" else 25
    labels = torch.arange(images) % len(names)

    def run(seed: int) -> Run:
        contexts = 0.02 * torch.randn(CONTEXT_LENGTH, backbone.text.width, generator=draw)
        features = torch.randn(images, VIEWS, backbone.embed_dim, generator=draw)
        return Run(names, layout, contexts, features, labels, steps, seed, schedule=FastSchedule())

    runs = [run(seed) for seed in range(FAST_RUNS)]
    flops = plan_training(backbone, [one.shape for one in runs], precision=precision).flops / steps
    training = partial(train, backbone, runs, precision=precision)
    return flops / median(step_seconds(training, backbone.device))


def _crop_seconds(backbone: Backbone) -> float:
    """Return the seconds of a crop: JPEG files read, cropped and encoded."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, pillow_defaults():
        paths = tuple(f"{number}.jpg" for number in range(PHOTOS))
        for path in paths:
            coarse = Image.fromarray(rng.integers(256, size=(30, 40, 3), dtype=np.uint8))
            coarse.resize(PHOTO_SIZE, Image.Resampling.BICUBIC).save(Path(folder) / path, quality=90)
        splits = {"test": Split(paths, np.zeros(PHOTOS, np.int64))}
        encoding = Encoding(
            backbone, make_dataset("photos", Path(folder), ["photo", "picture"], "a {}.", splits)
        )
        chunks = cut_chunks("test", np.arange(PHOTOS), encoding.arrays("test"))
        list(encode_chunks(encoding, chunks))  # warms up
        return timed(lambda: list(encode_chunks(encoding, chunks)), backbone.device) / PHOTOS


def _probe_seconds(backbone: Backbone) -> float:
    """Return the seconds of one search of the linear probe, per training image and class."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(PROBE_CLASSES, backbone.embed_dim))
    y = np.arange(PROBE_CLASSES).repeat(PROBE_SHOTS)

    def features() -> np.ndarray:
        return (centers[y] + 2 * rng.normal(size=(len(y), backbone.embed_dim))).astype(np.float32)

    given = features(), features()
    took = timed(lambda: LinearProbe().fit(given[0], y, X_val=given[1], y_val=y), backbone.device)
    return took / (len(y) * PROBE_CLASSES)


def _logit_seconds(backbone: Backbone) -> float:
    """Return the seconds of a logit: computed, and compared with the others of its image."""
    images, classes = SCORED
    rng = np.random.default_rng(0)
    features, weights = (rng.normal(size=(n, backbone.embed_dim)).astype(np.float32) for n in SCORED)
    classifier = LinearClassifier.of_texts(weights, backbone.logit_scale)
    labels = np.zeros(images, np.int64)
    score = partial(score_all, [classifier], features, labels, classes, backbone.device)
    score()  # warms up
    return timed(score, backbone.device) / (images * classes)


def _report_seconds() -> float:
    """Return the seconds of recording as many runs as Figure 3 has, with made-up scores, and of their report."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with open_store(Path(folder) / "results") as store, store.together():
            for number, (run, score) in enumerate(_made_up_runs()):
                store.record(RunRecord(key=f"{number:064x}", **run), [score])
        report(Path(folder) / "results", Path(folder) / "report")
    return time.perf_counter() - start


def _made_up_runs() -> Iterator[tuple[dict[str, Any], ScoreRecord]]:
    rng = np.random.default_rng(0)
    same = {"context_length": CONTEXT_LENGTH, "init": "random", "epochs": 50, "schedule": "paper"}
    kinds: list[tuple[str, dict[str, Any]]] = [("linear_probe", {})]
    kinds += [
        ("coop", same | {"class_position": position, "class_specific": specific})
        for position, specific in product(("end", "mid"), (False, True))
    ]
    draws = product(kinds, PAPER_EPOCHS, range(1, 1 + SEEDS))
    runs = [("zero_shot", {}, 0, 0), *((*kind, shots, seed) for kind, shots, seed in draws)]
    for (dataset, names), (method, columns, shots, seed) in product(paper_class_names().items(), runs):
        accuracy, images = float(rng.uniform(30, 90)), np.zeros(OFFICIAL[dataset].counts[-1], np.uint16)
        yield {
            "backbone": "RN50", "backbone_digest": "", "dataset": dataset, "method": method,
            "label": " ".join(map(str, (method, *columns.values()))), "shots": shots, "seed": seed,
            "settings": "{}", "columns": columns, "train_images": shots * len(names), "train_files": None,
            "status": "done", "seconds": 1.0, "losses": [1.0] * 50 if columns else None, "extra": {}, "device": "cpu",
        }, ScoreRecord(
            dataset=dataset, class_names=tuple(names), labels=images, accuracy=accuracy, macro_accuracy=accuracy,
            inputs=ScoreInputs(dataset, None, None, "[]"), per_class=np.full(len(names), accuracy),
            predictions=images, confidence=images.astype(np.float16),
        )  # fmt: skip
