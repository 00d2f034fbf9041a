"""A run out of a results folder, in the form that something else reads."""

from __future__ import annotations

from pathlib import Path

import torch

from fastcoop.backbones.precision import fresh_state
from fastcoop.errors import UserError, nearest, writing
from fastcoop.exchange.classifier import make_classifier
from fastcoop.exchange.official import frozen_embeddings, official_path, write_official
from fastcoop.exchange.runs import find_run, write_contexts_file

FORMATS = ("coop", "safetensors", "classifier")


@fresh_state()
def export_run(
    results: str | Path, key: str, format: str, out: str | Path, backbone: str | None = None
) -> Path:
    """Write a CoOp run's contexts for others to use; returns the file.

    Args:
        results: a results folder.
        key: the run's, or its beginning.
        format: "coop", a checkpoint in the official code's layout of folders under ``out``; "safetensors", the
            contexts with their metadata; "classifier", the finished classifier.
        out: the file to write; for "coop" the folder.
        backbone: what the run learned over, as a command line names it; by default what the results call it.

    Raises:
        UserError: no such run, format or backbone, or a disk that refuses.
    """
    if format not in FORMATS:
        raise UserError(f'Runs cannot be exported as "{format}".{nearest(format, FORMATS)}')
    run, path = find_run(results, key), Path(out)
    if backbone is not None:
        run.load_backbone(backbone)
    if format == "safetensors":
        write_contexts_file(path, run)
        return path
    model = run.load_backbone(backbone)
    if format == "classifier":
        make_classifier(run, model).save(path)
        return path
    layout = run.layout(model)
    if layout.prompt is not None:
        raise UserError(
            f'The official code has no place for the words of "{layout.prompt}"; export the classifier instead.'
        )
    words = run.settings.init
    path = official_path(path, run.dataset, run.backbone, layout, run.shots, run.seed, run.epochs, words)
    ctx = torch.from_numpy(run.contexts).to(getattr(torch, run.learned_dtype))
    with writing(path):
        write_official(
            path, ctx, *frozen_embeddings(model, run.class_names, layout.context_length), run.epochs
        )
    return path
