"""`fastcoop backbones`: what there is, where its weights are, and what prompt learning costs with it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
from huggingface_hub import constants

from fastcoop.backbones import backbone_from_spec, catalog, sources
from fastcoop.backbones.catalog import EMBEDDED_WEIGHTS, PromptCost, find_backbone, list_backbones
from fastcoop.cli import main
from fastcoop.engine.fit import RunShape, plan_training
from fastcoop.errors import UserError
from fastcoop.prompts import PromptLayout
from tests.advice import follows
from tests.docs.test_documents import parse
from tests.engine.conftest import tiny_backbone
from tests.small_world import write_backbone
from tools.count_backbones import row
from tools.plain_path import on_plain_path

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches: this folder's ``hub`` is Hugging Face's, its ``clip`` is open_clip's."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sources, "OPENAI_CACHE", tmp_path / "clip")
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["backbones", *arguments])
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return call


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def snapshot(caches: Path, repository: str) -> Path:
    return caches / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / "0123"


def test_the_list_has_all_of_open_clip_s_models_and_the_embedded_ones_first(run: Command) -> None:
    code, out, _ = run("--json")
    listed = json.loads(out)
    assert code == 0
    assert [one["name"] for one in listed[:2]] == ["demo-resnet", "demo-vit"]
    assert {one["name"] for one in listed[2:]} == set(open_clip.list_models())
    paths = {one["name"]: one["path"] for one in listed}
    assert paths["ViT-B-32"] == paths["ViT-H-14-worldwide"] == "shared"
    assert paths["ViT-B-16-SigLIP2"] == paths["xlm-roberta-base-ViT-B-32"] == "plain"
    assert all(one["parameters"] > 1e6 and one["text"]["width"] for one in listed)
    _, out, _ = run()
    header, *lines = out.splitlines()
    assert header.split() == [
        "backbone",
        "parameters",
        "pixels",
        "features",
        "text",
        "tower",
        "prompts",
        "weights",
    ]
    assert len(lines) == len(listed)
    assert lines[0].endswith("here")


def test_the_table_of_models_is_right() -> None:
    """Where this fails after an update of open_clip, run ``python -m tools.count_backbones``."""
    for name in ("RN50", "ViT-B-16-SigLIP2", "roberta-ViT-B-32", "coca_base"):
        assert row(name) == {"model": name} | catalog._table()[name], name
    model = backbone_from_spec("demo-vit").model
    vit = find_backbone("demo-vit")
    assert vit is not None
    assert vit.parameters == sum(one.numel() for one in model.parameters())
    assert vit.image_parameters == sum(one.numel() for one in model.visual.parameters())


# Millions of parameters of models with Hugging Face's towers, as open_clip publishes them (docs/model_profile.csv).
PUBLISHED = {
    "roberta-ViT-B-32": 212.72, "coca_roberta-ViT-B-32": 420.37, "xlm-roberta-base-ViT-B-32": 366.12,
    "xlm-roberta-large-ViT-H-14": 1193.01, "mt5-base-ViT-B-32": 365.71, "mt5-xl-ViT-H-14": 2306.75,
    "nllb-clip-base": 501.89, "nllb-clip-large": 1399.22,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_hugging_face_towers_have_the_published_number_of_parameters(name: str) -> None:
    assert round(catalog._table()[name]["parameters"] / 1e6, 2) == PUBLISHED[name]


def test_a_model_that_is_not_in_the_table_is_counted_when_it_is_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = find_backbone("ViT-B-32")
    monkeypatch.setattr(catalog, "_table", dict)
    assert find_backbone("ViT-B-32") == known


def test_the_cost_is_what_the_engine_plans() -> None:
    text = catalog.TextSize(32, 3, 4, 128, 77)
    names = tuple(f"{first} {second}" for first in "abcdefghij" for second in "klmnopqrst")
    shape = RunShape(names, PromptLayout(16), 0, 4, 1, 1)
    backbone = tiny_backbone()
    cost, planned = PromptCost.of(text), plan_training(backbone, [shape]).runs[0]
    plain = plan_training(on_plain_path(backbone), [shape]).runs[0]
    assert cost.vectors == 16
    assert cost.plain_positions == plain.tree.rows == 100 * 77
    assert cost.shared_positions == 416
    assert planned.tree.rows == 16 + 10 + 100 * 3  # here names share their first token
    assert 1 < cost.shared_flops / planned.step_flops < 2
    assert 1 < cost.plain_flops / plain.step_flops < 2
    assert PromptCost.of(catalog.TextSize(32, 3, 4, 128, 16)).vectors == 11  # the most that fit
    assert PromptCost.of(text, masks_padding=True).plain_positions == 100 * (16 + 2 + 3)


def test_weights_are_found_where_open_clip_and_the_hub_keep_them(caches: Path) -> None:
    def at_hand(name: str) -> list[tuple[str, Path | None]]:
        one = find_backbone(name)
        assert one is not None
        return [(weights.backbone, weights.file) for weights in one.at_hand]

    assert at_hand("ViT-B/32") == at_hand("ViT-B-16-SigLIP2") == []
    openai = put(caches / "clip" / "ViT-B-32.pt")
    webli = put(snapshot(caches, "timm/ViT-B-16-SigLIP2") / "open_clip_model.safetensors")
    assert at_hand("ViT-B/32") == [("ViT-B-32:openai", openai)]
    assert at_hand("ViT-B-32:laion2b_s34b_b79k") == []
    assert at_hand(f"ViT-B-32-gelu:{openai}") == [(f"ViT-B-32-gelu:{openai}", openai)]
    assert at_hand("ViT-B-16-SigLIP2") == [("ViT-B-16-SigLIP2:webli", webli)]
    listed = [one.name for one in list_backbones("ViT-B")]
    assert set(listed[:3]) == {"ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP2"}
    both = {"ViT-B-32:openai": openai, "ViT-B-32-quickgelu:openai": openai, "ViT-B-16-SigLIP2:webli": webli}
    found = {one.backbone: one.file for one in catalog.weights_at_hand()}
    assert found == both | {
        name: EMBEDDED_WEIGHTS / f"{name}.safetensors" for name in ("demo-resnet", "demo-vit")
    }


def test_models_in_the_hub_s_cache_and_in_folders_are_listed(
    caches: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = write_backbone(caches / "models" / "tiny")
    cached = snapshot(caches, "somebody/birds-clip")
    cached.parent.mkdir(parents=True)
    write_backbone(cached)
    (caches / "models" / "notes").mkdir()
    one = find_backbone("hf-hub:somebody/birds-clip")
    assert one is not None
    assert one.at_hand
    assert one.parameters == sum(
        weights.numel() for weights in backbone_from_spec(str(tiny)).model.parameters()
    )
    assert [found.name for found in list_backbones("birds")] == ["hf-hub:somebody/birds-clip"]
    assert catalog.weights_at_hand()[2].backbone == "hf-hub:somebody/birds-clip"
    tagged = snapshot(caches, "timm/ViT-B-16-SigLIP2")  # listed with its tag, and found by its own name, too
    tagged.parent.mkdir(parents=True)
    write_backbone(tagged)
    assert run("hf-hub:timm/ViT-B-16-SigLIP2")[0] == 0
    assert "hf-hub:timm/ViT-B-16-SigLIP2" not in [found.name for found in list_backbones()]
    monkeypatch.chdir(caches)
    assert [found.name for found in list_backbones("models")] == ["models/tiny"]
    code, out, _ = run("models/tiny")
    assert code == 0
    assert "--backbone models/tiny" in out


def test_a_cached_model_is_read_once_to_find_it_and_once_to_list_it(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = snapshot(caches, "somebody/birds-clip")
    cached.parent.mkdir(parents=True)
    write_backbone(cached)
    read, folders = sources.read_folder_config, list[Path]()

    def counted(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
        folders.append(folder)
        return read(folder)

    monkeypatch.setattr(sources, "read_folder_config", counted)
    assert "hf-hub:somebody/birds-clip" in [one.name for one in list_backbones()]
    assert folders == [cached, cached]


def test_a_page_has_every_fact_and_commands_that_parse(run: Command) -> None:
    for name in ("ViT-B/32", "vit-b-16-siglip2", "PE-Core-B-16", "demo-vit", "coca_base", "nllb-clip-base"):
        code, out, _ = run(name)
        assert code == 0
        assert " path" in out
        assert "operations" in out
        commands = [line.strip() for line in out.splitlines() if line.startswith("  fastcoop ")]
        assert len(commands) == 2
        for line in commands:
            parse(shlex.split(line)[1:])
    assert "16 vectors leave 14 for a class name" in run("PE-Core-B-16")[1]
    code, out, _ = run("vit-b/16-siglip2:webli", "--json")
    page = json.loads(out)
    assert (page["path"], page["reason"]) == ("plain", "its attention is not causal")
    assert page["cost"]["plain_positions"] == 6400
    assert page["weights"][0]["repository"] == "timm/ViT-B-16-SigLIP2"


def test_what_is_not_known_without_a_file_is_not_called_not_learned(caches: Path, run: Command) -> None:
    folder = write_backbone(caches / "bert")
    file = folder / "bert.json"
    config = json.loads(file.read_text())
    config["text_cfg"]["hf_model_name"] = "no/bert"
    file.write_text(json.dumps(config))
    _, out, _ = run(str(folder))
    assert 'prompts     not known: The config "no/bert" is not on this machine' in out
    assert "--only" not in out
    _, out, _ = run(str(caches))
    assert "None" not in out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ViT-B-23", 'There is no backbone "ViT-B-23". Did you mean "ViT-B-32"?'),
        ("ViT-B-32:opena", 'There is no file or tag of ViT-B-32 "opena". Did you mean "openai"?'),
        (
            "hf-hub:no/thing",
            'The model "no/thing" is not on this machine. Run "hf download no/thing --local-dir',
        ),
    ],
)
def test_an_unknown_name_gets_the_nearest_one_and_exit_code_2(run: Command, name: str, said: str) -> None:
    code, out, err = run(name)
    assert (code, out) == (2, "")
    assert said in err


@follows("hf download {} --local-dir FOLDER  # without a network here: elsewhere; then name FOLDER")
def test_weights_that_were_brought_by_hand(caches: Path, run: Command) -> None:
    assert "hf download timm/ViT-B-16-SigLIP2 --local-dir FOLDER" in run("ViT-B-16-SigLIP2")[1]
    folder = write_backbone(caches / "FOLDER")  # as that command leaves it: config and weights
    assert backbone_from_spec(str(folder)).name == "FOLDER"


def test_a_folder_that_cannot_be_read_is_named(caches: Path) -> None:
    folder = write_backbone(caches / "tiny")
    (folder / "tiny.json").write_text("{}")
    with pytest.raises(UserError, match="holds no open_clip model config"):
        find_backbone(str(folder))
