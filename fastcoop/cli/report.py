"""``report`` and ``interpret``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastcoop.cli.app import app
from fastcoop.cli.options import AsJson, BackboneSpec


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A results folder.")],
    out: Annotated[Path | None, typer.Option(help="Report folder (reports/<results name>).")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the figures, the tables, the claims and one page of it all from a results folder.

    Example:  [bold]fastcoop report results/photographs[/bold]
    """
    from fastcoop.reports import report as make_report

    written = make_report(results, out or Path("reports") / results.name)
    if as_json:
        typer.echo(json.dumps([str(path) for path in written], indent=1))
    else:
        typer.echo(f"{len(written)} files: {written[0]}")


@app.command()
def interpret(
    results: Annotated[Path, typer.Argument(help="A results folder.")],
    backbone: BackboneSpec,
    runs: Annotated[list[str] | None, typer.Option("--run", help="A run's key or its beginning.")] = None,
    k: Annotated[int, typer.Option("-k", help="Nearest words per vector.")] = 5,
    all_tokens: Annotated[bool, typer.Option(help="Also tokens the backbone never saw in training.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which words the learned context vectors are nearest to, by Euclidean distance (Table 4).

    Example:  [bold]fastcoop interpret results/photographs --backbone RN50 -k 3[/bold]
    """
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.sweeps.interpret import interpret as read_words

    model = backbone_from_spec(backbone)
    paths = read_words(results, model, runs=runs or (), k=k, trained_only=not all_tokens, again=True)
    stored = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    if as_json:
        typer.echo(json.dumps(stored, indent=1))
        return
    for key, words in stored.items():
        typer.echo(f"{key[:12]}  (a random vector's nearest word is {words['by_chance']:.3g} away)")
        for vector in words["vectors"]:
            near = ", ".join(
                f"{w} ({d:.3g})" for w, d in zip(vector["words"], vector["distances"], strict=True)
            )
            typer.echo(f"  {vector.get('class', '')} {vector['position']:>2}  {near}")
