"""``cache-features``, and looking into feature stores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fastcoop.cli.app import app, features_app
from fastcoop.cli.options import (
    AsJson,
    BackboneSpec,
    Cache,
    DataRoot,
    Device,
    SkipUnreadable,
    numbers,
    without_effect,
)
from fastcoop.cli.output import say, say_json
from fastcoop.errors import UserError

# What a grid file states itself.
GRID_SAYS = ("backbone", "shots", "seeds", "views", "recipe")


@app.command("cache-features")
def cache_features(
    context: typer.Context,
    datasets: Annotated[
        list[str], typer.Argument(help="Dataset names, folders, CSV files, or one grid file.")
    ],
    backbone: BackboneSpec = "RN50",
    data_root: DataRoot = Path("data"),
    cache: Cache = Path("cache"),
    shots: Annotated[str, typer.Option(help='Shots to cache for, or "all".')] = "1,2,4,8,16",
    seeds: Annotated[str, typer.Option(help="Seeds to cache for.")] = "1,2,3",
    views: Annotated[int, typer.Option(help="Augmented views per training image.")] = 8,
    recipe: Annotated[str, typer.Option(help='Image transforms: "current" or "official-2021".')] = "current",
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    skip_unreadable: SkipUnreadable = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compute image features once and keep them in HDF5.

    Caches what the shots and seeds can draw from the training split, and all of validation and test; asking for
    more later adds what is missing. Images that cannot be decoded are listed at the end, when all the rest is done.
    A grid file (*.yaml) says itself which backbones, datasets, shots, seeds, views and recipe it needs.

    Example:  [bold]fastcoop cache-features oxford_pets --backbone RN50 --data-root data[/bold]
    """
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.features import cache_all, find_dataset
    from fastcoop.sweeps import cache_grid

    if any(name.endswith((".yaml", ".yml")) for name in datasets):
        _refuse_beside_a_grid(context, datasets)
        paths = cache_grid(
            datasets[0], data_root=data_root, cache=cache, dtype=dtype, skip_unreadable=skip_unreadable,
            device=device,
        )  # fmt: skip
    else:
        wanted_seeds = [int(seed) for seed in numbers(seeds, "seeds")]
        wanted = [(find_dataset(name, data_root), numbers(shots, "shots"), wanted_seeds) for name in datasets]
        paths = cache_all(
            [backbone_from_spec(backbone, device=device)], wanted, cache, views=views, recipe=recipe, dtype=dtype,
            skip_unreadable=skip_unreadable,
        )  # fmt: skip
    if as_json:
        say_json(list(paths))
        return
    for path in paths:
        say(path)


def _refuse_beside_a_grid(context: typer.Context, datasets: list[str]) -> None:
    named = without_effect(context, GRID_SAYS)
    if len(datasets) > 1 or named:
        what = " ".join(named) if named else "another dataset or grid"
        raise UserError(f"A grid file says itself what to cache; {what} beside it came. Leave that out.")


@features_app.command("check")
def check_features(
    file: Annotated[Path, typer.Argument(help="A feature store (*.h5).")],
    backbone: Annotated[str | None, typer.Option(help="Encode a sample again with this backbone.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The dataset whose images to encode.")] = None,
    data_root: DataRoot = Path("data"),
    sample: Annotated[int, typer.Option(help="Images to encode again.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Verify a store's digests and counts; with --backbone and --dataset, encode a sample again.

    That tells how far features are from what they would be today, and how far float16 moves logits.

    Example:  [bold]fastcoop features check cache/RN50/oxford_pets.h5 --backbone RN50 --dataset oxford_pets[/bold]
    """
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.features import check_store, find_dataset

    model = backbone_from_spec(backbone) if backbone else None
    images = find_dataset(dataset, data_root) if dataset else None
    found = check_store(file, model, images, sample=sample)
    if as_json:
        say_json(asdict(found))
    else:
        for line in found.lines():
            say(line)
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
    as_json: AsJson = False,
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
    path = import_features(files, cache, model, name=name, template=template, dtype=dtype)
    if as_json:
        say_json(path)
    else:
        say(path)
