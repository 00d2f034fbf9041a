"""The report as one page that stands alone: images and tables inline, no network."""

from __future__ import annotations

import base64
import json
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template

import pandas as pd

from fastcoop import escape
from fastcoop.reports.claims import Judged, texts_of
from fastcoop.reports.item import ADD, Item, Part
from fastcoop.reports.paired import DATASETS, FAILS, HOLDS, SEEDS, Paired
from fastcoop.reports.study import Study, rows_of, schedule_note, shots_text
from fastcoop.reports.table import Cell, Table

MOST_ROWS = 40  # of a table that is shown unfolded
PIXELS_PER_INCH = 130  # at which a figure is shown
PACKAGES = ("fastcoop", "torch", "open_clip_torch", "numpy", "pandas", "scikit-learn", "scipy", "matplotlib")


def page(
    study: Study,
    made: list[tuple[Item, list[Part]]],
    missing: list[tuple[Item, str]],
    judged: list[Judged],
    claims_notes: list[str],
    warnings: list[str],
    out: Path,
) -> str:
    """The HTML of a report whose figures have been written under ``out``."""
    sections = [
        ("warnings", "Warnings", _warnings(warnings)),
        ("claims", "Claims", _claims(judged, claims_notes)),
    ]
    sections += [(item.name, item.title, _item(item, parts, out)) for item, parts in made]
    if missing:
        sections.append(("missing", "Missing", _missing(missing, study)))
    sections.append(("runs", "Runs", _runs(pd.concat([study.runs, study.repeated, study.lost]))))
    sections.append(("reproduce", "Reproduce", _reproduce(study, out)))
    contents = "".join(
        f'<a href="#{name}">{escape.html(title.split(". ")[0])}</a>' for name, title, _ in sections
    )
    body = "\n".join(
        f'<section id="{name}"><h2>{escape.html(title)}</h2>{text}</section>'
        for name, title, text in sections
    )
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    title = f"fastcoop report: {study.name}"
    return template.substitute(
        title=escape.html(title), lead=escape.html(_lead(study)), contents=contents, body=body
    )


def _pre(text: str) -> str:
    return f"<pre>{escape.html(text, keep=chr(10))}</pre>"


def _lead(study: Study) -> str:
    runs = study.runs
    datasets = ", ".join(dict.fromkeys(runs.dataset))
    quick = {schedule_note(schedule) for schedule in runs.schedule if schedule not in ("", "paper")}
    backbones = ", ".join(dict.fromkeys(runs.backbone))
    lead = f"{runs.key.nunique()} runs; backbones: {backbones}; datasets: {datasets}."
    return lead + (f" Not the paper's schedule but {'; '.join(sorted(quick))}." if quick else "")


def _warnings(warnings: list[str]) -> str:
    if not warnings:
        return "<p>Nothing was found that could mislead a reader.</p>"
    return f"<div class=warn><ul>{''.join(f'<li>{escape.html(text)}</li>' for text in warnings)}</ul></div>"


def _claims(judged: list[Judged], notes: list[str]) -> str:
    kinds = {HOLDS: "holds", FAILS: "fails"}
    heads = ("claim", "results", "verdict", "numbers here", "difference", "test")
    rows = []
    for one in judged:
        criterion = f"{one.claim.where}. Holds here if {one.claim.holds_if}."
        kind = kinds.get(one.finding.verdict, "unknown")
        cells = [f"<td>{escape.html(one.claim.text)}<div class=note>{escape.html(criterion)}</div></td>"]
        cells += [f"<td>{escape.html(one.results)}</td>"]
        cells += [f'<td><span class="verdict {kind}">{escape.html(one.finding.verdict)}</span></td>']
        cells += [f"<td>{escape.html(one.finding.numbers)}</td>", *_test_cells(one.finding.test)]
        named = (
            cell.replace("<td", f'<td data-head="{head}"', 1) for head, cell in zip(heads, cells, strict=True)
        )
        rows.append(f"<tr>{''.join(named)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    notes_text = "".join(f"<p class=note>{escape.html(note)}</p>" for note in notes)
    table = (
        f'<table class="sortable claims"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    return f"<div class=wide>{table}</div>{notes_text}"


def _test_cells(test: Paired | None) -> list[str]:
    """The difference with its interval, and the test that the verdict rests on; below it what was counted, and the p
    over the other unit where it could be had."""
    if test is None:
        return ["<td></td>"] * 2
    text = {name: escape.html(value) for name, value in texts_of(test).items()}
    other = SEEDS if test.unit == DATASETS else DATASETS
    beside = [f"{text['datasets']} dataset{'s' * (test.datasets != 1)}, {text['pairs']} pairs"]
    beside += [f"over {other}: p = {text[f'p over {other}']}"] if text[f"p over {other}"] else []
    p = text[f"p over {test.unit}"]
    shown = f"p = {p} over {test.unit}".replace("= &lt;", "&lt; ") if p else f"none over {test.unit}"
    return [
        f'<td data-sort="{test.mean:.8g}">{text["difference"]}<div class=note>{text["interval"]}</div></td>',
        f'<td data-sort="{1 if math.isnan(test.p) else test.p:.8g}">{shown}'
        f"<div class=note>{'; '.join(beside).replace('= &lt;', '&lt; ')}</div></td>",
    ]


def _item(item: Item, parts: list[Part], out: Path) -> str:
    text = [f"<p>{escape.html(item.caption)}</p>"]
    for part in parts:
        if len(parts) > 1:
            text.append(f"<h3>{escape.html(part.table.title if part.table else part.subtitle)}</h3>")
        if part.figure is not None:
            image = base64.b64encode((out / f"{item.name}{part.suffix}.png").read_bytes()).decode()
            width = int(part.figure.get_figwidth() * PIXELS_PER_INCH)
            alt = escape.html(f"{item.title} ({part.subtitle}); the numbers are in the table below")
            text.append(f'<img width="{width}" alt="{alt}" src="data:image/png;base64,{image}">')
        if part.table is not None:
            shown = part.table.to_html()
            rows = len(part.table.rows)
            summary = "The numbers" if part.figure is not None else f"All {rows} rows"
            folded = f"<details><summary>{summary}</summary>{shown}</details>"
            text.append(folded if part.figure is not None or rows > MOST_ROWS else shown)
    return "\n".join(text)


def _missing(missing: list[tuple[Item, str]], study: Study) -> str:
    lines = "".join(
        f"<li><b>{escape.html(item.title)}</b>: {escape.html(why)}.{_pre(item.command(study))}</li>"
        for item, why in missing
    )
    return f"<p>What these results lack runs for. {escape.html(ADD)}</p><ul>{lines}</ul>"


def _runs(runs: pd.DataFrame) -> str:
    columns = ("run", "shots", "seed", "learned on", "tested on", "backbone", "accuracy (%)", "macro (%)",
               "seconds", "status", "schedule", "settings")  # fmt: skip
    table = Table("Runs", ("method",), columns, unit="")
    for row in rows_of(runs):
        cells: dict[str, Cell | str] = {
            "run": str(row.key)[:12],
            "shots": shots_text(row.shots),
            "seed": str(row.seed),
        }
        cells |= {
            "learned on": row.source if row.shots else "",
            "tested on": row.dataset,
            "backbone": row.backbone,
        }
        cells |= {"accuracy (%)": _number(row.accuracy, 2), "macro (%)": _number(row.macro_accuracy, 2)}
        cells |= {"seconds": _number(row.seconds, 2), "status": row.status, "schedule": row.schedule}
        table.add((row.label or row.method,), cells | {"settings": _settings(row.settings)})
    return (
        f"<details><summary>All {len(runs)} results with their settings</summary>{table.to_html()}</details>"
    )


def _number(value: float, digits: int) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _settings(settings: object) -> str:
    given = settings if isinstance(settings, dict) else json.loads(str(settings) or "{}")
    return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)


def _reproduce(study: Study, out: Path) -> str:
    grid = study.folder / "grid.yaml"
    written = grid.read_text(encoding="utf-8") if grid.exists() else ""
    command, _, rest = written.partition("\n") if written.startswith("# ") else ("", "", written)
    sweep = command.removeprefix("# ") or escape.shell_command(
        "fastcoop", "sweep", "GRID.yaml", "--results", study.folder
    )
    parts = [_pre(f"{sweep}\n{escape.shell_command('fastcoop', 'report', study.folder, '--out', out)}")]
    if rest:
        parts.append(f"<p>{escape.html(grid)}:</p>{_pre(rest)}")
    ran = sorted({str(given) for given in study.runs.versions.dropna()})
    if ran:
        parts.append(
            f"<p>The runs were made with {escape.html('; '.join(_settings(given) for given in ran))}.</p>"
        )
    here = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            here.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "".join([*parts, f"<p>This report was made with {escape.html(', '.join(here))}.</p>"])
