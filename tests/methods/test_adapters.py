"""What all methods on image features promise: stacking changes nothing, choices see no test label, settings matter."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastcoop as fc
from fastcoop.backbones import Backbone, backbone_from_spec
from fastcoop.datasets import Split, load_dataset, write_draw
from fastcoop.errors import UserError
from fastcoop.methods import METHODS, Data, Outcome, RunContext, RunSpec, expand
from fastcoop.methods.adapters import ADAPTERS, base, proker, tip_adapter
from fastcoop.methods.adapters import selection as choice
from fastcoop.methods.adapters.base import AdapterSettings
from fastcoop.methods.estimators import MethodClassifier
from fastcoop.methods.scores import unit
from fastcoop.results import load_results
from fastcoop.sweeps import evaluate, sweep
from tests.advice import follows
from tests.array_store import ArrayStore
from tests.methods.conftest import array_store, job, make_data, run
from tests.small_world import write_backbone, write_dataset

# A short form of each method, and other values of each of its settings.
SHORT: dict[str, dict[str, Any]] = {
    "gda": {},
    "proker": {},
    "cross_modal": {"iterations": 3},
    "tip_adapter": {},
    "tip_adapter_f": {"epochs": 2, "batch_size": 4},
    "task_res": {"epochs": 3, "batch_size": 4},
    "clip_adapter": {"epochs": 3, "batch_size": 4},
    "lp_plus_plus": {"epochs": 21},
    "zs_lp": {"epochs": 3, "batch_size": 4},
    "clap": {"epochs": 3, "batch_size": 4},
    "prolip": {"epochs": 3},
}
CHANGED: dict[str, dict[str, Any]] = {
    "gda": {"alpha": 9.0, "variant": "base_to_new"},
    "proker": {"beta": 9.0, "lmbda": 9.0, "samples": "images"},
    "cross_modal": {
        "learning_rate": 0.1, "weight_decay": 90.0, "batch_size": 4, "iterations": 9, "init": "random", "wise_ft": 0.5,
    },
    "tip_adapter": {"alpha": 9.0, "beta": 9.0, "alpha_max": 60.0, "beta_max": 60.0},
    "tip_adapter_f": {
        "alpha": 9.0, "beta": 9.0, "alpha_max": 60.0, "beta_max": 60.0, "learning_rate": 0.3, "epochs": 3,
        "batch_size": 2,
    },
    "task_res": {"alpha": 3.0, "learning_rate": 0.3, "epochs": 4, "batch_size": 2},
    "clip_adapter": {"ratio": 0.6, "reduction": 2, "learning_rate": 0.3, "epochs": 4, "batch_size": 2},
    "lp_plus_plus": {"epochs": 30, "sum_alpha_gradients": False},
    "zs_lp": {"learning_rate": 0.3, "epochs": 4, "batch_size": 2},
    "clap": {"learning_rate": 0.3, "epochs": 4, "batch_size": 2, "constraint": "adaptive"},
    "prolip": {"learning_rate": 0.01, "lmbda": 9.0, "epochs": 4},
}  # fmt: skip
# What makes a case sensitive to the other settings: the only validation of a short training is after its first step,
# and multipliers hardly change in a few epochs.
SENSITIVE: dict[str, dict[str, Any]] = {"cross_modal": {"selection": "fixed"}, "clap": {"epochs": 30}}
NAMES = [one.name for one in ADAPTERS]
CHOOSING = [one.name for one in ADAPTERS if issubclass(one.Settings, AdapterSettings)]
PROTOCOLS = ["few_val", "shots_val", "full_val", "imagenet_val"]


@pytest.fixture(autouse=True)
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tip_adapter, "BETAS", 8)
    monkeypatch.setattr(tip_adapter, "ALPHAS", 5)
    monkeypatch.setattr(proker, "SEARCHED", {"beta": (0.5, 3.0, 3), "lmbda": (0.001, 1.0, 3)})


def hard_data(seed: int = 0, name: str = "animals", **others: Any) -> Data:
    """Data whose classes overlap, so that changed values change predictions."""
    data = make_data(name=name, seed=seed, **others)
    rng = np.random.default_rng(seed + 100)
    store: Any = data.store
    for split, features in store._features.items():
        store._features[split] = features + 2.5 * rng.normal(size=features.shape).astype(np.float32)
    return data


def learned(backbone: Backbone, name: str, jobs: list[RunSpec]) -> list[dict[str, np.ndarray]]:
    return [outcome.weights for outcome in run(backbone, name, jobs)]


def assert_equal(one: Outcome, other: Outcome) -> None:
    assert one.weights.keys() == other.weights.keys()
    for name, array in one.weights.items():
        np.testing.assert_array_equal(array, other.weights[name], name)
    assert one.extra == other.extra


def chosen_jobs(name: str, data: Data, selection: str, shots: int = 2) -> list[RunSpec]:
    given = {"selection": selection, **SHORT[name]}
    if selection == "imagenet_val":
        given["tuned_on"] = "others"
    jobs = [job(data, name, shots=shots, seed=seed, **given) for seed in (1, 2)]
    return [replace(one, tuning=hard_data(5, "others")) for one in jobs]


def spoiled(data: Data, what: str) -> Data:
    """The same data with other test labels, or other test features."""
    rng = np.random.default_rng(9)
    store: Any = ArrayStore(data.store._labels, data.store._features)
    part = getattr(store, what)
    noise = rng.permutation(part["test"]) if what == "_labels" else rng.normal(size=part["test"].shape)
    part["test"] = noise.astype(part["test"].dtype)
    return Data(data.dataset, store, data.views)


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("selection", ["fixed", *PROTOCOLS])
def test_no_choice_weight_or_prediction_depends_on_the_test_set(
    backbone: Backbone, name: str, selection: str
) -> None:
    data = hard_data()
    plain = run(backbone, name, chosen_jobs(name, data, selection))
    for what in ("_labels", "_features"):
        other = run(backbone, name, chosen_jobs(name, spoiled(data, what), selection))
        for one, two in zip(plain, other, strict=True):
            assert_equal(one, two)
            if what == "_labels":
                np.testing.assert_array_equal(
                    one.scores["animals"].predictions, two.scores["animals"].predictions
                )


@pytest.mark.parametrize("name", NAMES)
def test_stacked_runs_have_the_results_that_they_have_alone(backbone: Backbone, name: str) -> None:
    data = hard_data()
    jobs = [job(data, name, shots, seed, **SHORT[name]) for shots in (1, 2, 4) for seed in (1, 2)]
    jobs += [job(data, name, 2, 1, **SHORT[name] | dict([changed])) for changed in CHANGED[name].items()]
    floats = [pair for pair in CHANGED[name].items() if isinstance(pair[1], float)]
    jobs += [job(data, name, 2, 1, **SHORT[name] | {setting: 1.5 * number}) for setting, number in floats]
    uneven = np.array([0, 1, 2, 6, 7, 12])  # of six images of each class
    jobs += [replace(jobs[3], subset=replace(jobs[3].subset, train=uneven))]
    jobs += [job(hard_data(5, "others", classes=("rose", "sea lion", "oak")), name, 2, 1, **SHORT[name])]
    together = run(backbone, name, jobs)
    for one, outcome in zip(jobs, together, strict=True):
        (alone,) = run(backbone, name, [one])
        assert alone.extra.keys() == outcome.extra.keys()
        for key, array in alone.weights.items():
            rounding = 1e-6 * (1 + np.abs(array).max())
            np.testing.assert_allclose(array, outcome.weights[key], rtol=1e-5, atol=rounding, err_msg=key)
        np.testing.assert_array_equal(
            alone.scores[one.dataset].predictions, outcome.scores[one.dataset].predictions
        )


@pytest.mark.parametrize("name", NAMES)
def test_stacks_and_images_are_cut_to_the_memory(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data, method, sizes = hard_data(), METHODS[name], []
    fit = method.fit
    monkeypatch.setattr(
        type(method), "fit", lambda self, stack, judge: sizes.append(len(stack)) or fit(stack, judge)
    )
    jobs = [job(data, name, seed=seed, **SHORT[name]) for seed in (1, 2, 3, 4, 5)]
    together = run(backbone, name, jobs)
    tries = 1 if method.selection(jobs[0].settings) == "fixed" else len(method.tries(jobs[0]))
    assert sizes == [5 * tries]
    sizes.clear()
    monkeypatch.setattr(choice, "BLOCK_BYTES", 1)
    monkeypatch.setattr(base, "TEST_BYTES", 1)
    outcomes: dict[int, Outcome] = {}
    budget = 2 * method.run_bytes(6, 3, 3, 16)
    method.run(backbone, jobs, outcomes.__setitem__, RunContext(memory_budget=budget))
    assert max(sizes) == 2
    for index, outcome in enumerate(together):
        assert outcomes[index].extra == pytest.approx(outcome.extra)
        np.testing.assert_array_equal(
            outcomes[index].scores["animals"].predictions, outcome.scores["animals"].predictions
        )


@pytest.mark.parametrize("name", CHOOSING)
def test_the_length_of_validation_features_changes_no_choice(backbone: Backbone, name: str) -> None:
    data, short = hard_data(), hard_data()
    store: Any = short.store
    store._features["val"] *= np.float32(2**-8)
    one, other = (run(backbone, name, chosen_jobs(name, some, "few_val"))[0] for some in (data, short))
    assert_equal(one, other)


def test_runs_learn_with_what_their_own_run_chose_elsewhere(backbone: Backbone) -> None:
    """Of equal settings, shots and seed."""
    data, others, name = hard_data(), hard_data(5, "others"), "lp_plus_plus"
    given = {"selection": "imagenet_val", "tuned_on": "others"}
    jobs = [
        replace(job(data, name, shots, seed, epochs=epochs, **given), tuning=others)
        for epochs in (3, 40) for shots in (1, 2) for seed in (1, 2, 3)
    ]  # fmt: skip
    outcomes = run(backbone, name, jobs)
    for one, outcome in zip(jobs, outcomes, strict=True):
        own = job(others, name, one.shots, one.seed, epochs=one.settings.epochs, selection="full_val")
        epochs = outcome.extra.get("epochs", one.settings.epochs)  # recorded if they are others
        assert epochs == run(backbone, name, [own])[0].extra["epoch"]
    assert len({outcome.extra.get("epochs") for outcome in outcomes}) > 3


def test_runs_share_the_time_that_their_batch_takes(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(0.0)  # a second passes between two looks
    monkeypatch.setattr(base, "time", SimpleNamespace(perf_counter=clock.__next__))
    data = hard_data()
    jobs = [job(data, "prolip", seed=seed, selection="few_val", epochs=2) for seed in (1, 2)]
    outcomes = run(backbone, "prolip", jobs)
    assert [outcome.seconds for outcome in outcomes] == pytest.approx(
        [1, 1]
    )  # half of learning, half of tests
    reported: list[float] = []
    known = replace(jobs[0], weights=outcomes[0].weights, targets=(data,))
    METHODS["prolip"].run(
        backbone,
        [known],
        lambda _, outcome: outcomes.append(outcome),
        RunContext(on_progress=reported.append),
    )
    assert (outcomes[-1].seconds, reported) == (0, [1])


@pytest.mark.parametrize("name", ["task_res", "clip_adapter"])
def test_runs_of_different_shots_keep_their_epochs_where_classes_are_small(
    backbone: Backbone, name: str
) -> None:
    whole = make_data(views=0).dataset
    rows = np.arange(0, 18, 2)  # three images of each class, all of which both runs learn
    few = Split(tuple(whole.splits["train"].paths[row] for row in rows), whole.splits["train"].labels[rows])
    small = replace(whole, splits={**whole.splits, "train": few})
    data = Data(small, array_store(small, 0, 0), 0)
    jobs = [job(data, name, shots) for shots in (4, 8)]
    assert [len(one.losses) for one in run(backbone, name, jobs)] == [100, 200]


@pytest.mark.parametrize("name", CHOOSING)
def test_runs_learn_and_choose_on_the_images_that_could_be_read(backbone: Backbone, name: str) -> None:
    class WithoutFirst(ArrayStore):
        meta = SimpleNamespace(recipe="current", skipped={"val": [0], "train": [0]}, sha256={})

        def train(self, indices: np.ndarray, kind: str = "coop", as_stored: bool = False) -> torch.Tensor:
            return super().train(indices[indices > 0], kind, as_stored)

        def train_labels(self, indices: np.ndarray) -> torch.Tensor:
            return super().train_labels(indices[indices > 0])

        def indices(self, split: str) -> np.ndarray:
            return super().indices(split)[split == "val" :]

        def split(self, name: str, kind: str = "coop") -> tuple[torch.Tensor, torch.Tensor]:
            features, labels = super().split(name, kind)
            return features[name == "val" :], labels[name == "val" :]

    whole = make_data()
    data = Data(whole.dataset, WithoutFirst(whole.store._labels, whole.store._features), 3)
    jobs = [job(data, name, seed=seed, selection="few_val", **SHORT[name]) for seed in (2, 3, 4)]
    assert [0 in one.subset.train for one in jobs] == [True, False, False]
    assert [0 in one.subset.val for one in jobs] == [False, False, True]
    for one, outcome in zip(jobs, run(backbone, name, jobs), strict=True):
        assert_equal(*run(backbone, name, [one]), outcome)


def settings_of(names: list[str]) -> list[tuple[str, str]]:
    return [(name, setting) for name in names for setting in CHANGED[name]]


@pytest.mark.parametrize(("name", "setting"), settings_of(NAMES))
def test_every_setting_changes_the_key_and_the_result(backbone: Backbone, name: str, setting: str) -> None:
    data, method = hard_data(), METHODS[name]
    given = SHORT[name] | SENSITIVE.get(name, {})
    before = job(data, name, 4, **given)
    after = job(data, name, 4, **{**given, setting: CHANGED[name][setting]})
    assert method.key_settings(before, backbone) != method.key_settings(after, backbone)
    one, two = (METHODS[name].classifier(backbone, known(backbone, job), data) for job in (before, after))
    logits = [one.logits(data.unit_test if one.unit_length else data.test[0]) for one in (one, two)]
    assert not np.array_equal(*logits)


def known(backbone: Backbone, one: RunSpec) -> RunSpec:
    (weights,) = learned(backbone, one.method, [one])
    return replace(one, weights=weights)


def test_the_key_tells_whether_the_mirrored_image_is_learned_from(backbone: Backbone) -> None:
    keys, learned = [], []
    for views in (0, 1, 3):
        one = job(make_data(views=views), "cross_modal", 4)
        keys.append(METHODS["cross_modal"].key_settings(one, backbone)["views"])
        learned.append(one.data.train(one.subset, "flip")[0].shape[1])
    assert keys == learned == [1, 2, 2]


def test_every_setting_is_tested() -> None:
    for name in NAMES:
        settings = METHODS[name].Settings.model_fields.keys() - {"selection", "tuned_on"}
        assert settings == CHANGED[name].keys(), name


@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_is_counted(backbone: Backbone, name: str) -> None:
    trained = {
        "cross_modal": ["W"], "tip_adapter_f": ["keys"], "task_res": ["x"], "clip_adapter": ["down", "up"],
        "lp_plus_plus": ["W", "b", "alpha"], "zs_lp": ["prototypes"], "clap": ["prototypes"], "prolip": ["P"],
    }.get(name, [])  # fmt: skip
    fixed = {"selection": "fixed"} if name in CHOOSING else {}
    for settings in ({}, fixed):
        (outcome,) = run(backbone, name, [job(hard_data(), name, **SHORT[name] | settings)])
        sizes = [outcome.weights[weight].size for weight in trained]
        assert outcome.extra["trained_parameters"] == sum(sizes)


@pytest.mark.parametrize("name", CHOOSING)
def test_each_protocol_has_its_key_and_its_images(backbone: Backbone, name: str) -> None:
    data, method = hard_data(), METHODS[name]
    keys = []
    for selection in ("fixed", *PROTOCOLS):
        one = chosen_jobs(name, data, selection)[0]
        method.check(one)
        keys.append(str(method.key_settings(one, backbone)))
        assert method.columns(one, backbone)["selection"] == selection
    assert len(set(keys)) == len(keys)
    (outcome,) = run(backbone, name, [chosen_jobs(name, data, "full_val", shots=4)[0]])
    images = 12  # all validation images
    assert outcome.extra["val_accuracy"] * images / 100 == pytest.approx(
        round(outcome.extra["val_accuracy"] * images / 100)
    )


@pytest.mark.parametrize(
    ("name", "values"), [("tip_adapter", ("alpha", "beta")), ("prolip", ("learning_rate", "lmbda"))]
)
def test_values_are_chosen_unless_all_are_given(
    backbone: Backbone, name: str, values: tuple[str, str]
) -> None:
    method, data = METHODS[name], hard_data()
    given = [(), values[:1], values[1:], values]
    jobs = [job(data, name, selection="few_val", **dict.fromkeys(some, 1e-5)) for some in given]
    found = [method.columns(one, backbone)["selection"] for one in jobs]
    assert found == ["few_val", "few_val", "few_val", "fixed"]
    assert len({str(method.key_settings(one, backbone)) for one in jobs}) == 4


def test_the_key_has_the_dataset_that_values_are_chosen_on(backbone: Backbone) -> None:
    """Its images, features and prompt, if something is chosen."""
    (one, _), method = chosen_jobs("gda", hard_data(), "imagenet_val"), METHODS["gda"]
    assert one.tuning is not None
    dataset, store = one.tuning.dataset, hard_data(5, "others").store
    store.digest = "1" * 64
    others = [
        Data(replace(dataset, digest="other images"), one.tuning.store),
        Data(replace(dataset, template="a {}."), one.tuning.store),
        Data(dataset, store),
    ]
    keys = [method.key_settings(replace(one, tuning=data), backbone) for data in (one.tuning, *others)]
    assert len(set(map(str, keys))) == 4
    given = ({"selection": "fixed"}, {"selection": "imagenet_val", "tuned_on": "others"})
    fixed, unused = (job(one.data, "gda", alpha=2.0, **some) for some in given)
    assert method.key_settings(unused, backbone) == method.key_settings(fixed, backbone)
    assert [method.tuned_on(some.settings) for some in (one, fixed, unused)] == ["others", None, None]


@follows("name a dataset {} with a val split in the grid, or set selection to another protocol")
def test_values_of_another_dataset_need_that_dataset(backbone: Backbone) -> None:
    one = job(hard_data(), "tip_adapter", selection="imagenet_val")
    with pytest.raises(UserError, match="name a dataset imagenet with a val split in the grid"):
        METHODS["tip_adapter"].check(one)
    METHODS["tip_adapter"].check(replace(one, tuning=hard_data(3, "imagenet")))
    METHODS["tip_adapter"].check(job(hard_data(), "tip_adapter", selection="few_val"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["empty class", "one view", "duplicates", "few images"])
def test_edge_cases_have_finite_answers(backbone: Backbone, name: str, case: str) -> None:
    data = hard_data(views=0 if case == "one view" else 3)
    store: Any = data.store
    shots = 1 if case == "one view" else 4
    one = job(data, name, shots, **SHORT[name])
    if case in ("empty class", "few images"):
        rows = one.subset.train[one.data.dataset.splits["train"].labels[one.subset.train] != 1]
        rows = rows if case == "empty class" else one.subset.train[:-3]
        one = replace(one, subset=replace(one.subset, train=rows))
    if case == "duplicates":
        store._features["train"][:] = store._features["train"][:1]
    (outcome,) = run(backbone, name, [one])
    assert outcome.status == "done"
    assert all(np.isfinite(array).all() for array in outcome.weights.values())
    assert np.isfinite(outcome.scores["animals"].accuracy)


@pytest.mark.parametrize("name", NAMES)
def test_other_classes_are_matched_by_name(backbone: Backbone, name: str) -> None:
    """Half the classes in another order, and classes that were not learned."""
    data = hard_data()
    one = known(backbone, job(data, name, 4, **SHORT[name]))
    method = METHODS[name]
    whole = method.classifier(backbone, one, data)
    images = data.unit_test if whole.unit_length else data.test[0]
    other = hard_data(name="order", classes=("old dog", "cat"))
    part = method.classifier(backbone, one, other).logits(images)
    np.testing.assert_allclose(part, whole.logits(images)[:, [2, 0]], rtol=1e-4, atol=1e-4)
    new = hard_data(name="new", classes=("cat", "tractor"))
    if method.is_class_specific(one.settings):
        with pytest.raises(UserError, match='its class "tractor" is not among'):
            method.classifier(backbone, one, new)
        return
    logits = method.classifier(backbone, one, new).logits(images)
    assert np.isfinite(logits).all()
    if method.mixes:
        np.testing.assert_allclose(logits[:, 0], part[:, 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("tip_adapter", {}),
        ("tip_adapter_f", {}),
        ("proker", {}),
        ("gda", {}),
        ("gda", {"variant": "base_to_new"}),
    ],
)
def test_one_shared_class_neither_gets_nor_loses_the_images_of_another_dataset(
    backbone: Backbone, name: str, given: dict[str, str]
) -> None:
    """Keys, dual weights and Gaussians add to the logits of a class, whatever the image, so no others are beside it."""
    one = known(backbone, job(hard_data(), name, 4, selection="fixed", **SHORT[name], **given))
    of_others = replace(one, data=hard_data(classes=("hedge", "sea lion", "old dog")))
    shared = hard_data(name="shared", classes=("cat", "tractor", "barn", "plough"))
    found, expected = (METHODS[name].classifier(backbone, run, shared) for run in (one, of_others))
    images = shared.unit_test if found.unit_length else shared.test[0]
    np.testing.assert_array_equal(found.logits(images), expected.logits(images))
    if not given:
        zero_shot = METHODS["zero_shot"].classifier(backbone, job(shared, "zero_shot"), shared)
        np.testing.assert_allclose(found.logits(images), zero_shot.logits(shared.unit_test), atol=1e-5)


@follows(
    "tuned_on is the dataset of selection: imagenet_val; leave it out",
    "{} is not searched; leave out {}_max",
)
def test_settings_without_effect_are_refused() -> None:
    for wrong, right in (
        ({"tuned_on": "birds"}, {}),
        ({"alpha_max": 5.0, "selection": "fixed"}, {"selection": "fixed"}),
        ({"beta_max": 5.0, "beta": 1.0}, {"beta": 1.0}),
    ):
        with pytest.raises(UserError, match="leave"):
            expand(METHODS["tip_adapter"], wrong)
        expand(METHODS["tip_adapter"], right)


@follows("test images to choose on; set selection to fixed, few_val, shots_val or full_val")
def test_estimators_have_no_other_dataset_and_no_test_images(data: Data) -> None:
    X, y = data.train(data.subset(4, 1))
    for selection in ("imagenet_val", "official"):
        with pytest.raises(UserError, match="set selection to fixed, few_val, shots_val or full_val"):
            fc.TipAdapter(selection=selection).fit(X, y, text_features=np.eye(3, 16))
    for selection in ("fixed", "few_val", "shots_val", "full_val"):
        fc.TipAdapter(selection=selection).fit(X, y, text_features=np.eye(3, 16))


@follows("All text_features have length 1; pass them as the text tower gives them")
@pytest.mark.parametrize("name", NAMES)
def test_lengths_of_texts_and_of_images_make_no_other_difference_than_is_told(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = hard_data()
    X, y = data.train(data.subset(4, 1))
    raw = 9 * np.random.default_rng(0).normal(size=(3, X.shape[-1]))
    estimator = next(one for one in MethodClassifier.__subclasses__() if one.method == name)

    def learned(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
        return estimator(**SHORT[name]).fit(images, y, text_features=texts).predict_proba(data.test[0])

    plain = learned(raw, X)
    assert not caplog.text
    by_text, by_image = learned(unit(raw), X), learned(raw, unit(X))
    differ = [np.abs(other - plain).max() > 1e-4 for other in (by_text, by_image)]
    assert differ == [name in ("task_res", "zs_lp", "clap"), name.startswith("tip_adapter")]
    assert caplog.text.count("All text_features have length 1; pass them as") == differ[0]


@follows("set selection of {} to fixed")
def test_values_are_chosen_on_validation_images_or_fixed(backbone: Backbone) -> None:
    data = hard_data()
    one = job(data, "tip_adapter")
    without = replace(one, subset=replace(one.subset, val=one.subset.val[:0]))
    for selection in ("few_val", "shots_val", "full_val", "official"):
        (settings,) = expand(METHODS["tip_adapter"], {"selection": selection})
        with pytest.raises(UserError, match="set selection of tip_adapter to fixed"):
            METHODS["tip_adapter"].check(replace(without, settings=settings))
    METHODS["tip_adapter"].check(one)
    for selection in ("fixed", "imagenet_val"):
        (settings,) = expand(METHODS["tip_adapter"], {"selection": selection})
        METHODS["tip_adapter"].check(replace(without, settings=settings, tuning=hard_data(3, "imagenet")))


@pytest.mark.parametrize("name", ["tip_adapter"])
def test_alpha_zero_is_zero_shot(backbone: Backbone, data: Data, name: str) -> None:
    (outcome,) = run(backbone, name, [job(data, name, alpha=0.0, selection="fixed")])
    (zero_shot,) = run(backbone, "zero_shot", [job(data, "zero_shot")])
    np.testing.assert_array_equal(
        outcome.scores["animals"].predictions, zero_shot.scores["animals"].predictions
    )


@follows("set samples to images, or give it fewer shots")
def test_a_kernel_that_is_too_large_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proker, "KERNEL_BYTES", 8 * 20**2)
    with pytest.raises(UserError, match=r"36 x 36 entries.*set samples to images, or give it fewer shots"):
        METHODS["proker"].check(job(hard_data(), "proker", 4))
    METHODS["proker"].check(job(hard_data(), "proker", 2))
    METHODS["proker"].check(job(hard_data(), "proker", 4, samples="images"))


def test_another_draw_of_the_tuning_dataset_is_another_run(tmp_path: Path) -> None:
    """A draw that is read from files, in place of the one that follows from the dataset, shots and seed."""
    for number, name in enumerate(("colours", "again")):
        write_dataset(tmp_path / "data" / name, seed=number)
    places = {"data_root": tmp_path / "data", "cache": tmp_path / "cache", "results": tmp_path / "results"}
    gda = {
        "selection": "imagenet_val",
        "tuned_on": "again",
        "alpha": [None, 1.0],
    }  # of the second, nothing is chosen
    methods = {"gda": gda, "tip_adapter": None}
    grid = {
        "backbones": str(write_backbone(tmp_path / "tiny")), "datasets": ["colours", "again"], "shots": 1, "seeds": 1,
        "views": 0, "methods": methods,
    }  # fmt: skip
    sweep(grid, jobs=1, **places)
    before = set(load_results(places["results"]).key)
    again = load_dataset("again", tmp_path / "data")
    write_draw(again, 1, 1, again.fewshot_dir)
    assert sweep(grid, jobs=1, **places).finished == 0, "the same draw in a file"
    shutil.rmtree(again.fewshot_dir)
    for path in write_draw(again, 1, 2, again.fewshot_dir):
        path.rename(path.with_name(path.name.replace("seed_2", "seed_1")))
    assert sweep(grid, jobs=1, **places).finished == 4
    rows = load_results(places["results"])
    new = rows[~rows.key.isin(before)]
    assert sorted(zip(new.dataset, new.method, strict=True)) == [
        ("again", "gda"), ("again", "gda"), ("again", "tip_adapter"), ("colours", "gda"),
    ]  # fmt: skip


def test_other_pictures_of_the_tuning_dataset_are_learned_again(tmp_path: Path) -> None:
    """They are in no key: of the tuning dataset, keys have the validation and test features."""
    for number, name in enumerate(("colours", "again")):
        write_dataset(tmp_path / "data" / name, seed=number)
    places = {"data_root": tmp_path / "data", "cache": tmp_path / "cache", "results": tmp_path / "results"}
    grid = {
        "backbones": str(write_backbone(tmp_path / "tiny")), "datasets": ["colours", "again"], "shots": 1, "seeds": 1,
        "views": 0, "methods": {"gda": {"selection": "imagenet_val", "tuned_on": "again"}},
    }  # fmt: skip
    sweep(grid, jobs=1, **places)
    results = places["results"] / "results.sqlite"
    with closing(sqlite3.connect(results)) as db, db:  # as it was recorded before
        assert db.execute("UPDATE runs SET train_files = substr(train_files, 1, 64)").rowcount == 2
    assert sweep(grid, jobs=1, **places).finished == 0
    shutil.rmtree(places["results"])
    sweep(grid, jobs=1, **places)
    for path in (tmp_path / "data" / "again" / "train").rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert sweep(grid, jobs=1, **places).finished == 2
    assert sweep(grid, jobs=1, **places).finished == 0


def test_a_sweep_learns_tests_and_resumes_every_method(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data" / "colours")
    write_dataset(tmp_path / "data" / "again", train=2, val=1, seed=1)
    write_dataset(tmp_path / "data" / "others", classes=("purple", "green"), train=0, val=0, seed=2)
    places = {"data_root": tmp_path / "data", "cache": tmp_path / "cache"}
    methods: dict[str, Any] = {"zero_shot": None} | {name: SHORT[name] for name in NAMES}
    methods["gda"] = {"selection": "imagenet_val", "tuned_on": "again"}
    grid = {
        "backbones": str(write_backbone(tmp_path / "tiny")), "datasets": ["colours", "again"], "shots": [1, 2],
        "seeds": 1, "views": 2, "methods": methods,
    }  # fmt: skip
    summary = sweep(grid, results=tmp_path / "results", jobs=1, **places)
    runs = 2 + 4 * len(NAMES)
    assert (summary.runs, summary.finished, summary.failed) == (runs, runs, {})
    rows = load_results(tmp_path / "results")
    assert set(rows.method) == {"zero_shot", *NAMES}
    assert rows.accuracy.notna().all()
    trained = rows.groupby("method").trained_parameters.max()
    assert trained["gda"] == 0
    assert trained["cross_modal"] == 4 * backbone_from_spec(grid["backbones"]).embed_dim
    learned = rows.query("method != 'zero_shot'")
    assert set(learned.query("method == 'gda'").selection) == {"imagenet_val"}
    assert sweep(grid, results=tmp_path / "results", jobs=1, **places).finished == 0
    tested = evaluate(tmp_path / "results", ["others"], backbones=[grid["backbones"]], **places)
    refusing = sum(METHODS[name].is_class_specific(METHODS[name].Settings()) for name in NAMES)
    assert len(tested) == runs - 4 * refusing
    assert np.isfinite([one.accuracy for one in tested]).all()
