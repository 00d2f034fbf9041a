"""The advice in messages of the methods, followed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.datasets import load_dataset
from fastcoop.errors import UserError
from fastcoop.features import FeatureStore, cache_features
from fastcoop.methods import Data, RunSpec, expand, get_method
from fastcoop.methods.data import matching_classes
from fastcoop.methods.text import check_class_names, check_prompts, prompt_features
from tests.advice import follows
from tests.engine.plain_towers import write_plain
from tests.methods.conftest import job, make_data, run
from tests.small_world import write_backbone, write_dataset


@follows(
    "is an empty list; give it a value",
    "twice; leave one.",
    "are the same setting; leave one of them",
    "leave out context_length and class_position",
    "leave out val_accuracy",
    "val_every needs select: best_val; leave it out, or give that an entry of its own",
    "a fast schedule has its own steps; leave out epochs, or give schedule: {steps: 40}",
    "a fast schedule reads all images in each step; leave out batch_size",
    "leave out learning_rate, or give schedule: {learning_rate: 0.006}",
    "a pull needs a fast schedule; leave out pull, or give schedule: fast",
)
@pytest.mark.parametrize(
    ("method", "wrong", "message", "right"),
    [
        ("coop", {"init": []}, "is an empty list", [{"init": "random"}]),
        ("coop", {"epochs": [2, 2]}, "lists 2 twice", [{"epochs": [2]}]),
        ("zero_shot", {"prompt": "a {}", "prompts": "the {}"}, "same setting", [{"prompt": "a {}"}]),
        (
            "coop",
            {"prompt": "[V] [CLASS]", "context_length": 1},
            "context_length",
            [{"prompt": "[V] [CLASS]"}],
        ),
        ("coop", {"select": "best_val", "val_accuracy": True}, "always records", [{"select": "best_val"}]),
        (
            "coop",
            {"schedule": "fast", "epochs": 40},
            "own steps",
            [{"schedule": "fast"}, {"schedule": {"steps": 40}}],
        ),
        ("coop", {"schedule": "fast", "batch_size": 8}, "all images", [{"schedule": "fast"}]),
        (
            "coop",
            {"schedule": "fast", "learning_rate": 0.006},
            "own learning rate",
            [{"schedule": "fast"}, {"schedule": {"learning_rate": 0.006}}],
        ),
        ("coop", {"pull": "none"}, "needs a fast", [{}, {"schedule": "fast", "pull": "none"}]),
        (
            "coop",
            {"select": ["last", "best_val"], "val_every": 2},
            "val_every",
            [{"select": ["last", "best_val"]}, {"select": "last"}, {"select": "best_val", "val_every": 2}],
        ),
    ],
)
def test_settings_are_given_as_advised(
    method: str, wrong: dict[str, Any], message: str, right: list[dict[str, Any]]
) -> None:
    with pytest.raises(UserError, match=message):
        expand(get_method(method), wrong)
    for settings in right:
        assert expand(get_method(method), settings)


@follows("is not used: leave it out, or move it to an entry of {} with init: random", "vectors; give it {}.")
@pytest.mark.parametrize(
    ("wrong", "message", "right"),
    [
        ({"init": "a photo of a", "context_length": 16}, "entry of coop", {"init": "a photo of a"}),
        (
            {"init": "a photo of a", "prompt": "[V]x2 [CLASS]."},
            "give it 4",
            {"init": "a photo of a", "prompt": "[V]x4 [CLASS]."},
        ),
    ],
)
def test_words_and_vectors_have_one_length(
    backbone: Backbone, data: Data, wrong: dict[str, Any], message: str, right: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        get_method("coop").check(job(data, "coop", model=backbone, **wrong))
    for settings in (right, {"context_length": 16}):  # an entry of its own for either
        get_method("coop").check(job(data, "coop", model=backbone, **settings))


@follows("leave these settings out", "use another method", "to a number", "give it a val split")
@pytest.mark.parametrize(
    ("method", "settings", "instead"),
    [
        ("coop", {"select": "best_val"}, ("coop", {})),
        ("coop", {"val_accuracy": True}, ("coop", {})),
        ("linear_probe", {}, ("coop", {})),
        ("text_bias", {}, ("text_bias", {"learning_rate": 0.01})),
    ],
)
def test_what_needs_validation_images_gets_them_or_goes(
    data: Data, method: str, settings: dict[str, Any], instead: tuple[str, dict[str, Any]]
) -> None:
    splits = {name: split for name, split in data.dataset.splits.items() if name != "val"}
    bare = Data(replace(data.dataset, splits=splits), data.store, data.views)
    with pytest.raises(UserError, match="has no validation images"):
        get_method(method).check(job(bare, method, **settings))
    get_method(method).check(job(data, method, **settings))
    get_method(instead[0]).check(job(bare, instead[0], **instead[1]))


@follows("so that only the last is validated; give a smaller number", "shots, not for {}; add them")
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"val_every": 9, "epochs": 3}, {"val_every": 2, "epochs": 3}),
        ({"epochs": {1: 3}}, {"epochs": {1: 3, 2: 3}}),
    ],
)
def test_schedules_are_given_as_advised(data: Data, wrong: dict[str, Any], right: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"give a smaller number|add them"):
        get_method("coop").check(job(data, "coop", select="best_val", **wrong))
    get_method("coop").check(job(data, "coop", select="best_val", **right))


@follows('{} has {} classes called "{}"; give its classes names of their own')
@pytest.mark.parametrize(
    ("source", "target"), [(("a", "b"), ("a", "A")), (("a", "A"), ("a",))], ids=["target", "source"]
)
def test_classes_have_names_of_their_own(source: tuple[str, ...], target: tuple[str, ...]) -> None:
    one, other = make_data(source), make_data(target, "other")
    with pytest.raises(UserError, match="2 classes called"):
        matching_classes(one, other)
    assert matching_classes(make_data(("a", "b", "c")), make_data(("a", "b"), "other")) == [0, 1]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "colours", train=1, val=1, test=1)


def learn_from(backbone: Backbone, folder: Path) -> RunSpec[Any]:
    dataset = load_dataset(folder)
    path = cache_features(backbone, dataset, folder.parent / "cache", shots=[1], seeds=[1], views=0)
    data = Data(dataset, FeatureStore.open(path, backbone, dataset), views=0)
    return job(data, "finetune_image_encoder", shots=1, epochs=1)


@follows("put the images back", "but could when its features were cached; repair it")
def test_images_are_put_back_or_repaired(backbone: Backbone, pictures: Path) -> None:
    asked = learn_from(backbone, pictures)
    method, first = get_method("finetune_image_encoder"), pictures / "test" / "dark red"
    first.rename(pictures / "elsewhere")
    with pytest.raises(UserError, match="put the images back"):
        method.check(asked)
    (pictures / "elsewhere").rename(first)
    method.check(asked)
    content = (first / "0.png").read_bytes()
    (first / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="repair it"):
        run(backbone, method.name, [asked])
    (first / "0.png").write_bytes(content)
    assert run(backbone, method.name, [asked])[0].status == "done"


@follows("that are not finite numbers; check its weights, and load them in float32")
def test_features_that_float16_does_not_hold(tmp_path: Path) -> None:
    folder = str(write_backbone(tmp_path / "tiny"))
    half, single = backbone_from_spec(folder), backbone_from_spec(folder)
    for backbone in (half, single):
        backbone.model.text_projection.data.mul_(1e5)
    half.model.half()
    with pytest.raises(UserError, match="load them in float32"):
        prompt_features(half, ("cat", "dog"), "a {}.")
    assert torch.isfinite(torch.from_numpy(prompt_features(single, ("cat", "dog"), "a {}."))).all()


@follows(
    "shorten the prompt, or give the class a shorter name", "reads as nothing in a prompt of {}; give the"
)
def test_prompts_and_names_are_changed_as_advised(backbone: Backbone, pictures: Path) -> None:
    def named(name: str) -> Data:
        (pictures / "dataset.yaml").write_text(f"class_names: {{green: {name}}}", encoding="utf-8")
        return Data(load_dataset(pictures), None)

    long = "word " * 90
    for data, template in ((named("green"), f"{long} {{}}"), (named(f'"{long}"'), "a photo of a {}.")):
        with pytest.raises(UserError, match="shorten the prompt"):
            check_prompts(backbone, data, template)
    check_prompts(backbone, named("green"), "a photo of a {}.")
    for letter, most in (("9", 75), ("\u4e2d", 37)):  # of one token, and of two
        check_prompts(backbone, named(f'"{letter * most}"'), "{}")
        with pytest.raises(UserError, match="shorten the prompt"):
            check_prompts(backbone, named(f'"{letter * (most + 1)}"'), "{}")
    with pytest.raises(UserError, match="give the class another name"):
        check_class_names(backbone, named('"\\a"'))
    check_class_names(backbone, named("green"))


@follows("have the same prompt with {}, whose tokenizer drops punctuation; name them differently")
def test_names_that_differ_by_punctuation_only(
    tmp_path: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    siglip = backbone_from_spec(str(write_plain(tmp_path / "tiny", "siglip")), device="cpu")
    for names, warned in (("{green: C++, dark red: C}", True), ("{green: C plus, dark red: C}", False)):
        caplog.clear()
        (pictures / "dataset.yaml").write_text(f"class_names: {names}", encoding="utf-8")
        check_class_names(siglip, Data(load_dataset(pictures), None))
        assert ("The classes C, C++ of" in caplog.text) == warned
