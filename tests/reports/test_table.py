"""Tables: what is best, how a number is written in each format, and the paper's own numbers beside ours."""

from __future__ import annotations

import csv
import html.parser
import io

import pytest

from fastcoop import escape
from fastcoop.reports.frames import Setting
from fastcoop.reports.items import table1, table5
from fastcoop.reports.paper import AS_PRINTED, printed
from fastcoop.reports.study import study_of
from fastcoop.reports.table import Cell, Table, save_table
from tests.reports.made_up_results import coop, run


def small() -> Table:
    table = Table("A_title", ("dataset", "method"), ("1 shot",), "shots")
    table.add(("a|b", "one"), {"1 shot": Cell(50.004, 1.0, 3)})
    table.add(("a|b", "two & <more>"), {"1 shot": Cell(50.001, 2.0, 3)})
    table.add(("a|b", "three"), {"1 shot": Cell(49.0, float("nan"), 1)})
    table.add(("a|b", "paper"), {"1 shot": Cell(99.0, runs=0)})
    table.mark_best()
    return table


def test_ties_to_the_digits_shown_are_all_best_and_the_papers_number_never_is():
    assert [cells["1 shot"].best for _, cells in small().rows] == [True, True, False, False]


def test_formats():
    table = small()
    markdown, latex, page = table.to_markdown(), table.to_latex(), table.to_html()
    assert "| a\\|b | one | **50.00 ± 1.00** | 3 |" in markdown
    assert "| a\\|b | three | 49.00 | 1 |" in markdown
    assert r"two \& \textless{}more\textgreater{} & \textbf{50.00$\pm$2.00} & 3 \\" in latex
    assert r"\caption{A\_title}" in latex
    assert "two &amp; &lt;more&gt;" in page
    html.parser.HTMLParser().feed(page)
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert list(rows[0]) == ["dataset", "method", "shots", "mean", "std", "runs", "best", "text"]
    assert list(rows[0].values()) == ["a|b", "one", "1 shot", "50.004", "1", "3", "1", ""]
    assert rows[3]["runs"] == "0"


def test_latex_leaves_nothing_for_latex_to_act_on():
    assert escape.latex("50% of $x_1$ & #2 {a} \\b ~^") == (
        r"50\% of \$x\_1\$ \& \#2 \{a\} \textbackslash{}b \textasciitilde{}\textasciicircum{}"
    )


def test_a_row_that_starts_with_a_bracket_is_no_option_of_the_line_before():
    table = Table("T", ("prompt",), ("accuracy",))
    table.add(("[V]₁ [CLASS].",), {"accuracy": Cell(50.0)})
    assert "\n{}[V]$_1$ [CLASS]. & 50.00" in table.to_latex()


def test_pdflatex_sets_rows_without_runs():
    table = Table("numbers of others", ("method",), ("16 shots", "32 shots"), "shots")
    table.add(("CoOp",), {"16 shots": Cell(60.0, runs=0)})
    assert table.to_latex().isascii()
    assert r"\textcolor{gray}{60.00} & \textcolor{gray}{--} & \textcolor{gray}{--} \\" in table.to_latex()


def test_words_that_pdflatex_cannot_set_are_said():
    for word, said in (("café – “x” ±", False), ("カ☀", True)):
        table = Table("T", ("#",), ("words",), unit="")
        table.add((1,), {"words": word})
        first, *_ = table.to_latex().splitlines()
        assert first.startswith(r"% needs \usepackage{booktabs}")
        assert ("XeLaTeX or LuaLaTeX with a font that has ☀カ" in first) == said


def test_tables_are_written_in_three_formats(tmp_path):
    assert {p.name for p in save_table(small(), tmp_path / "t")} == {"t.csv", "t.md", "t.tex"}


PAPER = Setting(16, "random", 16)


@pytest.mark.parametrize(
    ("item", "backbone", "dataset", "series", "setting", "prompt", "number"),
    [
        ("table1", "RN50", "imagenet", "coop end", Setting(4, "random", 16), "", 63.33),
        ("table1", "ViT-B/16", "ImageNet-A", "linear_probe", PAPER, "", 35.68),
        ("table2", "RN101", "imagenet", "zero_shot", PAPER, "", 61.26),
        ("table5", "RN50", "imagenet", "finetune_image_encoder", PAPER, "", 18.28),
        ("figure1", "RN50", "dtd", "zero_shot", PAPER, "{} texture.", 42.32),
        ("figure1", "RN50", "eurosat", "coop", PAPER, "", 83.53),
    ],
)
def test_the_papers_numbers(item, backbone, dataset, series, setting, prompt, number):
    assert printed(item, backbone, dataset, series, setting, prompt).mean == number


def test_the_papers_numbers_are_for_the_same_setting_only():
    assert printed("table1", "RN50", "imagenet", "coop", Setting(8, "random", 16)) is None
    assert printed("table1", "RN50x4", "imagenet", "zero_shot", PAPER) is None
    assert printed("figure1", "RN50", "dtd", "zero_shot", PAPER, "a {}.") is None


def test_the_papers_numbers_stand_in_rows_of_their_own(tmp_path):
    import pandas as pd

    common = {"backbone": "RN50", "source": "imagenet"}
    rows = []
    for dataset, accuracy in (("imagenet", 60.0), ("imagenet_a", 20.0)):
        rows.append(
            run(**common, dataset=dataset, method="zero_shot", shots=0, seed=0, accuracy=accuracy - 2)
        )
        rows += [coop(**common, dataset=dataset, shots=16, seed=s, accuracy=accuracy + s) for s in (1, 2)]
    rows.append(run(**common, dataset="imagenet", method="text_bias", shots=16, seed=1, accuracy=59.0))
    rows.append(coop(**common, dataset="imagenet", shots=16, seed=1, context_length=8, accuracy=61.0))
    study = study_of(pd.DataFrame(rows), tmp_path)
    (part,) = table1.ITEM.make(study)
    found = {names[0]: cells for names, cells in part.table.rows}
    assert found["CoOp (M=16, end)"]["imagenet_a"].mean == 21.5
    assert not any("M=8" in name for name in found)  # of no target
    assert found[f"CoOp (M=16, end), {AS_PRINTED}"]["imagenet_a"].mean == 22.12
    (part,) = table5.ITEM.make(study)
    assert part.table.to_markdown().count(AS_PRINTED) >= 3
