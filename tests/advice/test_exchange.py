"""What the messages of exports, imports and predictions advise, done."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastcoop as fc
from fastcoop.cli import main
from fastcoop.errors import UserError
from fastcoop.exchange.coop_files import frozen_embeddings
from tests.advice import follows
from tests.exchange.conftest import backbone, dataset, save_official
from tests.small_world import write_backbone, write_dataset

__all__ = ["backbone", "dataset", "save_official"]

CHECKPOINT = "colours/CoOp/tiny_ep50_1shots/nctx3_cscFalse_ctpend/seed2/prompt_learner/model.pth.tar-50"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two CoOp runs and a diverged one, one with words in its prompt, and a zero-shot run."""
    root = tmp_path_factory.mktemp("exchange-advice")
    write_dataset(root / "data" / "colours")
    write_backbone(root / "tiny")
    prompt = "[V]x2 [CLASS], a colour."
    grid = {
        "backbones": str(root / "tiny"), "datasets": "colours", "shots": 1, "seeds": 1, "views": 1,
        "methods": [
            "zero_shot", {"coop": {"context_length": 2, "epochs": 2, "learning_rate": [0.1, 1e38]}},
            {"coop": {"prompt": prompt, "epochs": 1}},
        ],
    }  # fmt: skip
    fc.sweep(grid, data_root=root / "data", cache=root / "cache", results=root / "results", jobs=1)
    return root


@pytest.fixture
def keys(world: Path) -> dict[str, str]:
    table = fc.load_results(world / "results")
    good = table[(table.method == "coop") & (table.status == "done")]
    kinds = {
        "plain": good[good.class_position == "end"], "words": good[good.class_position != "end"],
        "diverged": table[table.status == "diverged"], "zero_shot": table[table.method == "zero_shot"],
    }  # fmt: skip
    return {kind: str(rows.key.iloc[0]) for kind, rows in kinds.items()}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command: (exit code, error message)."""

    def command(*arguments: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        return int(stopped.value.code or 0), capsys.readouterr().err

    return command


def write_tower(folder: Path, **text: int) -> Path:
    """A backbone folder whose text tower differs, and so its weights."""
    import open_clip
    from safetensors.torch import save_file

    write_backbone(folder)
    config = json.loads((folder / f"{folder.name}.json").read_text())
    config["text_cfg"] |= text
    (folder / f"{folder.name}.json").write_text(json.dumps(config))
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@follows(
    "There is no classifier {}; make one with `fastcoop export`",
    "is not {} ({}), which {} was made with; name that backbone with --backbone",
    "which {} was made with, is not found by its name alone; pass its folder or weights with --backbone",
)
def test_a_classifier_is_exported_and_used_with_its_backbone(
    world: Path, keys: dict[str, str], call: Callable[..., Any], tmp_path: Path
) -> None:
    other = write_tower(tmp_path / "other")
    file, tiny = tmp_path / "classifier.safetensors", world / "tiny"
    export = ["export", keys["plain"], "--results", world / "results", "--out", file]
    predict = ["predict", file, world / "data" / "colours" / "test" / "green" / "0.png"]
    assert "make one with `fastcoop export`" in call(*predict)[1]
    assert "was made with, is not found by its name alone; pass its folder" in call(*export)[1]
    assert "is not tiny" in (said := call(*export, "--backbone", other)[1])
    assert "name that backbone with --backbone" in said
    assert call(*export, "--backbone", tiny)[0] == 0
    assert "the classifier was made with, is not found by its name alone; pass its" in call(*predict)[1]
    assert "name that backbone with --backbone" in call(*predict, "--backbone", other)[1]
    for given in (tiny, tiny / "open_clip_model.safetensors"):
        assert call(*predict, "--backbone", given)[0] == 0


@follows('has no place for the words of "{}"; export the classifier instead')
def test_words_are_exported_in_a_classifier(world: Path, keys: dict[str, str], tmp_path: Path) -> None:
    tiny = str(world / "tiny")
    with pytest.raises(UserError, match="export the classifier instead"):
        fc.export_run(world / "results", keys["words"], "coop", tmp_path, tiny)
    assert fc.export_run(world / "results", keys["words"], "classifier", tmp_path / "file", tiny).is_file()


@follows(
    "begins with {}; give more of the key",
    "contexts are not finite; choose another run",
)
def test_a_coop_run_is_chosen_by_more_of_its_key(world: Path, keys: dict[str, str]) -> None:
    for key, message in (
        ("", "give more of the key"),
        (keys["diverged"], "choose another run"),
    ):
        with pytest.raises(UserError, match=message):
            fc.find_run(world / "results", key)
    assert fc.find_run(world / "results", keys["plain"][:12]).key == keys["plain"]


@follows(
    "but {} was given; leave out --{}",
    "as the official folders do; pass --{}",
    "got {} in {}; name the backbone and the dataset that it was learned with",
)
@pytest.mark.parametrize("wrong", ["told", "untold", "wide", "classes", "short"])
def test_a_checkpoint_is_imported_with_what_it_was_learned_with(
    world: Path, save_official: Callable[..., None], call: Callable[..., Any], tmp_path: Path, wrong: str
) -> None:
    path = tmp_path / ("model.pth.tar-50" if wrong == "untold" else CHECKPOINT)
    save_official(path, torch.ones(3, 16))
    right = {"--dataset": "colours", "--backbone": world / "tiny", "--data-root": world / "data"}
    if wrong == "untold":
        right |= {"--class-position": "end", "--shots": "1", "--seed": "1"}
    towers = {"wide": {"width": 32}, "short": {"context_length": 40}}
    if wrong in towers:
        write_tower(tmp_path / wrong, **towers[wrong])
    write_dataset(tmp_path / "fewer", ("grey", "green"), train=1, val=1, test=1)
    fits = "name the backbone and the dataset that it was learned with"
    options, message = {
        "told": (right | {"--seed": "9"}, "leave out --seed"),
        "untold": ({name: right[name] for name in right if name != "--shots"}, "pass --shots"),
        "wide": (right | {"--backbone": tmp_path / "wide"}, fits),
        "classes": (right | {"--dataset": tmp_path / "fewer"}, fits),
        "short": (right | {"--backbone": tmp_path / "short"}, fits),
    }[wrong]

    def bring(options: dict[str, Any]) -> tuple[int, str]:
        given = [word for pair in options.items() for word in pair]
        return call("import-coop", path, "--results", tmp_path / "results", *given)

    code, said = bring(options)
    assert (code, message in said) == (2, True), said
    assert bring(right)[0] == 0


@follows("if torch itself can load it, save it again there")
def test_a_checkpoint_of_an_old_torch_is_saved_again(
    backbone: fc.Backbone, dataset: fc.Dataset, tmp_path: Path
) -> None:
    path = tmp_path / CHECKPOINT
    path.parent.mkdir(parents=True)
    state = {"state_dict": {"ctx": torch.ones(3, 16)}, "epoch": 50}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="if torch itself can load it, save it again there"):
        fc.import_coop(path, backbone, dataset, tmp_path / "results")
    torch.save(torch.load(path), path)
    (run,) = fc.import_coop(path, backbone, dataset, tmp_path / "results")
    assert np.array_equal(fc.load_contexts(tmp_path / "results", run.key), np.ones((3, 16)))


@follows("which the tokenizer of {} does not make; export with --format safetensors")
def test_an_official_file_of_prompts_without_a_start_token(world, keys, call, tmp_path) -> None:
    tiny = fc.backbone_from_spec(world / "tiny")

    def startless(texts: list[str], context_length: int = 77) -> torch.Tensor:
        return tiny.tokenizer(texts, context_length=context_length + 1)[:, 1:]

    with pytest.raises(UserError, match="which the tokenizer of tiny does not make"):
        frozen_embeddings(replace(tiny, tokenizer=startless), ["cat"], 2)
    frozen_embeddings(tiny, ["cat"], 2)
    file = tmp_path / "contexts.safetensors"
    export = ["export", keys["plain"], "--results", world / "results", "--backbone", world / "tiny"]
    assert call(*export, "--format", "safetensors", "--out", file)[0] == 0
    assert file.is_file()
