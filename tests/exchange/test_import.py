"""Official checkpoints: read whole, checked, and never obeyed."""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcoop.backbones.weights import TorchFile
from fastcoop.errors import UserError
from fastcoop.exchange import Classifier, export_run, find_run, import_coop, predict
from fastcoop.exchange.coop_files import coop_path, path_facts, read_coop_file
from fastcoop.features.images import crops, normalize, read_rgb
from fastcoop.prompts import PromptLayout
from fastcoop.results import load_contexts
from fastcoop.results.read import load_runs
from tests.small_world import write_backbone, write_dataset

OFFICIAL = (
    "output/colours/CoOp/rn50_ep50_1shots/nctx3_csc{csc}_ctp{ctp}/seed2/prompt_learner/model.pth.tar-50"
)


def contexts(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "ctp"), [((3, 16), "end"), ((4, 3, 16), "middle")])
def test_round_trip_is_bit_identical(save_official, backbone, dataset, world, tmp_path, dtype, shape, ctp):
    ctx = contexts(*shape, dtype=dtype)
    path = tmp_path / OFFICIAL.format(csc=len(shape) == 3, ctp=ctp)
    save_official(path, ctx)
    with pytest.raises(pickle.UnpicklingError):  # what torch's own safe reader says of a genuine one
        torch.load(path, weights_only=True)
    (run,) = import_coop(tmp_path / "output", backbone, dataset, tmp_path / "results")
    np.testing.assert_array_equal(load_contexts(tmp_path / "results", run.key), ctx.float())
    back = export_run(tmp_path / "results", run.key, "coop", tmp_path / "back", str(world / "tiny"))
    state = torch.load(back, weights_only=True)
    original = read_coop_file(path)
    assert state["epoch"] == 50
    assert state["state_dict"]["ctx"].dtype == dtype
    assert state["state_dict"]["ctx"].numpy().tobytes() == ctx.numpy().tobytes() == original.ctx.tobytes()
    for name, saved in (("token_prefix", original.prefix), ("token_suffix", original.suffix)):
        np.testing.assert_array_equal(state["state_dict"][name], saved)
    (again,) = import_coop(tmp_path / "back", backbone, dataset, tmp_path / "results")
    assert again.key == run.key
    assert len(load_runs(tmp_path / "results")) == 1


def test_the_path_says_the_rest(save_official, backbone, dataset, tmp_path):
    path = tmp_path / OFFICIAL.format(csc=False, ctp="middle")
    save_official(path, contexts(3, 16))
    save_official(path.with_name("model.pth.tar-9"), contexts(3, 16), epoch=9)
    (run,) = import_coop(tmp_path, backbone, dataset, tmp_path / "results")
    assert run.path == path
    row = load_runs(tmp_path / "results").iloc[0]
    assert (row.shots, row.seed, row.class_position, row.epochs, row.schedule) == (1, 2, "mid", 50, "paper")
    assert find_run(tmp_path / "results", run.key[:8]).class_names == dataset.class_names
    words = path_facts(Path("imagenet/CoOp/rn50_ep50_ctxv1_16shots/nctx16_cscFalse_ctpend/seed1/x"))
    assert (words["words"], words["shots"]) == ("a photo of a", 16)


def test_words_decide_what_the_folder_only_asked_for(save_official, backbone, dataset, world, tmp_path):
    """The official code takes as many vectors as words and ignores M and class-specific, which the folder repeats."""
    folder = "output/colours/CoOp/vit_b16_ep50_ctxv1_1shots/nctx16_cscTrue_ctpmiddle/seed2"
    save_official(tmp_path / folder / "prompt_learner/model.pth.tar-50", contexts(4, 16))
    (run,) = import_coop(tmp_path / "output", backbone, dataset, tmp_path / "results")
    settings = find_run(tmp_path / "results", run.key).settings
    assert (settings.init, settings.context_length, settings.class_specific) == ("a photo of a", 4, False)
    back = export_run(tmp_path / "results", run.key, "coop", tmp_path / "back", str(world / "tiny"))
    assert "/tiny_ep50_ctxv1_1shots/nctx4_cscFalse_ctpmiddle/seed2/" in back.as_posix()
    (again,) = import_coop(tmp_path / "back", backbone, dataset, tmp_path / "results")
    assert again.key == run.key

    save_official(tmp_path / folder / "prompt_learner/model.pth.tar-50", contexts(4, 4, 16))
    with pytest.raises(UserError, match="M=16"):
        import_coop(tmp_path / "output", backbone, dataset, tmp_path / "results")


@pytest.mark.parametrize(
    ("backbone_name", "epoch", "words", "config"),
    [
        ("RN50", 200, "random", "rn50"),
        ("RN101", 50, "random", "rn101_ep50"),
        ("ViT-B-16", 100, "a photo of a", "vit_b16_ep100_ctxv1"),
        ("ViT-B-32", 50, "this is a picture", "vit_b32_ep50"),
    ],
)
def test_folders_are_called_after_the_official_configs(backbone_name, epoch, words, config):
    layout = PromptLayout(4, "mid")
    path = coop_path(Path("output"), "imagenet", backbone_name, layout, 16, 3, epoch, words)
    folder = f"output/imagenet/CoOp/{config}_16shots/nctx4_cscFalse_ctpmiddle/seed3"
    assert path.as_posix() == f"{folder}/prompt_learner/model.pth.tar-{epoch}"
    half = coop_path(Path("output"), "imagenet:base", backbone_name, layout, 16, 3, epoch, words)
    assert half.as_posix() == path.as_posix().replace("imagenet", "imagenet-base")


def test_what_no_path_says_is_asked_for(save_official, backbone, dataset, tmp_path):
    path = tmp_path / "model.pth.tar-50"
    save_official(path, contexts(3, 16))
    with pytest.raises(UserError, match="--class-position"):
        import_coop(path, backbone, dataset, tmp_path / "results")
    with pytest.raises(UserError, match="class_position"):
        import_coop(path, backbone, dataset, tmp_path / "results", class_position="nd", shots=1, seed=1)
    assert not (tmp_path / "results").exists()
    assert import_coop(path, backbone, dataset, tmp_path / "results", class_position="front", shots=4, seed=7)


def test_runs_on_the_transforms_of_2021_are_predicted_by_them(
    save_official, backbone, dataset, world, tmp_path
):
    path = tmp_path / OFFICIAL.format(csc=False, ctp="end")
    save_official(path, contexts(3, 16))
    (current,) = import_coop(path, backbone, dataset, tmp_path / "results")
    (run,) = import_coop(path, backbone, dataset, tmp_path / "results", recipe="official-2021")
    assert run.key != current.key
    made = export_run(
        tmp_path / "results", run.key, "classifier", tmp_path / "classifier", str(world / "tiny")
    )
    classifier = Classifier.load(made)
    assert classifier.recipe == "official-2021"
    picture = next((world / "data/colours/test/green").iterdir())
    (found,) = predict(classifier, backbone, [picture])
    pixels = crops(read_rgb(picture), picture.name, [0], backbone.preprocess, "official-2021", 0)
    features = backbone.encode_images(normalize(pixels, backbone.preprocess, backbone.device))
    np.testing.assert_array_equal(found.probabilities, classifier.probabilities(features.numpy())[0])
    (other,) = predict(replace(classifier, recipe="current"), backbone, [picture])
    assert (other.probabilities != found.probabilities).any()
    with pytest.raises(UserError, match="official-2021"):
        import_coop(path, backbone, dataset, tmp_path / "results", recipe="official-2020")


class Runs:
    """Unpickled plainly, makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_does_not_run(save_official, backbone, dataset, tmp_path):
    path = tmp_path / OFFICIAL.format(csc=False, ctp="end")
    made = tmp_path / "made"
    save_official(path, contexts(3, 16), scheduler=Runs(made))
    run = import_coop(path, backbone, dataset, tmp_path / "results")
    assert len(run) == 1
    assert not made.exists()
    state = {"ctx": Runs(made)}
    save_official(path, contexts(3, 16), state_dict=state)
    with pytest.raises(UserError, match="checkpoint"):
        import_coop(path, backbone, dataset, tmp_path / "other")
    assert not made.exists()
    torch.save(
        {"state_dict": state}, path
    )  # as dangerous as it is meant to be: torch, told to trust it, runs it
    torch.load(path, weights_only=False)
    assert made.exists()


def test_nothing_outside_is_ever_imported(tmp_path):
    """Every name but OrderedDict, even of harmless builtins, is a stand-in."""
    path = tmp_path / "checkpoint"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"cbuiltins\neval\n(S'1/0'\ntR(lp0\n0.")
    with TorchFile(path) as file:
        found = file.unpickled()
    assert (found.name, found.args) == ("builtins.eval", ("1/0",))


@pytest.mark.parametrize(
    "damage", ["cut", "text", "legacy", "bomb", "outside", "float64", "cocoop", "no epoch"]
)
def test_what_is_no_checkpoint_is_refused(save_official, backbone, dataset, tmp_path, damage):
    path = tmp_path / OFFICIAL.format(csc=False, ctp="end")
    save_official(path, contexts(3, 16))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-400])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "legacy":
        torch.save({"state_dict": {}, "epoch": 1}, path, _use_new_zipfile_serialization=False)
    elif damage == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", bytes(1 << 20))
    elif damage == "outside":
        _swap_storage(path)
    elif damage == "float64":
        save_official(path, contexts(3, 16, dtype=torch.float64))
    elif damage == "cocoop":
        state = {"ctx": contexts(3, 16), "meta_net.linear1.weight": contexts(3, 16)}
        save_official(path, contexts(3, 16), state_dict=state)
    else:
        save_official(path, contexts(3, 16), epoch=None)
    with pytest.raises(UserError, match="prompt_learner/model"):
        import_coop(path, backbone, dataset, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def _swap_storage(path: Path) -> None:
    """Cut every tensor's numbers to one."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data[:4] if "/data/" in name else data)


def test_sizes_weights_and_names_are_checked(save_official, backbone, dataset, tmp_path, caplog):
    path = tmp_path / OFFICIAL.format(csc=False, ctp="end")
    results = tmp_path / "results"
    save_official(path, contexts(3, 16))
    fewer = write_dataset(tmp_path / "fewer", ("grey", "green"))
    from fastcoop.backbones import backbone_from_spec
    from fastcoop.datasets import load_dataset

    with pytest.raises(
        UserError,
        match=r"token_prefix of shape \(2, 1, 16\) .* classes of fewer, got \(4, 1, 16\)",
    ):
        import_coop(path, backbone, load_dataset(fewer), results)
    save_official(path, contexts(3, 8), state_dict={"ctx": contexts(3, 8)})
    with pytest.raises(UserError, match=r"Expected ctx of shape \(3, 16\) .*, got \(3, 8\)"):
        import_coop(path, backbone, dataset, results)
    save_official(path, contexts(2, 16))
    with pytest.raises(UserError, match="M=3"):
        import_coop(path, backbone, dataset, results)
    save_official(path, contexts(3, 16))
    from safetensors.torch import load_file, save_file

    weights = write_backbone(tmp_path / "other") / "open_clip_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="other weights"):
        import_coop(path, backbone_from_spec(str(tmp_path / "other")), dataset, results)
    turned = dataset.class_names[::-1]
    save_official(path, contexts(3, 16), names=turned)
    assert import_coop(path, backbone, dataset, results)
    assert "other names for 4 of 4 classes" in caplog.text
    specific = tmp_path / OFFICIAL.format(csc=True, ctp="end")
    save_official(specific, contexts(4, 3, 16), names=turned)
    with pytest.raises(UserError, match="same order"):
        import_coop(specific, backbone, dataset, results)
    with pytest.raises(UserError, match="no checkpoints"):
        import_coop(tmp_path / "fewer", backbone, dataset, results)


def test_imported_runs_are_scored_on_their_own_dataset_and_others(
    save_official, backbone, dataset, world, tmp_path
):
    """As the sweep's runs of the same contexts were."""
    from fastcoop.results import load_results
    from fastcoop.sweeps import evaluate

    study = load_results(world / "results").query("method == 'coop' and class_position == 'mid'")
    for row in study.itertuples():
        learned = torch.from_numpy(load_contexts(world / "results", row.key))
        path = tmp_path / "in" / OFFICIAL.format(csc=bool(row.class_specific), ctp="middle")
        save_official(path, learned)
    results = tmp_path / "results"
    import_coop(tmp_path / "in", backbone, dataset, results)
    write_dataset(world / "data" / "fewer", ("grey", "green"), train=0, val=0, seed=3)
    tested = evaluate(
        results, ["colours", "fewer"], backbones=[str(world / "tiny")], data_root=world / "data", cache=world / "cache"
    )  # fmt: skip
    own = {one.label: one.accuracy for one in tested if one.dataset == "colours"}
    assert own == dict(zip(study.label, study.accuracy, strict=True))
    assert sum(one.dataset == "fewer" for one in tested) == 2
    frame = load_results(results)
    assert set(frame.source) == {"colours"}
    assert len(frame) == 4
    names = load_contexts(results, frame.key[0])
    assert names.dtype == np.float32


def test_imported_contexts_are_read_as_words_before_anything_scored_them(
    save_official, backbone, dataset, tmp_path
):
    import json

    from fastcoop.sweeps import interpret

    path = tmp_path / OFFICIAL.format(csc=True, ctp="end")
    save_official(path, contexts(4, 3, 16))
    (run,) = import_coop(tmp_path / "output", backbone, dataset, tmp_path / "results")
    (written,) = interpret(tmp_path / "results", backbone)
    assert written.stem == run.key
    vectors = json.loads(written.read_text())["vectors"]
    assert [vector["class"] for vector in vectors] == [name for name in dataset.class_names for _ in range(3)]


def test_what_a_path_says_otherwise_is_refused(save_official, backbone, dataset, tmp_path):
    path = tmp_path / OFFICIAL.format(csc=False, ctp="end")
    save_official(path, contexts(3, 16))
    for name, other in (("class_position", "mid"), ("shots", 99), ("seed", 99)):
        option = name.replace("_", "-")
        with pytest.raises(UserError, match=f"{option} is .*, but {other} was given; leave out --{option}"):
            import_coop(path, backbone, dataset, tmp_path / "results", **{name: other})
    assert not (tmp_path / "results").exists()
    assert import_coop(path, backbone, dataset, tmp_path / "results", class_position="end")


def test_imported_runs_are_listed_and_said_to_be_untested(
    save_official, backbone, dataset, world, tmp_path, capsys, caplog, monkeypatch
):
    import shlex

    from fastcoop.cli import main
    from fastcoop.reports.report import report
    from fastcoop.results import merge_results

    monkeypatch.chdir(world)
    path = tmp_path / OFFICIAL.format(csc=False, ctp="end")
    save_official(path, contexts(3, 16))
    folder = tmp_path / "some results"
    (run,) = import_coop(path, backbone, dataset, folder)
    with pytest.raises(SystemExit):
        main(["results", "list", str(folder), "--where", "status=untested"])
    assert run.key[:12] in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["results", "export", str(folder), str(tmp_path / "runs.csv")])
    assert "1 run(s) that failed or were tested on nothing have no rows" in caplog.text
    merge_results([folder, world / "results"], tmp_path / "merged")
    (page, *_) = report(tmp_path / "merged", tmp_path / "report")
    assert "Left out, because they were not tested yet: CoOp (M=3, end) on colours" in page.read_text()
    with pytest.raises(UserError, match=r"None of the 1 runs .* was tested yet") as refused:
        report(folder, tmp_path / "none")
    command = shlex.split(str(refused.value).split("`")[1])
    with pytest.raises(SystemExit) as stopped:
        main([*command[1:], "--backbone", str(world / "tiny")])
    assert not stopped.value.code
    assert report(folder, tmp_path / "some")
