"""The report as one page that contains its images and tables and needs no network."""

from __future__ import annotations

import base64
import json
import math
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from fastcoop import escape
from fastcoop.progress import counted
from fastcoop.reports.claims import NOTES, Judged, texts_of
from fastcoop.reports.frames import rows_of, shots_text
from fastcoop.reports.item import ADD, Exhibit, Item
from fastcoop.reports.paired import DATASETS, FAILS, HOLDS, SEEDS, PairedDifference
from fastcoop.reports.study import Study, joined, schedule_note
from fastcoop.reports.table import Table

MAX_ROWS = 40  # of a table that is not folded
PIXELS_PER_INCH = 130  # at which a figure is shown
PACKAGES = ("fastcoop", "torch", "open_clip_torch", "numpy", "pandas", "scikit-learn", "scipy", "matplotlib")
CLAIM_HEADS = ("claim", "results", "verdict", "numbers here", "difference", "test")


def page(
    study: Study,
    made: list[tuple[Item, list[Exhibit]]],
    missing: list[tuple[Item, str]],
    judged: list[Judged],
    warnings: Iterable[str],
    out: Path,
) -> str:
    """Return the HTML of a report whose figures are files in ``out``."""
    runs = pd.concat([study.runs, study.repeated, study.diverged])
    warned = "".join(f"<li>{escape.html(text)}</li>" for text in warnings)
    warned = f"<div class=warn><ul>{warned}</ul></div>" if warned else "<p>No warnings.</p>"
    sections = [("warnings", "Warnings", warned), ("claims", "Claims", _claims(judged))]
    sections += [(item.name, item.title, _item(item, exhibits, out)) for item, exhibits in made]
    sections += [("missing", "Missing", _missing(missing, study))] * bool(missing)
    sections += [
        ("runs", "Runs", _fold(f"All {len(runs)} results with their settings", _runs(runs).to_html()))
    ]
    sections += [("reproduce", "Reproduce", _reproduce(study, out))]
    contents = "".join(
        f'<a href="#{name}">{escape.html(title.split(". ")[0])}</a>' for name, title, _ in sections
    )
    body = "\n".join(
        f'<section id="{name}"><h2>{escape.html(title)}</h2>{text}</section>'
        for name, title, text in sections
    )
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    title, lead = escape.html(f"fastcoop report: {study.folder.resolve().name}"), escape.html(_lead(study))
    return template.substitute(title=title, lead=lead, contents=contents, body=body)


def _pre(text: str) -> str:
    return f"<pre>{escape.html(text, keep=chr(10))}</pre>"


def _fold(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _lead(study: Study) -> str:
    runs = study.runs
    backbones, datasets = (", ".join(dict.fromkeys(column)) for column in (runs.backbone, runs.dataset))
    lead = f"{counted(runs.key.nunique(), 'run')}; backbones: {backbones}; datasets: {datasets}."
    quick = sorted({schedule_note(schedule) for schedule in runs.schedule if schedule not in ("", "paper")})
    return lead + (f" Not trained by the paper's schedule: {'; '.join(quick)}." if quick else "")


def _claims(judged: list[Judged]) -> str:
    rows = []
    for claim, results, finding in judged:
        criterion = escape.html(f"{claim.where}. Holds here if {claim.holds_if}.")
        kind = {HOLDS: "holds", FAILS: "fails"}.get(finding.verdict, "unknown")
        cells = [
            f">{escape.html(claim.text)}<div class=note>{criterion}</div>",
            f">{escape.html(results)}",
            f'><span class="verdict {kind}">{escape.html(finding.verdict)}</span>',
            f">{escape.html(finding.numbers)}",
            *([">", ">"] if finding.test is None else _test_cells(finding.test)),
        ]
        named = (f'<td data-head="{head}"{cell}</td>' for head, cell in zip(CLAIM_HEADS, cells, strict=True))
        rows.append(f"<tr>{''.join(named)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in CLAIM_HEADS)
    notes = "".join(f"<p class=note>{escape.html(note)}</p>" for note in NOTES)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class=wide><table class="sortable claims">{body}</table></div>{notes}'


def _test_cells(test: PairedDifference) -> list[str]:
    """Return the cells of the difference with its interval and of the test, with what was counted below it."""

    def p_of(unit: str) -> str:
        p = text[f"p over {unit}"]
        return f"p = {p}".replace("= <", "< ") if p else ""

    text, other = texts_of(test), SEEDS if test.unit == DATASETS else DATASETS
    shown = f"{p_of(test.unit) or 'none'} over {test.unit}"
    note = f"{counted(test.datasets, 'dataset')}, {test.pairs} pairs"
    note += f"; over {other}: {p_of(other)}" if p_of(other) else ""
    return [
        f' data-sort="{test.mean:.8g}">{text["difference"]}<div class=note>{text["interval"]}</div>',
        f' data-sort="{1 if math.isnan(test.p) else test.p:.8g}">{escape.html(shown)}'
        f"<div class=note>{escape.html(note)}</div>",
    ]


def _item(item: Item, exhibits: list[Exhibit], out: Path) -> str:
    text = [f"<p>{escape.html(item.caption)}</p>"]
    for one in exhibits:
        if len(exhibits) > 1:
            text.append(f"<h3>{escape.html(one.table.title if one.table else one.subtitle)}</h3>")
        if one.figure is not None:
            image = base64.b64encode((out / f"{item.name}{one.suffix}.png").read_bytes()).decode()
            width = int(one.figure.get_figwidth() * PIXELS_PER_INCH)
            alt = escape.html(f"{item.title} ({one.subtitle}); the numbers are in the table below")
            text.append(f'<img width="{width}" alt="{alt}" src="data:image/png;base64,{image}">')
        if one.table is not None:
            rows, table = len(one.table.rows), one.table.to_html()
            summary = "The numbers" if one.figure is not None else f"All {rows} rows"
            text.append(_fold(summary, table) if one.figure is not None or rows > MAX_ROWS else table)
    return "\n".join(text)


def _missing(missing: list[tuple[Item, str]], study: Study) -> str:
    lines = "".join(
        f"<li><b>{escape.html(item.title)}</b>: {escape.html(why)}.{_pre(item.command(study))}</li>"
        for item, why in missing
    )
    return f"<p>These results lack runs for the following. {escape.html(ADD)}</p><ul>{lines}</ul>"


def _runs(runs: pd.DataFrame) -> Table:
    rows = [
        {
            "run": row.key[:12], "shots": shots_text(row.shots), "seed": str(row.seed),
            "trained on": row.source if row.shots else "", "tested on": row.dataset, "backbone": row.backbone,
            "accuracy (%)": _number(row.accuracy), "macro (%)": _number(row.macro_accuracy),
            "seconds": _number(row.seconds), "status": row.status, "schedule": row.schedule,
            "settings": _settings(row.settings),
        }
        for row in rows_of(runs)
    ]  # fmt: skip
    table = Table("Runs", ("method",), tuple(rows[0]), unit="")
    for label, row in zip(runs.label, rows, strict=True):
        table.add((label,), row)
    return table


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
    parts = [_pre(f"{sweep}\n{escape.shell_command('fastcoop', 'report', study.folder, '--out', out)}")]
    if grid:
        parts.append(f"<p>{escape.html(study.folder / 'grid.yaml')}:</p>{_pre(grid)}")
    if versions := sorted(set(study.runs.versions.dropna())):
        texts = (_settings(json.loads(text)) for text in versions)
        parts.append(f"<p>Versions of the runs: {escape.html('; '.join(texts))}.</p>")
    here = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            here.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "".join([*parts, f"<p>Versions of this report: {escape.html(', '.join(here))}.</p>"])
