"""What can be given as a setting: finite numbers in range, and nothing that changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastcoop.backbones import Backbone
from fastcoop.checks import LARGEST_BATCH, LONGEST
from fastcoop.errors import UserError
from fastcoop.grids import read_grid
from fastcoop.methods import METHODS, Data, expand, get_method
from fastcoop.methods.adapters import ADAPTERS
from tests.advice import follows
from tests.golden.test_keys import NOT_HERE
from tests.methods.conftest import job

NUMBERS = [
    (name, field)
    for name, method in METHODS.items()
    for field, info in method.Settings.model_fields.items()
    if any(kind in str(info.annotation) for kind in ("int", "float")) and field != "precision"
]
# Of the values below, those that a setting may have all the same.
IN_RANGE = {
    "learning_rate": "1000000000000",
    "val_every": "None",
    "alpha": "None 0 1000000000000",
    "beta": "None 0 1000000000000",
    "alpha_max": "1000000000000",
    "beta_max": "1000000000000",
    "task_res.alpha": "0 1000000000000",
    "ratio": "0",
    "lmbda": "None 0 1000000000000",
    "tcp.lmbda": "0 1000000000000",
    "kgcoop.lmbda": "0 1000000000000",
    "prograd.lmbda": "0 1000000000000",
    "proker.beta": "None 1000000000000",
    "proker.lmbda": "None 1000000000000",
    "prolip.learning_rate": "None 1000000000000",
    "cross_modal.learning_rate": "None 1000000000000",
    "cross_modal.batch_size": "None",
    "weight_decay": "None 0 1000000000000",
    "wise_ft": "0",
}
NO_NUMBERS = [
    *(float("inf"), float("nan"), "1e400", "inf", "-inf", 10**400, 1e39, -1, 0, 10**12, True, False, None),
    *(b"1", "\u00b2", "one", "9" * 5000, {}, [[]], {1: True}, {1: float("inf")}),
]


@pytest.mark.parametrize(("name", "field"), NUMBERS)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:12])
def test_numbers_that_are_none_or_out_of_range_are_refused(name: str, field: str, value: Any) -> None:
    """In a mapping, by ``--set`` and for a method itself, each time in one short sentence."""
    method = get_method(name)
    if str(value) in IN_RANGE.get(f"{name}.{field}", IN_RANGE.get(field, "")).split():
        return
    grid = {"backbones": "b", "datasets": "d", "methods": {name: {field: value}}}
    for give in (lambda: expand(method, {field: [value]}), lambda: read_grid(grid)):
        with pytest.raises(UserError, match=f'"{field}" of method {name} cannot be|bytes|{field}') as caught:
            give()
        assert len(str(caught.value)) < 400
    text = "null" if value is None else value.decode() + "b" if isinstance(value, bytes) else value
    with pytest.raises(UserError, match=field):
        read_grid({**grid, "methods": name}, [f"methods.{name}.{field}={text}"])


@pytest.mark.parametrize(("name", "field"), NUMBERS)
def test_numbers_as_text_are_numbers(name: str, field: str) -> None:
    """YAML reads 1e-3 as text."""
    if field == "epochs":
        return
    more = {"val_every": {"select": "best_val"}, "context_length": {"init": "random"}}.get(field, {})
    number = 1 if field in ("ratio", "wise_ft") else 3
    (one,) = expand(get_method(name), {field: str(number), **more})
    assert getattr(one, field) == number
    if field == "learning_rate":
        assert expand(get_method(name), {field: "1e-3"})[0].learning_rate == 1e-3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("coop", {"epochs": {1: 5, "1": 6}}, "names 1 shots twice"),
        ("coop", {"epochs": {1: f"{LONGEST + 1} steps"}}, "at most 1000000 steps"),
        ("coop", {"batch_size": LARGEST_BATCH + 1}, "less than or equal to 65536"),
        ("coop", {"learning_rate": 1e-50}, "a number that float32 holds"),
        ("coop", {"class_specific": 2}, "valid boolean"),
        ("coop", {"init": True}, "not yes or no"),
        ("coop", {"prompt": f"[V]x{'9' * 5000} [CLASS]"}, "at most 6 digits"),
        ("zero_shot", {"prompt": "a {}", "prompts": "the {}"}, "prompt and prompts are the same setting"),
        ("tcp", {"lambda": 1.0}, 'Unknown setting "lambda" of method tcp. Did you mean "lmbda"'),
        ("tcp", {"template": "a photo"}, 'one "{}" where the class name goes'),
        ("cocoop", {"reducton": 8}, 'Did you mean "reduction"'),
        ("linear_probe", {"search_steps": 51}, "less than or equal to 50"),
    ],
)
def test_settings_that_mean_nothing(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        expand(get_method(name), settings)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("field", "most"), [("batch_size", LARGEST_BATCH), ("epochs", LONGEST), ("iterations", LONGEST)]
)
def test_every_method_has_the_same_largest_batch_and_longest_training(field: str, most: int) -> None:
    for name in (name for name, method in METHODS.items() if field in method.Settings.model_fields):
        expand(METHODS[name], {field: most})
        with pytest.raises(UserError, match=f'"{field}" of method {name} cannot be {most + 1}'):
            expand(METHODS[name], {field: most + 1})


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.reads_prompt])
def test_the_prompt_of_a_dataset_is_in_the_keys_of_methods_that_read_it(
    name: str, backbone: Backbone, data: Data
) -> None:
    other = Data(replace(data.dataset, template="the {}."), data.store, data.views)
    keys = [METHODS[name].key_settings(job(one, name), backbone) for one in (data, other)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("name", ["kgcoop", "prograd", "tcp"])
def test_a_prompt_that_learned_ones_are_held_to_is_in_the_key(
    name: str, backbone: Backbone, data: Data
) -> None:
    def keys(*templates: str, **given: Any) -> list[str]:
        made = [Data(replace(data.dataset, template=one), data.store, data.views) for one in templates]
        return [key(name, one, backbone, given) for one in made]

    assert len({*keys("a photo of a {}.", "a drawing of a {}.")}) == 2
    behind = keys("a {}.", "a {} cat.", template="the {}.")  # TCP's own prompts end as the dataset's
    assert len({*behind}) == (2 if name == "tcp" else 1)
    if name == "tcp":
        assert '"prompt": "[CLASS]."' in behind[0]


def test_a_layer_that_the_tower_lacks_is_refused_before_training(backbone: Backbone, data: Data) -> None:
    check("tcp", data, backbone, {"layer": 2})
    with pytest.raises(UserError, match=r"Expected a layer from 1 to 2, .* got 8"):
        check("tcp", data, backbone, {})


def test_the_defaults_of_methods_without_known_keys_are_the_official_ones() -> None:
    """The other methods' are in the keys of ``tests/golden``."""
    net = {"init": "random", "context_length": 4, "reduction": 4, "learning_rate": 0.002}
    tuned = {"selection": "fixed", "tuned_on": "imagenet", "learning_rate": None, "lmbda": None}
    steps = {"epochs": "paper", "batch_size": 32}
    assert {name: METHODS[name].Settings().model_dump() for name in NOT_HERE} == {
        "tcp": {**steps, **net, "lmbda": 8.0, "layer": 8, "template": None},
        "prolip": {**tuned, "epochs": 300},
        "finetune_image_encoder": {**steps, "learning_rate": 1e-5},
    }


# For each setting of each method: what else is given, and two values of it.
TWO_VALUES: dict[str, dict[str, tuple[dict[str, Any], Any, Any]]] = {
    "zero_shot": {"prompt": ({}, "a {}.", "the {}.")},
    "ensemble": {"templates": ({}, "selected", "all")},
    "linear_probe": {
        "solver": ({}, "official", "converged"),
        "iterations": ({}, 10, 20),
        "search_steps": ({}, 1, 2),
    },
    "coop": {
        "context_length": ({}, 2, 3),
        "class_position": ({"context_length": 4}, "end", "mid"),
        "class_specific": ({}, False, True),
        "prompt": ({}, "[V]x4 [CLASS], a.", "[V]x4 a [CLASS]."),
        "init": ({}, "random", "a photo"),
        "select": ({}, "last", "best_val"),
        "val_every": ({"select": "best_val"}, 1, 2),
        "val_accuracy": ({}, False, True),
        "precision": ({}, "float32", "bfloat16"),
        "schedule": ({}, "fast", {"steps": 4}),
        "pull": ({"schedule": "fast"}, "prompt", "none"),
    },
}
NET = {
    "init": ({}, "a photo", "a photo of"),
    "context_length": ({"init": "random"}, 2, 3),
    "reduction": ({}, 2, 4),
}
for held in ("kgcoop", "prograd"):
    TWO_VALUES[held] = {name: ({"init": "random", **beside}, *values)
                        for name, (beside, *values) in TWO_VALUES["coop"].items() if name != "pull"}  # fmt: skip
    TWO_VALUES[held] |= {"init": ({}, "a photo", "a photo of"), "lmbda": ({}, 0.0, 2.0)}
    TWO_VALUES[held]["template"] = ({}, "a {}.", "the {}.")
TWO_VALUES["cocoop"] = NET
TWO_VALUES["tcp"] = {name: ({"layer": 1, **beside}, *values) for name, (beside, *values) in NET.items()} | {
    "lmbda": ({"layer": 1}, 0.0, 1.0),
    "layer": ({}, 1, 2),
    "template": ({"layer": 1}, "a {}.", "the {}."),
}
SCHEDULE = {"epochs": ({}, 2, 3), "batch_size": ({}, 2, 4), "learning_rate": ({"epochs": 2}, 0.1, 0.2)}
TRAINED = (
    "coop",
    "kgcoop",
    "prograd",
    "tcp",
    "cocoop",
    "text_transform",
    "text_bias",
    "finetune_image_encoder",
)
for trained in TRAINED:
    more = {"layer": 1} if trained == "tcp" else {}
    schedule = {name: ({**beside, **more}, *values) for name, (beside, *values) in SCHEDULE.items()}
    TWO_VALUES[trained] = {**schedule, **TWO_VALUES.get(trained, {})}


def key(method: str, data: Data, backbone: Backbone, settings: Mapping[str, Any]) -> str:
    return json.dumps(
        get_method(method).key_settings(job(data, method, **settings), backbone), sort_keys=True
    )


def check(method: str, data: Data, backbone: Backbone, settings: Mapping[str, Any]) -> None:
    get_method(method).check(job(data, method, model=backbone, **settings))


@pytest.mark.parametrize(
    "name", sorted(METHODS.keys() - {one.name for one in ADAPTERS})
)  # see test_adapters.py
def test_every_setting_changes_the_key_or_is_refused(name: str, backbone: Backbone, data: Data) -> None:
    method = get_method(name)
    refused = {"pull"} if name in ("kgcoop", "prograd") else set()  # tests/methods/test_regularized.py
    assert TWO_VALUES[name].keys() == method.Settings.model_fields.keys() - refused
    for field, (beside, one, other) in TWO_VALUES[name].items():
        assert key(name, data, backbone, {**beside, field: one}) != key(
            name, data, backbone, {**beside, field: other}
        )


IN_VAIN = {
    "prompt": ("context_length", "class_position"),
    "init": ("context_length",),
    "epochs": ("schedule", "pull"),
}


@pytest.mark.parametrize(
    "beside",
    [
        {"prompt": "[V]x2 [CLASS], a."},
        {"select": "last"},
        {"init": "a photo of a"},
        {"epochs": 3},
    ],
)
def test_no_setting_is_given_in_vain_beside_another(
    beside: dict[str, Any], backbone: Backbone, data: Data
) -> None:
    """Two values of each setting beside those that can make another useless: two keys, or a sentence."""
    for field, (more, *values) in TWO_VALUES["coop"].items():
        if field in beside:
            continue
        given = [{**more, **beside, field: value} for value in values]
        if field in IN_VAIN.get(next(iter(beside)), ()) or (field, beside) == (
            "val_every",
            {"select": "last"},
        ):
            for settings in given:
                with pytest.raises(UserError, match=f"{field}|leave out epochs"):
                    check("coop", data, backbone, settings)
        else:
            assert len({key("coop", data, backbone, settings) for settings in given}) == 2, field


def test_the_accuracy_that_best_val_always_notes_is_not_asked_for(data: Data) -> None:
    with pytest.raises(UserError, match=r"best_val always records .* leave out val_accuracy"):
        job(data, "coop", select="best_val", val_accuracy=False)


def test_a_context_length_beside_words_is_their_number_of_tokens(backbone: Backbone, data: Data) -> None:
    """As in experiments/table3.yaml, which crosses random contexts and words of one length."""
    words = {"init": "a photo of a", "epochs": 2}
    given = key("coop", data, backbone, {**words, "context_length": 4})
    assert given == key("coop", data, backbone, words)
    with pytest.raises(UserError, match=r"are 4 tokens, .* context_length of 16 is not used: leave it out"):
        check("coop", data, backbone, {**words, "context_length": 16})


@follows("is not used: leave it out, or move it to an entry of {} with init: random")
@pytest.mark.parametrize("name", ["cocoop", "tcp"])
def test_a_context_length_beside_other_words_is_refused(name: str, backbone: Backbone, data: Data) -> None:
    more = {"layer": 1} if name == "tcp" else {}
    words = {"init": "a photo of a", **more}
    assert key(name, data, backbone, {**words, "context_length": 4}) == key(name, data, backbone, words)
    with pytest.raises(UserError, match=r"4 tokens, .* context_length of 8 is not used: leave it out"):
        check(name, data, backbone, {**words, "context_length": 8})
    assert key(name, data, backbone, {"init": "random", **more, "context_length": 8})


def test_looking_less_often_than_a_run_has_epochs_is_refused(data: Data) -> None:
    with pytest.raises(UserError, match="val_every of coop is 9, but a run has 3 epochs"):
        get_method("coop").check(job(data, "coop", select="best_val", val_every=9, epochs=3))


def test_the_longest_schedule_and_largest_batch_fit_memory() -> None:
    assert LONGEST * 32 * np.int64().itemsize < 1 << 28
    assert 200 * LARGEST_BATCH * np.int64().itemsize < 1 << 28
