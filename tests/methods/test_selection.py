"""Which contexts a CoOp run keeps, and what every method notes of itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcoop.backbones import Backbone
from fastcoop.errors import UserError
from fastcoop.methods import METHODS, Data, expand, get_method
from fastcoop.methods.coop import validation_epochs
from fastcoop.prompts import PromptLayout, initial_contexts
from tests.methods.conftest import job, make_data, run
from tests.reference import reference_features

SETTINGS = {"context_length": 2, "learning_rate": 0.3}


def on_validation(backbone: Backbone, data: Data, contexts: np.ndarray) -> float:
    """Accuracy on the validation images by the plain 77-token way."""
    features, labels = data.validation(data.subset(2, 1))
    texts = reference_features(
        backbone.model, backbone.tokenizer, data.class_names, torch.from_numpy(contexts), "end"
    )
    texts = torch.nn.functional.normalize(texts, dim=-1).numpy()
    return 100 * float(((features @ texts.T).argmax(1) == labels).mean())


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("seed", [1, 3, 4])
def test_best_val_keeps_the_first_best_of_the_epochs(backbone: Backbone, seed: int, specific: bool) -> None:
    data = make_data(seed=seed, views=0)
    settings = SETTINGS | {"class_specific": specific, "epochs": 7}
    one = job(data, "coop", select="best_val", val_every=1, **settings)
    (outcome,) = run(backbone, "coop", [one])

    from fastcoop.engine import train

    (trained,) = train(backbone, [METHODS["coop"].training(backbone, one)])
    contexts = [trained.snapshots[epoch].numpy() for epoch in range(1, 8)]
    accuracy = [on_validation(backbone, data, c) for c in contexts]
    best = int(np.argmax(accuracy))
    assert outcome.extra == {"val_accuracy": pytest.approx(accuracy[best]), "epoch": best + 1}
    assert (outcome.contexts == contexts[best]).all()
    assert outcome.losses.shape == (7,)
    assert len(set(accuracy)) > 1, "the epochs are told apart"


def test_the_last_step_is_kept_unless_asked_and_its_accuracy_noted_on_request(
    backbone: Backbone, data: Data
) -> None:
    silent, asked = (job(data, "coop", epochs=3, **SETTINGS, **more) for more in ({}, {"val_accuracy": True}))
    one, other = run(backbone, "coop", [silent, asked])
    assert one.extra == {}
    assert other.extra == {"val_accuracy": pytest.approx(on_validation(backbone, data, other.contexts))}
    assert (one.contexts == other.contexts).all()


@pytest.mark.parametrize(
    ("epochs", "every", "expected"),
    [
        (200, None, list(range(10, 201, 10))),
        (5, None, [1, 2, 3, 4, 5]),
        (7, 3, [3, 6, 7]),
        (9, 9, [9]),
    ],
)
def test_validation_epochs(data: Data, epochs: int, every: int | None, expected: list[int]) -> None:
    settings = {"epochs": epochs} | ({"val_every": every} if every else {})
    assert validation_epochs(job(data, "coop", select="best_val", **settings)) == expected
    assert validation_epochs(job(data, "coop", epochs=epochs)) == []


def test_selection_needs_validation_images(backbone: Backbone, data: Data) -> None:
    splits = {name: split for name, split in data.dataset.splits.items() if name != "val"}
    bare = Data(replace(data.dataset, splits=splits), data.store, data.views)
    for settings in ({"select": "best_val"}, {"val_accuracy": True}):
        with pytest.raises(UserError, match=r"no validation images.* best_val"):
            get_method("coop").check(job(bare, "coop", **settings))
    get_method("coop").check(job(bare, "coop"))


def test_settings_that_came_later_leave_earlier_keys_alone(backbone: Backbone, data: Data) -> None:
    coop = get_method("coop")
    plain = coop.key_settings(job(data, "coop", epochs=40), backbone)
    assert set(plain) == {
        "context_length", "class_position", "class_specific", "init", "epochs", "batch_size", "learning_rate",
        "views",
    }  # fmt: skip
    best = coop.key_settings(job(data, "coop", epochs=40, select="best_val"), backbone)
    assert coop.key_settings(job(data, "coop", epochs=40, select="best_val", val_every=2), backbone) == best
    assert best != plain
    (settings,) = expand(coop, {"select": "best_val"})
    assert coop.label(settings) == "CoOp (M=16, end, best on validation)"


def test_bfloat16_is_another_run_and_float32_is_not_named(backbone: Backbone, data: Data) -> None:
    settings = {"context_length": 4, "epochs": 12, "learning_rate": 0.05}
    exact, rough = (job(data, "coop", precision=p, **settings) for p in ("float32", "bfloat16"))
    coop = get_method("coop")
    assert coop.key_settings(rough, backbone) == coop.key_settings(exact, backbone) | {
        "precision": "bfloat16"
    }
    assert coop.label(rough.settings) == "CoOp (M=4, end, bfloat16)"
    (alone,) = run(backbone, "coop", [exact])
    together, other = run(backbone, "coop", [exact, rough])
    assert (together.contexts == alone.contexts).all()
    assert other.contexts.dtype == np.float32
    difference = np.abs(other.contexts - alone.contexts).max()
    moved = np.abs(alone.contexts - initial_contexts(backbone, PromptLayout(4), 3, 1).numpy()).max()
    assert 0 < difference < 0.2 * moved
    assert other.losses[-1] < other.losses[0]


FEATURES_ONLY = [name for name in METHODS if name != "finetune_image_encoder"]


@pytest.mark.parametrize("method", FEATURES_ONLY)
def test_every_method_reports_its_accuracies_and_learned_ones_their_losses(
    backbone: Backbone, data: Data, method: str
) -> None:
    settings = {"epochs": 4} if "epochs" in METHODS[method].Settings.model_fields else {}
    settings |= {"tcp": {"layer": 1}, "cross_modal": {"iterations": 4}}.get(method, {})
    (outcome,) = run(backbone, method, [job(data, method, **settings)])
    scores, labels = outcome.scores["animals"], data.test[1]
    right = scores.predictions == labels
    assert scores.accuracy == pytest.approx(100 * right.mean())
    per_class = [100 * right[labels == k].mean() for k in range(3)]
    assert scores.per_class == pytest.approx(per_class)
    assert scores.macro_accuracy == pytest.approx(np.mean(per_class))
    assert (outcome.losses is not None) == bool(settings)
    if settings:
        assert outcome.losses.shape == (4,) or method == "cross_modal"
        assert np.isfinite(outcome.losses).all()
    if method == "linear_probe":
        assert 0 <= outcome.extra["val_accuracy"] <= 100
