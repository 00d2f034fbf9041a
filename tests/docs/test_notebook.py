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


WORK = """import time
import fastcoop.progress as shown
shown.NOTEBOOK_LINE_EVERY = 0.0
with shown.progress("Working", 4) as advance:
    for _ in range(4):
        advance(note="\\x1b[31m")
print(shown.in_notebook())
"""


def test_progress_is_one_output_of_a_saved_notebook() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(WORK)])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    line, printed = notebook.cells[0].outputs
    assert line.data == {"text/plain": "Working: 100%"}
    assert printed.text == "True\n"
