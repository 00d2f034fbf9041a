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
    class_names: Annotated[
        Path | None, Option(help="Folder of JSON lists, in place of the paper's datasets.")
    ] = None,
    backbone: Annotated[str, Option(help="An open_clip model; its weights are random.")] = "RN50",
    repeats: Annotated[int, Option(min=1, help="Measurements, fewer for slow contenders.")] = 5,
    dtype: Annotated[str, Option(help="Of both contenders: float32 or bfloat16.")] = "float32",
    precision: Annotated[str | None, Option(help="Also measure this precision: bfloat16.")] = None,
    out: Annotated[Path, Option(help="Folder for bench.json and bench.md.")] = Path("reports/bench"),
    device: Device = "auto",
    rows: Annotated[
        str, Option(help="On a GPU: rows of the steps that are measured.")
    ] = "4096,16384,65536,131072",
    profile: Annotated[
        bool, Option("--profile", help="On a GPU: also print each step's longest kernels.")
    ] = False,
    project: Annotated[
        str | None, Option(help='"fig3": also print the time that each part of Figure 3 takes.')
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
    from fastcoop.backbones.load import resolve_device
    from fastcoop.bench import class_lists, random_backbone, run_bench
    from fastcoop.bench.benchmark import torch_dtype
    from fastcoop.bench.tables import markdown, sections

    lists = class_lists(datasets or (), class_names)
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
        if precision == dtype:
            raise UserError(f"--precision is compared with --dtype, and both are {dtype}; leave one out.")
        second = None if precision is None else torch_dtype(precision)
        measured = run_bench(random_backbone(backbone, device, dtype), lists, repeats, second, out)
    lines, value = sections(measured, profile)[1:], asdict(measured)
    if project:
        from fastcoop.bench.figure import FIGURE, project_figure

        figure = project_figure(random_backbone(backbone, device, dtype), measured)
        lines += [FIGURE, markdown(figure)]
        value["projection"] = figure.to_dict("records")
    show(value, [*"\n\n".join(lines).split("\n"), out / "bench.json", out / "bench.md"], as_json)
