"""The notebook of the examples runs from top to bottom, and CoOp beats the hand-written prompt in it."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_runs_from_top_to_bottom(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "commit it without outputs"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in cells for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    zero_shot, coop = map(int, re.findall(r"(\d+)%", text))
    assert coop > zero_shot + 10
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
