"""Reading results loads neither torch nor open_clip, which take seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

VERSION_1 = Path(__file__).parent / "results_v1"


@pytest.mark.parametrize(
    "code",
    [
        "import fastcoop.results",
        "import fastcoop.reports",
        f"from fastcoop.results import load_results; assert len(load_results({str(VERSION_1)!r})) == 22",
    ],
)
def test_reading_results_loads_no_torch(code: str) -> None:
    code += "; import sys; assert not {'torch', 'open_clip'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rooms_are_imported_in_order() -> None:
    found = subprocess.run(
        ["lint-imports", "--no-cache"], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert found.returncode == 0, found.stdout
