"""``bench``."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fastcoop.cli.app import app
from fastcoop.cli.options import AsJson, Device, comma_list
from fastcoop.cli.output import show
from fastcoop.errors import UserError

log = logging.getLogger("fastcoop")


@app.command()
def bench(
    class_names: Annotated[Path | None, typer.Option(help="Folder of JSON lists, one per dataset.")] = None,
    datasets: Annotated[
        list[str] | None, comma_list(help="Datasets of the paper, or files of that folder.")
    ] = None,
    backbone: Annotated[str, typer.Option(help="An open_clip model; its weights are random.")] = "RN50",
    repeats: Annotated[int, typer.Option(min=1, help="Measurements, fewer for slow contenders.")] = 5,
    dtype: Annotated[str, typer.Option(help="Of both contenders: float32 or bfloat16.")] = "float32",
    precision: Annotated[
        str | None, typer.Option(help="bfloat16: also measure its speed and error beside --dtype's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.md.")] = Path("reports/bench"),
    device: Device = "cpu",
    project: Annotated[str | None, typer.Option(help='"fig3": also print the time Figure 3 takes.')] = None,
    as_json: AsJson = False,
) -> None:
    """Time training steps of the official code and of fastcoop, alternately, in one process per dataset.

    All of the paper's eleven class lists take the better part of an hour on two quiet cores. Each dataset's result is
    written when it is measured. Without --class-names and --datasets: ImageNet's names, all of them and the first 10
    and 100.

    Example:  [bold]fastcoop bench --datasets imagenet-10 --repeats 5[/bold]
    """
    from fastcoop.bench import class_lists, projection, run_bench, table, write_bench
    from fastcoop.bench.inputs import random_backbone, torch_dtype
    from fastcoop.bench.project import ARITHMETIC
    from fastcoop.bench.show import markdown, precision_table, write_json
    from fastcoop.engine.weights import warn_if_dtype_is_slow

    lists = class_lists(class_names, ",".join(datasets) if datasets else None)
    if project not in (None, "fig3"):
        raise UserError(f'Only "fig3" can be projected, not "{project}".')
    if project and as_json:
        raise UserError("A projection is printed as text; give --project without --json.")
    if precision == dtype:
        raise UserError(f"--precision is compared with --dtype, and both are {dtype}; leave one out.")
    rounded = None if precision is None else torch_dtype(precision)
    frozen = random_backbone(backbone, device, dtype)
    try:  # before an hour of measuring
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"{out} cannot be written to ({error.strerror}); give another to --out.") from None
    warn_if_dtype_is_slow(frozen.dtype, frozen.device.type)
    if rounded is not None and warn_if_dtype_is_slow(rounded, frozen.device.type):
        log.warning("Measuring it would take hours; going on without --precision %s.", precision)
        rounded = None
    measured = run_bench(frozen, lists, repeats, rounded, on_dataset=lambda so_far: write_json(so_far, out))
    written = write_bench(measured, out)
    lines = markdown(table(measured)).split("\n")
    if measured.precision:
        lines += ["", *markdown(precision_table(measured)).split("\n")]
    if project:
        lines += ["", ARITHMETIC, "", *markdown(projection(measured)).split("\n")]
    show(json.loads(written[0].read_text(encoding="utf-8")), [*lines, *map(str, written)], as_json)
