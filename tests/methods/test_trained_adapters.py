"""The trained methods on image features, each against plain torch: its own optimizer, one run, one batch per epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import fastcoop as fc
from fastcoop.backbones import Backbone
from fastcoop.errors import UserError
from fastcoop.methods import METHODS, Data, RunSpec
from fastcoop.methods.adapters import prolip
from fastcoop.methods.adapters.prolip import LAMBDAS, RATES
from fastcoop.methods.adapters.stack import Stack, Texts
from fastcoop.methods.adapters.training import ImageBatches, Optimizer, softmax_gradient, train
from tests.methods.conftest import job, make_data, run

EPOCHS = 25
SHOTS = 4
CLASSES = 3


def texts_of(backbone: Backbone, data: Data) -> Tensor:
    tokens = backbone.tokenizer([f"a photo of a {name}." for name in data.class_names])
    with torch.no_grad():
        return backbone.model.encode_text(tokens)


def images_of(data: Data, one: RunSpec) -> tuple[Tensor, Tensor]:
    """Views float32 (images, views, dim), and labels."""
    features, labels = data.train_views(one.subset)
    return torch.from_numpy(np.asarray(features, np.float32)), torch.from_numpy(labels)


def cosine_logits(scale: float, images: Tensor, classes: Tensor) -> Tensor:
    return scale * normalize(images, dim=-1) @ normalize(classes, dim=-1).T


def coop_rate(epoch: int, base: float) -> float:
    return 1e-5 if epoch == 0 else base * (1 + np.cos(np.pi * (epoch - 1) / EPOCHS)) / 2


def plain_training(
    optimizer: torch.optim.Optimizer, rates: Sequence[float], loss: Callable[[int], Tensor]
) -> list[float]:
    """Train with one batch per epoch, and return the losses."""
    losses = []
    for epoch, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        found = loss(epoch)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(found.item())
    return losses


def parameter(start: Any) -> Tensor:
    return torch.as_tensor(start, dtype=torch.float32).clone().requires_grad_()


def assert_moved_alike(found: np.ndarray, expected: Tensor, start: Any) -> None:
    """Compare what was learned to 1e-4 of the distance that it moved."""
    moved = expected.detach() - torch.as_tensor(start)
    assert moved.norm() > 0
    assert (torch.from_numpy(found) - expected.detach()).norm() < 1e-4 * moved.norm()


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_the_gradient_of_the_softmax_is_that_of_autograd(spread: float) -> None:
    """Also where the likelihood of the true class is 0 in float32."""
    logits = parameter(spread * np.random.default_rng(0).normal(size=(2, 5, 7)))
    labels = torch.randint(5, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = cross_entropy(logits, labels, reduction="none").mean(1)
    expected.sum().backward()
    found = logits.detach().clone()
    np.testing.assert_allclose(softmax_gradient(found, labels), expected.detach(), rtol=1e-6)
    assert logits.grad is not None
    np.testing.assert_allclose(found / 7, logits.grad, atol=1e-7)


def test_the_loss_of_an_image_that_is_surely_right_keeps_its_digits() -> None:
    logits, labels = torch.tensor([[[0.0], [-16.0], [-17.0]]]), torch.tensor([[0]])
    exact = logits.double().requires_grad_()
    loss = cross_entropy(exact, labels)
    loss.backward()
    # In float32, the class's probability is 1.
    np.testing.assert_allclose(softmax_gradient(logits, labels), [loss.item()], rtol=1e-6)
    np.testing.assert_allclose(logits, exact.grad, rtol=1e-6)


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps() -> None:
    given = torch.tensor([[1.0, 2.0, 6.0, 5.0], [0.0, 4.0, 8.0, 2.0]])
    epochs = [[(given[:, 0],)], [(given[:, 1],), (given[:, 2],), (given[:, 3],)]]

    def gradient(parameters: Any, sums: Any, momentum: float, losses: Tensor) -> Tensor:
        sums["x"].mul_(momentum).add_(losses[:, None])
        return losses

    learned, losses = train(
        {"x": torch.zeros(2, 1)}, epochs, gradient, Optimizer("sgd", torch.full((4, 2), 0.5))
    )
    torch.testing.assert_close(losses, torch.tensor([[1.0, 13 / 3], [0.0, 14 / 3]]))
    x = torch.zeros(2, 1, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.5, momentum=0.9)
    for step in range(4):
        x.grad = given[:, step, None].clone()
        optimizer.step()
    torch.testing.assert_close(learned["x"], x.detach())


@pytest.mark.parametrize(("alpha", "rate"), [(0.5, 2e-3), (1.3, 0.05)])
def test_task_res_is_adam_on_residuals(backbone: Backbone, alpha: float, rate: float) -> None:
    data = make_data(views=0)
    one = job(data, "task_res", SHOTS, epochs=EPOCHS, alpha=alpha, learning_rate=rate)
    (outcome,) = run(backbone, "task_res", [one])
    (images, labels), texts = images_of(data, one), texts_of(backbone, data)
    x = parameter(torch.zeros_like(texts))
    losses = plain_training(
        torch.optim.Adam([x], weight_decay=5e-4),
        [coop_rate(epoch, rate) for epoch in range(EPOCHS)],
        lambda epoch: cross_entropy(
            cosine_logits(backbone.logit_scale, images[:, 0], texts + alpha * x), labels
        ),
    )
    assert_moved_alike(outcome.weights["x"], x, 0.0)
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-4)
    logits = cosine_logits(backbone.logit_scale, torch.from_numpy(data.test[0]), texts + alpha * x)
    assert (outcome.scores["animals"].predictions == logits.argmax(1).numpy()).all()


@pytest.mark.parametrize(
    ("dataset", "shots", "expected"),
    [
        ("oxford_flowers:base", 1, (1.0, 2e-3, 100)),
        ("imagenet", 16, (0.5, 2e-4, 200)),
        ("imagenet", "all", (0.5, 2e-4, 200)),
        ("caltech101:base", 4, (0.5, 2e-3, 100)),
    ],
)
def test_task_res_has_the_official_settings(
    backbone: Backbone, dataset: str, shots: int | str, expected: tuple[float, float, int]
) -> None:
    one = replace(job(make_data(name=dataset), "task_res", 2), shots=shots)
    key = METHODS["task_res"].key_settings(one, backbone)
    assert (key["alpha"], key["learning_rate"], key["epochs"], key["batch_size"]) == (*expected, 256)


def test_clip_adapters_epochs_are_in_its_key_and_its_columns(backbone: Backbone, data: Data) -> None:
    method, jobs = (
        METHODS["clip_adapter"],
        [job(data, "clip_adapter", 4, epochs=one) for one in ("paper", 100)],
    )
    paper, written = (method.key_settings(one, backbone) for one in jobs)
    assert paper == written
    assert [method.columns(one, backbone) for one in jobs] == [
        {"selection": "fixed", "epochs": 100, "schedule": schedule}
        for schedule in ("paper", "quick: 100 epochs")
    ]


@pytest.mark.parametrize("ratio", [0.2, 0.7])
def test_clip_adapter_is_sgd_on_two_linear_maps(backbone: Backbone, ratio: float) -> None:
    data = make_data(views=0)
    one = job(data, "clip_adapter", SHOTS, epochs=EPOCHS, ratio=ratio, learning_rate=0.05)
    (outcome,) = run(backbone, "clip_adapter", [one])
    (start,) = run(
        backbone, "clip_adapter", [replace(one, settings=one.settings.model_copy(update={"epochs": 1}))]
    )
    (images, labels), texts = images_of(data, one), texts_of(backbone, data)
    rng = np.random.default_rng([one.seed, 1])
    drawn = [rng.uniform(-(into**-0.5), into**-0.5, (out, into)) for out, into in ((4, 16), (16, 4))]
    np.testing.assert_allclose(start.weights["down"], drawn[0], atol=1e-3)  # after one epoch of warm-up
    down, up = (parameter(part) for part in drawn)

    def logits(images: Tensor) -> Tensor:
        adapted = torch.relu(torch.relu(images @ down.T) @ up.T)
        return cosine_logits(backbone.logit_scale, ratio * adapted + (1 - ratio) * images, texts)

    losses = plain_training(
        torch.optim.SGD([down, up], lr=1.0, momentum=0.9, weight_decay=5e-4),
        [coop_rate(epoch, 0.05) for epoch in range(EPOCHS)],
        lambda epoch: cross_entropy(logits(images[:, 0]), labels),
    )
    for name, learned, first in (("down", down, drawn[0]), ("up", up, drawn[1])):
        assert_moved_alike(outcome.weights[name], learned, first)
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-4)
    predicted = logits(torch.from_numpy(data.test[0])).argmax(1).numpy()
    assert (outcome.scores["animals"].predictions == predicted).all()


@pytest.mark.parametrize("absent", [None, 1])  # a class without images has the mean multiplier of the others
@pytest.mark.parametrize("given", [{}, {"constraint": "fixed"}, {"constraint": "adaptive"}])
def test_zs_lp_and_clap_are_sgd_on_all_views(
    backbone: Backbone, given: dict[str, str], absent: int | None
) -> None:
    name = "clap" if given else "zs_lp"
    data = make_data(views=3)
    one = job(data, name, SHOTS, epochs=EPOCHS, **given)
    train = one.subset.train[data.dataset.splits["train"].labels[one.subset.train] != absent]
    one = replace(one, subset=replace(one.subset, train=train))
    (outcome,) = run(backbone, name, [one])
    (images, labels), texts = images_of(data, one), texts_of(backbone, data)
    images, labels = images.flatten(0, 1), labels.repeat_interleave(3)
    right = cosine_logits(backbone.logit_scale, images, texts).softmax(-1)[np.arange(len(labels)), labels]
    alpha = torch.stack([right[labels == label].mean() for label in range(CLASSES)])
    alpha = alpha.where(~alpha.isnan(), alpha.nanmean())
    prototypes, rho = parameter(texts), torch.zeros(CLASSES)

    def loss(epoch: int) -> Tensor:
        found = cross_entropy(cosine_logits(backbone.logit_scale, images, prototypes), labels)
        distance = (prototypes - texts).square().sum(1)
        if (
            epoch and given.get("constraint") == "adaptive"
        ):  # the step of the multipliers after the last epoch
            alpha.add_(rho * distance.detach())
            rho.copy_(distance.detach())
        return found + (alpha * distance).mean() * (name == "clap")

    rates = [coop_rate(epoch, 0.1) for epoch in range(EPOCHS)]
    losses = plain_training(torch.optim.SGD([prototypes], lr=1.0, momentum=0.9), rates, loss)
    assert_moved_alike(outcome.weights["prototypes"], prototypes, texts)
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-4)


def test_clap_holds_prototypes_near_their_texts(backbone: Backbone) -> None:
    data = make_data()
    distances = []
    for name in ("zs_lp", "clap"):
        (outcome,) = run(backbone, name, [job(data, name, SHOTS, epochs=60)])
        distances.append(np.linalg.norm(outcome.weights["prototypes"] - texts_of(backbone, data).numpy()))
    assert distances[1] < 0.8 * distances[0]


def test_clap_has_a_multiplier_for_a_class_without_images(backbone: Backbone) -> None:
    """The mean over the others, where the official code divides zero by zero: class 1 is held."""
    data = make_data()
    one = job(data, "clap", SHOTS, epochs=60)
    labels = data.dataset.splits["train"].labels[one.subset.train]
    one = replace(one, subset=replace(one.subset, train=one.subset.train[labels != 1]))
    free, held = (run(backbone, name, [replace(one, method=name)])[0] for name in ("zs_lp", "clap"))
    start = texts_of(backbone, data)[1].numpy()
    moved = [np.linalg.norm(outcome.weights["prototypes"][1] - start) for outcome in (free, held)]
    assert np.isfinite(moved).all()
    assert moved[1] < moved[0]


@pytest.mark.parametrize(("images", "views", "expected"), [(70, 3, [32, 32]), (6, 2, [12]), (40, 1, [32])])
def test_zs_lp_draws_its_batches_from_all_views(images: int, views: int, expected: list[int]) -> None:
    features = torch.arange(2.0 * images * views).view(2, images, views, 1)  # of each view its own number
    numbers = torch.arange(2 * images).view(2, images)  # of each image its own, as its label
    runs = tuple(replace(job(make_data(), "zs_lp"), seed=seed) for seed in (1, 2))
    stack = Stack(runs, features, numbers, Texts(torch.ones(3, 1), 1.0))
    seen = set[int]()
    for batches in ImageBatches(stack, features, 20, 32, pooled=True):
        parts = [(part.clone(), labels) for part, labels in batches]  # the next batch takes over its memory
        assert [part.shape[1] for part, _ in parts] == expected
        drawn, labels = (torch.cat(some, 1) for some in zip(*parts, strict=True))
        assert (drawn[..., 0] // views == labels).all()
        for run_index, places in enumerate(drawn[..., 0].tolist()):
            assert len(set(places)) == sum(expected)
            assert min(places) >= run_index * images * views
            assert max(places) < (1 + run_index) * images * views
        seen |= set(drawn[0, :, 0].tolist())
    assert len(seen) > 0.9 * images * views


@pytest.mark.parametrize(("keep_short", "expected"), [(True, [5, 5, 2]), (False, [5, 5])])
def test_batches_have_each_image_once_at_a_view_drawn_from_the_seed(
    keep_short: bool, expected: list[int]
) -> None:
    images, views = 12, 4
    features = torch.arange(2.0 * images * views).view(2, images, views, 1)
    labels = torch.arange(2 * images).view(2, images)
    runs = tuple(replace(job(make_data(), "task_res"), seed=seed) for seed in (1, 2))
    stack = Stack(runs, features, labels, Texts(torch.ones(3, 1), 1.0))
    draws = [np.random.default_rng(seed) for seed in (1, 2)]
    epochs = ImageBatches(stack, features, 18, 5, keep_short=keep_short)
    assert len(expected) == epochs.steps
    for batches in epochs:
        parts = [(part.clone(), of_part) for part, of_part in batches]
        assert [part.shape[1] for part, _ in parts] == expected
        drawn, of_images = (torch.cat(some, 1) for some in zip(*parts, strict=True))
        for run_index, rng in enumerate(draws):
            rows = rng.permutation(images)
            places = (rows + run_index * images) * views + rng.integers(views, size=images)
            assert drawn[run_index, :, 0].tolist() == places[: sum(expected)].tolist()
            assert of_images[run_index].tolist() == (rows + run_index * images)[: sum(expected)].tolist()
    assert len(list(epochs)) == 18
    rates = epochs.coop_rates(torch.tensor([0.1, 0.2]))
    assert rates.shape == (18 * len(expected), 2)
    torch.testing.assert_close(rates[: len(expected)], torch.full((len(expected), 2), 1e-5))
    torch.testing.assert_close(rates[len(expected)], torch.tensor([0.1, 0.2]))


def plain_lp_plus_plus(
    images: Tensor,
    labels: Tensor,
    texts: Tensor,
    bias: np.ndarray,
    val: Tensor,
    val_labels: Tensor,
    sums: bool,
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[float], list[float]]:
    """W, b and alpha after each epoch, the losses, and the validation accuracies, in float64."""
    images, texts, val = images.double(), texts.double(), val.double()
    onehot = torch.nn.functional.one_hot(labels, CLASSES).double()
    W, b = (onehot.T @ images).requires_grad_(), torch.from_numpy(bias).requires_grad_()
    own = (images * texts[labels]).sum(1)
    mean = torch.stack([own[labels == c].mean() for c in range(CLASSES)]).mean()
    alpha = (250 * mean.expand(CLASSES)).clone().requires_grad_()
    rate = 4 * len(images) / torch.linalg.eigvalsh(images.T @ images)[-1]
    alpha_rate = len(images) / (4 * (images @ texts.T).square().sum(0).max())
    optimizer = torch.optim.SGD([W, b], lr=float(rate), momentum=0.9)
    states, losses, accuracies = [], [], []
    for epoch in range(EPOCHS):
        loss = cross_entropy(images @ W.T + b + alpha * (images @ texts.T), labels)
        optimizer.zero_grad()
        if not sums:
            alpha.grad = None
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            if (epoch + 1) % 10 == 0:
                alpha -= alpha_rate * alpha.grad
            logits = val @ W.T + b + alpha * (val @ texts.T)
        losses.append(loss.item())
        accuracies.append(100 * (logits.argmax(1) == val_labels).float().mean().item())
        states.append((W.detach().clone(), b.detach().clone(), alpha.detach().clone()))
    return states, losses, accuracies


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("selection", ["fixed", "few_val"])
def test_lp_plus_plus_is_gradient_descent_with_step_sizes_from_the_data(
    backbone: Backbone, selection: str, sums: bool
) -> None:
    data = make_data(views=3 if sums else 0, seed=3)
    store: Any = data.store
    for split, features in store._features.items():
        noise = np.random.default_rng(len(split)).normal(size=features.shape)
        store._features[split] = features + 2.5 * noise.astype(np.float32)
    one = job(data, "lp_plus_plus", SHOTS, epochs=EPOCHS, selection=selection, sum_alpha_gradients=sums)
    (outcome,) = run(backbone, "lp_plus_plus", [one])
    (images, labels), texts = images_of(data, one), normalize(texts_of(backbone, data), dim=-1)
    bias = np.random.default_rng([one.seed, 1]).uniform(-0.25, 0.25, CLASSES)
    views = np.random.default_rng(one.seed).integers(images.shape[1], size=len(images))
    x = normalize(images[np.arange(len(images)), views], dim=-1)
    val, val_labels = (torch.from_numpy(part) for part in data.validation(one.subset))
    states, losses, accuracies = plain_lp_plus_plus(
        x, labels, texts, bias, normalize(val, dim=-1), val_labels, sums
    )
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-4)
    kept = EPOCHS - 1
    if selection != "fixed":
        kept = max(epoch for epoch in range(EPOCHS) if accuracies[epoch] == max(accuracies))
        assert outcome.extra["epoch"] == kept + 1
        assert outcome.extra["val_accuracy"] == pytest.approx(max(accuracies))
        assert min(accuracies) < max(accuracies)
    for name, expected in zip(("W", "b", "alpha"), states[kept], strict=True):
        np.testing.assert_allclose(outcome.weights[name], expected, rtol=1e-4, atol=1e-4, err_msg=name)


def test_lp_plus_plus_starts_alpha_at_the_mean_of_classes_with_images(backbone: Backbone, data: Data) -> None:
    one = job(data, "lp_plus_plus", SHOTS, epochs=1, selection="fixed")
    train = one.subset.train[data.dataset.splits["train"].labels[one.subset.train] != 1]
    one = replace(one, subset=replace(one.subset, train=train))
    (outcome,) = run(backbone, "lp_plus_plus", [one])
    (images, labels), texts = images_of(data, one), normalize(texts_of(backbone, data), dim=-1)
    views = np.random.default_rng(one.seed).integers(3, size=len(images))
    own = (normalize(images[np.arange(len(images)), views], dim=-1) * texts[labels]).sum(1)
    mean = torch.stack([own[labels == label].mean() for label in (0, 2)]).mean()
    np.testing.assert_allclose(outcome.weights["alpha"], np.full(CLASSES, 250 * mean), rtol=1e-5)


def test_lp_plus_plus_is_not_tested_on_classes_that_it_has_not_learned(
    backbone: Backbone, data: Data
) -> None:
    new = make_data(("cat", "tractor"), "new")
    with pytest.raises(UserError, match=r'its class "tractor" is not among animals\'s'):
        METHODS["lp_plus_plus"].check(job(data, "lp_plus_plus", targets=(new,)))
    (outcome,) = run(backbone, "lp_plus_plus", [one := job(data, "lp_plus_plus")])
    with pytest.raises(UserError, match='its class "tractor"'):
        METHODS["lp_plus_plus"].classifier(backbone, replace(one, weights=outcome.weights), new)


@pytest.mark.parametrize(
    ("given", "rate", "factor"),
    [({}, 1e-5, 1 / SHOTS), ({"lmbda": 0.02, "learning_rate": 0.01}, 0.01, 0.02)],
)
def test_prolip_is_adam_on_the_projection(
    backbone: Backbone, given: dict[str, float], rate: float, factor: float
) -> None:
    data = make_data(views=3)
    one = job(data, "prolip", SHOTS, epochs=EPOCHS, **given)
    (outcome,) = run(backbone, "prolip", [one])
    (images, labels), texts = images_of(data, one), texts_of(backbone, data)
    first = backbone.model.visual.proj.detach()
    P = parameter(first)

    def loss(epoch: int) -> Tensor:
        found = cross_entropy(
            cosine_logits(backbone.logit_scale, images[:, (epoch + 1) % 3] @ P, texts), labels
        )
        return found + factor * (P - first).square().sum()

    rates = [rate * (1 + np.cos(np.pi * epoch / EPOCHS)) / 2 for epoch in range(EPOCHS)]
    losses = plain_training(torch.optim.Adam([P], eps=1e-4), rates, loss)
    assert_moved_alike(outcome.weights["P"], P, first)
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-4)
    logits = cosine_logits(backbone.logit_scale, torch.from_numpy(data.test[0]) @ P, texts)
    assert (outcome.scores["animals"].predictions == logits.argmax(1).numpy()).all()


def test_prolip_chooses_the_first_best_of_49(backbone: Backbone) -> None:
    data = make_data(views=1)
    store: Any = data.store
    shape = store._features["val"].shape
    store._features["val"] += 2.5 * np.random.default_rng(0).normal(size=shape).astype(np.float32)
    one = job(data, "prolip", SHOTS, epochs=8, selection="few_val")
    (outcome,) = run(backbone, "prolip", [one])
    found = {}
    for rate in RATES:
        for factor in LAMBDAS:
            tried = job(data, "prolip", SHOTS, epochs=8, learning_rate=rate, **{"lmbda": factor})
            (alone,) = run(backbone, "prolip", [tried])
            classifier = METHODS["prolip"].classifier(backbone, replace(tried, weights=alone.weights), data)
            features, labels = data.validation(one.subset)
            found[rate, factor] = 100 * float((classifier.logits(features).argmax(1) == labels).mean())
    best = max(found, key=found.__getitem__)
    assert len(set(found.values())) > 1
    assert (outcome.extra["learning_rate"], outcome.extra["lmbda"]) == best
    assert outcome.extra["val_accuracy"] == pytest.approx(found[best])


def test_prolip_chooses_and_is_tested_on_features_before_the_projection(
    backbone: Backbone, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = data.store
    read, split = [], store.split
    monkeypatch.setattr(store, "split", lambda *given: read.append(given) or split(*given))
    run(backbone, "prolip", [job(data, "prolip", epochs=1, selection="few_val")])
    assert [given for given in read if given[0] == "val"] == [("val", "pre")]
    assert ("test", "pre") in read


def test_prolip_keeps_no_learning_rate_that_diverged(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the others are wrong about every validation image."""
    monkeypatch.setattr(prolip, "RATES", (1e30, 1e-12))
    data = make_data(views=1)
    store: Any = data.store
    start = job(data, "prolip", SHOTS, epochs=8, learning_rate=1e-12, lmbda=0.0)
    (outcome,) = run(backbone, "prolip", [start])
    classifier = METHODS["prolip"].classifier(backbone, replace(start, weights=outcome.weights), data)
    store._labels["val"] = classifier.logits(store._features["val"][:, 0]).argmin(1)
    given = {"epochs": 8, "selection": "full_val", "lmbda": 0.0}
    (outcome,) = run(backbone, "prolip", [job(data, "prolip", SHOTS, **given)])
    assert (outcome.status, outcome.extra["val_accuracy"]) == ("done", 0)
    assert outcome.extra["learning_rate"] == 1e-12


@pytest.mark.parametrize("name", ["lp_plus_plus", "prolip"])
def test_what_another_dataset_chose_is_used_and_recorded(backbone: Backbone, name: str) -> None:
    data, other = make_data(views=1), make_data(views=1, seed=7, name="others")
    given = {"selection": "imagenet_val", "tuned_on": "others"}
    (chosen,) = run(backbone, name, [job(other, name, SHOTS, epochs=8, selection="full_val")])
    (outcome,) = run(backbone, name, [replace(job(data, name, SHOTS, epochs=8, **given), tuning=other)])
    if name == "prolip":
        values = {key: chosen.extra[key] for key in ("learning_rate", "lmbda")} | {"epochs": 8}
    else:
        values = {"epochs": int(chosen.extra["epoch"])}
    (same,) = run(backbone, name, [job(data, name, SHOTS, selection="fixed", **values)])
    for key, array in same.weights.items():
        np.testing.assert_array_equal(outcome.weights[key], array)
    assert outcome.extra.items() >= {key: value for key, value in values.items() if value != 8}.items()


@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        (fc.TaskRes, {"alpha": 0.7}),
        (fc.CLIPAdapter, {"ratio": 0.4}),
        (fc.LPPlusPlus, {"selection": "fixed"}),
        (fc.ZeroShotLinearProbe, {"learning_rate": 0.2}),
        (fc.CLAP, {}),
        (fc.ProLIP, {"lmbda": 0.1, "learning_rate": 0.01}),
    ],
)
def test_an_estimator_learns_what_a_run_learns(
    backbone: Backbone, data: Data, estimator: type[fc.MethodClassifier], settings: dict[str, Any]
) -> None:
    one = job(data, estimator.method, SHOTS, epochs=12, **settings)
    (outcome,) = run(backbone, estimator.method, [one])
    features, labels = data.train(one.subset)
    fitted = estimator(backbone, epochs=12, **settings).fit(features, labels, class_names=data.class_names)
    assert (fitted.predict(data.test[0]) == outcome.scores["animals"].predictions).all()
    np.testing.assert_allclose(fitted.losses_, outcome.losses, rtol=1e-5)
    texts = texts_of(backbone, data).numpy()
    given = {"backbone": backbone} if estimator is fc.ProLIP else {}
    by_texts = estimator(epochs=12, **settings, **given).fit(
        features, labels, text_features=texts, logit_scale=backbone.logit_scale
    )
    assert (by_texts.predict(data.test[0]) == outcome.scores["animals"].predictions).all()


def test_prolips_penalty_is_one_divided_by_the_shots(backbone: Backbone, data: Data) -> None:
    """Of "all" shots, by the images of a class. A default that is written out is the same run."""
    jobs = [job(data, "prolip", shots) for shots in (2, 8, "all")]
    jobs += [job(data, "prolip", 2, lmbda=0.5, learning_rate=1e-5)]
    keys = [METHODS["prolip"].key_settings(one, backbone) for one in jobs]
    assert [key["lmbda"] for key in keys] == [1 / 2, 1 / 8, 1 / 6, 1 / 2]
    assert keys[0] == keys[3]


def test_prolip_keeps_the_bias_of_the_projection(data: Data) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(16, 8)), rng.normal(size=8)
    projection = SimpleNamespace(weight=torch.tensor(weight), bias=torch.tensor(bias), before_dim=16)
    backbone = SimpleNamespace(digest="", logit_scale=50.0, image_projection=projection, embed_dim=8)
    features, labels = data.train(data.subset(SHOTS, 1))
    texts = rng.normal(size=(CLASSES, 8))
    fitted = fc.ProLIP(backbone, epochs=2, learning_rate=1e-12).fit(features, labels, text_features=texts)
    x = torch.from_numpy(data.test[0] @ weight + bias)
    expected = cosine_logits(50.0, x, torch.from_numpy(texts))
    np.testing.assert_allclose(fitted.decision_function(data.test[0]), expected, rtol=1e-4, atol=1e-4)


def test_prolip_without_a_backbone_adapts_features_from_the_identity(backbone: Backbone, data: Data) -> None:
    features, labels = data.train(data.subset(SHOTS, 1))
    texts = texts_of(backbone, data).numpy()
    still, moved = (
        fc.ProLIP(epochs=5, learning_rate=rate).fit(features, labels, text_features=texts)
        for rate in (1e-12, 0.1)
    )
    zero_shot = fc.ZeroShot().fit(None, text_features=texts)
    np.testing.assert_allclose(
        still.predict_proba(data.test[0]), zero_shot.predict_proba(data.test[0]), atol=1e-5
    )
    assert moved.losses_[-1] < still.losses_[-1]
    with pytest.raises(
        UserError, match=r"as wide as the input of the image tower's projection, got \(images, 12\)"
    ):
        fc.ProLIP(backbone).fit(features[..., :12], labels, class_names=data.class_names)


@pytest.mark.parametrize("name", ["task_res", "zs_lp", "clap"])
def test_classes_that_were_not_learned_keep_their_zero_shot_text(
    backbone: Backbone, data: Data, name: str
) -> None:
    new = make_data(("cat", "tractor"), "new", seed=4)
    (outcome,) = run(backbone, name, [one := job(data, name, SHOTS, epochs=5)])
    known = replace(one, weights=outcome.weights)
    found = METHODS[name].classifier(backbone, known, new).logits(new.unit_test)
    plain = METHODS["zero_shot"].classifier(backbone, job(new, "zero_shot"), new).logits(new.unit_test)
    np.testing.assert_allclose(found[:, 1], plain[:, 1], rtol=1e-5, atol=1e-4)
    assert np.abs(found[:, 0] - plain[:, 0]).max() > 1e-3


def start_of(name: str, backbone: Backbone, data: Data) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings, and weights at the start of a method that begins at zero-shot CLIP."""
    texts, dim = texts_of(backbone, data).numpy(), 16
    return {
        "task_res": ({}, {"x": np.zeros_like(texts), "alpha": np.float32(0.5)}),
        "zs_lp": ({}, {"prototypes": texts}),
        "clap": ({}, {"prototypes": texts}),
        "clip_adapter": (
            {"ratio": 0.0},
            {
                "ratio": np.float32(0),
                "down": np.ones((4, dim), np.float32),
                "up": np.ones((dim, 4), np.float32),
            },
        ),
    }[name]


@pytest.mark.parametrize("name", ["task_res", "zs_lp", "clap", "clip_adapter"])
def test_at_its_start_it_is_zero_shot_clip(backbone: Backbone, data: Data, name: str) -> None:
    settings, weights = start_of(name, backbone, data)
    one = replace(job(data, name, **settings), weights=weights)
    classifier = METHODS[name].classifier(backbone, one, data)
    found = classifier.logits(data.unit_test if classifier.unit_length else data.test[0])
    plain = METHODS["zero_shot"].classifier(backbone, job(data, "zero_shot"), data).logits(data.unit_test)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=2e-5)
    assert (found.argmax(1) == plain.argmax(1)).all()
