"""Documents that cannot rot: links lead somewhere, commands parse and, if marked, run; numbers are measured ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

import fastcoop
from fastcoop.cli import main
from fastcoop.cli.app import app
from fastcoop.methods import METHODS
from tests.small_world import write_backbone, write_dataset
from tools.parity import __main__ as parity
from tools.quote import quote, requote

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "fastcoop").rglob("*.md")])
RUN = "<!-- run -->"  # before a block whose commands the tests run
# One after the other: a page may use what the one before it made.
RUNNING = ["docs/tutorials/own-pictures.md", "README.md", "docs/tutorials/deploy.md"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, marked: bool = False) -> Iterator[str]:
    """The shell blocks of a page, or only those marked to run."""
    text = page.read_text(encoding="utf-8")
    mark = re.escape(RUN) + r"\n" if marked else ""
    for found in re.finditer(mark + r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL):
        yield found[1]


def commands(block: str) -> Iterator[list[str]]:
    """The fastcoop commands of a block, as argument lists."""
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        for part in re.split(r"&&|;|\|", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"\$|[A-Z_]+=\S*|srun|time", words[0]):
                words = words[1:]
            if words[:1] == ["fastcoop"]:
                yield words[1:]


def inline(page: Path) -> Iterator[list[str]]:
    """Commands named in running text that give at least one option."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for code in re.findall(r"`(fastcoop [^`]*--[^`]*)`", text):
        if "..." not in code:
            yield shlex.split(" ".join(code.split()))[1:]


def parse(arguments: list[str]) -> None:
    """Let the command line read the arguments without doing anything. Raises for what does not exist."""
    command, name = typer.main.get_command(app), "fastcoop"
    context = command.make_context(name, list(arguments), resilient_parsing=False)
    rest = [*getattr(context, "_protected_args", []), *context.args]
    while rest and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"there is no command {rest[0]}"
        command = command.commands[rest[0]]
        context = command.make_context(rest[0], rest[1:], parent=context)
        rest = [*getattr(context, "_protected_args", []), *context.args]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page):
    for arguments in [*(found for block in blocks(page) for found in commands(block))]:
        try:
            parse(arguments)
        except Exception as error:
            pytest.fail(f"{name_of(page)}: fastcoop {' '.join(arguments)}: {error!r}")
    for arguments in inline(page):
        known = {option for found in every_option(arguments) for option in found}
        wrong = [word for word in arguments if word.startswith("--") and word.split("=")[0] not in known]
        assert not wrong, f"{name_of(page)}: fastcoop {' '.join(arguments)} has no {wrong[0]}"


def every_option(arguments: list[str]) -> Iterator[list[str]]:
    command = typer.main.get_command(app)
    for word in ["", *arguments]:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
        yield from ([*option.opts, *option.secondary_opts] for option in command.params)


def test_there_are_commands_to_check_and_mistakes_are_found():
    assert sum(len(list(commands(block))) for page in PAGES for block in blocks(page)) > 30
    for wrong, said in (
        (["swep", "x.yaml"], "swep"),
        (["sweep", "x.yaml", "--rezults", "y"], "rezults"),
        (["predict"], "[Mm]issing"),
    ):
        with pytest.raises(Exception, match=said):
            parse(wrong)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if re.search(r"(^|/)figures/", path) and "docs" in page.parts:
            continue  # added by docs/hooks.py; mkdocs checks it
        assert file.exists(), f"{name_of(page)} links to {target}, which is not there"
        if anchor and file.suffix == ".md" and not anchor.startswith("fastcoop."):
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
            }
            assert anchor in anchors, f"{name_of(page)} links to {target}, which has no such heading"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader of the documents has it: data/photos, a backbone RN50 (a small one), and grid files."""
    folder = tmp_path_factory.mktemp("desk")
    write_dataset(folder / "data" / "photos", train=3, val=1, test=2)
    write_backbone(folder / "models" / "RN50")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    photographs = yaml.safe_load((folder / "experiments" / "photographs.yaml").read_text(encoding="utf-8"))
    photographs |= {"shots": [1, 2], "seeds": [1], "views": 1}
    photographs["methods"]["coop"] |= {"context_length": 2, "epochs": 1}
    (folder / "experiments" / "photographs.yaml").write_text(yaml.safe_dump(photographs), encoding="utf-8")
    picture = next((folder / "data/photos/test/green").iterdir())
    shutil.copy(picture, folder / "cat.jpg")
    (folder / "holidays").mkdir()
    shutil.copy(picture, folder / "holidays" / "1.png")
    return folder


def at_the_desk(arguments: list[str], desk: Path) -> list[str]:
    """A document's command with the desk's backbone and run in place of those it names."""
    out = []
    for word in arguments:
        word = re.sub(r"(^|=)RN50$", rf"\g<1>{desk.as_posix()}/models/RN50", word)
        out.append(a_run(desk) if word == "3f2a" else word)
    if arguments[0] in ("export", "predict"):
        out += ["--backbone", str(desk / "models" / "RN50")]
    return out


def a_run(desk: Path) -> str:
    """Return a run of the study of own-pictures.md, which is run first if that page has not been."""
    results = desk / "results" / "photographs"
    if not results.exists():
        fastcoop.sweep(
            desk / "experiments" / "photographs.yaml", data_root=desk / "data", cache=desk / "cache", results=results,
            overrides=["datasets=photos", f"backbones={desk.as_posix()}/models/RN50"], jobs=1,
        )  # fmt: skip
    frame = fastcoop.load_results(results)
    return str(frame.key[frame.method == "coop"].iloc[0])[:12]


@pytest.mark.parametrize("page", RUNNING)
def test_commands_marked_to_run_do(page, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    ran = 0
    for block in blocks(ROOT / page, marked=True):
        for arguments in commands(block):
            with pytest.raises(SystemExit) as stopped:
                main(at_the_desk(arguments, desk))
            said = capsys.readouterr()
            assert not stopped.value.code, f"{page}: fastcoop {' '.join(arguments)}\n{said.err}"
            ran += 1
    assert ran >= 3
    assert page in RUNNING


def test_every_page_with_marked_commands_is_run():
    marked = {name_of(page) for page in PAGES if list(blocks(page, marked=True))}
    assert marked == set(RUNNING)


def test_the_example_study_runs(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    code = (ROOT / "examples" / "study.py").read_text(encoding="utf-8")
    code = code.replace('"RN50"', repr(str(desk / "models" / "RN50")))
    exec(compile(code, "study.py", "exec"), {"__name__": "study"})
    said = capsys.readouterr().out
    assert "13 runs in" in said
    assert len(re.findall(r"^\d \(4, 16\) loss ", said, re.MULTILINE)) == 3
    assert (desk / "reports" / "study" / "index.html").is_file()


def test_the_readme_quotes_the_benchmark():
    """Where this fails, run `python -m tools.quote`."""
    bench = json.loads((ROOT / "reports" / "bench" / "bench.json").read_text(encoding="utf-8"))
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert quote(bench) in page
    assert requote(page, bench) == page
    assert requote(page.replace(quote(bench), "what an earlier run said"), bench) == page


def test_official_codes_are_compared_at_the_commits_that_are_named():
    page = (ROOT / "docs" / "reproducibility.md").read_text()
    for repository, commit in parity.COMMITS.items():
        assert f"`{commit}`" in page, repository
    assert set(parity.METHODS) <= set(METHODS)


def test_the_comparison_names_missing_official_codes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parity", str(tmp_path), "clap"])
    with pytest.raises(SystemExit):
        parity.main()
    message = capsys.readouterr().err
    assert f"git clone https://github.com/jusiro/CLAP {tmp_path}/CLAP" in message
    assert "Dassl.pytorch" in message


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = {line.rpartition(".")[2] for line in re.findall(r"^::: (fastcoop\.\S+)$", page, re.MULTILINE)}
    assert named == set(fastcoop.__all__)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason='mkdocs-material is not installed: pip install -e ".[docs]"')
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        assert (tmp_path / "site" / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file()
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in home
    example = (tmp_path / "site" / "tutorials" / "python.html").read_text(encoding="utf-8")
    assert "Load a dataset" in example  # the file itself, not the line that asks for it
