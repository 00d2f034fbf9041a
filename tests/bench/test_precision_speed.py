"""``tools/precision_speed.py`` compares two precisions on one tower."""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import tiny_backbone
from tools import precision_speed


def test_a_precision_is_compared_with_the_backbones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcoop.engine.fit.CPU_ROWS", 400)  # as many as fit are not many here
    backbone = tiny_backbone(torch.float32)
    found = precision_speed.compare_precision(backbone, torch.bfloat16, ["cat", "sea lion", "dog"], 2)
    assert 0 < found["feature_error"] < 0.05
    assert 0 < found["gradient_error"] < 0.05
    assert found["faster"] == found["exact_run_step_s"] / found["run_step_s"] > 0
