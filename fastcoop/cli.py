"""The command line: one thin function per command. Logic lives in the rooms."""

from __future__ import annotations

import json
import logging
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastcoop.errors import UserError

# Read by torch's thread pool when it starts: on a shared machine, threads that spin while they wait for one that
# lost its core make training many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="fastcoop",
    help="Prompt learning for CLIP (CoOp): features once, then thousands of runs together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
features_app = typer.Typer(help="Look into feature stores.", no_args_is_help=True)
datasets_app = typer.Typer(help="Which datasets there are, and whether they are complete.")
results_app = typer.Typer(help="Look into results folders.", no_args_is_help=True)
app.add_typer(features_app, name="features")
app.add_typer(datasets_app, name="datasets")
app.add_typer(results_app, name="results")

DataRoot = Annotated[Path, typer.Option(help="Folder that holds the datasets.")]
Cache = Annotated[Path, typer.Option(help="Folder of the feature stores.")]
Device = Annotated[str, typer.Option(help='Where the towers run: "cpu" or "cuda".')]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
BackboneSpec = Annotated[
    str,
    typer.Option(
        "--backbone", help="RN50, ViT-B/16, MODEL:TAG, demo-resnet, or a folder with config and weights."
    ),
]


class Shown(str, Enum):
    """Formats that results are exported in."""

    csv = "csv"
    parquet = "parquet"


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")] = False,
) -> None:
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("fastcoop").setLevel(level)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder that everything goes into.")] = Path("fastcoop-demo"),
    full: Annotated[
        bool, typer.Option("--full", help="The paper's schedule, both backbones: hours.")
    ] = False,
) -> None:
    """Run the main job on the small world that ships with fastcoop: from pictures to Figure 3.

    Needs no network, no GPU and no data; a second call finds everything done.

    Example:  [bold]fastcoop demo[/bold]
    """
    from fastcoop.demo.run import run_demo

    typer.echo(run_demo(out, full))


@app.command("cache-features")
def cache_features(
    datasets: Annotated[list[str], typer.Argument(help="Dataset names, folders, or one grid file (*.yaml).")],
    backbone: BackboneSpec = "RN50",
    data_root: DataRoot = Path("data"),
    cache: Cache = Path("cache"),
    shots: Annotated[str, typer.Option(help='Shots to cache for, or "all".')] = "1,2,4,8,16",
    seeds: Annotated[str, typer.Option(help="Seeds to cache for.")] = "1,2,3",
    views: Annotated[int, typer.Option(help="Augmented views per training image.")] = 8,
    recipe: Annotated[str, typer.Option(help='Image transforms: "current" or "official-2021".')] = "current",
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    skip_unreadable: Annotated[bool, typer.Option(help="Leave out images that cannot be decoded.")] = False,
    device: Device = "cpu",
) -> None:
    """Compute image features once and keep them in HDF5.

    Caches what the shots and seeds can draw from the training split, and all of validation and test; asking for
    more later adds what is missing.

    Example:  [bold]fastcoop cache-features oxford_pets --backbone RN50 --data-root data[/bold]
    """
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.datasets import load_dataset
    from fastcoop.features import cache_features as cache_one
    from fastcoop.sweeps import read_grid

    backbones, wanted_shots, wanted_seeds = [backbone], _numbers(shots, "shots"), _numbers(seeds, "seeds")
    if len(datasets) == 1 and datasets[0].endswith((".yaml", ".yml")):
        grid = read_grid(datasets[0])
        backbones, datasets, views = list(grid.backbones), list(grid.datasets), grid.views
        wanted_shots, wanted_seeds = list(grid.shots), list(grid.seeds)
    loaded = [load_dataset(name, data_root) for name in datasets]
    for spec in backbones:
        model = backbone_from_spec(spec, device=device)
        for dataset in loaded:
            path = cache_one(
                model, dataset, cache, shots=wanted_shots, seeds=[int(seed) for seed in wanted_seeds], views=views,
                recipe=recipe, dtype=dtype, skip_unreadable=skip_unreadable,
            )  # fmt: skip
            typer.echo(path)


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="The grid file.")],
    data_root: DataRoot = Path("data"),
    cache: Cache = Path("cache"),
    results: Annotated[Path | None, typer.Option(help="Results folder (results/<grid name>).")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value in place of the grid's.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this method; may be given again.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
    memory_budget: Annotated[float | None, typer.Option(help="GB that training may take at once.")] = None,
    device: Device = "cpu",
    jobs: Annotated[int, typer.Option(help="Processes for linear probes; -1 is one per core.")] = -1,
    as_json: AsJson = False,
) -> None:
    """Run every experiment of a grid file that is not done yet.

    Features that are missing are cached first. Interrupt it when you like: the same command goes on.

    Example:  [bold]fastcoop sweep experiments/photographs.yaml --set shots=1,16[/bold]
    """
    from fastcoop.sweeps import sweep as run_sweep

    summary = run_sweep(
        grid, data_root=data_root, cache=cache, results=results, overrides=overrides or (), only=only or (),
        dry_run=dry_run, memory_budget=memory_budget, device=device, jobs=jobs,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(summary.as_json(), indent=1))
        return
    for count in summary.counts:
        typer.echo(
            f"{count.backbone}  {count.dataset}  {count.method}: {count.runs} runs, {count.done} done before"
        )
    doing = "would run" if dry_run else "finished"
    number = summary.runs - summary.done_before if dry_run else summary.finished
    typer.echo(
        f"{doing} {number} of {summary.runs} runs; {summary.done_before} were done before: {summary.results}"
    )
    if summary.diverged:
        typer.echo(f"{summary.diverged} runs diverged; they are marked in the results.", err=True)


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


@features_app.command("check")
def check_features(
    file: Annotated[Path, typer.Argument(help="A feature store (*.h5).")],
    backbone: Annotated[str | None, typer.Option(help="Encode a sample anew with this backbone.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The dataset whose images to encode.")] = None,
    data_root: DataRoot = Path("data"),
    sample: Annotated[int, typer.Option(help="Images to encode anew.")] = 32,
) -> None:
    """Verify a store's digests and counts; with --backbone and --dataset, encode a sample anew.

    Example:  [bold]fastcoop features check cache/RN50/oxford_pets.h5[/bold]
    """
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.datasets import load_dataset
    from fastcoop.features.check import check_store

    model = backbone_from_spec(backbone) if backbone else None
    images = load_dataset(dataset, data_root) if dataset else None
    found = check_store(file, model, images, sample=sample)
    typer.echo("\n".join(found.lines()))
    if not found.ok:
        raise typer.Exit(2)


@features_app.command("import")
def import_store(
    test: Annotated[Path, typer.Option(help=".npz or .pt of features, labels and names.")],
    name: Annotated[str, typer.Option(help="What the dataset is called.")],
    backbone: BackboneSpec,
    train: Annotated[Path | None, typer.Option(help="The same for training images.")] = None,
    val: Annotated[Path | None, typer.Option(help="The same for validation images.")] = None,
    template: Annotated[str, typer.Option(help="The hand-written prompt.")] = "a photo of a {}.",
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    cache: Cache = Path("cache"),
) -> None:
    """Make a store of features that were computed elsewhere.

    Example:  [bold]fastcoop features import --test test.npz --train train.npz --name birds --backbone RN50[/bold]
    """
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.features.imported import import_features

    files = {
        split: path for split, path in (("train", train), ("val", val), ("test", test)) if path is not None
    }
    model = backbone_from_spec(backbone)
    typer.echo(import_features(files, cache, model, name=name, template=template, dtype=dtype))


@datasets_app.callback(invoke_without_command=True)
def datasets(context: typer.Context, data_root: DataRoot = Path("data"), as_json: AsJson = False) -> None:
    """List the datasets and what of them is under the data root.

    Example:  [bold]fastcoop datasets --data-root data[/bold]
    """
    if context.invoked_subcommand is not None:
        return
    from fastcoop.datasets.survey import survey

    found = survey(data_root)
    if as_json:
        typer.echo(
            json.dumps([{"name": f.name, "place": str(f.place), "status": f.status} for f in found], indent=1)
        )
        return
    width = max(len(one.name) for one in found)
    for one in found:
        typer.echo(f"{one.name:<{width}}  {one.status:<24}  {one.place}")


@datasets_app.command("check")
def check(
    name: Annotated[str, typer.Argument(help="A dataset's name, or a folder.")],
    data_root: DataRoot = Path("data"),
) -> None:
    """Compare a dataset with Table 6, name what is missing, and say what to download.

    Example:  [bold]fastcoop datasets check oxford_pets --data-root data[/bold]
    """
    from fastcoop.datasets.survey import check_dataset

    found = check_dataset(name, data_root)
    typer.echo(f"{found.title}  {found.images}")
    for key, (have, expected) in found.counts.items():
        typer.echo(f"  {key}: {have:,}" + ("" if expected is None else f" of {expected:,}"))
    for line in (*found.problems, *(f"missing: {path}" for path in found.missing[:20]), *found.advice):
        typer.echo(f"  {line}")
    if found.problems:
        raise typer.Exit(2)


@results_app.command("list")
def list_results(
    results: Annotated[Path, typer.Argument(help="A results folder.")], as_json: AsJson = False
) -> None:
    """Show every run: what it was, its accuracy, and the beginning of its key."""
    from fastcoop.sweeps import load_results

    frame = load_results(results)
    columns = ["key", "backbone", "dataset", "label", "shots", "seed", "accuracy", "status", "seconds"]
    if as_json:
        typer.echo(frame[columns].to_json(orient="records", indent=1))
    else:
        shown = frame[columns].assign(key=frame.key.str[:12])
        typer.echo(shown.to_string(index=False, float_format=lambda value: f"{value:.2f}"))


@results_app.command("export")
def export_results(
    results: Annotated[Path, typer.Argument(help="A results folder.")],
    to: Annotated[Path, typer.Argument(help="The file to write, .csv or .parquet.")],
) -> None:
    """Write the results table as tidy CSV or Parquet.

    Example:  [bold]fastcoop results export results/demo demo.csv[/bold]
    """
    from fastcoop.sweeps import load_results

    frame = load_results(results)
    if to.suffix == ".csv":
        frame.to_csv(to, index=False)
    elif to.suffix == ".parquet":
        try:
            frame.to_parquet(to, index=False)
        except ImportError:
            raise UserError("Writing Parquet needs pyarrow; install it, or export to a .csv file.") from None
    else:
        raise UserError(
            f"Results are exported to .csv or .parquet, not to {to.name}; choose one of those endings."
        )
    typer.echo(f"{len(frame)} rows: {to}")


@results_app.command("merge")
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Results folders to add.")],
    into: Annotated[Path, typer.Option(help="The folder they are added to.")],
) -> None:
    """Add the runs of several results folders to one, by key; conflicts are named.

    Example:  [bold]fastcoop results merge results/machine-a results/machine-b --into results/all[/bold]
    """
    from fastcoop.sweeps import merge_results

    typer.echo(f"{merge_results(folders, into)} runs added to {into}")


@app.command()
def bench(
    class_names: Annotated[
        Path | None, typer.Option(help="Folder of JSON lists of class names, one per dataset.")
    ] = None,
    datasets: Annotated[str | None, typer.Option(help="Only these, separated by commas.")] = None,
    backbone: Annotated[str, typer.Option(help="An open_clip model; its weights are random.")] = "RN50",
    repeats: Annotated[int, typer.Option(help="Measurements per contender; medians are shown.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.md and bench.png.")] = Path(
        "reports/bench"
    ),
    device: Device = "cpu",
    project: Annotated[
        str | None, typer.Option(help='"fig3": what the paper\'s Figure 3 would take.')
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure training steps the official way and fastcoop's, in turn, in one process.

    Without --class-names: ImageNet's names, all of them and the first 10 and 100.

    Example:  [bold]fastcoop bench --datasets imagenet-10 --repeats 5[/bold]
    """
    from fastcoop.bench import class_lists, projection, run_bench, table, write_bench
    from fastcoop.bench.names import random_backbone
    from fastcoop.bench.show import markdown

    lists = class_lists(class_names, datasets)
    if project not in (None, "fig3"):
        raise UserError(f'Only "fig3" can be projected, not "{project}".')
    measured = run_bench(random_backbone(backbone, device, dtype), lists, repeats)
    written = write_bench(measured, out)
    if as_json:
        typer.echo(written[0].read_text())
        return
    typer.echo(markdown(table(measured)))
    if project:
        typer.echo("")
        typer.echo(markdown(projection(measured)))
    typer.echo("\n".join(map(str, written)))


def _numbers(text: str, what: str) -> list[int | str]:
    """``"1,2,all"`` as a list."""
    values: list[int | str] = []
    for piece in text.split(","):
        piece = piece.strip()
        if piece == "all" and what == "shots":
            values.append("all")
        elif piece.isdigit():
            values.append(int(piece))
        else:
            raise UserError(f'--{what} should be whole numbers separated by commas; "{piece}" came.')
    return values


def main(arguments: list[str] | None = None) -> Any:
    """The entry point: a UserError is one sentence on standard error and exit code 2."""
    try:
        app(arguments)
    except UserError as error:
        typer.echo(f"fastcoop: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
