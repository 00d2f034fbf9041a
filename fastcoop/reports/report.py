"""Write a report: every figure and table that the results allow, what the others need, and one page with everything."""

from __future__ import annotations

from pathlib import Path

from fastcoop.errors import writing
from fastcoop.progress import progress
from fastcoop.reports.cautions import cautions
from fastcoop.reports.claims import claims_table, judge
from fastcoop.reports.frames import Missing
from fastcoop.reports.item import ADD, Exhibit, Item
from fastcoop.reports.items import ITEMS
from fastcoop.reports.page import page
from fastcoop.reports.paper_claims import PAPER_CLAIMS
from fastcoop.reports.study import Study, read_study
from fastcoop.reports.style import drawing, save_figure
from fastcoop.reports.table import save_table, write_text


def report(results_folder: str | Path, out_folder: str | Path) -> list[Path]:
    """Write the report of a results folder.

    Figures are PNG and PDF, tables CSV, Markdown and LaTeX. ``missing.txt`` names the items that the results lack runs
    for, with the commands that add them. The same results give the same bytes.

    Args:
        results_folder: The results of a sweep.
        out_folder: Folder to write to.

    Returns:
        The paths of the files, first that of the page.

    Raises:
        UserError: the results folder holds no finished run, or the files cannot be written.
    """
    study = read_study(Path(results_folder))
    with writing(Path(out_folder)):
        return _write(study, Path(out_folder))


def _write(study: Study, out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    made: list[tuple[Item, list[Exhibit]]] = []
    missing: list[tuple[Item, str]] = []
    with progress("Report", len(ITEMS)) as advance, drawing(study.runs.series):
        for item in ITEMS.values():
            try:
                exhibits = item.make(study)
            except Missing as why:
                missing.append((item, str(why)))
            else:
                made.append((item, exhibits))
                written += [path for one in exhibits for path in save_exhibit(item, one, out)]
            advance(1, item.title)
        judged = judge(study, PAPER_CLAIMS)
    claims = claims_table(judged)
    texts = {"claims.csv": claims.to_csv(), "claims.md": claims.to_markdown()}
    texts["missing.txt"] = missing_text(study, missing)
    written += [write_text(out / name, text) for name, text in texts.items()]
    text = page(study, made, missing, judged, cautions(study), out)
    return [write_text(out / "index.html", text), *written]


def save_exhibit(item: Item, exhibit: Exhibit, out: Path) -> list[Path]:
    """Write an exhibit's figure and table into ``out``; return the paths."""
    stem = out / f"{item.name}{exhibit.suffix}"
    written = [] if exhibit.figure is None else save_figure(exhibit.figure, stem)
    return written + ([] if exhibit.table is None else save_table(exhibit.table, stem))


def missing_text(study: Study, missing: list[tuple[Item, str]]) -> str:
    """Return what the results lack: per item the reason, and the command that adds the runs."""
    if not missing:
        return f"Nothing is missing: the folder {study.folder} holds runs for every figure and table.\n"
    lines = [f"- {item.title}: {why}.\n    {item.command(study)}" for item, why in missing]
    return "\n".join([f"The folder {study.folder} lacks runs for the following. {ADD}", "", *lines, ""])
