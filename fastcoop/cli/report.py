"""``report`` and ``interpret``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from fastcoop.cli.app import app
from fastcoop.cli.options import AsJson, BackboneSpec
from fastcoop.cli.output import say, say_json


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A results folder.")],
    out: Annotated[Path | None, typer.Option(help="Report folder (reports/<results name>).")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the figures, the tables, the claims and one page of it all from a results folder.

    What the results do not suffice for is said, with the command that would supply it.

    Example:  [bold]fastcoop report results/photographs[/bold]
    """
    from fastcoop.reports import report as make_report

    written = make_report(results, out or Path("reports") / results.name)
    if as_json:
        say_json(written)
    else:
        missing = next(path for path in written if path.name == "missing.txt")
        for line in missing.read_text(encoding="utf-8").split("\n"):
            say(line)
        say(f"{len(written)} files: {written[0]}")


@app.command()
def interpret(
    results: Annotated[Path, typer.Argument(help="A results folder.")],
    backbone: BackboneSpec,
    runs: Annotated[list[str] | None, typer.Option("--run", help="A run's key or its beginning.")] = None,
    k: Annotated[int, typer.Option("-k", help="Nearest words per vector.")] = 5,
    all_tokens: Annotated[bool, typer.Option(help="Also tokens the backbone never saw in training.")] = False,
    cosine: Annotated[bool, typer.Option("--cosine", help="By 1 - cosine, not Euclidean distance.")] = False,
    latin_only: Annotated[bool, typer.Option("--latin-only", help="N/A for words in other scripts.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which words the learned context vectors are nearest to (Table 4), and how near one would be by chance.

    A hyphen ends a piece of a word. A class-specific context has a line per class, then what classes share.

    Example:  [bold]fastcoop interpret results/photographs --backbone RN50 -k 3[/bold]
    """
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.sweeps.interpret import interpret as read_words

    paths = read_words(
        results, backbone_from_spec(backbone), runs=runs or (), k=k, trained_only=not all_tokens,
        metric="cosine" if cosine else "euclidean", latin_only=latin_only, again=True,
    )  # fmt: skip
    stored = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    if as_json:
        say_json(stored)
        return
    for key, words in stored.items():
        say(
            f"{key[:12]}  nearest words: a random context's are {words['by_chance']:.3g} away, those of the one it "
            f"started from {words['initial']:.3g}"
        )
        for line in _by_class(words) if "summary" in words else _by_position(words["vectors"]):
            say(f"  {line}")


def _by_position(vectors: list[dict[str, Any]]) -> Iterator[str]:
    for vector in vectors:
        pairs = zip(vector["words"], vector["distances"], strict=True)
        near = ", ".join(f"{word} ({distance:.3g})" for word, distance in pairs)
        yield f"{vector['position']:>2}  {near}  [by chance at its length {vector['chance']:.3g}]"


def _by_class(words: dict[str, Any]) -> Iterator[str]:
    for name, group in groupby(words["vectors"], key=lambda vector: vector["class"]):
        near = ", ".join(f"{vector['words'][0]} ({vector['distances'][0]:.3g})" for vector in group)
        yield f"{name}: {near}"
    summary = words["summary"]
    often = ", ".join(f"{word} ({count})" for word, count in summary["words"])
    yield (
        f"over {summary['classes']} classes: {summary['mean_distance']:.3g} on average, by chance at their lengths "
        f"{summary['chance']:.3g}; most often {often}"
    )
