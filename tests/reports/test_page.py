"""The page: that it stands alone, and, where Chromium is installed, what it shows and that its tables
sort."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from fastcoop.reports import report
from tests.reports.made_up_results import results, store_words

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CLICK = """<script>
const table = document.querySelector("#figure4 table");
const head = [...table.tHead.rows[0].cells].find(cell => cell.textContent === "gain");
head.click();
const shown = [...table.tBodies[0].rows].map(row => Number(row.cells[3].dataset.sort));
const sorted = shown.every((value, i) => i === 0 || value >= shown[i - 1]);
document.title = `sorted ${sorted} ${head.getAttribute("aria-sort")}`;
</script></body>"""


@pytest.fixture
def page(folder_of, tmp_path):
    frame = results(datasets=("objects", "digits"), shots=(1, 16))
    frame.loc[0, "settings"] = '{"prompt": "<script>alert(1)</script> {}."}'
    folder = folder_of(frame)
    store_words(folder, frame)
    (folder / "grid.yaml").write_text("datasets: [objects, digits]\n")
    first, *_ = report(folder, tmp_path / "out")
    assert first.name == "index.html"
    return first


def test_the_page_needs_no_network_and_no_other_file(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert text.count("data:image/png;base64,") == 2  # Figures 3 and 4


def test_the_page_has_claims_words_settings_command_and_versions(page):
    text = page.read_text(encoding="utf-8")
    for expected in (
        "CoOp is above the linear probe", "Nearest words", "views=8", "fastcoop sweep", "datasets: [objects",
        "matplotlib", "Figure 5b. Backbones</b>: CoOp was run on one backbone only",
    ):  # fmt: skip
        assert expected in text
    assert "<script>alert(1)" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the page in")
def test_in_a_browser_the_images_load_and_the_tables_sort(page, tmp_path):
    checked = tmp_path / "checked.html"
    image = (
        'document.title += " images " + [...document.images].every(i => i.complete && i.naturalWidth > 300);'
    )
    script = CLICK.replace("</script></body>", image + "</script></body>")
    checked.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    shown = subprocess.run([CHROMIUM, *flags, checked.as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>sorted true ascending images true</title>" in shown.stdout
    assert "Few-shot learning" in shown.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the page in")
def test_on_a_narrow_screen_a_claim_is_read_without_scrolling_sideways(page, tmp_path):
    checked = tmp_path / "checked.html"
    script = """<script>
    const cells = [...document.querySelectorAll(".claims tbody td")].filter(cell => cell.textContent);
    const fit = cells.every(cell => cell.getBoundingClientRect().right <= innerWidth);
    const named = getComputedStyle(cells[2], "::before").content;
    document.title = `${cells.length > 50} ${innerWidth < 700} ${fit} ${named}`;
    </script></body>"""
    checked.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    flags = [
        "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=560,900", "--dump-dom",
    ]  # fmt: skip
    shown = subprocess.run([CHROMIUM, *flags, checked.as_uri()], capture_output=True, text=True, timeout=120)
    assert re.search(r"<title>true true true .*verdict.*</title>", shown.stdout)
