"""The benchmark counts what is done, and its official way is the official way."""

from __future__ import annotations

import itertools
import json
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastcoop.bench import class_lists, run_bench, table, write_bench
from fastcoop.bench.benchmark import run_in_fresh_process
from fastcoop.bench.measure import STEPS, FastcoopStep, Matmuls, measure, plan_equal_runs
from fastcoop.bench.official import OfficialStep, class_bytes, classes_that_fit, longest_prompt
from fastcoop.engine.forest import Forest, Trees, Workspace
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.training import WORTH_RECORDING
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout
from tests.engine.conftest import tiny_backbone
from tests.reference import reference_features

NAMES = ["cat", "cat fish", "dog", "a big lion"]


@pytest.mark.parametrize("position", ["end", "mid", "front"])
def test_counted_operations_are_those_that_run_less_what_attention_masks_away(position):
    backbone = tiny_backbone(width=64)
    trees = Trees(backbone)
    layout = trees[tuple(NAMES), PromptLayout(8, position)]
    forest_pass, workspace = ForestPass(Forest(trees.tower, [(layout, 3)])), Workspace(trees.tower)
    vectors, grad = torch.zeros(3 * layout.vectors, 64), torch.zeros(3 * len(NAMES), 24)
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * a[2] * b[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        forest_pass.forward(vectors, workspace)
        forest_pass.backward(grad, workspace)
    planned = plan_equal_runs(backbone, NAMES, PromptLayout(8, position), 3).flops
    assert 1 < counter.get_total_flops() / planned < 1.05


def test_the_official_step_is_the_plain_step_and_may_be_cut(monkeypatch):
    backbone = tiny_backbone()
    longest = longest_prompt(backbone, NAMES, 4)
    torch.manual_seed(0)
    whole = OfficialStep(backbone, NAMES, 4, 77)
    torch.manual_seed(0)
    cut = OfficialStep(backbone, NAMES, 4, longest)
    features = torch.nn.functional.normalize(torch.randn(8, 24, dtype=torch.float64), dim=-1)
    labels = torch.arange(8) % 4
    start = whole.contexts.detach().clone()
    text = reference_features(backbone.model, backbone.tokenizer, NAMES, start, "end")
    logits = backbone.logit_scale * features @ torch.nn.functional.normalize(text, dim=-1).t()
    assert whole.learn(features, labels) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-12
    )
    cut.learn(features, labels)
    torch.testing.assert_close(cut.contexts, whole.contexts, rtol=1e-12, atol=0)
    assert not torch.equal(whole.contexts, start)


def test_the_official_way_runs_positions_before_prompts_on_the_model_s_own_weights():
    backbone = tiny_backbone()
    own, theirs = backbone.model.transformer, OfficialStep(backbone, NAMES, 4, 77).transformer
    for transformer, batch_first in ((own, True), (theirs, False)):
        attentions = [block.attn for block in transformer.resblocks]
        assert {module.batch_first for module in [transformer, *attentions]} == {batch_first}
    assert all(a is b for a, b in zip(own.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_the_official_way_keeps_the_bytes_that_its_classes_are_chosen_by(quick_gelu, monkeypatch):
    backbone = tiny_backbone(torch.float32, width=64, quick_gelu=quick_gelu)
    text, step = backbone.text, OfficialStep(backbone, NAMES, 4, 77)
    weights = {weight.untyped_storage().data_ptr() for weight in backbone.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.learn(torch.randn(8, 24), torch.arange(8) % 4)
    measured = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    assert measured / len(NAMES) == pytest.approx(class_bytes(text, 77), rel=0.1)

    for free, classes in ((35 * class_bytes(text, 77), 10), (0, 1)):
        monkeypatch.setattr("fastcoop.bench.official.free_bytes", lambda device, free=free: free)
        assert classes_that_fit(text, 77) == classes


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(
        "fastcoop.bench.benchmark.run_in_fresh_process", lambda function, *args: function(*args)
    )


def test_a_fresh_process_has_as_many_threads_and_raises_what_the_function_raises():
    both = "__import__('os').getpid(), __import__('torch').get_num_threads()"
    process, threads = run_in_fresh_process(eval, both)
    assert process != os.getpid()
    assert threads == torch.get_num_threads()
    with pytest.raises(UserError, match='no list of class names "nothing here"'):
        run_in_fresh_process(class_lists, ["nothing here"])
    with pytest.raises(UserError, match="The system ended the process"):
        run_in_fresh_process(os.abort)


@pytest.mark.usefixtures("in_this_process")
def test_the_official_way_on_some_classes_is_scaled_to_all_and_marked(monkeypatch):
    monkeypatch.setattr("fastcoop.engine.fit.CPU_ROWS", 400)
    monkeypatch.setattr("fastcoop.bench.measure.classes_that_fit", lambda text, tokens: 3)
    # Every call takes a second.
    monkeypatch.setattr("fastcoop.bench.measure.time.perf_counter", itertools.count().__next__)
    bench = run_bench(tiny_backbone(torch.float32), {"part": NAMES, "whole": NAMES[:2]}, 2)
    assert {row["official_text_s"] for row in bench.rows} == {4 / 3, 1}
    assert list(table(bench)["scaled"]) == ["from 3"] * 3 + [""] * 3


@pytest.mark.usefixtures("in_this_process")
def test_a_bench_writes_its_table_json_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("fastcoop.engine.fit.CPU_ROWS", 400)  # as many as fit are not many here
    lists = {"small": NAMES[:2], "large": NAMES}
    seen: list[int] = []
    write = "fastcoop.bench.benchmark.write_bench"
    monkeypatch.setattr(write, lambda so_far, out: seen.append(len(so_far.rows)))
    bench = run_bench(tiny_backbone(torch.float32), lists, 2, tmp_path)
    assert seen == [3 * n for n in range(1, len(lists) + 1)]  # after each list, three layouts each
    lines = table(bench)
    assert list(lines["layout"]) == ["end", "mid", "class-specific"] * 2
    assert (lines[["(a) s", "(b) s", "(b)/(c)", "of matmul"]] > 0).all().all()
    for row in bench.rows:
        assert row["flops_per_run"] < row["official_text_flops"]
        assert set(row["measurements"].values()) == {2}
        assert list(row["bytes_planned"].values()) == sorted(row["bytes_planned"].values())
    bench.projection = [{"part": "trainings", "paper": 3.5}]
    written = write_bench(bench, tmp_path / "out")
    assert json.loads(written[0].read_text())["machine"]["dtype"] == "float32"
    text = written[1].read_text()
    for part in ("# Training steps", "Figure 3 in hours", "| trainings | 3.5 |"):
        assert part in text
    assert "nan" not in text


def test_slow_contenders_are_measured_less_often():
    calls = []

    def contender() -> float:
        calls.append("a")
        return 7.0

    assert measure({"a": contender}, 9) == {"a": [7.0] * 3}  # two, and one more in ten seconds
    assert len(calls) == 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_last_step_of_a_training_is_timed(device, monkeypatch):
    backbone = tiny_backbone(torch.float32)
    monkeypatch.setitem(STEPS, "cpu", STEPS[device])
    # Every reading of the clock takes a second.
    monkeypatch.setattr("fastcoop.bench.measure.time.perf_counter", itertools.count().__next__)
    matmuls = Matmuls(backbone, 64)
    step = FastcoopStep(backbone, NAMES, PromptLayout(4), 3, matmuls=matmuls)
    assert step.repeats == max(1, round(step.flops / matmuls.flops))
    assert [step(), step()] == [1, 1]
    assert step.matmul_seconds == [1, 1]


def test_steps_on_a_gpu_are_enough_to_be_recorded():
    assert STEPS["cuda"] >= WORTH_RECORDING


def test_class_lists_are_the_papers():
    assert {name: len(names) for name, names in class_lists().items()} == {
        "imagenet-10": 10, "imagenet-100": 100, "imagenet": 1000,
    }  # fmt: skip
    assert list(class_lists(["oxford_pets", "eurosat"])) == ["eurosat", "oxford_pets"]
    with pytest.raises(UserError, match='Did you mean "oxford_pets"'):
        class_lists(["oxford_pet"])
