"""``datasets``, ``backbones``, ``cache-features`` and ``features``: what runs read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from fastcoop.cli import options
from fastcoop.cli.groups import app, datasets_app, features_app
from fastcoop.cli.output import show
from fastcoop.errors import UserError
from fastcoop.progress import counted

if TYPE_CHECKING:
    from fastcoop.datasets.load import Check

MAX_LISTED = 20  # missing files printed
IN_GRIDS = ("backbone", "shots", "seeds", "views", "kinds", "recipe")  # what a grid file names itself


@datasets_app.callback(invoke_without_command=True)
def datasets(
    context: typer.Context, data_root: options.DataRoot = Path("data"), as_json: options.AsJson = False
) -> None:
    """List datasets and whether they are complete.

    Example:  fastcoop datasets --data-root data
    """
    if context.invoked_subcommand is not None:
        return
    from fastcoop.datasets.load import survey

    rows = [(one.name, one.status, str(one.place)) for one in survey(data_root)]
    name, status, _ = (max(map(len, column), default=0) for column in zip(*rows, strict=True))
    lines = (f"{row[0]:<{name}}  {row[1]:<{status}}  {row[2]}" for row in rows)
    show([{"name": row[0], "place": row[2], "status": row[1]} for row in rows], lines, as_json)


@datasets_app.command("check")
def check(
    name: Annotated[str, Argument(help="A dataset's name, or a folder.")],
    data_root: options.DataRoot = Path("data"),
    class_names: options.ClassNames = None,
    as_json: options.AsJson = False,
) -> None:
    """Check a dataset's files, and warn of possible mistakes.

    Sizes of the paper's datasets are compared with its Table 6. What is missing is printed, and where to download it.

    Example:  fastcoop datasets check oxford_pets --data-root data
    """
    from fastcoop.datasets.load import check_dataset

    found = check_dataset(name, data_root, class_names)
    show(found, _check_lines(found), as_json)
    if found.problems:
        raise typer.Exit(2)


@datasets_app.command("names")
def names(
    name: Annotated[str, Argument(help="A folder or CSV of your own.")],
    data_root: options.DataRoot = Path("data"),
    out: Annotated[Path | None, Option(help="File to write (NAME-names.csv).")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a CSV with a name for each class, to be corrected.

    Class folders such as 001.Black_footed_Albatross, n02085620-Chihuahua and AnnualCrop make poor prompts. The file
    suggests names without numbers, IDs and words like "class" in front. Correct them, and pass the file to other
    commands with --class-names, or name it under class_names in the folder's dataset.yaml.

    Example:  fastcoop datasets names birds --data-root data
    """
    from fastcoop.datasets import write_class_names

    path, found = write_class_names(name, out, data_root)
    changed = sum(old != new for old, new in found.items())
    line = f"{path}: {counted(len(found), 'class')}, {changed} renamed"
    show({"path": path, "names": found}, [line], as_json)


@datasets_app.command("draw")
def draw(
    name: Annotated[str, Argument(help="A dataset's name, or a folder.")],
    data_root: options.DataRoot = Path("data"),
    shots: Annotated[str, Option(help="Images per class.")] = "1,2,4,8,16",
    seeds: Annotated[str, Option(help="Seeds, such as 1,2,3 or 1-10.")] = "1,2,3",
    out: Annotated[Path | None, Option(help="Folder to write to (below draws/).")] = None,
    class_names: options.ClassNames = None,
    as_json: options.AsJson = False,
) -> None:
    """Write few-shot subsets as .jsonl files for other programs.

    A pair of files per shots and seed, as 2SFS publishes its splits: shot_1-seed_1_train.jsonl and _val.jsonl. Such
    files, in the dataset's folder split_fewshot, are read in place of a draw.

    Example:  fastcoop datasets draw oxford_pets --data-root data --shots 1,16 --seeds 1-10
    """
    from fastcoop.datasets import load_dataset, write_draw

    dataset = load_dataset(name, data_root, class_names)
    folder = out or Path("draws", dataset.name)
    draws = product(*options.shots_and_seeds(shots, seeds))
    paths = [path for number, seed in draws for path in write_draw(dataset, number, seed, folder)]
    show(paths if as_json else None, paths, as_json)


def _check_lines(found: Check) -> Iterator[str]:
    yield f"{found.title}  {found.images}"
    for key, (have, expected) in found.counts.items():
        if have or expected:
            yield f"  {key}: {have:,}" + ("" if expected is None else f" of {expected:,}")
    yield from (f"  {problem}" for problem in found.problems)
    yield from (f"  missing: {path}" for path in found.missing[:MAX_LISTED])
    if (more := len(found.missing) - MAX_LISTED) > 0:
        yield f"  missing: {more:,} more (--json lists them all)"
    yield from (f"  to do: {line}" for line in found.advice)
    if not found.problems:
        notes = f"; {counted(len(found.notes), 'note')} on standard error, and with --json"
        yield f"  all there{notes if found.notes else ''}"


@app.command()
def backbones(
    name: Annotated[str | None, Argument(help="A backbone, part of names, or a folder of models.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """List backbones, or show one.

    It lists the backbones included in fastcoop, the models in Hugging Face's cache and all that open_clip knows, or
    those with NAME in their names. The whole name of one shows everything about it: its weights and where they are, the
    commands to use it, and how it learns prompts: on the shared path (what prompts have in common is computed once) or
    the plain path (all positions of all prompts), with what a step costs.

    Example:  fastcoop backbones siglip

    Example:  fastcoop backbones ViT-B-16-SigLIP2
    """
    from fastcoop.backbones.catalog import find_backbone, list_backbones, list_lines, page_lines

    if name is not None and (one := find_backbone(name)):
        show(one, page_lines(one), as_json)
        return
    found = list_backbones(name)
    show(found, list_lines(found), as_json)


@app.command("cache-features")
def cache_features(
    context: typer.Context,
    datasets: Annotated[list[str], Argument(help="Names, folders, CSV files, or one grid file.")],
    backbone: options.BackboneSpec = "RN50",
    data_root: options.DataRoot = Path("data"),
    cache: options.Cache = Path("cache"),
    shots: Annotated[str, Option(help='Shots to cache for, or "all".')] = "1,2,4,8,16",
    seeds: Annotated[str, Option(help="Seeds to cache for.")] = "1,2,3",
    views: Annotated[int, Option(help="Augmented views per training image, of each kind.")] = 8,
    kinds: Annotated[
        list[str] | None,
        options.comma_list(help="Kinds of features: coop (default), tip, flip, pre (docs/formats.md)."),
    ] = None,
    recipe: options.Recipe = "current",
    dtype: options.Dtype = "float16",
    precision: Annotated[
        str | None,
        Option(help="Of products: float32, tf32 (GPU), bfloat16. Default: the store's, or float32."),
    ] = None,
    skip_unreadable: options.SkipUnreadable = False,
    device: options.Device = "auto",
    class_names: options.ClassNames = None,
    as_json: options.AsJson = False,
) -> None:
    """Compute image features once and keep them in HDF5.

    The store holds the training images that these shots and seeds can draw, and all of validation and test. A later
    call with more shots or seeds adds the missing images. Images that cannot be decoded are listed at the end, after
    all others are stored. A grid file (*.yaml) names all of this itself.

    Example:  fastcoop cache-features oxford_pets --backbone RN50 --data-root data
    """
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.features import cache_all, find_datasets
    from fastcoop.sweeps import cache_grid

    if any(name.endswith((".yaml", ".yml")) for name in datasets):
        if extra := options.given_options(context, IN_GRIDS) or datasets[1:]:
            raise UserError(
                f"A grid file names what to cache itself, got {' '.join(extra)} too. Leave that out."
            )
        paths = cache_grid(
            datasets[0], data_root=data_root, cache=cache, dtype=dtype, precision=precision,
            skip_unreadable=skip_unreadable, device=device, class_names=class_names,
        )  # fmt: skip
    else:
        draws = options.shots_and_seeds(shots, seeds)
        wanted = [(one, *draws) for one in find_datasets(datasets, data_root, class_names).values()]
        paths = cache_all(
            [backbone_from_spec(backbone, device=device)], wanted, cache, views=views, kinds=kinds or ["coop"],
            recipe=recipe, dtype=dtype, precision=precision, skip_unreadable=skip_unreadable,
        )  # fmt: skip
    show(list(paths) if as_json else None, paths, as_json)


@features_app.command("check")
def check_features(
    file: Annotated[Path, Argument(help="A feature store (*.h5).")],
    backbone: Annotated[str | None, Option(help="Encode a sample again with this backbone.")] = None,
    dataset: Annotated[str | None, Option(help="The dataset whose images to encode.")] = None,
    data_root: options.DataRoot = Path("data"),
    sample: Annotated[int, Option(help="Images to encode again.")] = 32,
    class_names: options.ClassNames = None,
    as_json: options.AsJson = False,
) -> None:
    """Verify a store's digests and counts.

    With --backbone and --dataset, a sample of the images is encoded again. The sample shows how far the stored
    features are from today's, and how far float16 moves logits.

    Example:  fastcoop features check cache/RN50/oxford_pets.h5 --backbone RN50 --dataset oxford_pets
    """
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.features import check_store, find_dataset

    model = backbone_from_spec(backbone) if backbone else None
    images = find_dataset(dataset, data_root, class_names) if dataset else None
    found = check_store(file, model, images, sample=sample)
    show(found, found.lines(), as_json)
    if not found.ok:
        raise typer.Exit(2)


@features_app.command("import")
def import_store(
    test: Annotated[Path, Option(help=".npz or .pt of features, labels and class names.")],
    name: Annotated[str, Option(help="The dataset's name.")],
    backbone: options.BackboneSpec,
    train: Annotated[Path | None, Option(help="The same for training images.")] = None,
    val: Annotated[Path | None, Option(help="The same for validation images.")] = None,
    template: Annotated[str, Option(help="The hand-written prompt.")] = "a photo of a {}.",
    dtype: options.Dtype = "float16",
    cache: options.Cache = Path("cache"),
    as_json: options.AsJson = False,
) -> None:
    """Make a store of features that were computed elsewhere.

    Example:  fastcoop features import --test test.npz --train train.npz --name birds --backbone RN50
    """
    from fastcoop.features import import_features

    files = {split: path for split, path in (("train", train), ("val", val), ("test", test)) if path}
    path = import_features(files, cache, backbone, name=name, template=template, dtype=dtype)
    show(path, [path], as_json)
