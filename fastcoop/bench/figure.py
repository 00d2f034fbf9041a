"""All of the paper's Figure 3 on this machine: the work of each part is counted, and its rate is measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from fastcoop.backbones import Backbone
from fastcoop.bench.measure import CONTEXT_LENGTH, LAYOUTS, timed, wait
from fastcoop.bench.tables import EPOCHS, IMAGENET_EPOCHS, SEEDS, VARIANTS, Bench
from fastcoop.datasets import Split
from fastcoop.datasets.dataset import make_dataset
from fastcoop.datasets.official import paper_class_names
from fastcoop.engine import FastSchedule, Run, RunShape, plan_training, train
from fastcoop.engine.runs import BATCH_SIZE, steps_per_epoch
from fastcoop.features.encode import Encoding, cut_chunks, encode_chunks
from fastcoop.features.images import pillow_defaults
from fastcoop.methods.estimators import LinearProbe
from fastcoop.methods.scores import LinearClassifier, score_all
from fastcoop.reports.paper import printed_dataset
from fastcoop.reports.report import report
from fastcoop.results.records import RunRecord, ScoreInputs, ScoreRecord
from fastcoop.results.store import open_store

VIEWS, VAL_SHOTS = 8, 4
PHOTOS, PHOTO_SIZE = 64, (500, 375)
FAST_RUNS = 2  # that train together where the fast schedule is timed
PROBE_CLASSES, PROBE_SHOTS = 20, 4
SCORED = 4096, 1000  # images and classes
FIGURE = (
    "Figure 3 in hours. Caching: all images and views that can be drawn, at the rate of cropping and encoding JPEG "
    "files. Probes: 165 searches, the time of one scaled by images x classes. Trainings: operations by the rate of "
    "measured steps. Tests: class features and logits of 660 runs. The report: 836 runs, with their records. Official: "
    "measured steps, one run at a time, which encode their images again; its probes are not measured."
)


def project_figure(backbone: Backbone, bench: Bench) -> pd.DataFrame:
    """Return the expected hours of Figure 3's parts, and their shares, by the paper's schedule and by the fast one.

    Args:
        backbone: Its rates are measured; its weights may be random.
        bench: Measured training steps, of any class names; on a GPU those in float32 are used.
    """
    rows = [row for row in bench.rows if row.get("precision", "float32") == "float32"] or bench.rows
    step_rates = {
        name: median(row["flops_per_s"] for row in rows if row["layout"] == name) for name in LAYOUTS
    }
    largest = max(rows, key=lambda row: row["classes"])
    image_s, class_s = (
        largest["official_image_s"] / BATCH_SIZE,
        largest["official_text_s"] / largest["classes"],
    )
    names = paper_class_names()
    fast_rate = _fast_rate(backbone, names["eurosat"])
    crop_s, probe_s, logit_s = _crop_seconds(backbone), _probe_seconds(backbone), _logit_seconds(backbone)
    hours = {
        part: dict.fromkeys(("paper", "fast", "official"), 0.0)
        for part in ("caching", "linear probes", "trainings", "tests")
    }
    for dataset, class_names in names.items():
        counts = _counts(dataset)
        classes, runs = len(class_names), SEEDS * len(EPOCHS)
        crops = min(counts["train"], SEEDS * max(EPOCHS) * classes) * (1 + VIEWS) + counts["test"]
        crops += min(counts["val"], SEEDS * VAL_SHOTS * classes)
        _add(hours["caching"], crops * crop_s)
        _add(hours["linear probes"], SEEDS * sum(EPOCHS) * classes * classes * probe_s)
        hours["tests"]["official"] += runs * len(VARIANTS) * counts["test"] * image_s
        for layout in VARIANTS.values():
            shapes = [_shape(class_names, layout, shots, dataset) for shots in EPOCHS]
            fast = [_shape(class_names, layout, shots, dataset, fast=True) for shots in EPOCHS]
            paper_plan, fast_plan = (plan_training(backbone, [*some]) for some in (shapes, fast))
            hours["trainings"]["paper"] += SEEDS * paper_plan.flops / step_rates[layout]
            hours["trainings"]["fast"] += SEEDS * fast_plan.flops / fast_rate
            steps = SEEDS * sum(shape.steps for shape in shapes)
            hours["trainings"]["official"] += steps * (BATCH_SIZE * image_s + classes * class_s)
            forward_flops = paper_plan.runs[0].tree.flops / 2  # half of a step's
            encoding = forward_flops / step_rates[layout]
            _add(hours["tests"], runs * (encoding + counts["test"] * classes * logit_s))
    hours["report"] = dict.fromkeys(("paper", "fast"), _report_seconds(names))
    frame = pd.DataFrame(hours).T.rename_axis("part").reset_index()
    total = frame.drop(columns="part").sum()
    shares = {f"share, {name}": frame[name] / total[name] for name in ("paper", "fast")}
    whole = total.to_frame().T.assign(part="all")
    hourly = pd.concat(
        [frame.assign(**shares), whole.assign(**dict.fromkeys(shares, 1.0))], ignore_index=True
    )
    hourly[["paper", "fast", "official"]] /= 3600
    return hourly


def _add(hours: dict[str, float], seconds: float) -> None:
    for schedule in ("paper", "fast"):
        hours[schedule] += seconds


def _counts(dataset: str) -> dict[str, int]:
    """Return the number of images in each split (Table 6), 0 where it has none."""
    row = printed_dataset(dataset) or {}

    def number(text: str) -> int:
        plain = text.replace(",", "").replace("N/A", "0")
        return round(float(plain.removesuffix("M")) * 1e6) if plain.endswith("M") else int(plain)

    return {split: number(row[split]) for split in ("train", "val", "test")}


def _shape(names: Sequence[str], layout: str, shots: int, dataset: str, fast: bool = False) -> RunShape:
    images = shots * len(names)
    if fast:
        steps = round(15 * shots**0.5)
        return RunShape(names, LAYOUTS[layout], steps, images, VIEWS, images * VIEWS, is_fast=True)
    epochs = IMAGENET_EPOCHS if dataset == "imagenet" else EPOCHS[shots]
    return RunShape(names, LAYOUTS[layout], epochs * steps_per_epoch(images, BATCH_SIZE), images, VIEWS)


def _fast_rate(backbone: Backbone, names: Sequence[str]) -> float:
    """Return the operations per second of steps of the fast schedule."""
    draw = torch.Generator().manual_seed(0)
    images, layout, steps = 16 * len(names), LAYOUTS["end"], 8 if backbone.device.type == "cpu" else 25
    labels = torch.arange(images) % len(names)

    def run(seed: int) -> Run:
        contexts = 0.02 * torch.randn(CONTEXT_LENGTH, backbone.text.width, generator=draw)
        features = torch.randn(images, VIEWS, backbone.embed_dim, generator=draw)
        return Run(names, layout, contexts, features, labels, steps, seed, schedule=FastSchedule())

    runs, ends = [run(seed) for seed in range(FAST_RUNS)], list[float]()

    def on_step(get_state: Callable[[], object]) -> None:
        wait(backbone.device)
        ends.append(time.perf_counter())

    train(backbone, runs, on_step=on_step)
    flops = plan_training(backbone, [one.shape for one in runs]).flops / steps
    return flops / median(end - start for start, end in pairwise(ends))


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
    start = time.perf_counter()
    LinearProbe().fit(given[0], y, X_val=given[1], y_val=y)
    return (time.perf_counter() - start) / (len(y) * PROBE_CLASSES)


def _logit_seconds(backbone: Backbone) -> float:
    """Return the seconds of a logit: computed, and compared with the others of its image."""
    images, classes = SCORED
    rng = np.random.default_rng(0)
    features, weights = (rng.normal(size=(n, backbone.embed_dim)).astype(np.float32) for n in SCORED)
    given = (
        [LinearClassifier.of_texts(weights, backbone.logit_scale)],
        features,
        np.zeros(images, np.int64),
        classes,
    )
    score_all(*given, backbone.device)
    return timed(lambda: score_all(*given, backbone.device), backbone.device) / (images * classes)


def _report_seconds(datasets: Mapping[str, Sequence[str]]) -> float:
    """Return the seconds of recording as many runs as Figure 3 has, with made-up scores, and of their report."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with open_store(Path(folder) / "results") as store, store.together():
            for number, (run, score) in enumerate(_made_up_runs(datasets)):
                store.record(RunRecord(key=f"{number:064x}", **run), [score])
        report(Path(folder) / "results", Path(folder) / "report")
    return time.perf_counter() - start


def _made_up_runs(datasets: Mapping[str, Sequence[str]]) -> Iterator[tuple[dict[str, Any], ScoreRecord]]:
    rng = np.random.default_rng(0)
    draws = list(product(EPOCHS, range(1, 1 + SEEDS)))
    kinds: list[tuple[str, dict[str, Any]]] = [("linear_probe", {})]
    for position, specific in product(("end", "mid"), (False, True)):
        layout = {"context_length": CONTEXT_LENGTH, "class_position": position, "class_specific": specific}
        kinds.append(("coop", layout | {"init": "random", "epochs": 50, "schedule": "paper"}))
    for dataset, names in datasets.items():
        of_learners = [(*kind, *draw) for kind, draw in product(kinds, draws)]
        for method, columns, shots, seed in [("zero_shot", {}, 0, 0), *of_learners]:
            accuracy, images = float(rng.uniform(30, 90)), np.zeros(_counts(dataset)["test"], np.uint16)
            yield {
                "backbone": "RN50", "backbone_digest": "", "dataset": dataset, "method": method,
                "label": " ".join(map(str, (method, *columns.values()))), "shots": shots, "seed": seed,
                "settings": "{}",
                "columns": columns, "train_images": shots * len(names), "train_files": None, "status": "done",
                "seconds": 1.0, "losses": [1.0] * 50 if columns else None, "extra": {}, "device": "cpu",
            }, ScoreRecord(
                dataset=dataset, class_names=tuple(names), labels=images, accuracy=accuracy, macro_accuracy=accuracy,
                inputs=ScoreInputs(dataset, None, None, "[]"), per_class=np.full(len(names), accuracy),
                predictions=images, confidence=images.astype(np.float16),
            )  # fmt: skip
