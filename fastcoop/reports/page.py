"""The report as one page that contains its images and tables and needs no network."""

from __future__ import annotations

import base64
import gzip
import json
import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from fastcoop import escape
from fastcoop.errors import abbreviate
from fastcoop.progress import counted
from fastcoop.reports.best import best_methods
from fastcoop.reports.cautions import Caution
from fastcoop.reports.chart import Chart, swatch
from fastcoop.reports.claims import NOTES, Judged, claims_table, texts_of
from fastcoop.reports.frames import shots_text
from fastcoop.reports.item import ADD, Exhibit, Item
from fastcoop.reports.paired import FAILS, HOLDS, UNKNOWN
from fastcoop.reports.study import Study, joined, schedule_note
from fastcoop.reports.table import Table, text_table

FOLDER = Path(__file__).parent
TITLES = {"png": "PNG", "svg": "SVG", "csv": "CSV", "tex": "LaTeX"}

MAX_NAMES = 6  # of datasets or backbones in a sentence
MAX_ROWS = 12  # of a table that is not folded
MAX_UNPACKED, MAX_LETTERS = 100, 50_000  # rows of a table, letters of a fold, that are not compressed
MAX_FILE = 2_000  # letters of a file to save that is not compressed
PACKAGES = ("fastcoop", "torch", "open_clip_torch", "numpy", "pandas", "scikit-learn", "scipy", "matplotlib")
VERDICTS = {HOLDS: "holds", FAILS: "fails"}
Drawn = dict[str, tuple[Item, Exhibit, Chart]]  # exhibits with charts, by the ids of these on the page


def page(
    study: Study,
    made: list[tuple[Item, list[Exhibit]]],
    missing: list[tuple[Item, str]],
    judged: list[Judged],
    warnings: Iterable[Caution],
    out: Path,
) -> str:
    """Return the HTML of a report whose figures are files in ``out``."""
    warnings = list(warnings)
    drawn = {
        name: (item, one, chart)
        for item, found in made
        for one in found
        for name, chart in _named(item, one).items()
    }
    datasets = {name for piece in study.slices() for name in piece.runs.dataset}
    charts = {name: _described(chart, warnings, datasets) for name, (*_, chart) in drawn.items()}
    first = _first_item(drawn)
    made = sorted(made, key=lambda pair: pair[0] is not first)
    sections = [
        (item.name, item.title, _item(item, found, item is first, charts, out)) for item, found in made
    ]
    sections += [("claims", "Claims", _claims(judged)), ("warnings", "Warnings", _warnings(warnings))]
    sections += [("missing", "Missing", _missing(missing, study))] * bool(missing)
    sections += [("runs", "Runs", _runs(study)), ("reproduce", "Reproduce", _reproduce(study, out))]
    links = (f'<a href="#{name}">{escape.html(title.split(". ")[0])}</a>' for name, title, _ in sections)
    parts = (
        f'<section id="{name}"><h2>{escape.html(title)}</h2>{text}</section>'
        for name, title, text in sections
    )
    own = {name: one for name, one in drawn.items() if one[0] is first and one[2].runs is not None}
    library = (FOLDER / "vega.js.gz").read_bytes() if charts else b""
    return Template((FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape.html(f"fastcoop report: {study.folder.resolve().name}"), lead=escape.html(_lead(study)),
        style=(FOLDER / "page.css").read_text(encoding="utf-8"), contents="".join(links),
        body=_top(own) + "\n".join(parts),
        charts=json.dumps(charts, separators=(",", ":")).replace("<", "\\u003c"),
        library=base64.b64encode(library).decode(), script=(FOLDER / "page.js").read_text(encoding="utf-8"),
    )  # fmt: skip


def _named(item: Item, one: Exhibit) -> dict[str, Chart]:
    """Return the charts of an exhibit by their ids on the page."""
    stem = f"{item.name}{one.suffix}"
    return {f"{stem}/{place}" if place else stem: chart for place, chart in enumerate(one.charts)}


def _first_item(drawn: Drawn) -> Item | None:
    """Return the item whose curves over shots have the most methods; it stands first."""
    counts = [(len(chart.looks), item) for item, _, chart in drawn.values() if chart.runs is not None]
    return max(counts, key=lambda pair: pair[0])[1] if counts else None


def _lead(study: Study) -> str:
    """Return in a sentence what the page shows."""
    runs = study.runs
    names = runs.source.str.replace(r":(base|new)$", "", regex=True)
    backbones, datasets = (abbreviate(list(dict.fromkeys(one)), MAX_NAMES) for one in (runs.backbone, names))
    shots = sorted(set(runs.shots) - {0.0})
    ends = " to ".join(dict.fromkeys(shots_text(one) for one in (shots[0], shots[-1]))) if shots else "no"
    quick = sorted({schedule_note(one).partition(":")[0] for one in set(runs.schedule) - {"", "paper"}})
    has_both = bool(quick) and "paper" in set(runs.schedule)
    schedule = f" ({joined(*quick)}, {'and' if has_both else 'not'} the paper's)" if quick else ""
    return (
        f"Accuracy on test images of {counted(runs.label.nunique(), 'method')} with {ends} training images per class:"
        f" {counted(runs.key.nunique(), 'run')} on {datasets} with {backbones}{schedule}."
    )


def _top(own: Drawn) -> str:
    """Return the first screen: the curves of a panel that the reader chooses, and the best method per shots."""
    if not own:
        return ""
    options, tables = [], []
    common = set.intersection(*(set(one.subtitle.split(", ")) for _, one, _ in own.values()))
    for name, (_, one, chart) in own.items():
        apart = ", ".join(part for part in one.subtitle.split(", ") if part not in common)
        where = f" ({apart})" if apart else ""
        options += [
            f'<option value="{name}|{place}">{escape.html(panel + where)}</option>'
            for place, panel in enumerate(chart.panels)
        ]
        best = best_methods(chart, f"Best method per number of shots ({one.subtitle})")
        links = _get(f"best{one.suffix}", None, _texts(best))
        tables.append(f'<div class="best" data-of="{name}">{best.to_html()}{links}</div>')
    legends = "".join(f'<div data-of="{name}">{_legend(chart)}</div>' for name, (*_, chart) in own.items())
    item, *_ = next(iter(own.values()))
    return (
        '<section class="top" id="top"><div class="draw"><div class="bar">'
        f"<h2>{escape.html(item.title)}</h2>"
        f'<label>of <select id="chosen" aria-label="Dataset">{"".join(options)}</select></label></div>'
        f'<p class="care"></p><div class="chart"></div>{legends}</div>'
        f'<div class="side"><h2>Best method per number of shots</h2>{"".join(tables)}</div></section>'
    )


def _pre(text: str) -> str:
    return f"<pre>{escape.html(text, keep=chr(10))}</pre>"


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _fold(summary: str, content: str, rows: int = 0) -> str:
    """Return content behind a line; many ``rows`` or letters are compressed, and unpacked when they are first shown."""
    if rows > MAX_UNPACKED or len(content) > MAX_LETTERS:
        content = f'<script type="text/plain" data-packed>{_packed(content)}</script>'
    return f"<details><summary>{escape.html(summary)}</summary>{content}</details>"


def _get(stem: str, image: str | None, texts: Mapping[str, str] | None = None) -> str:
    """Return links that save a figure, given by its id, and texts by kind; long texts are compressed."""
    name = escape.html(stem)
    links = [(kind, f'data-image="{image}"') for kind in ("png", "svg") if image]
    for kind, text in (texts or {}).items():
        if len(text) > MAX_FILE:
            links.append((kind, f'data-packed-file="{_packed(text)}"'))
        else:
            links.append((kind, f'href="data:text/plain;base64,{_base64(text)}"'))
    shown = (f'<a download="{name}.{kind}" {where}>{TITLES[kind]}</a>' for kind, where in links)
    return f'<p class="get">{"".join(shown)}</p>' if links else ""


def _texts(table: Table) -> dict[str, str]:
    return {"csv": table.to_csv(), "tex": table.to_latex()}


def _legend(chart: Chart) -> str:
    """Return a button per method, which hides it."""
    if len(chart.looks) < 2:
        return ""
    looks = {escape.html(name): swatch(look) for name, look in chart.looks.items()}
    buttons = (
        f'<button type="button" aria-pressed="true" data-method="{name}">{drawn}{name}</button>'
        for name, drawn in looks.items()
    )
    return f'<div class="legend" role="group" aria-label="Methods shown">{"".join(buttons)}</div>'


def _described(chart: Chart, warnings: list[Caution], datasets: set[str]) -> dict[str, Any]:
    """Return a chart for the page's script: its specification, its panels, and short warnings on all and on each."""
    own = datasets & set(chart.panels)
    notes: dict[str, list[str]] = {title: [] for title in chart.panels}
    general = []
    for text, all_named in ((one.short, one.datasets) for one in warnings if one.short and chart.looks):
        named = {*map(str, all_named)} & (own or datasets)
        with_names = f"{text} ({abbreviate(sorted(named), MAX_NAMES)})"
        if named == (own or datasets):
            general.append(text)
        elif named and not own:
            general.append(with_names)
        elif named:
            for title in chart.panels:
                notes[title] += [text] * (title in named) if title in own else [with_names]
    panels = [
        {"title": escape.visible(title), "points": points, "notes": notes[title]}
        for title, points in chart.panels.items()
    ]
    return chart.described() | {"notes": general, "panels": panels}


def _care(notes: list[str]) -> str:
    return f'<p class="care">{escape.html("; ".join(notes))}</p>' if notes else ""


def _item(item: Item, exhibits: list[Exhibit], is_first: bool, charts: dict[str, Any], out: Path) -> str:
    text = [f"<p>{escape.html(item.caption)}</p>"]
    first = next((one for one in exhibits if one.figure is not None), None)
    for fold, group in groupby(exhibits, key=lambda one: one.fold):
        parts = "\n".join(
            _exhibit(item, one, len(exhibits) > 1, one is not first, is_first, charts, out) for one in group
        )
        text.append(_fold(fold, parts) if fold else parts)
    return "\n".join(text)


def _exhibit(
    item: Item,
    one: Exhibit,
    is_named: bool,
    is_later: bool,
    is_first: bool,
    charts: dict[str, Any],
    out: Path,
) -> str:
    stem, text = f"{item.name}{one.suffix}", []
    if is_named and not one.fold:
        text.append(f"<h3>{escape.html(one.table.title if one.table else one.subtitle)}</h3>")
    shown, boxes = _named(item, one), []
    for name, chart in shown.items():
        is_on_top = is_first and chart.runs is not None  # the first screen has the first panel
        panels = [_panel(name, place, panel) for place, panel in enumerate(charts[name]["panels"])]
        boxes += panels[is_on_top:]
        text.append(_care(charts[name]["notes"]))
        text += [_legend(chart)] if boxes else []
    if boxes:
        text.append(f'<div class="panels {next(iter(shown.values())).kind}">{"".join(boxes)}</div>')
    if one.figure is not None:
        svg = (out / f"{stem}.svg").read_text(encoding="utf-8")
        alt = escape.html(f"{item.title} ({one.subtitle}); the numbers are in the table below")
        classes = "static" if shown else "figure"
        # An item's first figure shows without scripts; the others are compressed, or many would fill the page.
        if is_later:
            source = f'data-packed-image="{_packed(svg)}"'
        else:
            source = f'src="data:image/svg+xml;base64,{_base64(svg)}"'
        text.append(f'<img id="image-{stem}" class="{classes}" alt="{alt}" {source}>')
    image = f"image-{stem}" if one.figure is not None else None
    text.append(_get(stem, image, _texts(one.table) if one.table is not None else None))
    if one.table is not None:
        rows, table = len(one.table.rows), one.table.to_html()
        summary = "The numbers" if one.figure is not None else f"All {rows} rows"
        text.append(_fold(summary, table, rows) if one.figure is not None or rows > MAX_ROWS else table)
    return "\n".join([*text, one.html])


def _panel(name: str, place: int, panel: dict[str, Any]) -> str:
    box = f'<div class="chart" data-chart="{name}" data-panel="{place}"></div>'
    title = f"{escape.html(panel['title'])}{_care(panel['notes'])}"
    return f"<figure><figcaption>{title}</figcaption>{box}</figure>"


def _warnings(warnings: list[Caution]) -> str:
    if not warnings:
        return "<p>No warnings.</p>"
    return f'<ul class="warnings">{"".join(f"<li>{escape.html(one.text)}</li>" for one in warnings)}</ul>'


def _claims(judged: list[Judged]) -> str:
    """Return a line per claim and finding, the numbers behind it."""
    rows: tuple[list[str], list[str]] = ([], [])
    for claim, results, finding in judged:
        facts = {"in the paper": claim.where, "holds here if": claim.holds_if, "results": results}
        facts |= {"numbers": finding.numbers, **texts_of(finding.test)}
        pairs = ((escape.html(name), escape.html(text)) for name, text in facts.items() if text)
        listed = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in pairs)
        kind = VERDICTS.get(finding.verdict, "unknown")
        where = "" if results == "all" else f' <span class="note">{escape.html(results)}</span>'
        verdict = f'<span class="verdict {kind}">{escape.html(finding.verdict)}</span>'
        summary = f"{verdict}: {escape.html(claim.text)}{where}"
        rows[finding.verdict == UNKNOWN].append(
            f"<details><summary>{summary}</summary><dl>{listed}</dl></details>"
        )
    counts = Counter(finding.verdict for _, _, finding in judged)
    words = {HOLDS: "hold", FAILS: "do not hold", UNKNOWN: "undecided"}
    summary = ", ".join(f"{counts[name]} {text}" for name, text in words.items() if counts[name])
    notes = "".join(f"<p class=note>{escape.html(note)}</p>" for note in NOTES)
    unknown = f'<div class="claims">{"".join(rows[1])}</div>'
    return (
        f"<p>The paper's claims on these results: {summary}.</p>{_get('claims', None, _texts(claims_table(judged)))}"
        f'<div class="claims">{"".join(rows[0])}</div>{_fold(f"{len(rows[1])} with {UNKNOWN}", unknown)}'
        f"{_fold('How claims are judged', notes)}"
    )


def _missing(missing: list[tuple[Item, str]], study: Study) -> str:
    lines = "".join(
        f"<li><b>{escape.html(item.title)}</b>: {escape.html(why)}.{_pre(item.command(study))}</li>"
        for item, why in missing
    )
    names = ", ".join(item.title.partition(". ")[0] for item, _ in missing)
    listed = f"<p>{escape.html(ADD)}</p><ul>{lines}</ul>"
    fold = _fold("What each needs, and the command", listed)
    return f"<p>These results lack runs for {escape.html(names)}.</p>{fold}"


def _runs(study: Study) -> str:
    """Return a table of all runs, with their settings."""
    runs = pd.concat([study.runs, study.repeated, study.diverged])
    texts = pd.DataFrame({
        "method": runs.label, "run": runs.key.str[:12], "shots": runs.shots.map(shots_text),
        "seed": runs.seed.astype(str), "trained on": runs.source.where(runs.shots > 0, ""),
        "tested on": runs.dataset, "backbone": runs.backbone, "accuracy (%)": runs.accuracy.map(_number),
        "macro (%)": runs.macro_accuracy.map(_number), "seconds": runs.seconds.map(_number),
        "status": runs.status, "schedule": runs.schedule, "settings": runs.settings.map(_settings),
    })  # fmt: skip
    table = text_table("Runs", texts.set_index("method"))
    files = {"csv": texts.map(escape.csv_cell).to_csv(index=False), "tex": table.to_latex()}
    folded = _fold(f"{counted(len(runs), 'result')} with settings", table.to_html(), len(runs))
    export = escape.shell_command("fastcoop", "results", "export", study.folder, "runs.csv")
    return f"{_get('runs', None, files)}{folded}<p>All columns: <code>{escape.html(export)}</code></p>"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _settings(settings: dict[str, Any]) -> str:
    return joined(*(f"{name}={value}" for name, value in settings.items() if value is not None))


def _reproduce(study: Study, out: Path) -> str:
    first, _, grid = study.grid_text.partition("\n")
    sweep = escape.shell_command("fastcoop", "sweep", "GRID.yaml", "--results", study.folder)
    if first.startswith("# "):
        sweep = first[2:]
    else:
        grid = study.grid_text
    gallery = ("--gallery",) if study.pictures else ()
    report = escape.shell_command("fastcoop", "report", study.folder, "--out", out, *gallery)
    parts = [_pre(f"{sweep}\n{report}")]
    if grid:
        parts.append(_fold(str(study.folder / "grid.yaml"), _pre(grid)))
    if versions := sorted(set(study.runs.versions.dropna())):
        texts = (_settings(json.loads(text)) for text in versions)
        parts.append(f"<p>Versions of the runs: {escape.html('; '.join(texts))}.</p>")
    here = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            here.append(f"{package} {version(package)}")
    return "".join([*parts, f"<p>Versions of this report: {escape.html(', '.join(here))}.</p>"])
