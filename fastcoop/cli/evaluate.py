"""``evaluate``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastcoop.cli.app import app
from fastcoop.cli.options import AsJson, Cache, DataRoot, Device, SkipUnreadable
from fastcoop.cli.output import say, say_json


@app.command()
def evaluate(
    results: Annotated[Path, typer.Argument(help="A results folder.")],
    targets: Annotated[str, typer.Option(help="Datasets to test on, separated by commas.")],
    runs: Annotated[
        list[str] | None, typer.Option("--run", help="A run's key or its beginning; may be given again.")
    ] = None,
    backbones: Annotated[
        list[str] | None,
        typer.Option("--backbone", help="Of the runs, where their names alone do not find it."),
    ] = None,
    data_root: DataRoot = Path("data"),
    cache: Cache = Path("cache"),
    recipe: Annotated[
        str | None,
        typer.Option(help='Image transforms: "current" or "official-2021" (what the runs learned from).'),
    ] = None,
    device: Device = "cpu",
    skip_unreadable: SkipUnreadable = False,
    as_json: AsJson = False,
) -> None:
    """Test what runs learned on other datasets, with these datasets' own class names. Nothing is trained.

    Unified contexts, text transforms and biases and zero-shot prompts meet any class names. Class-specific contexts
    and linear probes answer with those of their own classes that the target has, found by WordNet ID or name. Runs of
    import-coop are scored so, on their own dataset too. The tests join the runs in the results folder.

    Example:  [bold]fastcoop evaluate results/table1 --targets imagenetv2,imagenet_sketch[/bold]
    """
    from fastcoop.results.read import percent
    from fastcoop.sweeps import evaluate as test_runs

    tested = test_runs(
        results, [name.strip() for name in targets.split(",") if name.strip()], runs=runs or (),
        backbones=backbones or (), data_root=data_root, cache=cache, recipe=recipe, device=device,
        skip_unreadable=skip_unreadable,
    )  # fmt: skip
    if as_json:
        say_json([dataclasses.asdict(one) for one in tested])
        return
    titles = ("label", "source", "dataset")
    widths = [max(len(getattr(one, title)) for one in tested) for title in titles]
    for one in tested:
        names = "  ".join(
            f"{getattr(one, title):<{width}}" for title, width in zip(titles, widths, strict=True)
        )
        shots = f"{one.shots} shot{'s' * (str(one.shots) != '1')}"
        say(
            f"{one.key[:12]}  {names}  {shots:>9}  seed {one.seed}  {percent(one.accuracy):>7}"
            + ("" if one.new else "  (tested before)")
        )
    say(f"{sum(one.new for one in tested)} of {len(tested)} tests are new: {results}")
