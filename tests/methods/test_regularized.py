"""KgCoOp and ProGrad against their formulas written plainly, beside CoOp in one forest, and alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize, softmax

from fastcoop.backbones import Backbone
from fastcoop.datasets import FewShot
from fastcoop.engine import train
from fastcoop.errors import UserError
from fastcoop.methods import METHODS, Data, RunContext, RunSpec
from fastcoop.methods.regularized import KgCoOpMethod
from fastcoop.prompts import PromptLayout
from tests.advice import follows
from tests.methods.conftest import ALONE, job, make_data, run
from tests.reference import reference_features

QUICK: dict[str, dict[str, Any]] = {
    "kgcoop": {"epochs": 5, "learning_rate": 0.2, "batch_size": 4},
    "prograd": {"epochs": 5, "learning_rate": 0.2, "batch_size": 4, "context_length": 6},
}


def plain_gradient(
    backbone: Backbone, one: RunSpec, contexts: Tensor, images: Tensor, labels: Tensor
) -> Tensor:
    """The gradient that a step follows, at 77 tokens by autograd. Its loss is in the papers' own form."""
    names, s = one.data.class_names, one.settings
    texts = reference_features(backbone.model, backbone.tokenizer, names, contexts, s.class_position)
    texts = normalize(texts, dim=-1)
    prompts = [f"a photo of a {name}." for name in names]
    reference = normalize(backbone.model.encode_text(backbone.tokenizer(prompts)), dim=-1)
    logits, zero_shot = (backbone.logit_scale * images @ features.T for features in (texts, reference))
    loss = cross_entropy(logits, labels)
    if one.method == "kgcoop":
        loss = loss + s.lmbda * (1 - torch.cosine_similarity(texts, reference).mean())
        return torch.autograd.grad(loss, contexts)[0]
    soft = -(softmax(zero_shot, -1) * log_softmax(logits, -1)).sum(1).mean()
    g, h = (torch.autograd.grad(part, contexts, retain_graph=True)[0] for part in (loss, soft))
    unit = h / h.norm()
    return g - s.lmbda * (g * unit).sum() * unit if (g * h).sum() < 0 else g


def plain_training(backbone: Backbone, one: RunSpec, start: Tensor) -> Tensor:
    settings, (features, labels) = one.settings, map(torch.from_numpy, one.data.train_views(one.subset))
    contexts = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([contexts], lr=1.0, momentum=0.9, weight_decay=5e-4)
    images, views, size = len(labels), features.shape[1], settings.batch_size
    steps, draw = max(1, images // size), np.random.default_rng(one.seed)
    for epoch in range(settings.epochs):
        cosine = 0.5 * settings.learning_rate * (1 + np.cos(np.pi * (epoch - 1) / settings.epochs))
        optimizer.param_groups[0]["lr"] = 1e-5 if epoch == 0 else cosine
        order, view = draw.permutation(images), draw.integers(views, size=images)
        for step in range(steps):
            part = slice(step * size, (step + 1) * size)
            batch = normalize(features[order[part], view[part]], dim=-1)
            contexts.grad = plain_gradient(backbone, one, contexts, batch, labels[order[part]])
            optimizer.step()
    return contexts.detach()


@pytest.mark.parametrize(("name", "specific"), [("kgcoop", False), ("prograd", False), ("prograd", True)])
def test_training_is_the_formula(backbone: Backbone, data: Data, name: str, specific: bool) -> None:
    one = job(data, name, shots=4, **QUICK[name], class_specific=specific)
    start = METHODS[name].training(backbone, one).contexts
    (outcome,) = run(backbone, name, [one])
    expected = plain_training(backbone, one, start)
    moved = (expected - start).norm()
    assert (torch.from_numpy(outcome.contexts) - expected).norm() < 1e-4 * moved
    other = job(data, name, shots=4, **QUICK[name] | {"lmbda": 0.0}, class_specific=specific)
    (free,) = run(backbone, name, [other])
    assert (torch.from_numpy(free.contexts) - expected).norm() > 1e-2 * moved, "the second term matters"


def test_runs_of_all_objectives_train_in_one_forest_each_as_if_alone(backbone: Backbone, data: Data) -> None:
    runs = [job(data, name, seed=seed, **QUICK[name], init="random") for name in QUICK for seed in (1, 2)]
    runs += [job(data, "coop", seed=3, epochs=5, learning_rate=0.2, batch_size=4, context_length=4)]
    runs += [job(data, "kgcoop", **QUICK["kgcoop"], lmbda=1.0)]
    trainings = [METHODS[one.method].training(backbone, one) for one in runs]
    states: list[Any] = []
    together = train(backbone, trainings, on_step=lambda state: states.append(state()))
    resumed = train(backbone, trainings, state=states[2])
    for one, found, later in zip(trainings, together, resumed, strict=True):
        (alone,) = train(backbone, [one])
        assert (found.contexts == alone.contexts).all()
        assert (later.contexts == alone.contexts).all()
        assert (found.losses == alone.losses).all()


def test_two_trainings_of_one_call_are_in_no_checkpoint(backbone: Backbone, data: Data) -> None:
    class Kept:
        offered = 0

        def load(self) -> None:
            return None

        def offer(self, get_state: Any) -> None:
            self.offered += 1

    for names, offered in ((("coop", "kgcoop"), True), (("coop", "prograd"), False)):
        runs, kept = [job(data, name, epochs=2) for name in names], Kept()
        METHODS["coop"].run(backbone, runs, lambda index, one: None, RunContext(checkpoint=kept))
        assert bool(kept.offered) == offered


@pytest.mark.parametrize("name", ["coop", *QUICK])
def test_methods_name_the_gradients_of_their_objective(backbone: Backbone, data: Data, name: str) -> None:
    one, method = job(data, name, epochs=1), METHODS[name]
    assert method.trainer(one.settings).gradients == method.training(backbone, one).objective.parts


def test_an_object_that_no_package_registers_runs_its_own_way(backbone: Backbone, data: Data) -> None:
    class Unlike(KgCoOpMethod):
        name = "unlike"

        def objective(self, backbone: Backbone, run: Any) -> Any:
            return METHODS["prograd"].objective(backbone, job(data, "prograd"))

    one, outcomes = job(data, "kgcoop", **QUICK["kgcoop"]), list[Any]()
    Unlike().run(backbone, [replace(one, method="unlike")], lambda _, found: outcomes.append(found), ALONE)
    (plain,) = run(backbone, "kgcoop", [one])
    assert (outcomes[0].contexts != plain.contexts).any()


@pytest.mark.parametrize("name", QUICK)
def test_a_callers_modes_of_torch_change_nothing(backbone: Backbone, data: Data, name: str) -> None:
    (plain,) = run(backbone, name, [job(data, name, **QUICK[name])])
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            (found,) = run(backbone, name, [job(data, name, **QUICK[name])])
        assert (found.contexts == plain.contexts).all()
        assert (found.losses == plain.losses).all()


@pytest.mark.parametrize("name", QUICK)
def test_learned_contexts_are_tested_later_and_elsewhere(backbone: Backbone, data: Data, name: str) -> None:
    new = make_data(("pug", "maine coon"), name="pets", seed=4)
    one = job(data, name, targets=(new,), **QUICK[name])
    (outcome,) = run(backbone, name, [one])
    (later,) = run(backbone, name, [replace(one, contexts=outcome.contexts)])
    for key in ("predictions", "confidence"):
        assert (getattr(later.scores["pets"], key) == getattr(outcome.scores["pets"], key)).all()


@pytest.mark.parametrize("name", QUICK)
def test_test_images_and_labels_change_nothing_that_is_learned(backbone: Backbone, name: str) -> None:
    (one,) = run(backbone, name, [job(make_data(), name, **QUICK[name])])
    other = make_data()
    other.store._labels["test"] = other.store._labels["test"][::-1].copy()
    other.store._features["test"] += 1.0
    (two,) = run(backbone, name, [job(other, name, **QUICK[name])])
    assert (one.contexts == two.contexts).all()
    assert (one.losses == two.losses).all()


@pytest.mark.parametrize("name", QUICK)
def test_each_setting_of_its_own_changes_what_is_learned(backbone: Backbone, data: Data, name: str) -> None:
    more: dict[str, Any] = {
        "lmbda": 0.25,
        "template": "drawing of {}.",
        "init": "the photo of",
        "batch_size": 8,
    }
    base = QUICK[name] if name == "kgcoop" else QUICK[name] | {"context_length": 3}
    base = base | {"template": "a photo of {}."}
    settings = [base, *(base | {key: value} for key, value in more.items())]
    first, *others = run(backbone, name, [job(data, name, shots=4, **given) for given in settings])
    for key, other in zip(more, others, strict=True):
        same = other.contexts.shape == first.contexts.shape and np.allclose(
            other.contexts, first.contexts, atol=1e-4
        )
        assert not same, key


@pytest.mark.parametrize("name", QUICK)
def test_a_class_without_images_has_a_prompt_like_any_other(
    backbone: Backbone, data: Data, name: str
) -> None:
    one = job(data, name, **QUICK[name])
    seen = one.data.dataset.splits["train"].labels[one.subset.train] > 0
    (outcome,) = run(backbone, name, [replace(one, subset=FewShot(one.subset.train[seen], one.subset.val))])
    assert np.isfinite(outcome.contexts).all()
    assert outcome.status == "done"


@follows("give a context_length of at least {}, or init: random")
def test_prograd_starts_from_the_templates_words_behind_zeros(backbone: Backbone, data: Data) -> None:
    def start(**settings: Any) -> Tensor:
        return METHODS["prograd"].training(backbone, job(data, "prograd", epochs=1, **settings)).contexts

    words = backbone.text.token_embedding[backbone.tokenizer(["a photo of a"])[0, 1:5]]
    assert not start()[:12].any()
    assert (start()[12:] == words).all()
    assert (start(context_length=4, class_specific=True) == words).all()
    assert not start(template="{} texture.").any()
    with pytest.raises(UserError, match=r'"a photo of a".* are 4 tokens, but there are 3 .* at least 4'):
        METHODS["prograd"].check(job(data, "prograd", model=backbone, context_length=3))
    METHODS["prograd"].check(job(data, "prograd", model=backbone, context_length=4))
    short = job(data, "prograd", model=backbone, context_length=3)
    METHODS["prograd"].check(replace(short, contexts=np.zeros((3, 16), np.float32)))  # it has started
    assert len(start(context_length=3, init="random")) == 3


@follows("lmbda weighs the hand-written prompt here; leave out pull")
def test_the_fast_schedule_follows_each_objective(backbone: Backbone, data: Data) -> None:
    for name in QUICK:
        one, other = (job(data, name, schedule="fast", lmbda=lmbda) for lmbda in (0.0, 8.0))
        found, held = run(backbone, name, [one, other])
        assert np.abs(found.contexts - held.contexts).max() > 1e-3
        assert found.losses[-1] < found.losses[0]
        with pytest.raises(UserError, match="leave out pull"):
            job(data, name, schedule="fast", pull="none")
    (plain,) = run(backbone, "coop", [job(data, "coop", schedule="fast", pull="none", init="a photo of a")])
    (zero,) = run(backbone, "kgcoop", [job(data, "kgcoop", schedule="fast", lmbda=0.0)])
    assert (plain.contexts == zero.contexts).all()


def test_official_prompts_stand_where_they_differ_from_the_datasets(backbone: Backbone) -> None:
    """As the official codes write them, full stops and grammar included."""
    official = {
        "dtd:base": ("a photo of a {}, a type of texture.", "a texture of {}.",
                     "a photo of a {}, a type of texture.", "[CLASS] texture."),
        "oxford_pets": (None, "a type of pet, a photo of a {}.", None, None),
        "oxford_flowers": (None, "a type of flower, a photo of a {}.", None, None),
        "fgvc_aircraft": (None, "a type of aircraft, a photo of a {}.",
                          "a photo of an aircraft {}.", "[CLASS], a type of aircraft."),
        "food101": (None, "a type of food, a photo of {}.", "a photo of a {}, a type of food.", None),
        "stanford_cars": (None, None, None, "[CLASS], a type of car"),
        "ucf101": (None, None, None, "person doing [CLASS]."),
    }  # fmt: skip
    settings = {name: METHODS[name].Settings() for name in ("kgcoop", "prograd", "tcp")}
    for dataset, expected in official.items():
        data = make_data(name=dataset)
        found = [METHODS[name].prompts(one, data)[0] for name, one in settings.items()]
        layout = METHODS["tcp"].layout(settings["tcp"], backbone, data)
        assert found == [one or "a photo of a {}." for one in expected[:3]]
        assert layout == PromptLayout.written(f"[V]x4 {expected[3] or '[CLASS].'}")
    own = {name: METHODS[name].prompts(one, make_data())[0] for name, one in settings.items()}
    assert set(own.values()) == {"a photo of a {}."}
