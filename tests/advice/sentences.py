"""Every sentence in fastcoop that tells people to do something, read from the source.

``python -m tests.advice.sentences [ROOM]`` lists those that no test follows yet.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
VERBS = (
    "add|allow|ask|cache|call|change|check|choose|close|compare|convert|copy|correct|create|cut|delete|download|drop|"
    "evaluate|export|extract|fetch|find|fix|free|get|give|import|increase|install|interpret|keep|leave|let|list|load|"
    "lower|make|mark|merge|mount|move|name|omit|open|pass|pick|place|point|provide|put|quote|raise|reduce|reinstall|"
    "remove|rename|repair|repeat|replace|report|restart|restore|resume|run|save|see|select|set|shorten|sort|spell|split|"
    "start|state|stop|take|test|train|try|turn|uninstall|unpack|update|upgrade|use|wait|write"
)
IMPERATIVE = re.compile(
    rf"(?:^|[;.:,(–-] |\bthen |\band |\bor |\belse |\binstead )(?:{VERBS})\b(?! (?:of|is|was|are)\b)", re.I
)
SQL = re.compile(r"\s*(?:SELECT|CREATE|DELETE|DROP|INSERT|UPDATE) ")
# Strings that only look like advice, such as help texts that name an option's effect, and what they are.
NO_ADVICE: dict[str, str] = {
    "Leave out images that cannot be decoded": "help of --skip-unreadable",
    "TEST LABELS (official)": "a mark in tables",
    "Chosen on: the images that values of a method were chosen on": "a note below tables",
    "Report folder (reports/": "help of --out",
    "Only rows that meet this": "help of --where",
    "Try runs again that failed.": "help of --retry-failed",
    "folders with a folder per class, or a folder per class, or a split.json": "a list of layouts",
    "a .csv with the columns class and name": "the form of a file",
    "expected train, val or test": "a list of values",
    "Prompt learning for CLIP (CoOp): cache": "help of fastcoop",
    "Check and import feature stores.": "help of features",
    "List, compare, export": "help of results",
    "Worker processes (-1: automatic": "help of --jobs",
}
# Advice that a test cannot follow, and why.
CANNOT_FOLLOW: dict[str, str] = {}


class Sentence(NamedTuple):
    """A string in the source that advises something; values in it are written ``{}``."""

    path: str
    line: int
    text: str


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ""


def _docstrings(tree: ast.AST) -> set[ast.AST]:
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, scopes)]
    return {
        statement.value
        for body in bodies
        for statement in body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    }


@cache
def advising() -> list[Sentence]:
    """Return the advising sentences of every module of the package."""
    found = []
    for path in sorted((ROOT / "fastcoop").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        seen: set[ast.AST] = _docstrings(tree)
        for node in ast.walk(tree):  # breadth first: whole sentences before their parts
            if node in seen or not isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                continue
            seen.update(ast.walk(node))
            text = _text(node)
            known = SQL.match(text) or any(part in text for part in NO_ADVICE)
            if len(text.split()) > 2 and IMPERATIVE.search(text) and not known:
                found.append(Sentence(str(path.relative_to(ROOT)), node.lineno, text))
    return found


@cache
def followed() -> dict[str, str]:
    """Return the parts of sentences that tests name with ``follows``, each with the test's name."""

    def of(path: Path) -> Iterator[tuple[str, str]]:
        for test in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for mark in getattr(test, "decorator_list", []):
                if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "follows":
                    for sentence in mark.args:
                        yield _text(sentence), f"{path.relative_to(ROOT)}::{test.name}"  # type: ignore[attr-defined]

    return dict(pair for path in sorted((ROOT / "tests").rglob("test_*.py")) for pair in of(path))


def open_sentences(room: str = "") -> list[Sentence]:
    """Return the advising sentences under ``fastcoop/<room>`` that no test follows."""
    known = {*followed(), *CANNOT_FOLLOW}
    under = f"fastcoop/{room}"
    return [
        one
        for one in advising()
        if one.path.startswith(under) and not any(part in one.text for part in known)
    ]


if __name__ == "__main__":
    for sentence in open_sentences(*sys.argv[1:2]):
        print(f"{sentence.path}:{sentence.line}: {sentence.text}")
