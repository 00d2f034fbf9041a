"""Measure a dataset's steps in turn: the official method's parts, and fastcoop with 1, 8 and as many runs as fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from fastcoop.backbones import Backbone
from fastcoop.backbones.precision import Precision
from fastcoop.bench.official import OfficialStep, classes_that_fit, longest_prompt, official_text_flops
from fastcoop.engine import Run, RunShape, TrainingPlan, plan_training, train
from fastcoop.engine.fit import BatchBudget
from fastcoop.engine.schedule import BATCH_SIZE
from fastcoop.prompts import PromptLayout

CONTEXT_LENGTH = 16
LAYOUTS = {
    "end": PromptLayout(CONTEXT_LENGTH, "end"),
    "mid": PromptLayout(CONTEXT_LENGTH, "mid"),
    "class-specific": PromptLayout(CONTEXT_LENGTH, "end", class_specific=True),
}
MAX_SECONDS = 10.0  # that a contender may take beyond its warm-up and two measurements
STEPS = {"cpu": 2, "cuda": 20}  # of a training whose last step is timed; a GPU records them after a few
MATMUL_ROWS = 2048  # enough for full speed on a CPU


class Matmuls:
    """The matrix products of one text block, forward and backward, on random inputs."""

    def __init__(self, backbone: Backbone, rows: int):
        text = backbone.shared_text
        hidden = text.blocks[0].fc.weight.shape[0]
        shapes = [(text.width, 3 * text.width), (text.width, text.width), (text.width, hidden)]
        shapes += [(out, into) for into, out in shapes] + [(hidden, text.width), (text.width, hidden)]
        self.flops = sum(2.0 * rows * into * out for into, out in shapes)
        options: dict[str, Any] = {"dtype": text.dtype, "device": backbone.device}
        self._products = [
            (torch.randn(rows, into, **options), torch.randn(into, out, **options)) for into, out in shapes
        ]
        self._outputs = [torch.empty(rows, out, **options) for _, out in shapes]

    def __call__(self) -> None:
        for (x, weight), out in zip(self._products, self._outputs, strict=True):
            torch.mm(x, weight, out=out)


class FastcoopStep:
    """Times one step of ``runs`` equal runs that train together, and right after it as many operations of ``matmuls``.

    A shared machine's speed changes within seconds; timing the two next to each other makes their ratio reliable.
    """

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        layout: PromptLayout,
        runs: int,
        *,
        precision: Precision | None = None,
        matmuls: Matmuls | None = None,
    ):
        self.backbone, self.precision, self.matmuls = backbone, precision, matmuls
        self.plan = plan_equal_runs(backbone, class_names, layout, runs, precision)
        self.flops = sum(run.tree.flops for run in self.plan.runs)  # of one step of all runs
        self.repeats = max(1, round(self.flops / matmuls.flops)) if matmuls else 0
        self.matmul_seconds: list[float] = []  # one entry per call
        self.runs = []
        for seed in range(runs):
            draw = torch.Generator().manual_seed(seed)
            contexts = 0.02 * torch.randn(layout.shape(len(class_names), backbone.text.width), generator=draw)
            features = torch.randn(BATCH_SIZE, 1, backbone.text.dim, generator=draw)
            labels = torch.randint(len(class_names), (BATCH_SIZE,), generator=draw)
            steps = STEPS[backbone.device.type]  # the training set is one batch, so an epoch is one step
            self.runs.append(Run(class_names, layout, contexts, features, labels, steps, seed))

    def __call__(self) -> float:
        """Return the seconds of the last step of a short training."""
        *_, last = step_seconds(self.train, self.backbone.device)
        if (matmuls := self.matmuls) is not None:
            seconds = timed(lambda: [matmuls() for _ in range(self.repeats)], self.backbone.device)
            self.matmul_seconds.append(seconds)
        return last

    def train(self, on_step: Callable[[Callable[[], Any]], None]) -> None:
        """Do a short training, and call ``on_step`` after each step."""
        memory = self.plan.memory_bytes
        train(self.backbone, self.runs, memory_budget=memory, precision=self.precision, on_step=on_step)


def measure_dataset(
    backbone: Backbone, name: str, class_names: list[str], repeats: int
) -> list[dict[str, Any]]:
    """Return a row per layout of everything measured on these class names, ready for JSON."""
    text, device = backbone.shared_text, backbone.device
    official, measured = official_parts(backbone, class_names)
    scale = len(class_names) / measured
    matmuls = Matmuls(backbone, MATMUL_ROWS)
    steps = {
        (layout, runs): FastcoopStep(backbone, class_names, settings, runs, matmuls=matmuls)
        for layout, settings in LAYOUTS.items()
        for runs in run_counts(backbone, class_names, settings)
    }
    parts = {name: partial(timed, part, device) for name, part in official.items()}
    times = measure({**parts, **steps}, repeats)
    seconds = {key: median(values) for key, values in times.items()}
    shares = {}  # of the rate of matrix products
    for key, step in steps.items():
        rates = [step.repeats * matmuls.flops / one for one in step.matmul_seconds[1:]]
        shares[key] = median(step.flops / one / rate for one, rate in zip(times[key], rates, strict=True))
    rows = []
    for layout in LAYOUTS:
        counts = [runs for key, runs in steps if key == layout]
        per_run = {runs: seconds[layout, runs] / runs for runs in counts}
        # Chosen by the share of matrix products, which the changing speed of the machine affects less than the time.
        best = max(counts, key=lambda runs: shares[layout, runs])
        step = steps[layout, best]
        rows.append({
            "dataset": name, "classes": len(class_names), "layout": layout, "nodes": step.plan.runs[0].tree.nodes,
            "official_tokens": len(class_names) * text.context_length, "official_image_s": seconds["image"],
            "official_text_s": seconds["text"] * scale, "official_cut_s": seconds["cut"] * scale,
            "official_measured_classes": measured,
            "official_text_flops": official_text_flops(text, len(class_names), text.context_length),
            "run_step_s": per_run, "best_runs": best, "best_run_step_s": per_run[best],
            "flops_per_run": step.flops / best, "flops_per_s": step.flops / seconds[layout, best],
            "matmul_share": {runs: shares[layout, runs] for runs in counts},
            "bytes_planned": {runs: steps[layout, runs].plan.bytes_of(range(runs)) for runs in counts},
            "measurements": {runs: len(times[layout, runs]) for runs in counts},
        })  # fmt: skip
    return rows


def official_parts(
    backbone: Backbone, class_names: Sequence[str]
) -> tuple[dict[Any, Callable[[], object]], int]:
    """Return what an official step does, and the number of classes that it does it for.

    These are the "image" part, the "text" part at the tower's full length, and the text part "cut" to the longest
    prompt. If memory does not hold all classes, fewer are measured, and the times of the text parts must be scaled.
    """
    text, size = backbone.shared_text, backbone.image_size
    part = list(class_names)[: classes_that_fit(text, text.context_length)]
    images = torch.randn(BATCH_SIZE, 3, size, size).to(backbone.device, backbone.dtype)
    labels = torch.arange(BATCH_SIZE, device=backbone.device) % len(part)
    whole = OfficialStep(backbone, part, CONTEXT_LENGTH, text.context_length)
    cut = OfficialStep(backbone, part, CONTEXT_LENGTH, longest_prompt(backbone, class_names, CONTEXT_LENGTH))
    features = whole.encode_images(images)
    return {
        "image": lambda: whole.encode_images(images),
        "text": lambda: whole.learn(features, labels),
        "cut": lambda: cut.learn(features, labels),
    }, len(part)


def plan_equal_runs(
    backbone: Backbone,
    class_names: Sequence[str],
    layout: PromptLayout,
    runs: int,
    precision: Precision | None = None,
) -> TrainingPlan:
    """Return the plan of ``runs`` equal runs."""
    shape = RunShape(tuple(class_names), layout, steps=1, images=BATCH_SIZE, batch_size=BATCH_SIZE)
    return plan_training(backbone, [shape] * runs, precision=precision)


def run_counts(backbone: Backbone, class_names: Sequence[str], layout: PromptLayout) -> list[int]:
    """Return 1, 8 and the number of runs that fit a batch, without 8 where fewer fit."""
    plan = plan_equal_runs(backbone, class_names, layout, 1)
    budget = BatchBudget(plan)
    while budget.try_add(plan.runs[0]):
        pass
    return sorted({1, min(8, budget.runs), budget.runs})


def measure(contenders: Mapping[Any, Callable[[], float]], repeats: int) -> dict[Any, list[float]]:
    """Call each contender once to warm up, then all in turn; return the seconds that the later calls returned.

    Args:
        contenders: Functions that return the seconds of one measurement.
        repeats: Measurements of each at most; slow contenders get fewer, but at least two.
    """
    counts = {key: min(repeats, 2 + int(MAX_SECONDS / one())) for key, one in contenders.items()}
    times: dict[Any, list[float]] = {key: [] for key in contenders}
    for turn in range(repeats):
        for key, contender in contenders.items():
            if turn < counts[key]:
                times[key].append(contender())
    return times


def step_seconds(train: Callable[..., object], device: torch.device) -> list[float]:
    """Return the seconds of each step but the first of a training that takes ``on_step``."""
    ends: list[float] = []

    def on_step(get_state: Callable[[], Any]) -> None:
        wait(device)
        ends.append(time.perf_counter())

    train(on_step=on_step)
    return [end - start for start, end in pairwise(ends)]


def timed(function: Callable[[], object], device: torch.device | None = None) -> float:
    """Return the seconds that a call takes, with its work on ``device``."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device | None) -> None:
    """Wait until a GPU has finished its work."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
