"""The report as one page that contains its images and tables and needs no network."""

from __future__ import annotations

import base64
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template

import pandas as pd

from fastcoop import escape
from fastcoop.progress import counted
from fastcoop.reports.claims import NOTES, Judged, texts_of
from fastcoop.reports.frames import rows_of, shots_text
from fastcoop.reports.item import ADD, Exhibit, Item
from fastcoop.reports.paired import DATASETS, FAILS, HOLDS, SEEDS, PairedDifference
from fastcoop.reports.study import Study, joined, schedule_note, settings_of
from fastcoop.reports.table import Table

MAX_ROWS = 40  # of a table that is not folded
PIXELS_PER_INCH = 130  # at which a figure is shown
PACKAGES = ("fastcoop", "torch", "open_clip_torch", "numpy", "pandas", "scikit-learn", "scipy", "matplotlib")
CLAIM_HEADS = ("claim", "results", "verdict", "numbers here", "difference", "test")
RUN_COLUMNS = (
    "run", "shots", "seed", "trained on", "tested on", "backbone", "accuracy (%)", "macro (%)", "seconds", "status",
    "schedule", "settings",
)  # fmt: skip


def page(
    study: Study,
    made: list[tuple[Item, list[Exhibit]]],
    missing: list[tuple[Item, str]],
    judged: list[Judged],
    warnings: list[str],
    out: Path,
) -> str:
    """Return the HTML of a report whose figures are files in ``out``."""
    sections = [("warnings", "Warnings", _warnings(warnings)), ("claims", "Claims", _claims(judged))]
    sections += [(item.name, item.title, _item(item, exhibits, out)) for item, exhibits in made]
    if missing:
        sections.append(("missing", "Missing", _missing(missing, study)))
    sections.append(("runs", "Runs", _runs(pd.concat([study.runs, study.repeated, study.diverged]))))
    sections.append(("reproduce", "Reproduce", _reproduce(study, out)))
    contents = "".join(
        f'<a href="#{name}">{escape.html(title.split(". ")[0])}</a>' for name, title, _ in sections
    )
    body = "\n".join(
        f'<section id="{name}"><h2>{escape.html(title)}</h2>{text}</section>'
        for name, title, text in sections
    )
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    title, lead = escape.html(f"fastcoop report: {study.name}"), escape.html(_lead(study))
    return template.substitute(title=title, lead=lead, contents=contents, body=body)


def _pre(text: str) -> str:
    return f"<pre>{escape.html(text, keep=chr(10))}</pre>"


def _lead(study: Study) -> str:
    runs = study.runs
    backbones, datasets = (", ".join(dict.fromkeys(column)) for column in (runs.backbone, runs.dataset))
    lead = f"{counted(runs.key.nunique(), 'run')}; backbones: {backbones}; datasets: {datasets}."
    quick = sorted({schedule_note(schedule) for schedule in runs.schedule if schedule not in ("", "paper")})
    return lead + (f" Not trained by the paper's schedule: {'; '.join(quick)}." if quick else "")


def _warnings(warnings: list[str]) -> str:
    if not warnings:
        return "<p>No warnings.</p>"
    return f"<div class=warn><ul>{''.join(f'<li>{escape.html(text)}</li>' for text in warnings)}</ul></div>"


def _claims(judged: list[Judged]) -> str:
    rows = []
    for one in judged:
        criterion = escape.html(f"{one.claim.where}. Holds here if {one.claim.holds_if}.")
        kind = {HOLDS: "holds", FAILS: "fails"}.get(one.finding.verdict, "unknown")
        cells = [
            f">{escape.html(one.claim.text)}<div class=note>{criterion}</div>",
            f">{escape.html(one.results)}",
            f'><span class="verdict {kind}">{escape.html(one.finding.verdict)}</span>',
            f">{escape.html(one.finding.numbers)}",
            *_test_cells(one.finding.test),
        ]
        named = (f'<td data-head="{head}"{cell}</td>' for head, cell in zip(CLAIM_HEADS, cells, strict=True))
        rows.append(f"<tr>{''.join(named)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in CLAIM_HEADS)
    notes = "".join(f"<p class=note>{escape.html(note)}</p>" for note in NOTES)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class=wide><table class="sortable claims">{body}</table></div>{notes}'


def _test_cells(test: PairedDifference | None) -> list[str]:
    """Return the cells of the difference with its interval and of the test, with what was counted below it."""
    if test is None:
        return [">", ">"]
    text = {name: escape.html(value) for name, value in texts_of(test).items()}
    p, other = text[f"p over {test.unit}"], SEEDS if test.unit == DATASETS else DATASETS
    counted = f"{text['datasets']} dataset{'s' * (test.datasets != 1)}, {text['pairs']} pairs"
    if text[f"p over {other}"]:
        counted += f"; over {other}: p = {text[f'p over {other}']}".replace("= &lt;", "&lt; ")
    shown = f"p = {p} over {test.unit}".replace("= &lt;", "&lt; ") if p else f"none over {test.unit}"
    return [
        f' data-sort="{test.mean:.8g}">{text["difference"]}<div class=note>{text["interval"]}</div>',
        f' data-sort="{1 if math.isnan(test.p) else test.p:.8g}">{shown}<div class=note>{counted}</div>',
    ]


def _item(item: Item, exhibits: list[Exhibit], out: Path) -> str:
    text = [f"<p>{escape.html(item.caption)}</p>"]
    for one in exhibits:
        table, rows = one.table, len(one.table.rows) if one.table else 0
        if len(exhibits) > 1:
            text.append(f"<h3>{escape.html(table.title if table else one.subtitle)}</h3>")
        if one.figure is not None:
            image = base64.b64encode((out / f"{item.name}{one.suffix}.png").read_bytes()).decode()
            width = int(one.figure.get_figwidth() * PIXELS_PER_INCH)
            alt = escape.html(f"{item.title} ({one.subtitle}); the numbers are in the table below")
            text.append(f'<img width="{width}" alt="{alt}" src="data:image/png;base64,{image}">')
        if table is not None:
            summary = "The numbers" if one.figure is not None else f"All {rows} rows"
            folded = f"<details><summary>{summary}</summary>{table.to_html()}</details>"
            text.append(folded if one.figure is not None or rows > MAX_ROWS else table.to_html())
    return "\n".join(text)


def _missing(missing: list[tuple[Item, str]], study: Study) -> str:
    lines = "".join(
        f"<li><b>{escape.html(item.title)}</b>: {escape.html(why)}.{_pre(item.command(study))}</li>"
        for item, why in missing
    )
    return f"<p>These results lack runs for the following. {escape.html(ADD)}</p><ul>{lines}</ul>"


def _runs(runs: pd.DataFrame) -> str:
    table = Table("Runs", ("method",), RUN_COLUMNS, unit="")
    for row in rows_of(runs):
        texts = (
            str(row.key)[:12], shots_text(row.shots), str(row.seed), row.source if row.shots else "", row.dataset,
            row.backbone, _number(row.accuracy), _number(row.macro_accuracy), _number(row.seconds), row.status,
            row.schedule, _settings(row.settings),
        )  # fmt: skip
        table.add((row.label or row.method,), dict(zip(RUN_COLUMNS, texts, strict=True)))
    summary = f"All {len(runs)} results with their settings"
    return f"<details><summary>{summary}</summary>{table.to_html()}</details>"


def _number(value: float) -> str:
    return "" if value is None or value != value else f"{value:.2f}"


def _settings(settings: object) -> str:
    return joined(*(f"{name}={value}" for name, value in settings_of(settings).items() if value is not None))


def _reproduce(study: Study, out: Path) -> str:
    first, _, rest = study.grid_text().partition("\n")
    command, grid = (first[2:], rest) if first.startswith("# ") else ("", study.grid_text())
    sweep = command or escape.shell_command("fastcoop", "sweep", "GRID.yaml", "--results", study.folder)
    parts = [_pre(f"{sweep}\n{escape.shell_command('fastcoop', 'report', study.folder, '--out', out)}")]
    if grid:
        parts.append(f"<p>{escape.html(study.folder / 'grid.yaml')}:</p>{_pre(grid)}")
    if versions := sorted(set(map(str, study.runs.versions.dropna()))):
        parts.append(f"<p>Versions of the runs: {escape.html('; '.join(map(_settings, versions)))}.</p>")
    here = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            here.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "".join([*parts, f"<p>Versions of this report: {escape.html(', '.join(here))}.</p>"])
