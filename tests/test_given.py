"""What the public functions refuse: numbers that are none, out of range, or of another kind."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastcoop as fc
from fastcoop.checks import amount, several, shortened, whole_number
from fastcoop.methods.base import SettingError
from tests.methods.conftest import make_data
from tests.small_world import write_backbone, write_dataset

NO_WHOLE = [-1, 1.0, 0.5, float("inf"), float("nan"), True, "2", b"2", 2**40, 10**400, np.array([1, 2]), []]
NO_AMOUNT = [-1, 0, float("inf"), float("nan"), -0.0, True, "2", b"2", 10**400, np.array([1, 2]), []]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> fc.Backbone:
    return fc.backbone_from_spec(str(write_backbone(tmp_path_factory.mktemp("given") / "tiny")))


@pytest.mark.parametrize("value", NO_WHOLE, ids=lambda value: str(value)[:9])
def test_whole_numbers(value: Any) -> None:
    with pytest.raises(
        UserErrorOf := fc.UserError, match="Expected n to be a whole number from 0 to 4294967295, got"
    ):
        whole_number(value, "n")
    assert UserErrorOf is fc.UserError
    assert (whole_number(np.uint8(3), "n"), whole_number(torch.tensor(3), "n")) == (3, 3)


@pytest.mark.parametrize("value", NO_AMOUNT, ids=lambda value: str(value)[:9])
def test_amounts(value: Any) -> None:
    with pytest.raises(fc.UserError, match="Expected x to be a finite number above 0, got"):
        amount(value, "x")
    assert amount(np.float32(0.5), "x") == amount("0.5" and 0.5, "x") == 0.5


def test_long_values_are_shortened() -> None:
    assert len(shortened("a" * 10**6)) < 70
    assert len(shortened(10**4000)) < 70


def a_run(**changed: Any) -> fc.Run:
    facts: dict[str, Any] = {
        "class_names": ["a", "b"], "layout": fc.PromptLayout(2), "contexts": torch.zeros(2, 16),
        "features": torch.ones(2, 1, 16), "labels": torch.tensor([0, 1]), "epochs": 1, "seed": 0,
    }  # fmt: skip
    return fc.Run(**(facts | changed))


WHOLE: dict[str, Callable[[fc.Backbone, Any], Any]] = {
    "context_length": lambda backbone, value: fc.PromptLayout(value),
    "classes": lambda backbone, value: fc.initial_contexts(backbone, fc.PromptLayout(2), value, 1),
    "seed of contexts": lambda backbone, value: fc.initial_contexts(backbone, fc.PromptLayout(2), 2, value),
    "k": lambda backbone, value: fc.nearest_words(backbone, torch.zeros(1, 16), value),
    "epochs": lambda backbone, value: a_run(epochs=value),
    "batch_size": lambda backbone, value: a_run(batch_size=value),
    "seed of a run": lambda backbone, value: a_run(seed=value),
    "memory_budget": lambda backbone, value: fc.train(backbone, [a_run()], memory_budget=value),
    "shots": lambda backbone, value: fc.few_shot(make_data().dataset, value, 1),
    "seed of a draw": lambda backbone, value: fc.few_shot(make_data().dataset, 1, value),
    "seed of weights": lambda backbone, value: fc.load_backbone("RN50", seed=value),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", NO_WHOLE, ids=lambda value: str(value)[:9])
def test_functions_refuse_what_is_no_whole_number(tiny: fc.Backbone, name: str, value: Any) -> None:
    if (name, str(value)) == ("memory_budget", str(2**40)):
        return
    with pytest.raises(fc.UserError, match="to be a whole number from"):
        WHOLE[name](tiny, value)


@pytest.mark.parametrize("value", [*NO_AMOUNT, 1e39, 1e-60], ids=lambda value: str(value)[:9])
def test_runs_refuse_learning_rates_that_are_none(value: Any) -> None:
    with pytest.raises(fc.UserError, match="learning_rate"):
        a_run(learning_rate=value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: fc.PromptLayout(4, class_specific="no"), "class_specific to be True or False, got 'no'"),
        (lambda b: fc.PromptLayout(4, "mid", prompt="[V]x4 [CLASS]"), "leave out class_position"),
        (lambda b: fc.PromptLayout(4, 3), 'position "3" is unknown'),
        (
            lambda b: fc.initial_contexts(b, fc.PromptLayout(10**9), 2, 1),
            "at most 77, which the text tower reads",
        ),
        (
            lambda b: fc.nearest_words(b, torch.zeros(1, 16), metric="cosin"),
            '"euclidean" or "cosine", got .cosin.',
        ),
        (lambda b: fc.nearest_words(b, torch.full((1, 16), torch.nan)), "16 numbers of them not finite"),
        (lambda b: fc.nearest_words(b, torch.zeros(16)), r"shape \(n, 16\), got \(16,\)"),
        (lambda b: fc.load_backbone("RN50", "openai", seed=1), "these are given"),
        (lambda b: fc.load_backbone("RN50", device="gpu"), 'device "gpu" cannot be used'),
    ],
)
def test_arguments_that_mean_nothing(
    tiny: fc.Backbone, call: Callable[[fc.Backbone], Any], message: str
) -> None:
    with pytest.raises(fc.UserError, match=message):
        call(tiny)


def test_numbers_of_numpy_are_numbers(tiny: fc.Backbone) -> None:
    assert fc.PromptLayout(np.int64(4), class_specific=np.True_) == fc.PromptLayout(4, class_specific=True)
    assert type(fc.PromptLayout(np.int64(4)).context_length) is int
    one, other = (fc.few_shot(make_data().dataset, kind(2), kind(1)) for kind in (int, np.int64))
    assert np.array_equal(one.train, other.train)
    assert fc.nearest_words(tiny, torch.zeros(1, 16), np.int32(2)).tokens.shape == (1, 2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("views", -1),
        ("views", True),
        ("views", 10**9),
        ("view_seed", -1),
    ],
)
def test_caching_refuses_numbers_before_it_reads_anything(
    tiny: fc.Backbone, tmp_path: Path, option: str, value: Any
) -> None:
    dataset = fc.load_dataset(write_dataset(tmp_path / "colours"))
    with pytest.raises(fc.UserError, match=f"Expected {option} to be a whole number"):
        fc.cache_features(tiny, dataset, tmp_path / "cache", shots=[1], seeds=[1], **{option: value})
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("value", "listed"),
    [
        ("a", ["a"]), (Path("a"), [Path("a")]), (2, [2]), (np.int64(2), [2]), (torch.tensor(2), [2]), ((), []),
        (np.arange(2), [0, 1]), (torch.arange(2), [0, 1]), (range(2), [0, 1]), ((n for n in (0, 1)), [0, 1]),
        (np.array(["a", "b"]), ["a", "b"]), ({"a": 1}.keys(), ["a"]),
    ],
)  # fmt: skip
def test_one_or_several(value: Any, listed: list[Any]) -> None:
    assert several(value) == listed


@pytest.mark.parametrize("kind", [np.array, torch.tensor, iter, list])
def test_shots_and_seeds_of_any_kind_cache_the_same(tiny: fc.Backbone, tmp_path: Path, kind: Any) -> None:
    """An iterator, too, which a loop over shots and seeds would read once only."""
    dataset = fc.load_dataset(write_dataset(tmp_path / "colours"))
    digests = [
        fc.FeatureStore.open(
            fc.cache_features(
                tiny, dataset, tmp_path / name, shots=made([1, 2]), seeds=made([1, 2, 3]), views=1
            )
        ).digest
        for name, made in (("one", list), ("other", kind))
    ]
    assert digests[0] == digests[1]
    one = np.int64(1)
    assert fc.cache_features(tiny, dataset, tmp_path / "third", shots=one, seeds=one, views=1).is_file()


def test_errors_of_settings_survive_the_way_between_processes() -> None:
    found = pickle.loads(pickle.dumps(SettingError("no", ("a", 1))))
    assert (str(found), found.place) == ("no", ("a", 1))
