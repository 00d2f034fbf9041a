"""Tip-Adapter, GDA, ProKeR and the cross-modal probe, each against plain NumPy or torch of one run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fastcoop import ProKeR
from fastcoop.backbones import Backbone
from fastcoop.methods import METHODS, Data, RunSpec
from fastcoop.methods.adapters.cross_modal import batches
from fastcoop.methods.adapters.selection import Judge, drawn_for
from fastcoop.methods.adapters.stack import Stack, Texts
from fastcoop.methods.scores import unit
from fastcoop.methods.text import class_texts
from tests.methods.conftest import DIM, job, make_data, run
from tests.methods.test_adapters import assert_equal, hard_data, spoiled
from tests.methods.test_trained_adapters import assert_moved_alike, parameter

CLASSES = 3


def known(backbone: Backbone, one: RunSpec) -> RunSpec:
    (outcome,) = run(backbone, one.method, [one])
    return replace(one, weights=outcome.weights)


def logits_of(backbone: Backbone, one: RunSpec, data: Data) -> np.ndarray:
    classifier = METHODS[one.method].classifier(backbone, one, data)
    return classifier.logits(data.unit_test if classifier.unit_length else data.test[0])


def arrays(backbone: Backbone, one: RunSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Views (images, views, dim) of any length, labels, texts and test features of length 1, in float64."""
    views, labels = one.data.train_views(one.subset)
    texts = class_texts(backbone, one.data)
    return views.astype(float), labels, texts.astype(float), unit(one.data.test[0].astype(float))


@pytest.mark.parametrize(("alpha", "beta"), [(1.17, 1.0), (3.0, 7.0)])
@pytest.mark.parametrize("drop", [0, 1])  # images of the last class: fewer than of the others
def test_tip_adapter_is_a_cache_of_mean_views(
    backbone: Backbone, data: Data, alpha: float, beta: float, drop: int
) -> None:
    one = job(data, "tip_adapter", 4, alpha=alpha, beta=beta)
    train = one.subset.train[: len(one.subset.train) - drop]
    one = known(backbone, replace(one, subset=replace(one.subset, train=train)))
    views, labels, texts, x = arrays(backbone, one)
    keys = unit(views.mean(1))
    cache = np.exp(-beta * (1 - x @ keys.T)) @ np.eye(CLASSES)[labels]
    expected = backbone.logit_scale * x @ texts.T + alpha * cache
    np.testing.assert_allclose(logits_of(backbone, one, data), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "steps"), [(256, 1), (8, 2)])
def test_tip_adapter_f_is_adamw_on_the_keys(backbone: Backbone, batch_size: int, steps: int) -> None:
    """The last, short batch of an epoch is a step, too."""
    data, epochs, rate = make_data(views=0), 15, 0.01
    given = {"selection": "fixed", "epochs": epochs, "learning_rate": rate, "batch_size": batch_size}
    one = job(data, "tip_adapter_f", 4, **given)
    (outcome,) = run(backbone, "tip_adapter_f", [one])
    views, labels, texts, _ = arrays(backbone, one)
    x, T = torch.from_numpy(unit(views[:, 0])).float(), torch.from_numpy(texts).float()
    targets, onehot = torch.from_numpy(labels), torch.eye(CLASSES)[labels]
    keys, losses, rng = parameter(x), [], np.random.default_rng(one.seed)
    optimizer = torch.optim.AdamW([keys], lr=rate, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        order, of_epoch = torch.from_numpy(rng.permutation(len(x))), []
        rng.integers(1, size=len(x))  # views
        for rows in order.split(batch_size):
            logits = backbone.logit_scale * x[rows] @ T.T + 1.17 * torch.exp(x[rows] @ keys.T - 1) @ onehot
            loss = cross_entropy(logits, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            of_epoch.append(loss.item())
        losses.append(np.mean(of_epoch))
    assert_moved_alike(outcome.weights["keys"], keys, x)
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-4)


@pytest.mark.parametrize("name", ["tip_adapter", "gda", "proker"])
def test_the_best_values_on_validation_images_are_chosen(backbone: Backbone, name: str) -> None:
    data = hard_data(3)
    one = job(data, name, 4, selection="full_val")
    (outcome,) = run(backbone, name, [one])
    features, labels = data.validation(replace(one.subset, val=drawn_for(one, "full_val")))
    validation = replace(data)
    vars(validation).update(test=(features, labels))
    found, searched = [], METHODS[name].searched(one.settings)
    rng = np.random.default_rng(0)
    for _ in range(12):
        values = {key: float(rng.choice(numbers)) for key, numbers in searched.items()}
        fixed = replace(one, settings=one.settings.model_copy(update=values))
        predictions = logits_of(backbone, replace(known(backbone, fixed), data=validation), validation)
        found.append(100 * (predictions.argmax(1) == labels).mean())
    assert outcome.extra["val_accuracy"] >= max(found) - 1e-9
    assert len(set(found)) > 1
    chosen = replace(one, weights=outcome.weights, data=validation)
    accuracy = 100 * (logits_of(backbone, chosen, validation).argmax(1) == labels).mean()
    assert accuracy == pytest.approx(outcome.extra["val_accuracy"])


def gaussian(means: np.ndarray, P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    W = means @ P
    return W, -np.log(len(means)) - np.einsum("cd,cd->c", W, means) / 2


def test_gda_is_a_shared_gaussian(backbone: Backbone, data: Data) -> None:
    one = known(backbone, job(data, "gda", 4, alpha=0.7))
    views, labels, texts, x = arrays(backbone, one)
    samples, of_sample = unit(views).reshape(-1, DIM), np.repeat(labels, views.shape[1])
    means = np.stack([samples[of_sample == label].mean(0) for label in range(CLASSES)])
    S = np.cov((samples - means[of_sample]).T)
    W, b = gaussian(means, DIM * np.linalg.pinv((len(samples) - 1) * S + np.trace(S) * np.eye(DIM)))
    expected = backbone.logit_scale * x @ texts.T + 0.7 * (x @ W.T + b)
    np.testing.assert_allclose(logits_of(backbone, one, data), expected, rtol=1e-4, atol=1e-4)


def test_gda_makes_gaussians_of_new_classes_from_their_texts(backbone: Backbone) -> None:
    data = make_data(views=20, seed=2)
    new = make_data(("tractor", "plough"), "new")
    one = known(backbone, job(data, "gda", 4, alpha=0.7, variant="base_to_new"))
    views, labels, _, x = arrays(backbone, one)
    texts = class_texts(backbone, new).astype(float)
    samples, of_sample = unit(views).reshape(-1, DIM), np.repeat(labels, views.shape[1])
    means = np.stack([samples[of_sample == label].mean(0) for label in range(CLASSES)])
    S = np.mean([np.cov(samples[of_sample == label].T) for label in range(CLASSES)], axis=0)
    W, b = gaussian(means, np.linalg.pinv(S))
    expected = backbone.logit_scale * x @ class_texts(backbone, data).T + 0.7 * (x @ W.T + b)
    np.testing.assert_allclose(logits_of(backbone, one, data), expected, rtol=1e-3, atol=1e-2)

    near = [samples[np.argsort(-samples @ text)[:64]] for text in texts]
    means = np.stack([(part.sum(0) + 16 * text) / 80 for part, text in zip(near, texts, strict=True)])
    inverses = []
    for part, text in zip(near, texts, strict=True):
        scatter = (part - text).T @ (part - text)
        inverses.append(DIM * np.linalg.pinv(scatter + np.trace(scatter) / 63 * np.eye(DIM)))
    W, b = gaussian(means, np.mean(inverses, axis=0))
    x = unit(new.test[0].astype(float))
    expected = backbone.logit_scale * x @ texts.T + 0.7 * (x @ W.T + b)
    np.testing.assert_allclose(logits_of(backbone, one, new), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shots", [2, 3])
def test_gda_inverts_covariances_of_few_samples_exactly(backbone: Backbone, shots: int) -> None:
    data = make_data(views=2, seed=3)
    one = known(backbone, job(data, "gda", shots, alpha=1.0, variant="base_to_new"))
    views, labels, _, _ = arrays(backbone, one)
    samples, of_sample = unit(views).reshape(-1, DIM), np.repeat(labels, views.shape[1])
    assert len(samples) - CLASSES < DIM  # so the covariance is singular
    means = np.stack([samples[of_sample == label].mean(0) for label in range(CLASSES)])
    S = np.mean([np.cov(samples[of_sample == label].T) for label in range(CLASSES)], axis=0)
    W, _ = gaussian(means, np.linalg.pinv(S, rcond=DIM * np.finfo(np.float32).eps, hermitian=True))
    assert np.abs(one.weights["W"] - W).max() < 5e-6 * np.abs(W).max()


@pytest.mark.parametrize("variant", ["few_shot", "base_to_new"])
def test_gda_gives_a_class_without_images_the_mean_of_the_others(backbone: Backbone, variant: str) -> None:
    data = make_data(views=20, seed=2)
    one = job(data, "gda", 4, alpha=0.7, variant=variant)
    train = one.subset.train[one.data.dataset.splits["train"].labels[one.subset.train] != 1]
    one = known(backbone, replace(one, subset=replace(one.subset, train=train)))
    views, labels, _, _ = arrays(backbone, one)
    samples, of_sample = unit(views).reshape(-1, DIM), np.repeat(labels, views.shape[1])
    means = np.stack([samples[of_sample == label].mean(0) for label in (0, 2)])
    if variant == "few_shot":
        S = np.cov((samples - means[of_sample // 2]).T)
        P = DIM * np.linalg.pinv((len(samples) - 1) * S + np.trace(S) * np.eye(DIM))
    else:
        P = np.linalg.pinv(np.mean([np.cov(samples[of_sample == label].T) for label in (0, 2)], axis=0))
    W, _ = gaussian(means, P)
    b = -np.log(CLASSES) - np.einsum("cd,cd->c", W, means) / 2
    np.testing.assert_allclose(one.weights["W"], [W[0], W.mean(0), W[1]], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(one.weights["b"], [b[0], b.mean(), b[1]], rtol=1e-3, atol=1e-3)


def test_gda_of_equal_features_is_zero_shot(backbone: Backbone) -> None:
    data = make_data()
    store: Any = data.store
    store._features["train"][:] = store._features["train"][:1, :1]
    one = known(backbone, job(data, "gda", 4, alpha=100.0))
    _, _, texts, x = arrays(backbone, one)
    logits, zero_shot = logits_of(backbone, one, data), backbone.logit_scale * x @ texts.T
    np.testing.assert_allclose(logits - logits[:, :1], zero_shot - zero_shot[:, :1], rtol=1e-4, atol=1e-4)


def test_gda_of_one_view_of_one_image_is_zero_shot(backbone: Backbone) -> None:
    data = make_data(views=0)
    one = known(backbone, job(data, "gda", 1, alpha=100.0))
    _, _, texts, x = arrays(backbone, one)
    logits, zero_shot = logits_of(backbone, one, data), backbone.logit_scale * x @ texts.T
    np.testing.assert_allclose(logits - logits[:, :1], zero_shot - zero_shot[:, :1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("samples", ["views", "images"])
@pytest.mark.parametrize(("beta", "lmbda"), [(1.7, 0.1), (0.5, 0.01), (3.0, 1.0)])
def test_proker_is_kernel_ridge_regression(
    backbone: Backbone, data: Data, samples: str, beta: float, lmbda: float
) -> None:
    one = known(backbone, job(data, "proker", 4, beta=beta, lmbda=lmbda, samples=samples))
    assert one.weights.keys() == {"samples", "dual", "beta", "lmbda"}
    views, labels, texts, x = arrays(backbone, one)
    S, of_sample = unit(views).reshape(-1, DIM), np.repeat(labels, views.shape[1])
    if samples == "images":
        S, of_sample = unit(views.mean(1)), labels
    a = np.linalg.solve(
        np.exp(-beta * (1 - S @ S.T)) / lmbda + np.eye(len(S)), np.eye(CLASSES)[of_sample] - S @ texts.T
    )
    expected = backbone.logit_scale * (x @ texts.T + np.exp(-beta * (1 - x @ S.T)) @ a)
    np.testing.assert_allclose(logits_of(backbone, one, data), expected, rtol=1e-4, atol=1e-4)


def test_prokers_sum_over_many_samples_keeps_its_digits() -> None:
    rng, images, classes, dim, beta, lmbda = np.random.default_rng(12), 640, 8, 128, 0.75, 1.0
    labels, texts = np.arange(images) % classes, rng.normal(size=(classes, dim))
    features = texts[labels] + 5 * rng.normal(size=(images, dim))
    fitted = ProKeR(beta=beta, lmbda=lmbda).fit(features, labels, text_features=texts)
    S, T = (unit(given.astype(np.float32).astype(np.float64)) for given in (features, texts))
    K = np.exp(-beta * (1 - S @ S.T))
    a = np.linalg.solve(K / lmbda + np.eye(images), np.eye(classes)[labels] - S @ T.T)
    expected = 100 * (S @ T.T + K @ a)
    difference = np.abs(fitted.decision_function(features) - expected).max() / np.abs(expected).max()
    assert difference < 2e-6


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tip_adapter", {"alpha": 0.0, "beta": 5.0}),
        ("gda", {"alpha": 0.0}),
        ("proker", {"lmbda": 1e-9, "beta": 2.0}),
        ("cross_modal", {"wise_ft": 1.0, "iterations": 3}),
    ],
)
def test_at_its_start_it_is_zero_shot_clip(
    backbone: Backbone, data: Data, name: str, settings: dict[str, Any]
) -> None:
    (outcome,) = run(backbone, name, [job(data, name, **settings)])
    (zero_shot,) = run(backbone, "zero_shot", [job(data, "zero_shot")])
    one, other = outcome.scores["animals"], zero_shot.scores["animals"]
    np.testing.assert_array_equal(one.predictions, other.predictions)
    np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-3)


@pytest.mark.parametrize(("wise_ft", "sizes"), [(0.0, (2, 2)), (0.5, (3, 2))])
def test_cross_modal_is_adamw_on_images_and_texts(
    backbone: Backbone, data: Data, wise_ft: float, sizes: tuple[int, int]
) -> None:
    rate, decay, iterations = 0.01, 0.1, 160
    given = {"learning_rate": rate, "weight_decay": decay, "batch_size": sum(sizes), "iterations": iterations}
    one = job(data, "cross_modal", 4, selection="fixed", wise_ft=wise_ft, **given)
    (outcome,) = run(backbone, "cross_modal", [one])
    features, labels = data.train(one.subset, "flip")
    x = torch.from_numpy(unit(features)).reshape(-1, DIM)
    targets = torch.from_numpy(labels).repeat_interleave(features.shape[1])
    T = torch.from_numpy(class_texts(backbone, data))
    W = parameter(T)
    optimizer = torch.optim.AdamW([W], weight_decay=decay)
    step = 0
    for part in batches(Stack.of(backbone, [one], "flip"), len(x), sizes, iterations):
        for (rows,), (texts,) in part:
            rate_now = rate * (1 + np.cos(np.pi * (step - 50) / iterations)) / 2
            if step < 50:
                rate_now = rate * step / 50 if step else 1e-5
            optimizer.param_groups[0]["lr"] = rate_now
            logits = backbone.logit_scale * torch.cat([x[rows], T[texts]]) @ W.T
            loss = cross_entropy(logits, torch.cat([targets[rows], texts]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    assert step == iterations
    assert_moved_alike(outcome.weights["W"], W, T)
    mixed = (1 - wise_ft) * W.detach() + wise_ft * T
    expected = backbone.logit_scale * unit(data.test[0]) @ mixed.numpy().T
    found = logits_of(backbone, replace(one, weights=outcome.weights), data)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_cross_modal_has_the_paper_s_values_if_they_are_fixed(backbone: Backbone, data: Data) -> None:
    fixed = {"selection": "fixed", "iterations": 60}
    given = {"learning_rate": 1e-3, "weight_decay": 0.01, "batch_size": 8}
    jobs = [job(data, "cross_modal", 4, **fixed, **some) for some in ({}, given)]
    one, other = (outcome.weights["W"] for outcome in run(backbone, "cross_modal", jobs))
    np.testing.assert_array_equal(one, other)


def test_cross_modal_starts_at_numbers_drawn_from_the_seed(backbone: Backbone, data: Data) -> None:
    jobs = [
        job(data, "cross_modal", seed=seed, init="random", iterations=1, selection="fixed") for seed in (1, 2)
    ]
    for one, outcome in zip(jobs, run(backbone, "cross_modal", jobs), strict=True):
        drawn = np.random.default_rng((one.seed, 2)).uniform(-1, 1, (CLASSES, DIM)) / DIM**0.5
        np.testing.assert_allclose(outcome.weights["W"], drawn, atol=2e-5)  # after a step at a rate of 1e-5


def test_cross_modal_draws_each_image_once_before_it_draws_one_again(backbone: Backbone, data: Data) -> None:
    stack = Stack.of(backbone, [job(data, "cross_modal", 2, seed=seed) for seed in (1, 2)])
    parts = list(batches(stack, 24, (5, 1), 12))
    assert [len(part) for part in parts] == [1, 11]
    images, texts = (
        torch.stack(rows, 1) for rows in zip(*(pair for part in parts for pair in part), strict=True)
    )
    for run_images in images:
        for passed in (run_images[:4], run_images[4:8], run_images[8:]):  # 24 // 5 batches of a pass
            assert len(set(passed.flatten().tolist())) == 20
    for seed, run_images, run_texts in zip((1, 2), images, texts, strict=True):
        of_images, of_texts = (np.random.default_rng((seed, place)) for place in (0, 1))
        assert run_images[:4].flatten().tolist() == of_images.permutation(24)[:20].tolist()
        assert run_texts[:3].flatten().tolist() == of_texts.permutation(3).tolist()


def test_cross_modal_tries_the_batches_that_the_data_can_fill(backbone: Backbone) -> None:
    method = METHODS["cross_modal"]
    many = make_data(tuple(f"class {n}" for n in range(20)), "many")
    sizes = [
        {tried["batch_size"] for tried in method.tries(job(data, "cross_modal"))}
        for data in (many, make_data())
    ]
    assert sizes == [{8, 32}, {8}]
    assert {tried["batch_size"] for tried in method.tries(job(make_data(), "cross_modal", 6))} == {8}
    assert len(method.tries(job(many, "cross_modal"))) == 12
    assert len(method.tries(job(many, "cross_modal", learning_rate=0.1, batch_size=4))) == 3


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tip_adapter", "tip"),
        ("tip_adapter_f", "tip"),
        ("gda", "tip"),
        ("proker", "tip"),
        ("cross_modal", "flip"),
    ],
)
def test_each_method_reads_the_views_of_its_official_code(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    data, read = make_data(), []
    train = data.store.train

    def spy(indices: np.ndarray, kind: str = "coop", as_stored: bool = False) -> torch.Tensor:
        read.append(kind)
        return train(indices, kind, as_stored)

    monkeypatch.setattr(data.store, "train", spy)
    short = {"iterations": 1} if name == "cross_modal" else {}
    run(backbone, name, [job(data, name, selection="fixed", **short)])
    assert set(read) == {kind}


def test_shots_val_draws_as_many_validation_images_as_training_images() -> None:
    data = make_data()
    few, more, everything = (
        drawn_for(job(data, "tip_adapter", shots), selection)
        for shots, selection in ((1, "shots_val"), (3, "shots_val"), (1, "full_val"))
    )
    labels = data.dataset.splits["val"].labels
    assert [np.bincount(labels[rows]).tolist() for rows in (few, more, everything)] == [
        [1] * 3,
        [3] * 3,
        [4] * 3,
    ]
    other = drawn_for(job(data, "tip_adapter", 3, seed=2), "shots_val")
    assert sorted(other) != sorted(more)


@pytest.mark.parametrize(
    ("name", "dataset"), [("tip_adapter", "imagenet"), ("gda", "imagenet:base"), ("proker", "imagenet")]
)
def test_official_looks_at_the_test_labels_of_imagenet_and_is_called_so(
    backbone: Backbone, name: str, dataset: str
) -> None:
    data = hard_data(4, dataset)
    method, jobs = METHODS[name], [job(data, name, 4, selection=one) for one in ("official", "full_val")]
    official, honest = run(backbone, name, jobs)
    assert official.scores[dataset].accuracy > honest.scores[dataset].accuracy
    assert "val_accuracy" in honest.extra
    assert "val_accuracy" not in official.extra
    assert method.columns(jobs[0], backbone)["selection"] == "official"
    assert "official" in method.label(jobs[0].settings)
    elsewhere = hard_data(4)
    outcomes = run(
        backbone, name, [job(elsewhere, name, 4, selection=one) for one in ("official", "full_val")]
    )
    assert outcomes[0].extra["trained_parameters"] == 0
    for key in method.values:
        assert outcomes[0].extra[key] == outcomes[1].extra[key]


def test_official_tip_adapter_f_chooses_its_values_on_validation_images(backbone: Backbone) -> None:
    data, given = hard_data(4), {"selection": "official", "epochs": 1}
    both = [
        run(backbone, "tip_adapter_f", [job(one, "tip_adapter_f", 4, **given)])[0]
        for one in (data, spoiled(data, "_labels"))
    ]
    assert_equal(*both)


def test_the_first_of_equal_epochs_is_kept(backbone: Backbone) -> None:
    still, data = {"selection": "few_val", "learning_rate": 1e-12}, hard_data()
    (tip,) = run(backbone, "tip_adapter_f", [job(data, "tip_adapter_f", epochs=3, **still)])
    (probe,) = run(backbone, "cross_modal", [job(data, "cross_modal", iterations=202, **still)])
    assert (tip.extra["epoch"], probe.extra["iteration"]) == (1, 0)


def test_an_image_is_right_if_its_class_is_above_all_others(backbone: Backbone) -> None:
    texts = Texts(torch.eye(3), 1.0)
    stack = Stack(
        (job(make_data(), "zs_lp"),), torch.ones(1, 1, 1, 3), torch.zeros(1, 1, dtype=torch.int64), texts
    )
    images = torch.tensor([[[1.0, 0, 0], [1.0, 1, 0], [0, 0, 1.0], [1.0, 0, 2]]])
    judge = Judge(METHODS["zs_lp"], stack, images, torch.tensor([[0, 0, 2, 0]]))
    assert judge.accuracies({"prototypes": torch.eye(3)[None]}).tolist() == [[50.0]]


def test_cross_modal_does_not_validate_steps_after_the_last_hundred(backbone: Backbone) -> None:
    data, settings = (
        hard_data(),
        {"learning_rate": 1e3, "weight_decay": 0.0, "batch_size": 4, "iterations": 2},
    )
    after = known(backbone, job(data, "cross_modal", 4, selection="fixed", **settings))
    store: Any = data.store
    classifier = METHODS["cross_modal"].classifier(backbone, after, data)
    store._labels["val"] = classifier.logits(unit(store._features["val"][:, 0])).argmax(1)
    (outcome,) = run(backbone, "cross_modal", [job(data, "cross_modal", 4, selection="full_val", **settings)])
    assert outcome.extra["iteration"] == 0
    assert outcome.extra["val_accuracy"] < 100


def test_cross_modal_mixes_texts_in_after_it_has_chosen(backbone: Backbone) -> None:
    given = {"selection": "few_val", "learning_rate": 0.3, "iterations": 202}
    jobs = [job(hard_data(), "cross_modal", 4, wise_ft=share, **given) for share in (0.0, 0.9)]
    plain, mixed = run(backbone, "cross_modal", jobs)
    assert plain.extra == mixed.extra
    assert not np.array_equal(plain.scores["animals"].confidence, mixed.scores["animals"].confidence)


def test_what_is_searched_and_the_values_of_fixed_are_the_official_ones() -> None:
    ends = {}
    for name in ("gda", "proker", "tip_adapter"):
        searched = METHODS[name].searched(job(make_data(), name).settings)
        ends |= {(name, key): (some[0], some[1], some[-1], len(some)) for key, some in searched.items()}
    assert ends == {
        ("gda", "alpha"): (1e-4, 1e-3, 100, 7),
        ("proker", "beta"): (0.5, pytest.approx(0.5 + 2.5 / 19), 3, 20),
        ("proker", "lmbda"): (0.001, pytest.approx(0.112), 1, 10),
        ("tip_adapter", "beta"): (0.1, pytest.approx(0.1345), pytest.approx(6.9655), 200),
        ("tip_adapter", "alpha"): (0.1, pytest.approx(0.245), pytest.approx(2.855), 20),
    }
    assert METHODS["gda"].values == {"alpha": 1.0}
    assert METHODS["proker"].values == {"beta": 1.7, "lmbda": 0.1}
    assert METHODS["tip_adapter"].values == {"beta": 1.0, "alpha": 1.17}


def test_official_tip_adapter_f_keeps_the_epoch_with_the_best_test_accuracy(backbone: Backbone) -> None:
    data = hard_data(4)
    given = {"alpha": 9.0, "beta": 3.0, "learning_rate": 0.3, "epochs": 6, "batch_size": 4}
    official, last = run(
        backbone, "tip_adapter_f",
        [job(data, "tip_adapter_f", 4, selection=one, **given) for one in ("official", "fixed")],
    )  # fmt: skip
    assert official.scores["animals"].accuracy > last.scores["animals"].accuracy
    assert official.extra["epoch"] < 6
