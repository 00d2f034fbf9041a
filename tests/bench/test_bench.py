"""The benchmark counts what is done, and its official way is the official way."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastcoop.bench import class_lists, projection, run_bench, table, write_bench
from fastcoop.bench.official import OfficialStep, longest_prompt
from fastcoop.engine.flops import forest_flops
from fastcoop.engine.forest import plant
from fastcoop.engine.tower import ForestPass
from fastcoop.engine.trees import Trees
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout
from tests.engine.conftest import tiny_backbone
from tests.reference import reference_features

NAMES = ["cat", "cat fish", "dog", "a big lion"]


@pytest.mark.parametrize("position", ["end", "mid", "front"])
def test_counted_operations_are_those_that_run(position):
    backbone = tiny_backbone(width=64)
    trees = Trees(backbone)
    plan, constants = trees[tuple(NAMES), PromptLayout(8, position)]
    forest = plant(trees.tower, [(plan, constants, 3)])
    forest_pass = ForestPass(forest)
    contexts, grads = torch.zeros(3, plan.slot_count, 64), torch.zeros(3, len(NAMES), 24)
    with FlopCounterMode(display=False) as counter:
        forest_pass.forward([contexts])
        forest_pass.backward([grads])
    assert forest_flops(forest) == pytest.approx(counter.get_total_flops(), rel=0.02)


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


def test_a_bench_writes_its_table_json_and_picture(tmp_path):
    bench = run_bench(tiny_backbone(torch.float32), {"small": NAMES[:2], "large": NAMES}, repeats=1)
    lines = table(bench)
    assert list(lines["layout"]) == ["end", "mid", "class-specific"] * 2
    assert (lines[["(a) s", "(b) s", "(b)/(c)", "of matmul"]] > 0).all().all()
    assert [row["runs"] for row in bench.growth] == [1, 2, 4, 8, 16, 32, 64]
    total = projection(bench).iloc[-1]
    assert total["dataset"] == "all"
    assert total["runs"] == 2 * 60
    written = write_bench(bench, tmp_path / "out")
    assert json.loads(written[0].read_text())["machine"]["dtype"] == "float32"
    assert "| dataset |" in written[1].read_text()
    assert written[2].stat().st_size > 5_000


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
