"""A report over hostile names of datasets and words shows them as text, in every format."""

from __future__ import annotations

import csv
import re

from markdown_it import MarkdownIt

from fastcoop import escape
from fastcoop.reports import report, style
from tests.reports.made_up_results import results, store_words

# At least one that acts in each format: CSV, HTML, Markdown, LaTeX, file names.
NAMES = (
    "=cmd|' /C calc'!A0", "\t=1", "＝1+1", "<script>alert(1)</script>", "a & b &amp; c", 'x" onload="y', "a|b`c`",
    "![image](x.png)", "**bold** ~~gone~~", "# head\n1. one", "$x^2$ \\input{x}", "{a}_b^c~d 100 %", "../up",
)  # fmt: skip


def test_hostile_names_stay_text_in_every_file(folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(style, "METADATA", {"svg": style.METADATA["svg"]})  # the other pictures show the same
    frame = results(datasets=NAMES, shots=(16,), seeds=(1, 2))
    folder = folder_of(frame)
    store_words(folder, frame, words=NAMES)
    out = tmp_path / "out"
    report(folder, out)

    page = (out / "index.html").read_text(encoding="utf-8")
    assert [name for name in NAMES if escape.html(name) not in page] == []
    assert "<script>alert" not in page
    assert ' onload="' not in page
    for path in out.rglob("*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert len({len(row) for row in rows}) == 1, path.name
        number = re.compile(r"[-+]?\d+(\.\d+)?(e-?\d+)?")
        acting = [cell for row in rows for cell in row if re.match(r"\s*[=+\-@＝]", cell)]
        assert [cell for cell in acting if not number.fullmatch(cell)] == [], path.name
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for path in out.rglob("*.md"):
        rendered = markdown.render(path.read_text(encoding="utf-8"))
        tags = re.findall(r"<(\w+)", rendered)
        assert not set(tags) & {"script", "img", "code", "s", "ol"}, path.name
        assert tags.count("h1") <= 1, path.name  # the table's own title
    for path in out.rglob("*.tex"):
        text = path.read_text(encoding="utf-8")
        assert r"\input{" not in text, path.name
        assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}"), path.name
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} <= {out, folder / "nearest_words"}
