"""The page: that it stands alone, and in a real Chromium what it shows and what its controls do."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from fastcoop.reports import report, style
from fastcoop.reports.best import BEST, LEAD, SURE, best_methods
from fastcoop.reports.item import Exhibit, Item
from fastcoop.reports.items import ITEMS, figure3
from fastcoop.reports.study import study_of
from fastcoop.reports.table import Table
from tests.reports.made_up_results import coop, results, run, store_words
from tests.reports.test_field import fewshot

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>alert(1)</script> {}."
MAX_BYTES = 3_000_000


def two_datasets() -> pd.DataFrame:
    frame = results(datasets=("objects", "digits"), shots=(1, 4, 16))
    frame.loc[0, "settings"] = f'{{"prompt": "{HOSTILE}"}}'
    collapsed = (
        (frame.dataset == "digits") & (frame.shots == 4) & (frame.seed == 3) & (frame.method == "coop")
    )
    frame.loc[frame.index[collapsed][0], "accuracy"] = 11.0
    return frame


def two_backbones() -> pd.DataFrame:
    few = {"datasets": ("objects",), "shots": (1, 16), "seeds": (1, 2)}
    return pd.concat([results(backbone="s", **few), results(backbone="l", lift=5, **few)], ignore_index=True)


def one_run() -> pd.DataFrame:
    return pd.DataFrame([coop(backbone="b", dataset="pets", shots=16, seed=1, accuracy=60.0)])


def strange_names() -> pd.DataFrame:
    """Names that act in HTML or JSON, that are control characters, and that are those of averages."""
    frame = results(datasets=("objects", "digits"), shots=(1, 16), seeds=(1, 2))
    names = {"objects": "Average </script><b>\x1b", "digits": "a\u2028b | \"c\" & 'd'"}
    return frame.assign(dataset=frame.dataset.map(names), source=frame.source.map(names))


def without_learning() -> pd.DataFrame:
    return pd.DataFrame(
        [run(backbone="b", dataset="pets", method="zero_shot", shots=0, seed=0, accuracy=60.0)]
    )


FRAMES = {
    "own": two_datasets, "backbones": two_backbones, "field": fewshot, "one-run": one_run,
    "strange": strange_names, "zero": without_learning,
}  # fmt: skip
EXTRA = Item(
    "extra", "An item of a package", "Its caption.",
    lambda study: [
        Exhibit(f"-{name}", name, html='<div class="grid"><b>picture</b></div>', fold=f"{name} & more") for name in "ab"
    ],
    lambda study: "fastcoop sweep GRID.yaml",
)  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of each of `FRAMES`, by its name."""
    found = {}
    for name, frame in FRAMES.items():
        folder = tmp_path_factory.mktemp("page") / name
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            rows = frame()
            for kind, table in (
                ("results", rows),
                ("failures", pd.DataFrame()),
                ("untested", pd.DataFrame()),
            ):
                patch.setattr(f"fastcoop.results.load_{kind}", lambda folder, table=table: table)
            patch.setattr(style, "METADATA", {"svg": style.METADATA["svg"]})  # the page needs no other
            if name == "own":
                patch.setitem(ITEMS.data, "extra", EXTRA)
                store_words(folder, rows)
                (folder / "grid.yaml").write_text("datasets: [objects, digits]\n")
            found[name], *_ = report(folder, folder / "out")
    return found


def test_the_page_needs_no_network_and_no_other_file(pages):
    for page in pages.values():
        text = page.read_text(encoding="utf-8")
        assert page.name == "index.html"
        assert not re.search(r'(src|href)="(?!data:|#)', text)
        assert "http:" not in text
        assert "https:" not in text
        assert len(text) < MAX_BYTES
    assert (
        pages["own"].read_text(encoding="utf-8").count("data:image/svg+xml;base64,") == 2
    )  # Figures 3 and 4


def test_the_page_has_claims_words_settings_command_and_versions(pages):
    text = pages["own"].read_text(encoding="utf-8")
    for expected in (
        "CoOp is above the linear probe", "Nearest words", "views=8", "fastcoop sweep", "datasets: [objects",
        "matplotlib", "Figure 5b. Backbones</b>: CoOp was run on one backbone only",
    ):  # fmt: skip
        assert expected in text
    assert "<script>alert(1)" not in text


def test_the_best_methods_are_those_of_the_means_with_their_lead():
    frame = two_datasets()
    (part,) = figure3.ITEM.make(study_of(frame, Path("results")))
    found = dict(best_methods(part.charts[0], "Best").rows)
    own = frame[(frame.dataset == "digits") & (frame.shots == 16)]
    kinds = [own.method, own.class_position.fillna(""), own.class_specific]
    means = own.groupby(kinds).accuracy.mean().sort_values(ascending=False)
    _, position, specific = means.index[0]
    best = found["digits", "16"]
    assert best[BEST] == f"CoOp (M=16, {position}{', CSC' * bool(specific)})"
    assert best["accuracy (%)"].startswith(f"{means.iloc[0]:.2f} ± ")
    assert best[LEAD].startswith(f"{means.iloc[0] - means.iloc[1]:+.2f} [")
    assert found["objects", "1"][BEST].startswith("CoOp")
    assert re.match(r"(yes|no) \(p ", found["objects", "1"][SURE])


def test_one_seed_is_never_sure_and_choices_on_test_labels_are_not_ranked():
    frame = two_datasets()
    (part,) = figure3.ITEM.make(study_of(frame[frame.seed < 2], Path("results")))
    assert {cells[SURE] for names, cells in best_methods(part.charts[0], "Best").rows} == {"unknown"}
    from fastcoop.reports.items import field_fewshot

    part, _ = field_fewshot.ITEM.make(study_of(fewshot(), Path("results")))
    found = dict(best_methods(part.charts[0], "Best").rows)
    assert {cells[BEST] for cells in found.values()} == {
        "CLAP"
    }  # not the official Tip-Adapter-F, 24 points higher
    assert found["pets", "16"]["accuracy (%)"] == "64.00 ± 1.00"
    assert found["pets", "16"][LEAD].endswith("over GDA")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed to open the page in")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser, pages) -> Iterator:
    """A function that opens a page; afterwards it asserts that nothing was requested and nothing failed."""
    problems, opened = [], []

    def go(name: str, width: int = 1280, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(10_000)
        opened.append(page)
        address = pages[name].as_uri()
        page.on(
            "request",
            lambda one: (
                problems.append(one.url) if not one.url.startswith(("data:", "blob:", address)) else 0
            ),
        )
        page.on(
            "console", lambda one: problems.append(one.text) if one.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda one: problems.append(str(one)))
        page.goto(address)
        if name != "zero":
            page.wait_for_selector(".top .chart svg .mark-symbol path")
        return page

    yield go
    for page in opened:
        page.close()
    assert problems == []


def lines_of(page) -> int:
    return page.locator(".top .chart svg .mark-line path").count()


@pytest.mark.parametrize("name", FRAMES)
def test_every_report_fits_both_widths_and_both_themes(visit, name):
    page = visit(name)
    for width, scheme in ((1280, "light"), (400, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def test_the_first_screen_answers_which_method_is_best_and_how_sure_that_is(visit):
    page = visit("own")
    for selector in (".lead", ".top .chart svg", ".top .best table", ".top .legend"):
        box = page.locator(selector).first.bounding_box()
        assert box["y"] + box["height"] < 900, selector
    assert "runs on objects, digits with demo-resnet" in page.inner_text(".lead")
    page.select_option("#chosen", label="digits")
    rows = page.locator(".top .best tbody tr:visible").all_inner_texts()
    assert len(rows) == 3
    assert re.match(
        r"4\s+CoOp \(M=16, mid\)\s+[\d.]+ ± [\d.]+\s+\+[\d.]+ \[.*\] over .*\s(yes|no) \(p ", rows[1]
    )
    names = page.locator(".top .best tbody tr:visible td:nth-child(3)")
    heights = names.evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
    assert max(heights) < 30, "the name of a method is broken"
    assert "means include runs far below the other seeds" in page.inner_text(".top .care")
    page.select_option("#chosen", label="objects")
    assert "far below" not in page.inner_text(".top .care")


def test_strange_names_are_chosen_like_others(visit):
    page = visit("strange")
    options = page.locator("#chosen option").all_inner_texts()
    assert options[1:] == ["Average </script><b>\\x1b", "a\\u2028b | \"c\" & 'd'"]
    for place, lead in ((0, "Average over 2"), (1, "Average <"), (2, "a\\u2028b")):
        page.select_option("#chosen", index=place)
        rows = page.locator(".top .best tbody tr:not([hidden]) td:first-child").evaluate_all(
            "all => all.map(one => one.textContent)"
        )
        assert len(rows) == 2
        assert all(name.startswith(lead) for name in rows)


def test_pointing_at_a_curve_shows_method_shots_mean_spread_and_seeds(visit):
    page = visit("own")
    page.select_option("#chosen", label="objects")
    page.wait_for_function("document.querySelector('.top .chart svg').textContent.includes('accuracy')")
    page.wait_for_timeout(100)
    marks = page.locator(".top .chart svg .mark-symbol path[aria-label*='CoOp (M=16, end)']")
    box = marks.last.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 2, box["y"] + box["height"] / 2 + 2)
    tip = page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert re.search(r"method\s+CoOp \(M=16, \w+(, CSC)?\)", tip.inner_text())
    assert re.search(r"training images per class\s+16", tip.inner_text())
    assert re.search(r"mean ± deviation\s+\d+\.\d\d ± \d\.\d\d", tip.inner_text())
    assert re.search(r"seeds\s+3", tip.inner_text())


def test_the_legend_hides_a_method_in_every_chart_by_mouse_and_keyboard(visit):
    page = visit("own")
    page.wait_for_selector("#figure3 .chart svg .mark-line path")
    everywhere = page.locator("#figure3 .chart svg .mark-line path")
    before = lines_of(page), everywhere.count()
    button = page.locator(".top .legend button", has_text="Linear probe")
    button.click()
    page.wait_for_function(
        f"document.querySelectorAll('.top .chart svg .mark-line path').length == {before[0] - 1}"
    )
    assert button.get_attribute("aria-pressed") == "false"
    assert page.locator("#figure3 .legend button[aria-pressed=false]").inner_text() == "Linear probe"
    page.wait_for_function(
        f"document.querySelectorAll('#figure3 .chart svg .mark-line path').length < {before[1]}"
    )
    button.focus()
    page.keyboard.press("Space")
    page.wait_for_function(
        f"document.querySelectorAll('.top .chart svg .mark-line path').length == {before[0]}"
    )
    page.focus("#theme")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.parentElement.className")
        )
    order = [reached.index(name) for name in ("chosen", "legend", "get")]
    assert order == sorted(order)


def test_tables_sort_and_filter(visit):
    page = visit("own")
    page.click("#figure3 details summary")
    table = page.locator("#figure3 details table")
    head = table.locator("th", has_text="16 shots")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    shown = "rows => rows.map(row => parseFloat(row.cells[5].textContent)).filter(one => !isNaN(one))"
    numbers = table.locator("tbody tr").evaluate_all(shown)
    assert len(numbers) > 5
    assert numbers == sorted(numbers)
    head.locator("button").press("Enter")
    assert table.locator("tbody tr").evaluate_all(shown) == numbers[::-1]
    page.fill("#figure3 input[type=search]", "digits linear")
    assert table.locator("tbody tr:visible").count() == 1
    page.click("#runs summary")  # many rows, which are unpacked
    page.fill("#runs input[type=search]", HOSTILE[:10])
    assert page.locator("#runs tbody tr:visible").count() == 1


def test_every_figure_and_table_is_saved_with_one_click(visit, pages):
    page, out = visit("own"), pages["own"].parent
    names = set()
    for link in page.locator("#figure3 .get a, #table6 .get a, .top .best .get a, #claims .get a").all():
        with page.expect_download() as saved:
            link.click()
        name, content = saved.value.suggested_filename, Path(saved.value.path()).read_bytes()
        names.add(name)
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG")
            assert len(content) > 20_000
        elif not name.startswith("best") and name != "claims.tex":
            assert content == (out / name).read_bytes(), name
        elif name.endswith(".csv"):
            assert {row["dataset"] for row in csv.DictReader(io.StringIO(content.decode()))} > {
                "objects",
                "digits",
            }
    assert {f"figure3.{kind}" for kind in ("png", "svg", "csv", "tex")} <= names
    assert {"best.csv", "best.tex", "claims.csv"} <= names


@pytest.mark.parametrize("name", ["own", "field"])
def test_no_figure_or_table_lacks_its_files(visit, name):
    page = visit(name)
    for _ in range(2):  # what is unpacked may hold folds
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        page.wait_for_function("!document.querySelector('details[open] > script[data-packed]')")
    found = page.evaluate("""[...document.querySelectorAll('main table, main .panels, main img.static')].map(one => {
      const kind = one.tagName, up = one => one.querySelector('.get') ? one : up(one.parentElement);
      return [kind, [...up(one).querySelectorAll('.get a[href]')].map(link => link.textContent).join(' ')]; })""")
    assert {kind for kind, _ in found} == {"TABLE", "DIV", "IMG"}
    for kind, links in found:
        assert ("CSV LaTeX" if kind == "TABLE" else "PNG SVG CSV LaTeX") in links, kind


def test_the_table_of_runs_is_saved_with_a_line_per_run(visit):
    page = visit("own")
    for kind in ("CSV", "LaTeX"):
        with page.expect_download() as saved:
            page.click(f"#runs .get >> text={kind}")
        if kind == "CSV":
            runs = pd.read_csv(saved.value.path())
            assert len(runs) == len(two_datasets())
            assert set(runs["tested on"]) == {"objects", "digits"}
        else:
            assert r"\begin{table}" in Path(saved.value.path()).read_text(encoding="utf-8")


def test_folds_open_and_an_items_own_content_stands_in_them(visit):
    page = visit("own")
    folds = page.locator("#extra > details")
    assert folds.locator("summary").all_inner_texts() == ["a & more", "b & more"]
    assert not page.locator("#extra .grid").first.is_visible()
    folds.first.locator("summary").click()
    assert page.locator("#extra .grid").first.is_visible()
    claim = page.locator("#claims > .claims details").first
    assert re.match("(holds|does not hold): ", claim.inner_text())
    assert not claim.locator("dl").is_visible()
    claim.locator("summary").press("Enter")
    assert "p over seeds" in claim.inner_text()
    place = "const place = one => one.getBoundingClientRect().top; ['#figure3', '#table4', '#claims', '#warnings']"
    tops = page.evaluate(f"{place}.map(id => place(document.querySelector(id)))".replace("const", "var"))
    assert tops == sorted(tops)


def test_the_second_figure_of_an_item_is_compressed_and_saved_like_the_first(visit, pages):
    page, out = visit("backbones"), pages["backbones"].parent
    assert [path.stem for path in sorted(out.glob("figure3*.svg"))] == ["figure3-l", "figure3-s"]
    assert page.locator("#figure3 img[data-packed-image]").count() == 1
    for name in ("figure3-l.svg", "figure3-s.svg"):
        page.wait_for_selector(f'a[download="{name}"][href^="data:"]', state="attached")
        with page.expect_download() as saved:
            page.click(f'a[download="{name}"]')
        assert Path(saved.value.path()).read_bytes() == (out / name).read_bytes()
    page.emulate_media(media="print")
    assert page.locator("#figure3 img").evaluate_all("all => all.every(one => one.naturalWidth > 300)")


def test_in_print_the_static_figure_stands_for_the_charts_and_the_theme_is_a_button(visit):
    page = visit("own", scheme="dark")
    image = page.locator("#figure3 img.static")
    assert not image.is_visible()
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.click("#theme")
    page.emulate_media(media="print")
    assert image.is_visible()
    assert image.evaluate("one => one.naturalWidth") > 300
    assert not page.locator(".top .chart").is_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"


def test_without_scripts_the_page_shows_figures_and_numbers(browser, pages):
    page = browser.new_page(java_script_enabled=False)
    page.goto(pages["own"].as_uri())
    assert page.locator("#figure3 img.static").is_visible()
    assert page.locator(".top .best table").is_visible()
    assert not page.locator(".top .chart").is_visible()
    page.close()


def test_a_table_escapes_its_heads():
    table = Table("T", ("<b>",), ("a & b",), unit="")
    table.add(("x",), {"a & b": "1"})
    assert '<th scope="col"><button type="button">&lt;b&gt;</button></th>' in table.to_html()
