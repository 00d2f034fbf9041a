"""The benchmark counts what is done, and its official way is the official way."""

from __future__ import annotations

import itertools
import json
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastcoop.bench import Bench, class_lists, projection, run_bench, table, write_bench
from fastcoop.bench.apart import apart
from fastcoop.bench.beside import BesideProducts
from fastcoop.bench.measure import equal_runs, growth_counts, measure_growth, plan_of
from fastcoop.bench.official import OfficialStep, class_bytes, classes_that_fit, longest_prompt
from fastcoop.bench.timing import measure, share_of, warm_ups
from fastcoop.cli import main
from fastcoop.engine.fit import FREE_FRACTION
from fastcoop.engine.forest import plant
from fastcoop.engine.graph import WARM_UP, WORTH_IT
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.trees import Trees
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout
from tests.engine.conftest import tiny_backbone
from tests.reference import reference_features

NAMES = ["cat", "cat fish", "dog", "a big lion"]


@pytest.mark.parametrize("position", ["end", "mid", "front"])
def test_counted_operations_are_those_that_run_less_what_attention_masks_away(position):
    backbone = tiny_backbone(width=64)
    trees = Trees(backbone)
    plan, constants = trees[tuple(NAMES), PromptLayout(8, position)]
    forest = plant(trees.tower, [(plan, constants, 3)])
    forest_pass = ForestPass(forest)
    contexts, grads = torch.zeros(3, plan.slot_count, 64), torch.zeros(3, len(NAMES), 24)
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * a[2] * b[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        forest_pass.forward([contexts])
        forest_pass.backward([grads])
    assert (
        1 < counter.get_total_flops() / (3 * plan_of(backbone, NAMES, PromptLayout(8, position)).flops) < 1.05
    )


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
    tower, step = Trees(backbone).tower, OfficialStep(backbone, NAMES, 4, 77)
    weights = {weight.untyped_storage().data_ptr() for weight in backbone.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.learn(torch.randn(8, 24), torch.arange(8) % 4)
    measured = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    assert measured / len(NAMES) == pytest.approx(class_bytes(tower, 77), rel=0.1)

    for free, classes in ((35 * class_bytes(tower, 77), 10), (0, 1)):
        monkeypatch.setattr("fastcoop.bench.official.free_bytes", lambda device, free=free: free)
        assert classes_that_fit(tower, 77) == classes


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr("fastcoop.bench.run.apart", lambda function, *args: function(*args))


def test_a_measurement_apart_is_another_process_s_with_as_many_threads():
    assert apart(os.getpid) != os.getpid()
    assert apart(torch.get_num_threads) == torch.get_num_threads()
    here = measure_growth(tiny_backbone(torch.float32), "small", NAMES, 2)
    there = apart(measure_growth, tiny_backbone(torch.float32), "small", NAMES, 2)
    assert [row["nodes"] for row in there] == [row["nodes"] for row in here]
    assert all(row["step_s"] > 0 for row in there)


def test_what_goes_wrong_apart_is_said():
    with pytest.raises(UserError, match='no list of class names "nothing here"'):
        apart(class_lists, None, "nothing here")
    with pytest.raises(UserError, match="ended by the system"):
        apart(os.abort)


@pytest.mark.usefixtures("in_this_process")
def test_the_official_way_on_some_classes_is_scaled_to_all_and_marked(monkeypatch):
    monkeypatch.setattr("fastcoop.engine.fit.CPU_ROWS", 400)
    monkeypatch.setattr("fastcoop.bench.measure.classes_that_fit", lambda tower, tokens: 3)
    # Every call takes a second.
    monkeypatch.setattr("fastcoop.bench.timing.time.perf_counter", itertools.count().__next__)
    bench = run_bench(tiny_backbone(torch.float32), {"part": NAMES, "whole": NAMES[:2]}, 2)
    assert {row["official_text_s"] for row in bench.rows} == {4 / 3, 1}
    assert list(table(bench)["scaled"]) == ["from 3"] * 3 + [""] * 3


@pytest.mark.usefixtures("in_this_process")
def test_a_bench_writes_its_table_json_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("fastcoop.engine.fit.CPU_ROWS", 400)  # as many as fit are not many here
    lists = {"small": NAMES[:2], "large": NAMES}
    seen: list[int] = []
    bench = run_bench(
        tiny_backbone(torch.float32), lists, 2, torch.bfloat16, lambda so_far: seen.append(len(so_far.rows))
    )
    assert seen == [3 * n for n in range(1, len(lists) + 1)]  # told after each list, three layouts each
    lines = table(bench)
    assert list(lines["layout"]) == ["end", "mid", "class-specific"] * 2
    assert (lines[["(a) s", "(b) s", "(b)/(c)", "of matmul"]] > 0).all().all()
    assert [row["runs"] for row in bench.growth] == [1, 2, 4, 8, 16, 32, 64]
    for row in bench.rows:
        assert row["flops_per_run"] < row["official_text_flops"]
        for runs, held in row["bytes_held"].items():
            assert 0 < held < 1.25 * row["bytes_estimated"][runs]
            assert row["measurements"][runs] == 2
    for row in bench.precision:
        assert 0 < row["feature_error"] < 0.05
        assert 0 < row["gradient_error"] < 0.05
    total = projection(bench).iloc[-1]
    assert total["dataset"] == "all"
    assert total["runs"] == 2 * 60
    written = write_bench(bench, tmp_path / "out")
    assert json.loads(written[0].read_text())["machine"]["dtype"] == "float32"
    text = written[1].read_text()
    for heading in ("# Training steps", "## Work", "## Growth", "Figure 3", "## A lower precision"):
        assert heading in text
    assert "nan" not in text
    assert written[2].stat().st_size > 5_000


def test_slow_contenders_are_measured_less_often(monkeypatch):
    clock = iter(range(0, 10**6, 7))
    monkeypatch.setattr("fastcoop.bench.timing.time.perf_counter", lambda: next(clock))
    calls = []
    times = measure({"a": lambda: calls.append("a")}, 9, torch.device("cpu"))
    assert times == {"a": [7, 7, 7]}  # two, and one more in ten seconds
    assert len(calls) == 4


def test_steps_measured_on_a_gpu_are_recorded_ones(monkeypatch):
    """Enough calls before the first that counts, and steps enough in a batch to be worth recording."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    calls = []
    times = measure({"a": lambda: calls.append("a")}, 2, gpu)
    assert warm_ups(gpu) > WARM_UP
    assert len(calls) == warm_ups(gpu) + len(times["a"])
    trees = Trees(tiny_backbone(torch.float32))
    batch = equal_runs(tiny_backbone(torch.float32), trees, NAMES, PromptLayout(4), 1, 2)
    assert batch.steps >= WORTH_IT


def test_shares_are_medians_of_neighbours():
    assert share_of(10.0, [1.0, 2.0, 10.0], 10.0, [1.0, 1.0, 9.0]) == pytest.approx(0.9)


@pytest.mark.parametrize("count", [1, 7, 60])
def test_products_between_layers_change_neither_a_step_nor_its_time(count, monkeypatch):
    backbone = tiny_backbone(torch.float32)
    trees = Trees(backbone)
    plain, beside = (equal_runs(backbone, trees, NAMES, PromptLayout(4), 2, 2) for _ in range(2))
    calls = []
    both = BesideProducts(beside, lambda: calls.append(int(beside.at)), count)
    # Products alone take time.
    monkeypatch.setattr("fastcoop.bench.beside.time.perf_counter", lambda: len(calls))
    for _ in range(2):
        plain.step()
        both()
    assert torch.equal(plain.vectors, beside.vectors)
    assert calls == [0] * count + [1] * count  # within the step: its counter goes up at its end
    assert both.products == [count, count]
    assert both.steps == [0, 0]
    parts = []
    beside.forest_pass.report = parts.append
    both.within = False  # as on a GPU: the products come first, and are not the step's time either
    both()
    assert calls[2 * count :] == [2] * count
    assert (both.products[-1], both.steps[-1]) == (count, 0)
    assert parts == sorted(parts)
    assert len(parts) == 2 * len(trees.tower.blocks)
    assert parts[-1] == 1


def test_growth_ends_where_memory_does(monkeypatch):
    backbone, layout = tiny_backbone(torch.float32), PromptLayout(4)
    assert growth_counts(backbone, NAMES, layout) == [1, 2, 4, 8, 16, 32, 64]
    of_one = plan_of(backbone, NAMES, layout).runs[0].tree.activation_bytes
    for runs_worth, counts in ((0, [1]), (7, [1, 2, 4]), (8, [1, 2, 4]), (15, [1, 2, 4, 8])):
        free = (runs_worth * of_one + 1) / FREE_FRACTION
        monkeypatch.setattr("fastcoop.engine.fit.free_bytes", lambda device, free=free: free)
        assert growth_counts(backbone, NAMES, layout) == counts


def test_the_projection_is_steps_times_seconds(tmp_path):
    row = {
        "dataset": "imagenet", "classes": 1000, "official_image_s": 1.0, "official_text_s": 2.0,
        "official_text_flops": 1e12, "flops_per_run": 1e11,
    }  # fmt: skip
    seconds = {"end": 0.1, "mid": 0.2, "class-specific": 0.3}
    bench = Bench({}, [{**row, "layout": layout, "best_run_step_s": s} for layout, s in seconds.items()])
    line = projection(bench).iloc[0]
    steps = 3 * 50 * sum(shots * 1000 // 32 for shots in (1, 2, 4, 8, 16))
    assert line["steps_per_variant"] == steps
    assert line["official_hours"] == pytest.approx(4 * steps * 3.0 / 3600)
    assert line["fastcoop_hours"] == pytest.approx(steps * (0.1 + 0.2 + 0.3 + 0.3) / 3600)


def test_class_lists_come_from_imagenet_or_a_folder(tmp_path):
    assert {name: len(names) for name, names in class_lists().items()} == {
        "imagenet-10": 10, "imagenet-100": 100, "imagenet": 1000,
    }  # fmt: skip
    (tmp_path / "pets.json").write_text('["cat", "dog"]')
    assert class_lists(tmp_path) == {"pets": ["cat", "dog"]}
    with pytest.raises(UserError, match='Did you mean "pets"'):
        class_lists(tmp_path, "pet")
    (tmp_path / "bad.json").write_text('{"cat": 1}')
    with pytest.raises(UserError, match="should be a list of class names"):
        class_lists(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--project", "fig3", "--json"], "give --project without --json"),
        (["--precision", "float32"], "both are float32; leave one out"),
    ],
)
def test_options_of_bench_that_contradict_are_refused_before_any_work(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--out", str(tmp_path / "out"), *options])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
