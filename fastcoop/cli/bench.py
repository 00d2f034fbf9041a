"""``bench``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Option

from fastcoop.cli.groups import app
from fastcoop.cli.options import AsJson, Device, comma_list, numbers
from fastcoop.cli.output import show
from fastcoop.errors import UserError


@app.command()
def bench(
    datasets: Annotated[
        list[str] | None, comma_list(help="Of the paper, imagenet-10 or imagenet-100.")
    ] = None,
    backbone: Annotated[str, Option(help="An open_clip model; its weights are random.")] = "RN50",
    repeats: Annotated[int, Option(min=1, help="Measurements, fewer for slow contenders.")] = 5,
    out: Annotated[Path, Option(help="Folder for bench.json and bench.md.")] = Path("reports/bench"),
    device: Device = "auto",
    rows: Annotated[
        str, Option(help="On a GPU: rows of the steps that are measured.")
    ] = "4096,16384,65536,131072",
    profile: Annotated[
        bool, Option("--profile", help="On a GPU: also print each step's longest kernels.")
    ] = False,
    project: Annotated[
        str | None, Option(help='"fig3": also project the time that each part of Figure 3 takes.')
    ] = None,
    measure: Annotated[
        str | None, Option(help='"study": only print the time that each part of a small study takes.')
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time training steps of fastcoop and of the official code.

    The official code's step and fastcoop's are measured alternately, in one process per dataset. All of the paper's
    eleven class lists take about an hour on two quiet cores. The results are written after each dataset. Without
    --datasets: ImageNet's names, all of them and the first 10 and 100. On a GPU one process measures float32, TF32 and
    bfloat16, steps of several sizes, and the GPU's own rates. --project fig3 also measures caching, probes, tests and
    reports, and needs the steps of one list only.

    Example:  fastcoop bench --datasets imagenet-10 --repeats 5
    """
    from fastcoop.backbones.devices import resolve_device
    from fastcoop.bench import class_lists, random_backbone, run_bench, write_bench
    from fastcoop.bench.tables import markdown, sections

    lists = class_lists(datasets or ())
    if project not in (None, "fig3"):
        raise UserError(f'Only "fig3" can be projected, not "{project}".')
    if measure not in (None, "study"):
        raise UserError(f'Only "study" can be measured, not "{measure}".')
    device = resolve_device(device)
    if measure:
        from fastcoop.bench.study import measure_study

        parts = measure_study(device=device)
        show({"study": parts.to_dict("records")}, markdown(parts).split("\n"), as_json)
        return
    if device != "cpu":
        from fastcoop.bench.gpu import run_gpu_bench

        sizes = [int(size) for size in numbers(rows, "--rows")]
        measured = run_gpu_bench(backbone, device, lists, sizes, repeats=repeats, out=out)
    else:
        measured = run_bench(random_backbone(backbone, device), lists, repeats, out)
    if project:
        from fastcoop.bench.figure import project_figure

        measured.projection = project_figure(random_backbone(backbone, device), measured).to_dict("records")
        write_bench(measured, out)
    lines = "\n\n".join(sections(measured, profile)[1:]).split("\n")
    show(asdict(measured), [*lines, out / "bench.json", out / "bench.md"], as_json)
