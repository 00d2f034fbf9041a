"""A table of results, written as CSV (one line per number), Markdown, LaTeX and HTML."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from fastcoop import escape
from fastcoop.files import atomic_write

DASH = "–"
TEST_LABELS = "TEST LABELS"  # in names or cells of rows that were chosen on them, which are not ranked
LAST_LATIN = 0x17F  # the last character that pdfLaTeX can set without packages; vocabularies have others


@dataclass(frozen=True)
class Cell:
    """A mean over seeds, its standard deviation (NaN for one run), the number of runs, and how it is shown.

    ``runs`` 0 marks a number that is not from these results, such as the paper's; it is never the best, and a row of
    such numbers is gray.
    """

    mean: float
    std: float = math.nan
    runs: int = 1
    best: bool = False
    signed: bool = False
    second: bool = False  # whether it is the second best

    def text(self, plus_minus: str = " ± ") -> str:
        """Return the number with its deviation, a dash for NaN."""
        if math.isnan(self.mean):
            return DASH
        sign = "+" if self.signed else ""
        text = f"{self.mean:{sign}.2f}"
        if not math.isnan(self.std):
            text += f"{plus_minus}{self.std:.2f}"
        return text


Cells = dict[str, "Cell | str"]  # of one row, by column


@dataclass
class Table:
    """Rows of ``len(heads)`` names followed by one entry (a Cell, a text, or nothing) per column.

    Attributes:
        over: What the columns range over.
        unit: Unit of the numbers; empty for a table of text.
    """

    title: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    over: str = ""
    unit: str = "accuracy (%)"
    notes: list[str] = field(default_factory=list)
    rows: list[tuple[tuple[str, ...], Cells]] = field(default_factory=list)

    def add(self, names: Iterable[object], cells: Cells) -> None:
        self.rows.append((tuple(str(name) for name in names), cells))

    def mark_best(
        self,
        group: Sequence[int] | None = (0,),
        columns: Sequence[str] | None = None,
        second: bool = False,
    ) -> None:
        """Mark the highest number, to the digits shown, of each column among rows with equal names ``group``.

        Without a group, mark the highest number of each row. ``columns``: those to mark; None: all. ``second``: mark
        the second best too. Rows of values that were chosen on `TEST_LABELS` do not compete.
        """
        rivals: dict[Hashable, list[tuple[Cells, str, Cell]]] = {}
        for row, (names, cells) in enumerate(self.rows):
            if any(TEST_LABELS in str(text) for text in (*names, *cells.values())):
                continue
            for column, cell in cells.items():
                if columns is not None and column not in columns:
                    continue
                if isinstance(cell, Cell) and cell.runs and not math.isnan(cell.mean):
                    key = row if group is None else (column, *(names[i] for i in group))
                    rivals.setdefault(key, []).append((cells, column, cell))
        for found in rivals.values():
            highest, *others = sorted({round(cell.mean, 2) for _, _, cell in found}, reverse=True)
            next_best = others[0] if second and len(found) > 2 and others else None
            for cells, column, cell in found:
                mean = round(cell.mean, 2)
                cells[column] = replace(
                    cell, best=len(found) > 1 and mean == highest, second=mean == next_best
                )

    def footnotes(self) -> list[str]:
        """Return the notes below the table."""
        if not self.unit:
            return list(self.notes)
        shown = [cell for _, cells in self.rows for cell in cells.values() if isinstance(cell, Cell)]
        marks = ", the best in bold" * any(cell.best for cell in shown)
        marks += ", the second best underlined" * any(cell.second for cell in shown)
        unit = f"{self.unit}: mean ± standard deviation over seeds{marks};"
        return [f"{unit} the last column is the number of runs behind each number.", *self.notes]

    @property
    def heading(self) -> tuple[str, ...]:
        """The heads of the names, the columns, and for numbers a column of their runs."""
        return (*self.heads, *self.columns, *(["runs"] if self.unit else []))

    def _shown(
        self, escaped: Callable[[str], str], marks: tuple[str, str], gray: str = "%s", plus_minus: str = " ± "
    ) -> list[tuple[list[str], bool]]:
        """Return the rows as escaped texts, the best and second best numbers in ``marks``, references in ``gray``.

        A row is a reference, the second value, if all its numbers are from elsewhere.
        """
        rows = []
        for names, cells in self.rows:
            texts = list(map(escaped, names))
            for cell in (cells.get(column, "") for column in self.columns):
                if isinstance(cell, Cell):
                    mark = marks[0] if cell.best else marks[1] if cell.second else "%s"
                    texts.append(mark % escaped(cell.text(plus_minus)))
                else:
                    texts.append(escaped(cell or DASH))
            numbers = [cell for cell in cells.values() if isinstance(cell, Cell)]
            runs = sorted({cell.runs for cell in numbers} - {0})
            if self.unit:
                ends = dict.fromkeys((runs[0], runs[-1])) if runs else [DASH]
                texts.append(escaped(" to ".join(map(str, ends))))
            is_reference = bool(numbers) and not runs
            rows.append(([gray % text if is_reference else text for text in texts], is_reference))
        return rows

    def _align(self, text: str, number: str) -> str:
        """Return the alignment of the columns, from that of texts and that of numbers."""
        numbers = len(self.heading) - len(self.heads)
        return text * len(self.heads) + (number if self.unit else text) * numbers

    def to_csv(self) -> str:
        """Return one line per number: the row's names, the column, mean, std, runs, best (or the text)."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        heads = [*self.heads, self.over or "column", "mean", "std", "runs", "best", "text"]
        writer.writerow(map(escape.csv_cell, heads))
        for names, cells in self.rows:
            for column, cell in ((column, cells.get(column)) for column in self.columns):
                values: list[object] = ["", "", "", "", escape.csv_cell(cell)]
                if isinstance(cell, Cell):
                    mean, std = ("" if math.isnan(x) else f"{x:.6g}" for x in (cell.mean, cell.std))
                    values = [mean, std, cell.runs, int(cell.best), ""]
                if cell:
                    writer.writerow([*map(escape.csv_cell, (*names, column)), *values])
        return out.getvalue()

    def to_markdown(self) -> str:
        """Return a Markdown table below a heading, with its notes."""
        rows = [texts for texts, _ in self._shown(escape.markdown, ("**%s**", "<u>%s</u>"))]
        head, *body = (f"| {' | '.join(row)} |" for row in (map(escape.markdown, self.heading), *rows))
        title, ruler = f"# {escape.markdown(self.title)}", f"|{self._align('---|', '---:|')}"
        return "\n".join([title, "", head, ruler, *body, "", *map(escape.markdown, self.footnotes()), ""])

    def to_latex(self) -> str:
        """Return a ``table`` environment for booktabs; equal first names are printed once, with space between."""
        marks, gray = (r"\textbf{%s}", r"\underline{%s}"), r"\textcolor{gray}{%s}"
        rows = self._shown(escape.latex, marks, gray, plus_minus="±")
        out = [
            r"% needs \usepackage{booktabs}" + " and xcolor" * any(is_reference for _, is_reference in rows),
            r"\begin{table}",
            r"\centering\small",
            rf"\caption{{{escape.latex(self.title)}}}",
            rf"\begin{{tabular}}{{{self._align('l', 'r')}}}",
            r"\toprule",
            " & ".join(map(escape.latex, self.heading)) + r" \\",
            r"\midrule",
        ]
        last = None
        for (first, *others), _ in rows:
            if len(self.heads) > 1 and last not in (None, first):
                out.append(r"\addlinespace")
            shown = "" if len(self.heads) > 1 and first == last else first
            last = first
            if shown.startswith(("[", "*")):
                shown = "{}" + shown  # else LaTeX takes it for an option of the line break before it
            out.append(" & ".join([shown, *others]) + r" \\")
        out += [r"\bottomrule", r"\end{tabular}", r"\par\smallskip"]
        out += [rf"\footnotesize {escape.latex(' '.join(self.footnotes()))}", r"\end{table}", ""]
        if beyond := "".join(sorted({char for char in "".join(out) if ord(char) > LAST_LATIN})):
            out[0] += f", and XeLaTeX or LuaLaTeX with a font that has {beyond}"
        return "\n".join(out)

    def to_html(self) -> str:
        """Return a table with its notes; its heads are buttons, by which the page sorts it."""
        number = ' class="n"' if self.unit else ""
        kinds = [""] * len(self.heads) + [number] * (len(self.heading) - len(self.heads))
        head = "".join(
            f'<th scope="col"{kind}><button type="button">{escape.html(name)}</button></th>'
            for kind, name in zip(kinds, self.heading, strict=True)
        )
        body = []
        for texts, is_reference in self._shown(escape.html, ("<b>%s</b>", "<u>%s</u>")):
            row = "".join(f"<td{kind}>{text}</td>" for kind, text in zip(kinds, texts, strict=True))
            body.append(f"<tr{' class=ref' * is_reference}>{row}</tr>")
        rows = "\n".join(body)
        table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"
        notes = "".join(f"<p class=note>{escape.html(note)}</p>" for note in self.footnotes())
        return f"<div class=wide>{table}</div>{notes}"


def text_table(title: str, frame: pd.DataFrame, notes: Iterable[str] = ()) -> Table:
    """Return a table of the texts in a data frame, whose index names the rows."""
    heads, columns = tuple(map(str, frame.index.names)), tuple(map(str, frame))
    table = Table(title, heads, columns, unit="", notes=list(notes))
    for names, texts in zip(frame.index, frame.to_numpy(), strict=True):
        table.add(names if len(heads) > 1 else (names,), dict(zip(columns, texts, strict=True)))
    return table


def save_table(table: Table, stem: Path) -> list[Path]:
    """Write ``stem.csv``, ``stem.md`` and ``stem.tex``; return their paths."""
    texts = {"csv": table.to_csv(), "md": table.to_markdown(), "tex": table.to_latex()}
    return [write_text(stem.with_name(f"{stem.name}.{kind}"), text) for kind, text in texts.items()]


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all; return its path."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
    return path
