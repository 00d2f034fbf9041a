"""A forest and a training step through the kernels, in Triton's interpreter: what the engine computes on a CPU.

`test_kernels` runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from fastcoop.engine import training
from fastcoop.engine.forest import Forest, Trees, Workspace
from fastcoop.engine.kernels.forest_pass import KernelPass
from fastcoop.engine.kernels.training_step import kernel_step
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.training import DIVERGED, ActiveRun, Batch
from fastcoop.engine.weights import ANY_ROWS
from fastcoop.prompts import PromptLayout
from fastcoop.prompts.tree import tree_key
from tests.engine.conftest import NAMES, tiny_backbone
from tests.engine.interpreted_kernels import EXACT, relative


def startless(tokenizer, texts, context_length=77):
    return tokenizer(texts, context_length=context_length + 1)[:, 1:]


LAYOUTS = [PromptLayout(4), PromptLayout(3, "mid", True), PromptLayout(2, "front")]


@pytest.mark.parametrize(
    ("dtype", "layers", "quick_gelu", "width", "start"),
    [(torch.float64, 3, False, 32, 1), (torch.float32, 1, True, 24, 1), (torch.float64, 2, False, 16, 0)],
)
def test_a_forest_through_the_kernels_is_the_one_without_them(dtype, layers, quick_gelu, width, start):
    backbone = tiny_backbone(dtype, layers=layers, quick_gelu=quick_gelu, width=width)
    if not start:  # as mT5's tokenizer, so that there may be no constants
        backbone = replace(backbone, tokenizer=partial(startless, backbone.tokenizer))
    trees, classes = Trees(backbone), (*NAMES[:2], NAMES[1])  # two classes share a leaf
    layouts = LAYOUTS if start else LAYOUTS[:2]
    planned = [
        (trees[tree_key(classes, layout)], runs) for layout, runs in zip(layouts, (2, 1, 1), strict=False)
    ]
    forest = Forest(trees.tower, planned)
    vectors = torch.randn(forest.vectors, width, dtype=dtype)
    grad = torch.randn(sum(runs for _, runs in planned) * len(classes), 24, dtype=dtype)
    results = []
    for forest_pass in (ForestPass(forest), KernelPass(forest)):
        workspace = Workspace(trees.tower)
        features = forest_pass.forward(vectors, workspace)
        results.append([features, forest_pass.backward(grad, workspace)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours.shape == theirs.shape
        assert relative(ours, theirs) < EXACT[dtype]


def test_a_step_of_training_is_the_plain_one(make_run, monkeypatch):
    monkeypatch.setattr(training, "row_rule", lambda tower: ANY_ROWS)  # as on a GPU: no spare rows
    backbone = tiny_backbone(layers=2)
    trees = Trees(backbone)
    runs = [make_run(layout, NAMES[:2], seed=seed, images=5) for seed, layout in enumerate(LAYOUTS)]
    states = []
    for with_kernels in (False, True):
        active = [ActiveRun.start(n, run, torch.float64, trees.tower.device) for n, run in enumerate(runs)]
        batch = Batch(trees, active, backbone.logit_scale)
        do_step = batch._step
        if with_kernels:
            batch.forest_pass = KernelPass(batch.forest_pass.forest)
            do_step = partial(kernel_step(batch, DIVERGED), batch)
        do_step()
        batch.diverged_at[1] = 0  # from here on, this run is frozen
        do_step()
        states.append([batch.vectors, batch.optimizers[0][0].momentum, batch.losses[:2], batch.limit])
        assert int(batch.counter) == 2
        assert batch.diverged_at.tolist() == [-1, 0, -1]
    for ours, theirs in zip(states[1], states[0], strict=True):
        assert relative(ours, theirs) < 1e-12
