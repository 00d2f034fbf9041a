"""``cache-features``, and looking into feature stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastcoop.cli.app import app, features_app
from fastcoop.cli.options import BackboneSpec, Cache, DataRoot, Device, numbers


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

    backbones, wanted_shots, wanted_seeds = [backbone], numbers(shots, "shots"), numbers(seeds, "seeds")
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
