"""Write a report: every figure and table that the results allow, what the others need, and one page with everything."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastcoop.checks import MAX_JOBS, whole_number
from fastcoop.errors import writing
from fastcoop.files import begins_with, refuse_foreign
from fastcoop.progress import counted, progress
from fastcoop.reports.cautions import cautions
from fastcoop.reports.claims import claims_table, judge
from fastcoop.reports.frames import Missing
from fastcoop.reports.item import ADD, Exhibit, Item
from fastcoop.reports.items import ITEMS
from fastcoop.reports.page import page
from fastcoop.reports.paper_claims import PAPER_CLAIMS
from fastcoop.reports.study import Study, read_study
from fastcoop.reports.style import drawing, saving
from fastcoop.reports.table import save_table, write_text
from fastcoop.results.read import find_key

PAGE, TEXTS = "index.html", ("claims.csv", "claims.md", "missing.txt")
KINDS = "png|pdf|svg|csv|md|tex"  # endings of figures and tables
OWN, START = "<title>fastcoop report", 2000  # by which a page is known, and within how many of its characters
NOT_FINISHED = f"<!doctype html>\n{OWN}: not finished</title>\n"  # the page until the report is finished

log = logging.getLogger("fastcoop")


def report(
    results_folder: str | Path,
    out_folder: str | Path,
    pictures: Any = None,
    runs: Sequence[str] = (),
    jobs: int = 1,
) -> list[Path]:
    """Write the report of a results folder.

    Figures are PNG, PDF and SVG, tables CSV, Markdown and LaTeX. ``missing.txt`` names the items that the results lack
    runs for, with the commands that add them. The same results give the same bytes.

    Args:
        results_folder: The results of a sweep.
        out_folder: Folder to write to.
        pictures: Where the test images are (`fastcoop.features.PictureFinder`); the page then contains small copies of
            wrong ones. None: no pictures.
        runs: Keys, or their beginnings, of the runs whose mistakes are shown: the first that was tested on a dataset,
            compared with the second. By default the page chooses one per dataset.
        jobs: Processes that draw the figures, this one included.

    Returns:
        The paths of the files, first that of the page.

    Raises:
        UserError: the results folder holds no finished run, ``jobs`` is no number of processes, or the files cannot be
            written or would replace files that are no report's.
    """
    jobs = whole_number(jobs, "the number of jobs", 1, MAX_JOBS)
    study, out = read_study(Path(results_folder)), Path(out_folder)
    keys = tuple(find_key(results_folder, run) for run in runs)
    study = replace(study, pictures=pictures, chosen=keys)
    written: list[Path] = []
    made: list[tuple[Item, list[Exhibit]]] = []
    missing: list[tuple[Item, str]] = []
    _refuse_foreign(out)
    with writing(out), progress("Report", len(ITEMS)) as advance, drawing(study.runs.series):
        out.mkdir(parents=True, exist_ok=True)
        if not (out / PAGE).exists():  # should this be interrupted, the folder is known as a report's
            write_text(out / PAGE, NOT_FINISHED)
        with saving(study.runs.series, jobs) as save_figure:
            for item in ITEMS.values():
                try:
                    exhibits = item.make(study)
                except Missing as why:
                    missing.append((item, str(why)))
                else:
                    made.append((item, exhibits))
                    for one in exhibits:
                        stem = out / f"{item.name}{one.suffix}"
                        written += save_figure(one.figure, stem) if one.figure is not None else []
                        written += save_table(one.table, stem) if one.table is not None else []
                advance(1, item.title)
            judged = judge(study, PAPER_CLAIMS)
        for text in study.damaged:
            log.warning(f"Left out: {text}")
        claims = claims_table(judged)
        texts = {
            PAGE: page(study, made, missing, judged, cautions(study), out),
            "claims.csv": claims.to_csv(),
            "claims.md": claims.to_markdown(),
            "missing.txt": missing_text(study, missing),
        }
        page_path, *others = (write_text(out / name, text) for name, text in texts.items())
        _warn_of_older_files(out, written)
    return [page_path, *written, *others]


def has_report(out: Path) -> bool:
    """Return whether a folder holds the page of a report that was finished."""
    page_path = out / PAGE
    return page_path.is_file() and not begins_with(page_path, NOT_FINISHED)


def _refuse_foreign(out: Path) -> None:
    """Raise UserError for a folder that is no report's and has files with names of a report's."""
    page_path = out / PAGE
    refuse_foreign(page_path, lambda path: OWN in path.read_text(encoding="utf-8")[:START])
    if not page_path.exists() and out.is_dir():
        for path in sorted(out.iterdir()):
            if path.name in TEXTS or _is_item_file(path.name):
                refuse_foreign(path, lambda _: False)


def _is_item_file(name: str) -> bool:
    """Return whether a figure or table of a report may have this file name."""
    return re.fullmatch(rf"(?:{'|'.join(map(re.escape, ITEMS))})(?:-.*)?\.(?:{KINDS})", name) is not None


def _warn_of_older_files(out: Path, written: Sequence[Path]) -> None:
    """Warn of figures and tables of an earlier report, which these results do not have under such names."""
    new = {path.name for path in written}
    names = sorted(path.name for path in out.iterdir() if _is_item_file(path.name))
    if old := [name for name in names if name not in new]:
        log.warning(
            f"{out} keeps {counted(len(old), 'file')} that this report did not write, such as {old[0]}: figures and "
            "tables of an earlier report show other results."
        )


def missing_text(study: Study, missing: list[tuple[Item, str]]) -> str:
    """Return what the results lack: per item the reason, and the command that adds the runs."""
    if not missing:
        return f"Nothing is missing: the folder {study.folder} holds runs for every figure and table.\n"
    lines = [f"- {item.title}: {why}.\n    {item.command(study)}" for item, why in missing]
    return "\n".join([f"The folder {study.folder} lacks runs for the following. {ADD}", "", *lines, ""])
