"""``tools/plain_path.py`` times one tower on both paths."""

from __future__ import annotations

import re
import sys

import pytest

from tests.engine.conftest import tiny_backbone
from tools import plain_path


def test_both_paths_are_timed_on_one_tower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plain_path, "random_backbone", lambda name: tiny_backbone())
    monkeypatch.setattr(plain_path, "class_lists", lambda names: {names[0]: ["cat", "sea lion", "dog"]})
    monkeypatch.setattr(sys, "argv", ["plain_path.py", "--datasets", "pets", "--repeats", "1", "--runs", "2"])
    plain_path.main()
    found = re.fullmatch(
        r"pets \(3 classes\), a run's step: shared \d+ ms \((\d+) rows\), plain \d+ ms \((\d+) rows\); "
        r"plain / shared [\d.]+\n",
        capsys.readouterr().out,
    )
    assert found is not None
    assert [int(number) for number in found.groups()] == [16 + 3 * 3 + 1, 3 * 77]
