"""That hostile names stay literal in every format."""

from __future__ import annotations

import csv
import html.parser
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from markdown_it import MarkdownIt  # rich's

from fastcoop import escape

# Names as people, systems and attackers write them.
HOSTILE = (
    "=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", " =1", "'=1", "＝1+1", "=cmd|' /C calc'!A0", "-1_0",
    "<b>bold</b>", "<script>alert(1)</script>", "a & b &amp; c", '"quoted"', "it's", "a|b", "`code`", "**bold**",
    "_x_", "[link](https://example.org)", "![image](x.png)", "~~gone~~", "# head", "1. one", "- item", "a\nb",
    "a\r\nb", "a\rb", "a\u2028b", "\x1b[31mred\x1b[0m", "\x07", "\u202ecba", "$x^2$", "100 %", "\\input{x}",
    "{a}_b^c~d", "\0", "caf\u00e9", "cafe\u0301", "😀", "猫", "2020", "007", "1e3", "2020-01-01", "null", "no", "NA",
    "~", "-5", "+3.5", "[red]", "[/b]", "$(touch x)", "a;b", "a b", "-rf", "../up", "CON", "x" * 3000, "\udcff",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_csv_cell_is_no_formula_and_reads_back(name):
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow([escape.csv_cell(name), "next"])
    ((cell, last),) = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert last == "next"
    assert not re.match(r"\s*[=+\-@＝]", cell) or re.fullmatch(r"[-+]?\d+(\.\d+)?", cell)
    restored = re.sub(r"^'(?='*(\s*[=+\-@＝＋－＠]|[\t\\]))", "", cell)
    assert restored == escape.visible(name, keep="\n\t")


def test_numbers_in_csv_stay_numbers():
    for number in ("-5", "+3.5", "-1.25e-07", "0", ".5"):
        assert escape.csv_cell(number) == number


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_html_shows_the_name_and_nothing_else(name):
    parser = html.parser.HTMLParser(convert_charrefs=True)
    tags, text = [], []
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, attributes))  # type: ignore[method-assign]
    parser.handle_data = text.append  # type: ignore[method-assign]
    parser.feed(f'<p title="{escape.html(name)}">{escape.html(name)}</p>')
    parser.close()
    assert tags == [("p", [("title", escape.visible(name))])]
    assert "".join(text) == escape.visible(name)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_markdown_cell_shows_the_name_and_nothing_else(name):
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    rendered = reader.render(
        f"| a | b |\n|---|---|\n| x | {escape.markdown(name)} |\n\n{escape.markdown(name)}\n"
    )
    text = html_text(rendered).split()
    shown = escape.visible(name).split()
    assert text == ["a", "b", "x", *shown, *shown]
    assert set(re.findall(r"<(\w+)", rendered)) == {"table", "thead", "tbody", "tr", "th", "td", "p"}


def html_text(page: str) -> str:
    parser, text = html.parser.HTMLParser(convert_charrefs=True), []
    parser.handle_data = text.append  # type: ignore[method-assign]
    parser.feed(page)
    parser.close()
    return " ".join(text)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_latex_has_no_command_of_the_names_own(name):
    text = escape.latex(name)
    for command in re.findall(r"\\[A-Za-z]+|\\.", text):
        assert command in {r"\textbackslash", r"\textasciitilde", r"\textasciicircum", r"\textless", r"\textgreater",
                           r"\textbar", *(f"\\{char}" for char in "&%$#_{}")}  # fmt: skip
    assert "\n" not in text


@pytest.mark.parametrize(
    "name", [name for name in HOSTILE if "\0" not in name and len(name) < 300], ids=ascii
)
def test_a_shell_word_is_the_name(name, tmp_path):
    line = escape.shell_command("printf", "%s", name)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True)
    assert done.stdout == name.encode("utf-8", "surrogateescape")
    assert not list(tmp_path.iterdir())


def test_a_path_with_a_dash_is_no_option():
    assert shlex.split(escape.shell_command("ls", Path("-rf"), "-l")) == ["ls", "./-rf", "-l"]


def test_file_names_are_plain_and_differ():
    names = escape.file_names(HOSTILE)
    assert len({*names.values()}) == len(HOSTILE)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,59}", name) for name in names.values())
    assert escape.file_names(["RN50", "ViT-B/16"]) == {"RN50": "rn50", "ViT-B/16": "vit-b-16"}


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_terminal_gets_one_line_without_codes(name):
    assert escape.visible(name).isprintable()
    escape.visible(name).encode()
