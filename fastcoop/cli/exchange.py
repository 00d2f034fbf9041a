"""``import-coop``, ``export`` and ``predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from fastcoop.cli import options
from fastcoop.cli.groups import app
from fastcoop.cli.output import say, show
from fastcoop.progress import counted, progress


@app.command("import-coop")
def import_coop(
    place: Annotated[Path, Argument(help="A checkpoint, or a folder with checkpoints below it.")],
    dataset: Annotated[str, Option(help="The dataset that they were trained on.")],
    backbone: options.BackboneSpec,
    data_root: options.DataRoot = Path("data"),
    results: options.Results = Path("results/imported"),
    class_position: Annotated[str | None, Option(help="end, mid or front.")] = None,
    shots: Annotated[int | None, Option(help="Images per class.")] = None,
    seed: Annotated[int | None, Option(help="Seed of the subset.")] = None,
    recipe: options.Recipe = "current",
    class_names: options.ClassNames = None,
    as_json: options.AsJson = False,
) -> None:
    """Import checkpoints of the official CoOp code.

    They become runs of a results folder. No code in them is run. The class position, shots and seed are those
    in the folder names where no option gives them. The last epoch of each folder is used. Sizes, weights
    and class names are compared first.

    Example:  fastcoop import-coop output/imagenet --dataset imagenet --backbone RN50
    """
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.datasets import load_dataset
    from fastcoop.exchange import import_coop as import_all

    data, model = load_dataset(dataset, data_root, class_names), backbone_from_spec(backbone)
    found = import_all(
        place, model, data, results, class_position=class_position, shots=shots, seed=seed, recipe=recipe
    )
    lines = [f"{one.key[:12]}  {one.label}  {one.path}" for one in found]
    show([one._asdict() for one in found], [*lines, f"{counted(len(found), 'run')}: {results}"], as_json)


@app.command("export")
def export(
    run: options.RunKey,
    results: options.Results,
    format: Annotated[str, Option("--format", help="coop, safetensors or classifier.")] = "classifier",
    out: Annotated[Path | None, Option(help="File to write, for coop a folder (below exported/).")] = None,
    backbone: Annotated[str | None, options.FOUND_BY_NAME] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a run's learned prompt for other programs.

    The formats are a checkpoint for the official code (coop), the contexts with everything that describes them
    (safetensors), and the finished classifier in one file (classifier), which needs only open_clip. Runs of other
    methods whose logits are linear, such as task_res and gda, have only the last.

    Example:  fastcoop export 3f2a --results results/photographs --format classifier
    """
    from fastcoop.exchange import export_run
    from fastcoop.results.read import find_key

    key = find_key(results, run)
    name = "" if format == "coop" else f"{key[:12]}.{format}.safetensors"
    written = export_run(results, key, format, out or Path("exported", name), backbone)
    show({"key": key, "file": written}, [written], as_json)


@app.command("export-weights")
def export_weights(
    results: options.ResultsFolder,
    where: options.Where = None,
    out: Annotated[Path, Option(help="Folder to write to.")] = Path("prototypes"),
    backbones: options.Backbones = None,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Write class weights of few-shot runs.

    Each run becomes a tensor of (classes, dim), METHOD/ENCODER/Kshots/DATASET/seedS/text_features.pt in the folder
    Few-shot, as in the layout of TransCLIP's prototypes. Methods whose logits are no product of image features and
    class weights have none.

    Example:  fastcoop export-weights results/field_fewshot --where method=coop,task_res --where shots=16
    """
    from fastcoop.exchange import export_text_features

    paths = export_text_features(results, out, where=where or (), backbones=backbones or (), device=device)
    show(paths if as_json else None, paths, as_json)


@app.command("predict")
def predict(
    classifier: Annotated[Path, Argument(help="A file of `fastcoop export --format classifier`.")],
    images: Annotated[list[Path], Argument(help="Image files, and folders of them.")],
    k: Annotated[int, Option("-k", min=1, help="Labels per image.")] = 3,
    backbone: Annotated[str | None, options.FOUND_BY_NAME] = None,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Label images, with probabilities.

    Example:  fastcoop predict exported/3f2a.classifier.safetensors cat.jpg holidays -k 1
    """
    from fastcoop.exchange import Classifier, image_files
    from fastcoop.exchange import predict as classify

    loaded, files = Classifier.load(classifier), image_files(images)
    model = loaded.load_backbone(backbone, device)
    found = []
    with progress(f"Classifying with {loaded.backbone}", len(files)) as advance:
        for prediction in classify(loaded, model, files):
            found.append(prediction)
            advance()
    rows, lines, width = [], [], max(len(str(one.path)) for one in found)
    for one in found:
        if one.probabilities is None:
            say(f"{one.path}: {one.problem}", err=True)
            continue
        best = (-one.probabilities).argsort(kind="stable")[:k]
        labels = [(loaded.class_names[label], float(one.probabilities[label])) for label in best]
        lines.append(f"{one.path!s:<{width}}  " + "  ".join(f"{name} {p:.1%}" for name, p in labels))
        rows.append({"image": one.path, "labels": [{"label": name, "probability": p} for name, p in labels]})
    show(rows, lines, as_json)
    if len(rows) < len(found):
        raise typer.Exit(2)
