"""A table of results, and how it is written: CSV (one line per number), Markdown, LaTeX and HTML."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from fastcoop import escape
from fastcoop.files import atomic_write

DASH = "–"
LAST_LATIN = 0x17F  # of the letters that pdfLaTeX knows by itself; vocabularies have others


@dataclass(frozen=True)
class Cell:
    """A mean over seeds in ``digits`` decimals, its standard deviation (NaN for one run) and the runs
    behind it.

    ``runs`` 0 marks a number that no run here gave, such as the paper's: it is never the best.
    """

    mean: float
    std: float = math.nan
    runs: int = 1
    best: bool = False
    digits: int = 2
    signed: bool = False

    def text(self, plus_minus: str = " ± ") -> str:
        """The number as it is read; a dash for none."""
        if math.isnan(self.mean):
            return DASH
        sign = "+" if self.signed else ""
        text = f"{self.mean:{sign}.{self.digits}f}"
        if not math.isnan(self.std):
            text += f"{plus_minus}{self.std:.{self.digits}f}"
        return text


@dataclass
class Table:
    """Rows of ``len(heads)`` names followed by one entry (a Cell, a text, or nothing) per column.

    ``unit`` and ``over`` say what the numbers are and what the columns range over.
    """

    title: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    over: str = ""
    unit: str = "accuracy (%)"
    notes: list[str] = field(default_factory=list)
    rows: list[tuple[tuple[str, ...], dict[str, Cell | str]]] = field(default_factory=list)

    def add(self, names: Iterable[object], cells: dict[str, Cell | str]) -> None:
        self.rows.append((tuple(str(name) for name in names), cells))

    def mark_best(self, group: Sequence[int] = (0,)) -> None:
        """Mark the highest number of each column, to the digits shown, among the rows equal in the names
        ``group``."""
        rivals: dict[tuple, list[float]] = {}
        for key, _, cell in self._numbers(group):
            rivals.setdefault(key, []).append(round(cell.mean, cell.digits))
        for (*names, column), cells, cell in list(self._numbers(group)):
            others = rivals[(*names, column)]
            cells[column] = replace(
                cell, best=len(others) > 1 and round(cell.mean, cell.digits) == max(others)
            )

    def mark_best_in_row(self) -> None:
        """Mark the highest number of each row, to the digits shown."""
        for _, cells in self.rows:
            rivals = {
                column: round(cell.mean, cell.digits)
                for column, cell in cells.items()
                if isinstance(cell, Cell) and cell.runs and not math.isnan(cell.mean)
            }
            for column, value in rivals.items():
                cell = cells[column]
                assert isinstance(cell, Cell)
                cells[column] = replace(cell, best=len(rivals) > 1 and value == max(rivals.values()))

    def _numbers(self, group: Sequence[int]) -> Iterable[tuple[tuple, dict[str, Cell | str], Cell]]:
        for names, cells in self.rows:
            for column, cell in cells.items():
                if isinstance(cell, Cell) and cell.runs and not math.isnan(cell.mean):
                    yield (*(names[i] for i in group), column), cells, cell

    def footnotes(self) -> list[str]:
        """What must be read with the table."""
        if not self.unit:
            return list(self.notes)
        best = any(isinstance(cell, Cell) and cell.best for _, cells in self.rows for cell in cells.values())
        unit = f"{self.unit}: mean ± standard deviation over seeds{', the best in bold' if best else ''};"
        return [f"{unit} the last column counts the runs behind each number.", *self.notes]

    @property
    def heading(self) -> tuple[str, ...]:
        """The first line: the names' heads, the columns, and where there are numbers the runs behind them."""
        return (*self.heads, *self.columns, *(["runs"] if self.unit else []))

    def grid(
        self, plus_minus: str = " ± "
    ) -> Iterable[tuple[tuple[str, ...], list[tuple[str, bool, float | None]]]]:
        """Per row: its names and, per column after them, (text, whether best, the number to sort by)."""
        for names, cells in self.rows:
            line: list[tuple[str, bool, float | None]] = []
            for column in self.columns:
                cell = cells.get(column, "")
                if isinstance(cell, Cell):
                    line.append((cell.text(plus_minus), cell.best, cell.mean))
                else:
                    line.append((cell or DASH, False, None))
            if self.unit:
                runs = sorted({cell.runs for cell in cells.values() if isinstance(cell, Cell)} - {0})
                text = DASH if not runs else str(runs[0]) if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
                line.append((text, False, runs[0] if runs else None))
            yield names, line

    def to_csv(self) -> str:
        """One line per number: the row's names, the column, mean, std, runs, best (or the text)."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        heads = [*self.heads, self.over or "column", "mean", "std", "runs", "best", "text"]
        writer.writerow(map(escape.csv_cell, heads))
        for names, cells in self.rows:
            for column in self.columns:
                cell = cells.get(column)
                if isinstance(cell, Cell):
                    std = "" if math.isnan(cell.std) else f"{cell.std:.6g}"
                    mean = "" if math.isnan(cell.mean) else f"{cell.mean:.6g}"
                    values = [mean, std, cell.runs, int(cell.best), ""]
                elif cell:
                    values = ["", "", "", "", escape.csv_cell(cell)]
                else:
                    continue
                writer.writerow([*map(escape.csv_cell, (*names, column)), *values])
        return out.getvalue()

    def to_markdown(self) -> str:
        def line(entries: Iterable[str]) -> str:
            return f"| {' | '.join(entries)} |"

        out = [f"# {escape.markdown(self.title)}", "", line(map(escape.markdown, self.heading))]
        out.append(
            "|"
            + "---|" * len(self.heads)
            + ("---:|" if self.unit else "---|") * (len(self.heading) - len(self.heads))
        )
        for names, cells in self.grid():
            entries = [(escape.markdown(text), best) for text, best, _ in cells]
            shown = (f"**{text}**" if best else text for text, best in entries)
            out.append(line([*map(escape.markdown, names), *shown]))
        return "\n".join([*out, "", *map(escape.markdown, self.footnotes()), ""])

    def to_latex(self) -> str:
        """A ``table`` environment for the booktabs package; equal first names are printed once, with a rule
        between."""
        align = "l" * len(self.heads) + ("r" if self.unit else "l") * (len(self.heading) - len(self.heads))
        out = [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\small",
            rf"\caption{{{escape.latex(self.title)}}}",
        ]
        out += [
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
        ]
        out += [" & ".join(escape.latex(head) for head in self.heading) + r" \\", r"\midrule"]
        last = None
        for names, cells in self.grid(plus_minus="±"):
            repeated = len(names) > 1 and names[0] == last
            if len(names) > 1 and last is not None and not repeated:
                out.append(r"\addlinespace")
            last = names[0]
            entries = [
                "" if repeated else escape.latex(names[0]),
                *(escape.latex(name) for name in names[1:]),
            ]
            entries += [
                rf"\textbf{{{escape.latex(text)}}}" if best else escape.latex(text) for text, best, _ in cells
            ]
            if entries[0].startswith(("[", "*")):
                entries[0] = "{}" + entries[0]  # or it would be an option of the line break before it
            out.append(" & ".join(entries) + r" \\")
        out += [r"\bottomrule", r"\end{tabular}", r"\par\smallskip"]
        out += [rf"\footnotesize {escape.latex(' '.join(self.footnotes()))}", r"\end{table}", ""]
        if beyond := "".join(sorted({char for char in "".join(out) if ord(char) > LAST_LATIN})):
            out[0] += f", and XeLaTeX or LuaLaTeX with a font that has {beyond}"
        return "\n".join(out)

    def to_html(self) -> str:
        head = "".join(f"<th>{escape.html(name)}</th>" for name in self.heading)
        body = []
        for names, cells in self.grid():
            row = "".join(f"<td>{escape.html(name)}</td>" for name in names)
            for text, best, number in cells:
                value = escape.html(text)
                sort = "" if number is None or math.isnan(number) else f' data-sort="{number:.8g}"'
                number_class = ' class="n"' if self.unit else ""
                row += f"<td{number_class}{sort}>{f'<b>{value}</b>' if best else value}</td>"
            body.append(f"<tr>{row}</tr>")
        notes = "".join(f"<p class=note>{escape.html(note)}</p>" for note in self.footnotes())
        rows = "\n".join(body)
        table = f"<table class=sortable><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"
        return f"<div class=wide>{table}</div>{notes}"


def save_table(table: Table, stem: Path) -> list[Path]:
    """Write ``stem.csv``, ``stem.md`` and ``stem.tex``."""
    written = []
    for kind, text in (("csv", table.to_csv()), ("md", table.to_markdown()), ("tex", table.to_latex())):
        written.append(write_text(stem.with_name(f"{stem.name}.{kind}"), text))
    return written


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def cell_of(summary: pd.DataFrame, **where: object) -> Cell | str:
    """The Cell of the one row of a summary (mean, std, runs) whose columns equal ``where``; empty where
    none does."""
    for name, value in where.items():
        summary = summary[summary[name] == value]
    if summary.empty:
        return ""
    row = summary.iloc[0]
    return Cell(float(row["mean"]), float(row["std"]), int(row["runs"]))
