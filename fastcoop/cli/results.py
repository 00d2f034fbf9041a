"""``results list``, ``show``, ``compare``, ``export`` and ``merge``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fastcoop.cli.groups import results_app
from fastcoop.cli.options import AsJson, ResultsFolder, RunKey, Where
from fastcoop.cli.output import show
from fastcoop.progress import counted

log = logging.getLogger("fastcoop")


@results_app.command("list")
def list_results(results: ResultsFolder, where: Where = None, as_json: AsJson = False) -> None:
    """List runs and their accuracies.

    Example:  fastcoop results list results/demo --where method=coop,zero_shot --where "accuracy<20"

    Example:  fastcoop results list results/demo --where status=failed --json
    """
    from fastcoop.results.listing import list_lines, list_runs

    table = list_runs(results, where or ())
    show(table.to_dict("records"), list_lines(table), as_json)


@results_app.command("show")
def show_run(results: ResultsFolder, key: RunKey, as_json: AsJson = False) -> None:
    """Show everything that is recorded of a run.

    Example:  fastcoop results show results/demo 3f2a
    """
    from fastcoop.results.listing import run_lines
    from fastcoop.results.read import load_run

    run = load_run(results, key)
    show(run, run_lines(run), as_json)


@results_app.command("compare")
def compare(
    results: ResultsFolder,
    other: Annotated[Path | None, Argument(help="Another results folder.")] = None,
    labels: Annotated[
        tuple[str, str] | None, Option(help="Two labels of one folder: the second against the first.")
    ] = None,
    where: Where = None,
    as_json: AsJson = False,
) -> None:
    """Compare two folders, or two labels of a folder.

    The differences are listed by dataset, with a test. Runs are matched by backbone, dataset, shots and seed (and
    method and settings, between folders; runs of one label with other settings are listed separately). A difference
    is the second minus the first, in percentage points. p is two-sided: over datasets by Wilcoxon's signed-rank test
    where there are five or more, otherwise over seeds by a paired t test. Targets of one dataset count as one, because
    they test the same runs.

    Example:  fastcoop results compare results/before results/after --where method=coop

    Example:  fastcoop results compare results/demo --labels "CoOp (M=16, end)" "CoOp (M=16, mid)"
    """
    from fastcoop.reports.comparison import compare_results, comparison_lines

    groups = compare_results(results, other, labels, where or ())
    show(groups, comparison_lines(groups), as_json)


@results_app.command("export")
def export_results(
    results: ResultsFolder,
    to: Annotated[Path, Argument(help="The file to write, .csv or .parquet.")],
    where: Where = None,
    as_json: AsJson = False,
) -> None:
    """Write the results table as CSV or Parquet.

    It has a row per run and dataset that the run was tested on. Parquet needs pyarrow: pip install "fastcoop[parquet]".

    Example:  fastcoop results export results/demo demo.csv

    Example:  fastcoop results export results/demo coop16.parquet --where method=coop --where shots=16
    """
    from fastcoop.results.listing import export_results as export
    from fastcoop.results.listing import list_runs

    rows = export(results, to, where or ())
    if left_out := int(list_runs(results, where or ()).status.isin(("failed", "untested")).sum()):
        log.warning("%d run(s) that failed or were tested on nothing have no rows.", left_out)
    show({"rows": rows, "file": to}, [f"{rows} rows: {to}"], as_json)


@results_app.command("merge")
def merge(
    folders: Annotated[list[Path], Argument(help="Results folders to add.")],
    into: Annotated[Path, Option(help="The folder that they are added to.")],
    as_json: AsJson = False,
) -> None:
    """Add the runs of several results folders to one.

    Runs that have different results in two of the folders are named, and nothing of that folder is added.

    Example:  fastcoop results merge results/machine-a results/machine-b --into results/all
    """
    from fastcoop.results import merge_results

    added = merge_results(folders, into)
    show({"added": added, "into": into}, [f"{counted(added, 'run')} added to {into}"], as_json)
