"""Class weights of runs as other programs read them: ``text_features.pt`` per dataset, number of shots and seed.

The layout is that of the prototypes of TransCLIP (Zanella et al., NeurIPS 2024):
``Few-shot/METHOD/ENCODER/Kshots/DATASET/seedS/text_features.pt``, a tensor (classes, dim) whose products with image
features of length 1, times 100, are logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcoop.backbones.precision import fresh_state
from fastcoop.checks import several
from fastcoop.errors import UserError, writing
from fastcoop.files import atomic_write
from fastcoop.methods import METHODS, Data, LinearClassifier
from fastcoop.progress import progress
from fastcoop.results.metadata import recorded_datasets
from fastcoop.results.read import load_results
from fastcoop.results.tables import select_rows
from fastcoop.sweeps.evaluation import load_backbones, restore_run

SCALE = 100.0  # that readers multiply products by
METHOD_NAMES = {"task_res": "taskres"}  # where readers have other names than grid files
ENCODERS = {
    "RN50": "rn50", "RN101": "rn101", "ViT-B-32": "vit_b32", "ViT-B-16": "vit_b16", "ViT-L-14": "vit_l14",
}  # fmt: skip


@fresh_state()
def export_text_features(
    results: str | Path,
    out: str | Path,
    *,
    where: Sequence[str] = (),
    backbones: Sequence[str] = (),
    device: str = "auto",
) -> list[Path]:
    """Write the class weights of runs, each as a float32 tensor (classes, dim) of ``torch.load``.

    Args:
        results: A results folder.
        out: Folder to write ``Few-shot/...`` to.
        where: Conditions on the runs, as `results list` takes them. Runs without few-shot training are left out.
        backbones: Names or folders of the runs' backbones, if they are not found by their recorded names.
        device: Of the backbones.

    Returns:
        The files.

    Raises:
        UserError: There is no such run, several runs would be written to one file, a run's logits are no products of
            image features of length 1 and class weights, or a file cannot be written.
    """
    folder = Path(results)
    table = load_results(folder)
    table = select_rows(
        table[(table.dataset == table.source) & (table.shots.astype(str) != "0")], several(where)
    )
    if table.empty:
        raise UserError(f"{folder} has no few-shot run that meets the conditions; change --where.")
    rows: list[Any] = list(table.itertuples())
    places: dict[Path, str] = {}
    for row in rows:
        method, encoder = METHOD_NAMES.get(row.method, row.method), ENCODERS.get(row.backbone, row.backbone)
        path = Path(out, "Few-shot", method, encoder, f"{row.shots}shots", row.dataset, f"seed{row.seed}")
        if path in places:
            raise UserError(
                f"Runs of {places[path]} and {row.label} would both be written to {path}; choose one with --where, "
                f'such as --where "label={row.label}".'
            )
        places[path] = row.label
    models = load_backbones(rows, several(backbones), device)
    known, written = recorded_datasets(folder), []
    with progress("Exporting class weights", len(places)) as advance:
        for path, row in zip(places, rows, strict=True):
            run = restore_run(folder, row, models[row.backbone_digest])
            prompt = known.get(row.dataset, {}).get("prompt", "[CLASS]").replace("[CLASS]", "{}")
            data = Data(replace(run.data.dataset, template=prompt), None)
            found = METHODS[row.method].classifier(run.model, run, data)
            if not (isinstance(found, LinearClassifier) and found.unit_length) or (
                found.bias is not None or found.rows is not None
            ):
                raise UserError(
                    f"The logits of {row.label} are no products of image features and class weights, so they have no "
                    "text_features.pt; leave such runs out with --where."
                )
            weights = np.asarray(found.weights * (found.scale / SCALE), np.float32)
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
                with atomic_write(path / "text_features.pt") as part:
                    torch.save(torch.from_numpy(weights), part)
            written.append(path / "text_features.pt")
            advance()
    return written
