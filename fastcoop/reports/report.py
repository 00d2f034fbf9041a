"""`report`: every figure and table the results allow, what is missing for the rest, and one page with all
of it."""

from __future__ import annotations

from pathlib import Path

from fastcoop.errors import writing
from fastcoop.progress import progress
from fastcoop.reports.cautions import cautions
from fastcoop.reports.claims import claims_table, judge
from fastcoop.reports.item import ADD, Item, Part
from fastcoop.reports.items import ITEMS
from fastcoop.reports.page import page
from fastcoop.reports.study import Missing, Study, read_study
from fastcoop.reports.style import drawing, save_figure
from fastcoop.reports.table import save_table, write_text


def report(results_folder: Path, out_folder: Path) -> list[Path]:
    """Write the report of a sweep's results folder; return the paths written, the first figure first.

    Figures as PNG and PDF, tables as CSV, Markdown and LaTeX, and ``missing.txt`` naming what the results do not
    suffice for and the commands that would supply it. Raises UserError where the folder holds no finished run, or
    the disk refuses. The same results give the same bytes."""
    study = read_study(Path(results_folder))
    with writing(Path(out_folder)):
        return _write(study, Path(out_folder))


def _write(study: Study, out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    made: list[tuple[Item, list[Part]]] = []
    missing: list[tuple[Item, str]] = []
    with progress("Report", len(ITEMS)) as advance, drawing():
        for item in ITEMS:
            try:
                parts = item.make(study)
            except Missing as why:
                missing.append((item, str(why)))
            else:
                made.append((item, parts))
                for part in parts:
                    written += save_part(item, part, out)
            advance(1, item.title)
        judged = judge(study)
    claims = claims_table(judged)
    written += [
        write_text(out / "claims.csv", claims.to_csv()),
        write_text(out / "claims.md", claims.to_markdown()),
    ]
    written.append(write_text(out / "missing.txt", missing_text(study, missing)))
    text = page(study, made, missing, judged, claims.notes, cautions(study), out)
    return [write_text(out / "index.html", text), *written]


def save_part(item: Item, part: Part, out: Path) -> list[Path]:
    """Write a part's figure and table under ``out``."""
    stem = out / f"{item.name}{part.suffix}"
    written = [] if part.figure is None else save_figure(part.figure, stem)
    return written + ([] if part.table is None else save_table(part.table, stem))


def missing_text(study: Study, missing: list[tuple[Item, str]]) -> str:
    """What the results do not suffice for: per item why, and the command that would supply it."""
    if not missing:
        return f"Nothing is missing: {study.name} holds runs for every figure and table.\n"
    lines = [f"- {item.title}: {why}.\n    {item.command(study)}" for item, why in missing]
    return "\n".join([f"What {study.name} lacks runs for. {ADD}", "", *lines, ""])
