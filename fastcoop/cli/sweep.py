"""``sweep`` and ``evaluate``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from fastcoop import escape
from fastcoop.cli import options
from fastcoop.cli.groups import app
from fastcoop.cli.output import say, show
from fastcoop.progress import counted

if TYPE_CHECKING:
    from fastcoop.sweeps import Summary

log = logging.getLogger("fastcoop")

MAX_LISTED = 10  # failed or collapsed runs printed
RUNS_FAILED = 1  # exit code
RUN_ONLY = ("skip_unreadable", "backend", "address")  # options that change nothing beside --dry-run


@app.command()
def sweep(
    context: typer.Context,
    grid: Annotated[Path, Argument(help="The grid file.")],
    data_root: options.DataRoot = Path("data"),
    cache: options.Cache = Path("cache"),
    results: Annotated[Path | None, Option(help="Results folder (results/<grid name>).")] = None,
    overrides: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="Replaces the grid's value. Repeatable.")
    ] = None,
    only: Annotated[list[str] | None, options.comma_list(help="Only these methods or blocks.")] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Only print what would run, with time and memory.")
    ] = False,
    memory_budget: Annotated[float | None, Option(help="Memory for training, in GB.")] = None,
    device: options.Device = "auto",
    jobs: Annotated[
        int, Option(help="Worker processes (-1: one per GPU, or chosen for the cores; 1: this one).")
    ] = -1,
    retry_failed: Annotated[bool, Option("--retry-failed", help="Also do runs that failed before.")] = False,
    skip_unreadable: options.SkipUnreadable = False,
    backend: Annotated[str, Option(help="local, or dask: a cluster (docs/cluster.md).")] = "local",
    address: Annotated[str | None, Option(help="The scheduler: tcp://HOST:8786, or its file.")] = None,
    class_names: options.ClassNames = None,
    as_json: options.AsJson = False,
) -> None:
    """Do every run of a grid file that is not done yet.

    Missing features are cached first. It can be interrupted at any time: the same command continues.

    A grid names backbones, datasets, shots, seeds and methods with their settings, and crosses them: docs/grids.md.

    Example:  fastcoop sweep experiments/photographs.yaml --set shots=1,16

    Example:  fastcoop sweep experiments/fig3.yaml --only coop --set methods.coop.epochs=20 --dry-run
    """
    from fastcoop.sweeps import sweep as run_sweep

    if dry_run and (given := options.given_options(context, RUN_ONLY)):
        log.warning("Beside --dry-run these change nothing: %s.", ", ".join(given))
    given_values: dict[str, Any] = {
        "overrides": overrides or (), "only": only or (),
        "data_root": data_root, "cache": cache, "results": results, "dry_run": dry_run, "device": device, "jobs": jobs,
        "memory_budget": memory_budget, "retry_failed": retry_failed, "skip_unreadable": skip_unreadable,
        "backend": backend, "address": address, "class_names": class_names,
    }  # fmt: skip
    summary = run_sweep(grid, **given_values)
    show(summary.as_json(), _planned_lines(summary) if dry_run else _done_lines(summary), as_json)
    if dry_run:
        return
    if summary.diverged:
        log.warning("%s diverged; the results mark diverged runs.", counted(summary.diverged, "run"))
    for line in _first(summary.collapsed):
        log.warning("Accuracy far below that of other seeds, although the loss is finite: %s", line)
    for line in _first([f"{key[:12]}: {error}" for key, error in summary.failed.items()]):
        say(f"failed: {line}", err=True)
    if summary.failed:
        failed = counted(len(summary.failed), "run")
        say(f"{failed} failed; --retry-failed tries them again, all others are done.", err=True)
        raise typer.Exit(RUNS_FAILED)


def _summary_lines(summary: Summary, verb: str = "finished", number: int | None = None) -> Iterator[str]:
    for count in summary.counts:
        runs = f"{counted(count.runs, 'run')}, {count.done} done before"
        yield f"{count.backbone}  {count.dataset}  {count.method}: {runs}"
    number = summary.finished if number is None else number
    total = counted(summary.runs, "run")
    yield f"{verb} {number} of {total}; {summary.done_before} were done before: {summary.results}"
    if summary.finished:
        yield (
            f"{summary.seconds:.0f} s by {counted(summary.workers, 'process')}; "
            f"{summary.engine_share:.0%} of the time in training steps; "
            f"at most {summary.peak_memory_bytes / 1e9:.1f} GB of memory together"
        )


def _done_lines(summary: Summary) -> Iterator[str]:
    yield from _summary_lines(summary)
    yield f"figures and tables: {escape.shell_command('fastcoop', 'report', summary.results)}"


def _planned_lines(planned: Summary) -> Iterator[str]:
    *counts, total = _summary_lines(planned, "would run", planned.left)
    yield from counts
    if planned.failed:
        yield f"{counted(len(planned.failed), 'run')} failed before; --retry-failed tries them again"
    yield from planned.forecast.lines() if planned.forecast else ()
    yield total


def _first(lines: Sequence[str]) -> list[str]:
    more = len(lines) - MAX_LISTED
    return [*lines[:MAX_LISTED], *([f"and {more} more"] if more > 0 else [])]


@app.command()
def evaluate(
    results: options.ResultsFolder,
    targets: Annotated[list[str], options.comma_list(help="Datasets to test on.")],
    runs: options.Runs = None,
    backbones: options.Backbones = None,
    data_root: options.DataRoot = Path("data"),
    cache: options.Cache = Path("cache"),
    recipe: Annotated[
        str | None, Option(help="Image transforms: current or official-2021 (as in training).")
    ] = None,
    device: options.Device = "auto",
    skip_unreadable: options.SkipUnreadable = False,
    class_names: options.ClassNames = None,
    as_json: options.AsJson = False,
) -> None:
    """Test runs on other datasets, without training.

    Unified contexts, text transforms and biases and zero-shot prompts work with the class names of any dataset.
    Class-specific contexts and linear probes predict among those of their own classes that the target has, found by
    WordNet ID or name. Runs of import-coop are tested on their own dataset in the same way. The scores join those of
    the runs in the results folder.

    Example:  fastcoop evaluate results/table1 --targets imagenetv2,imagenet_sketch
    """
    import pandas as pd

    from fastcoop.sweeps import evaluate as test_runs

    tested = test_runs(
        results, targets, runs=runs or (), backbones=backbones or (), data_root=data_root, cache=cache,
        recipe=recipe, device=device, skip_unreadable=skip_unreadable, class_names=class_names,
    )  # fmt: skip
    table = pd.DataFrame(tested).drop(columns="macro_accuracy").assign(key=[one.key[:12] for one in tested])
    shown = table.to_string(index=False, na_rep="no accuracy", float_format="{:.2f}%".format)
    lines = [
        *shown.split("\n"),
        f"{sum(one.new for one in tested)} of {len(tested)} tests are new: {results}",
    ]
    show(tested, lines, as_json)
