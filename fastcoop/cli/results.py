"""``results``: what is in a results folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcoop import escape
from fastcoop.cli.app import results_app
from fastcoop.cli.options import AsJson
from fastcoop.cli.output import say, say_json
from fastcoop.errors import UserError
from fastcoop.files import atomic_write

if TYPE_CHECKING:
    import pandas as pd

    from fastcoop.reports.paired import Paired

log = logging.getLogger("fastcoop")

Results = Annotated[Path, typer.Argument(help="A results folder.")]
Where = Annotated[
    list[str] | None,
    typer.Option(help="Only rows that meet this: NAME=VALUE (or !=, <, <=, >, >=) of a column or a setting."),
]
ONCE = ("backbone", "dataset", "status")  # above the table where all rows agree, so that it fits 80 columns
SHOWN = ["key", "backbone", "dataset", "source", "label", "shots", "seed", "accuracy", "status", "seconds"]


@results_app.command("list")
def list_results(
    results: Results,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be given again.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Only tests on this dataset.")] = None,
    backbone: Annotated[list[str] | None, typer.Option(help="Only this backbone.")] = None,
    shots: Annotated[list[str] | None, typer.Option(help='Only this number of shots, or "all".')] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed.")] = None,
    status: Annotated[
        list[str] | None, typer.Option(help="Only done, diverged, untested or failed runs.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only runs of this label.")] = None,
    where: Where = None,
    as_json: AsJson = False,
) -> None:
    """Show runs: what each was, its accuracy on each dataset, and the beginning of its key.

    Several conditions must all be met; of one option given several times, any.

    Example:  [bold]fastcoop results list results/demo --method coop --shots 16 --where "accuracy<20"[/bold]

    Example:  [bold]fastcoop results list results/demo --status failed --json[/bold]
    """
    import pandas as pd

    from fastcoop.results.read import load_failures, load_results, load_untested
    from fastcoop.results.select import select_rows

    table = load_results(results)
    for status_of, others in (("untested", load_untested(results)), ("failed", load_failures(results))):
        if len(others):
            others = others.assign(status=status_of, source=others.dataset)
            table = pd.concat([table, others], ignore_index=True) if len(table) else others
    asked = {
        "method": method, "dataset": dataset, "backbone": backbone, "shots": shots, "seed": seed, "status": status,
        "label": label,
    }  # fmt: skip
    for name, values in asked.items():
        if values:
            table = table[table[name].astype(str).isin([str(value) for value in values])]
    table = select_rows(table, where or ())
    columns = [name for name in [*SHOWN, "error"] if name in table]
    if as_json:
        say_json(json.loads(table[columns].to_json(orient="records")))
        return
    if table.empty:
        say("No run meets this.")
        return
    if (table.source == table.dataset).all():
        columns.remove("source")
    if same := [name for name in ONCE if len(table) > 1 and table[name].nunique(dropna=False) == 1]:
        say(", ".join(f"{name} {table[name].iloc[0]}" for name in same))
    columns = [name for name in columns if name not in same]
    shown = table[columns].assign(key=table.key.str[:12])
    text = shown.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.2f}")
    for line in text.split("\n"):
        say(line)


@results_app.command("show")
def show(
    results: Results,
    key: Annotated[str, typer.Argument(help="A run's key, or its beginning.")],
    as_json: AsJson = False,
) -> None:
    """Show all that is kept of one run: settings, accuracy by dataset and class, losses, times, versions.

    Example:  [bold]fastcoop results show results/demo 3f2a[/bold]
    """
    from fastcoop.results.read import find_key, load_run

    run = load_run(results, find_key(results, key))
    if as_json:
        say_json(run)
        return
    for line in _lines(run):
        say(line)


def _lines(run: dict[str, Any]) -> Iterator[str]:
    from fastcoop.results.read import percent

    tests, losses = run.pop("tests"), run.pop("losses")
    for name, value in run.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {one}" for key, one in value.items())
        if value not in (None, ""):
            yield f"{name:<16} {value}"
    if losses:
        yield f"{'losses':<16} {losses[0]} in the first of {len(losses)} epochs, {losses[-1]} in the last"
    for dataset, test in tests.items():
        yield ""
        yield (
            f"on {dataset}: {percent(test['accuracy'])} (mean over classes {percent(test['macro_accuracy'])}, by "
            f"chance {percent(test['chance'])})"
        )
        known = {name: value for name, value in test["per_class"].items() if value is not None}
        for name, value in sorted(known.items(), key=lambda pair: pair[1]):
            yield f"{value:8.2f}  {name}"


@results_app.command("compare")
def compare(
    results: Results,
    other: Annotated[Path | None, typer.Argument(help="Another results folder.")] = None,
    labels: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two labels within one folder: the second against the first."),
    ] = None,
    where: Where = None,
    as_json: AsJson = False,
) -> None:
    """Compare two folders run by run, or two labels of one folder: the difference on each dataset, and whether it is
    more than chance.

    Runs are matched by backbone, dataset, shots and seed (and label, between folders); a difference is the second
    minus the first, in percentage points. p is two-sided: over datasets by Wilcoxon's signed-rank test where there
    are five or more, otherwise over seeds by a paired t test.

    Example:  [bold]fastcoop results compare results/before results/after --where method=coop[/bold]

    Example:  [bold]fastcoop results compare results/demo --labels "CoOp (M=16, end)" "CoOp (M=16, mid)"[/bold]
    """
    from fastcoop.results.compare import pair_folders, pair_labels
    from fastcoop.results.read import load_results
    from fastcoop.results.select import select_rows

    if (other is None) == (labels is None):
        raise UserError("Give either a second results folder to compare with, or --labels FIRST SECOND.")
    first = select_rows(load_results(results), where or ())
    if other is not None:
        pairs = pair_folders(first, select_rows(load_results(other), where or ()))
    else:
        assert labels is not None
        pairs = pair_labels(first, *labels, where=results)
    groups = [_compared(frame) for _, frame in pairs.groupby(["label", "backbone", "shots"], sort=False)]
    groups.sort(
        key=lambda group: (
            group["label"],
            group["backbone"],
            float(str(group["shots"]).replace("all", "inf")),
        )
    )
    if as_json:
        say_json(groups)
        return
    for group in groups:
        s = "s" * (str(group["shots"]) != "1")
        say(f"{group['label']}, {group['backbone']}, {group['shots']} shot{s}")
        width = max(len(row["dataset"]) for row in group["datasets"])
        for row in group["datasets"]:
            say(
                f"  {row['dataset']:<{width}} {row['first']:8.2f} {row['second']:8.2f} {row['difference']:+8.2f}  "
                f"({row['runs']} runs)"
            )
        p = "too few runs for a test" if group["p"] is None else f"p = {group['p']:.3g} over {group['over']}"
        say(f"  {'mean':<{width}} {'':8} {'':8} {group['difference']:+8.2f}  ({p})")


def _compared(pairs: pd.DataFrame) -> dict[str, Any]:
    """One group's differences, by dataset and in all, and their test."""
    from fastcoop.reports.paired import FEWEST_DATASETS, paired_test

    pairs = pairs.assign(
        difference=pairs["second"] - pairs["first"],
        place=[d if d == s else f"{s} > {d}" for s, d in zip(pairs.source, pairs.dataset, strict=True)],
    )
    differences = pairs.groupby(["place", "seed"], sort=False).difference.mean()
    more, less = paired_test(differences), paired_test(-differences)
    datasets = [
        {
            "dataset": str(place), "runs": len(frame), "first": float(frame["first"].mean()),
            "second": float(frame["second"].mean()), "difference": float(frame.difference.mean()),
        }
        for place, frame in pairs.groupby("place", sort=False)
    ]  # fmt: skip
    shots = pairs.shots.iloc[0]
    return {
        "label": str(pairs.label.iloc[0]), "backbone": str(pairs.backbone.iloc[0]),
        "shots": shots if isinstance(shots, str) else int(shots), "difference": more.mean, "pairs": more.pairs,
        "p": _two_sided(more, less), "over": "datasets" if more.datasets >= FEWEST_DATASETS else "seeds",
        "datasets": datasets,
    }  # fmt: skip


def _two_sided(more: Paired, less: Paired) -> float | None:
    p = min(1.0, 2 * min(more.p, less.p))
    return None if p != p else p


@results_app.command("export")
def export_results(
    results: Results,
    to: Annotated[Path, typer.Argument(help="The file to write, .csv or .parquet.")],
    where: Where = None,
    as_json: AsJson = False,
) -> None:
    """Write the results table as tidy CSV or Parquet: a row per run and dataset it was tested on.

    Parquet needs pyarrow: [bold]pip install "fastcoop[parquet]"[/bold].

    Example:  [bold]fastcoop results export results/demo demo.csv[/bold]

    Example:  [bold]fastcoop results export results/demo coop16.parquet --where method=coop --where shots=16[/bold]
    """
    from fastcoop.results.read import load_failures, load_results, load_untested
    from fastcoop.results.select import select_rows

    if to.suffix not in (".csv", ".parquet"):
        raise UserError(
            f"Results are exported to .csv or .parquet, not to {to.name}; choose one of those endings."
        )
    table = select_rows(load_results(results), where or ())
    for name in table:
        if (
            table[name].dtype == "object" and table[name].dropna().map(type).nunique() > 1
        ):  # such as "all" beside numbers of shots
            table[name] = table[name].map(str, na_action="ignore")
    try:
        with atomic_write(to) as part:
            if to.suffix == ".csv":
                table.map(_csv_cell).to_csv(part, index=False, encoding="utf-8", lineterminator="\n")
            else:
                table.to_parquet(part, index=False)
    except ImportError:
        raise UserError(
            'Writing Parquet needs pyarrow; `pip install "fastcoop[parquet]"`, or export to a .csv file.'
        ) from None
    except OSError as error:
        raise UserError(f"{to} cannot be written: {error.strerror or error}.") from None
    if lost := len(load_failures(results)) + len(load_untested(results)):
        log.warning("%d run(s) that failed or were tested on nothing have no rows.", lost)
    if as_json:
        say_json({"rows": len(table), "file": to})
    else:
        say(f"{len(table)} rows: {to}")


def _csv_cell(value: object) -> object:
    return escape.csv_cell(value) if isinstance(value, str) else value


@results_app.command("merge")
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Results folders to add.")],
    into: Annotated[Path, typer.Option(help="The folder they are added to.")],
    as_json: AsJson = False,
) -> None:
    """Add the runs of several results folders to one, by key; runs that differ between two are named.

    Example:  [bold]fastcoop results merge results/machine-a results/machine-b --into results/all[/bold]
    """
    from fastcoop.results import merge_results

    added = merge_results(folders, into)
    if as_json:
        say_json({"added": added, "into": into})
    else:
        say(f"{added} runs added to {into}")
