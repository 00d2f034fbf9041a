"""``demo``, ``report``, ``interpret`` and ``doctor``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from fastcoop.cli.groups import app
from fastcoop.cli.options import AsJson, BackboneSpec, ResultsFolder, Runs, comma_list
from fastcoop.cli.output import show


@app.command()
def demo(
    out: Annotated[Path, Option(help="Folder for everything it writes.")] = Path("fastcoop-demo"),
    full: Annotated[bool, Option("--full", help="The whole study: 1 to 2 hours.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a small study, from pictures to Figure 3.

    It draws its own datasets and needs no network, no GPU and no data. A second call finds everything done.

    Example:  fastcoop demo
    """
    from fastcoop.demo.run import run_demo

    shown = run_demo(out, full)
    show(shown, str(shown).split("\n"), as_json)


@app.command()
def report(
    results: ResultsFolder,
    out: Annotated[Path | None, Option(help="Report folder (reports/<results name>).")] = None,
    gallery: Annotated[bool, Option("--gallery", help="Show wrong test images on the page.")] = False,
    runs: Annotated[
        list[str] | None, comma_list("--run", help="Show these runs' mistakes; a second one is compared.")
    ] = None,
    data_root: Annotated[
        Path | None, Option(envvar="FASTCOOP_DATA_ROOT", help="Folder of the pictures (the sweep's).")
    ] = None,
    cache: Annotated[
        Path | None, Option(envvar="FASTCOOP_CACHE", help="Folder of the feature stores (the sweep's).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make figures, tables and a page from results.

    The page also checks the claims of the paper. Where runs are missing for an item, the command that would supply
    them is printed. For one run per dataset the page shows what went wrong: confusions, classes, calibration and, with
    --gallery, the pictures. --run A,B shows run A in its place, and which pictures only one of A and B gets right.

    Example:  fastcoop report results/photographs --gallery
    """
    from fastcoop.reports import report as make_report

    pictures = None
    if gallery:
        from fastcoop.features import PictureFinder
        from fastcoop.results.metadata import CLASS_NAMES, PLACES, recorded_places

        given = ["--data-root", "data", "--cache", "cache", *recorded_places(results, (*PLACES, CLASS_NAMES))]
        places = dict(zip(given[::2], given[1::2], strict=True))
        folders = data_root or places["--data-root"], cache or places["--cache"]
        pictures = PictureFinder(*folders, places.get(CLASS_NAMES))
    written = make_report(results, out or Path("reports") / results.name, pictures, runs or ())
    missing = next(path for path in written if path.name == "missing.txt").read_text(encoding="utf-8")
    show(written, [*missing.split("\n"), f"{len(written)} files: {written[0]}"], as_json)


@app.command()
def interpret(
    results: ResultsFolder,
    backbone: BackboneSpec,
    runs: Runs = None,
    k: Annotated[int, Option("-k", help="Nearest words per vector.")] = 5,
    all_tokens: Annotated[bool, Option(help="Also use tokens without training.")] = False,
    cosine: Annotated[bool, Option("--cosine", help="By 1 - cosine, not Euclidean distance.")] = False,
    latin_only: Annotated[bool, Option("--latin-only", help="N/A for words in other scripts.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the words nearest to learned contexts.

    These are the distances of Table 4, next to those of random vectors. A hyphen at the end marks part of a
    longer word. A class-specific context has one line per class and one for all.

    Example:  fastcoop interpret results/photographs --backbone RN50 -k 3
    """
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.sweeps import interpret as find_words

    paths = find_words(
        results, backbone_from_spec(backbone), runs=runs or (), k=k, trained_only=not all_tokens,
        metric="cosine" if cosine else "euclidean", latin_only=latin_only,
    )  # fmt: skip
    words_by_run = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    show(words_by_run, _word_lines(words_by_run), as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Describe this machine, for bug reports.

    It prints versions, devices, memory, folders and weights, and at the end what is slow or missing and what to do.

    Example:  fastcoop doctor
    """
    from fastcoop.doctor import examine, lines

    found = examine()
    show(found, lines(found), as_json)


def _word_lines(words_by_run: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    for key, words in words_by_run.items():
        yield (
            f"{key[:12]}  (mean distance of the nearest words of a random context: {words['by_chance']:.3g}, "
            f"of the initial one: {words['initial']:.3g})"
        )
        if "summary" not in words:
            for vector in words["vectors"]:
                pairs = zip(vector["words"], vector["distances"], strict=True)
                near = ", ".join(f"{word} ({distance:.3g})" for word, distance in pairs)
                yield f"  {vector['position']:>2}  {near}  [random vectors of this length: {vector['chance']:.3g}]"
            continue
        for name, group in groupby(words["vectors"], key=lambda vector: vector["class"]):
            near = ", ".join(f"{vector['words'][0]} ({vector['distances'][0]:.3g})" for vector in group)
            yield f"  {name}: {near}"
        summary = words["summary"]
        often = ", ".join(f"{word} ({count})" for word, count in summary["words"])
        yield (
            f"  {summary['classes']} classes: mean distance {summary['mean_distance']:.3g} (random vectors of the same "
            f"lengths: {summary['chance']:.3g}); most frequent words: {often}"
        )
