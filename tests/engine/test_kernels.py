"""The Triton kernels without a GPU: their plan, and their numbers in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcoop.backbones.precision import products_in_tf32
from fastcoop.engine import kernels
from fastcoop.engine.kernels.tiles import plan_tiles
from fastcoop.prompts.layout import Slot
from fastcoop.prompts.tree import build_tree

HERE = Path(__file__).parent
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it comes with torch on Linux"
)


def test_kernels_serve_gpus_in_float32_and_below(monkeypatch):
    monkeypatch.setattr(kernels, "_run_on", lambda device: True)
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kernels.are_usable(gpu, dtype)
        assert not kernels.are_usable(cpu, dtype)
    assert not kernels.are_usable(gpu, torch.float64)


@with_triton
def test_where_triton_fails_training_goes_on_without_it(monkeypatch, caplog):
    """For example, where there is no C compiler."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "_run_on", kernels._run_on.__wrapped__)
    assert not kernels.are_usable(torch.device("cuda", 0), torch.bfloat16)
    assert "Training goes on without them" in caplog.text


def test_the_engine_works_without_triton():
    without = "import sys, torch; sys.modules['triton'] = None; import fastcoop.engine; "
    usable = "from fastcoop.engine.kernels import are_usable; sys.exit(are_usable(torch.device('cuda'), torch.half))"
    subprocess.run([sys.executable, "-c", without + usable], check=True)


@with_triton
def test_products_in_kernels_are_as_precise_as_torch_s():
    from fastcoop.engine.kernels.launch import product_precision

    for is_on, expected in ((True, "tf32"), (False, "tf32x3")):
        with products_in_tf32(is_on):
            assert product_precision(torch.ones(1)) == expected
            assert product_precision(torch.ones(1, dtype=torch.bfloat16)) == "ieee"


def test_the_worked_example_of_the_tiles():
    start, vector, end = Slot(False, 0), Slot(True, 0), Slot(False, 9)
    tree = build_tree([(start, vector, Slot(False, name), end) for name in (1, 2)])
    plan = plan_tiles([(tree, 1), (tree, 2)], "cpu", 2)
    assert plan.tiles[:3].tolist() == [[0, 2, 0, 1], [2, 2, 1, 3], [4, 1, 4, 3]]
    assert plan.row_end[:5].tolist() == [5, 3, 3, 5, 5]
    assert plan.chain[:7].tolist() == [-1, -1, 0, 1, -1, 0, 3]
    assert plan.chain_start[:7].tolist() == [0, 0, 0, 1, 0, 0, 3]
    assert plan.chain_end[:7].tolist() == [5, 5, 5, 3, 5, 5, 5]
    # The other tree's runs: the same, five and ten rows and seven and 14 entries on, with a constant of their own.
    assert plan.tiles[3:].tolist() == [
        [5, 2, 7, 1], [7, 2, 8, 3], [9, 1, 11, 3], [10, 2, 14, 1], [12, 2, 15, 3], [14, 1, 18, 3],
    ]  # fmt: skip
    assert plan.chain[7:].tolist() == [-2, -2, 5, 6, -2, 5, 8, -2, -2, 10, 11, -2, 10, 13]
    assert plan.every.of_row.tolist() == list(range(15))
    assert plan.every.slots.rows.tolist() == [0, 1, 3, 5, 6, 8, 10, 11, 13]
    assert plan.every.slots.first.tolist() == [0, 2, 3, 4, 6, 7, 8, 10, 11, 12]
    assert plan.every.slots.order.tolist() == [2, 5, 3, 6, 9, 12, 10, 13, 16, 19, 17, 20]
    # Each run has one vector, v, in its first row.
    assert plan.learned.of_row.tolist() == [0, *[-1] * 4, 1, *[-1] * 4, 2, *[-1] * 4]
    assert plan.learned.slots.rows.tolist() == [0, 1, 2]
    assert plan.learned.slots.first.tolist() == [0, 2, 4, 6]
    assert plan.learned.slots.order.tolist() == [2, 5, 9, 12, 16, 19]


@with_triton
@pytest.mark.slow
def test_numbers_in_triton_s_interpreter():
    """Triton reads TRITON_INTERPRET as it is imported, so a process of its own runs these files."""
    files = sorted(map(str, HERE.glob("interpreted_*.py")))
    assert len(files) == 2
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files]
    has_cov = importlib.util.find_spec("pytest_cov") is not None
    done = subprocess.run(
        [*command, *["--no-cov"] * has_cov],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
