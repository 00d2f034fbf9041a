"""Escaping of names, prompts and paths, one function per output format.

Such text may contain anything: formulas, markup, line breaks, terminal codes. Every output passes it through here.
"""

from __future__ import annotations

import hashlib
import html as html_library
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath

import yaml

# Control characters, line separators, invisible marks that change the text's direction, and surrogates, which stand for
# bytes of file names and cannot be encoded.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
FORMULA = re.compile(r"'*(?:\s*[=+\-@＝＋－＠]|[\t\r\n])")  # the list of OWASP for spreadsheets
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
YAML_PLAIN = re.compile(r"[\w./]([\w./:-]*[\w./-])?", re.ASCII)  # needs no quotes if YAML reads it as text
FILE_NAME_LENGTH = 40
LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "Δ": r"$\Delta$", "·": r"$\cdot$", "≥": r"$\geq$",
    "−": "$-$", "×": r"$\times$", "…": r"\ldots{}", "₁": "$_1$", "₂": "$_2$", "ᴍ": "$_M$", "–": "--", "“": "``",
    "”": "''", **{char: "\\" + char for char in "&%$#_{}"},
}  # fmt: skip


def visible(text: object, keep: str = "") -> str:
    r"""Return ``text`` on one line for terminals, plain text and figures.

    Control characters become their codes (``\n``, ``\x1b``, ``\u202e``), except those in ``keep``.
    """
    return CONTROL.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), str(text)
    )


def csv_cell(text: object) -> str:
    r"""Return ``text`` as a CSV cell that no spreadsheet runs as a formula.

    Text that begins like a formula gets an apostrophe in front; numbers, including negative ones, stay numbers. To read
    the text back, remove an apostrophe before `FORMULA`. Other control characters than tab and line feed become codes.
    """
    text = str(text)
    if FORMULA.match(text) and not NUMBER.fullmatch(text):
        text = f"'{text}"
    return visible(text, keep="\n\t")


def markdown(text: object) -> str:
    """Return ``text`` as Markdown that displays it literally, on one line, also in a table cell."""
    text = re.sub(r"([\\`*|~$])", r"\\\1", visible(text))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it is literal
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;").replace(">", "&gt;")
    text = text.replace("](", r"]\(")
    # At the beginning these marks would begin a list, a heading or a rule.
    text = re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", text)
    return re.sub(r"^([-+#=]+)(?=\s|[.)]\s|$)", r"\\\1", text)


def html(text: object, keep: str = "") -> str:
    """Return ``text`` for HTML, as content or in a quoted attribute. ``keep``: see `visible`."""
    return html_library.escape(visible(text, keep))


def latex(text: object) -> str:
    """Return ``text`` for LaTeX, with all special characters escaped."""
    return "".join(LATEX.get(char, char) for char in visible(text))


def yaml_scalar(text: str) -> str:
    """Return ``text`` as a YAML scalar on one line, quoted if YAML would read it as something else."""
    is_plain = YAML_PLAIN.fullmatch(text) and yaml.safe_load(text) == text
    return text if is_plain else visible(json.dumps(text, ensure_ascii=False))


def shell_word(text: object) -> str:
    """Return ``text`` as one word for a POSIX shell, on one line."""
    word = str(text)
    if CONTROL.search(word):
        escaped = word.replace("\\", "\\\\").replace("'", "\\'")
        raw = re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", escaped)
        return f"$'{visible(raw)}'"
    return shlex.quote(word)


def shell_command(*words: object) -> str:
    """Return a command line for a POSIX shell. A `Path` that begins with a dash gets ``./`` in front."""
    return " ".join(
        shell_word(f"./{word}" if isinstance(word, PurePath) and str(word).startswith("-") else word)
        for word in words
    )


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Return a different file name (lower-case ASCII letters, digits and dashes) for each of ``names``."""
    short = {name: re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:FILE_NAME_LENGTH] for name in names}
    shared = Counter(short.values())
    for name, slug in short.items():
        if not slug or shared[slug] > 1:
            digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
            short[name] = f"{slug}-{digest}".strip("-")
    return short
