"""Each method against an independent computation on the same arrays."""

from __future__ import annotations

import dataclasses
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fastcoop.backbones import Backbone
from fastcoop.errors import UserError
from fastcoop.methods import METHODS, Data, RunSpec, expand, get_method, score
from fastcoop.methods.data import matching_classes
from fastcoop.methods.linear_probe import choose_c
from fastcoop.methods.schedule import epochs_of
from fastcoop.methods.text import check_texts, prompt_features
from tests.methods.conftest import job, make_data, run
from tests.reference import reference_features, reference_mixed_features


@pytest.mark.parametrize("name", METHODS)
def test_no_jobs_are_no_work_and_no_words(
    backbone: Backbone, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """A forecast calls a method so, to have imported what it works with before it takes the time."""
    run(backbone, name, [])
    assert not caplog.records


def test_runs_of_many_seeds_share_their_subsets() -> None:
    data = make_data()
    first = [data.subset(1, seed) for seed in range(500)]
    assert all(data.subset(1, seed) is subset for seed, subset in enumerate(first))


def test_runs_share_the_training_features_that_were_read_last(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    subsets = [data.subset(2, seed) for seed in (1, 2, 3)]
    first, second = (data.train_views(subset)[0] for subset in subsets[:2])
    for subset, found in zip(subsets, (first, second), strict=False):
        assert np.array_equal(found, data.store.train(subset.train)[:, 1:])
    assert np.shares_memory(first, data.train_views(subsets[0])[0])
    two = 2 * data.train(subsets[0])[0].nbytes
    monkeypatch.setattr("fastcoop.methods.data.KEPT_BYTES", two)
    data.train_views(subsets[2])
    assert np.shares_memory(first, data.train_views(subsets[0])[0])
    assert not np.shares_memory(second, data.train_views(subsets[1])[0])


def text_features(backbone: Backbone, prompts: list[str]) -> np.ndarray:
    with torch.no_grad():
        return backbone.model.encode_text(backbone.tokenizer(prompts), normalize=True).numpy()


def predict(data: Data, texts: np.ndarray) -> np.ndarray:
    images = data.test[0] / np.linalg.norm(data.test[0], axis=1, keepdims=True)
    return (images @ texts.T).argmax(1)


@pytest.mark.parametrize("template", [None, "a drawing of {}"])
def test_zero_shot_is_the_nearest_prompt(backbone: Backbone, data: Data, template: str | None) -> None:
    settings = {"prompts": template} if template else {}
    (outcome,) = run(backbone, "zero_shot", [job(data, "zero_shot", **settings)])
    texts = text_features(backbone, [(template or "a photo of a {}.").format(c) for c in data.class_names])
    assert (outcome.scores["animals"].predictions == predict(data, texts)).all()
    written = make_data(tuple(name.replace(" ", "_") for name in data.class_names))
    (same,) = run(backbone, "zero_shot", [job(written, "zero_shot", **settings)])
    assert (same.scores["animals"].confidence == outcome.scores["animals"].confidence).all()


def test_zero_shot_on_a_target_has_the_targets_prompt(backbone: Backbone, data: Data) -> None:
    other = Data(dataclasses.replace(data.dataset, name="drawn", template="a drawing of {}"), data.store)
    (outcome,) = run(backbone, "zero_shot", [job(data, "zero_shot", targets=(other,))])
    (alone,) = run(backbone, "zero_shot", [job(other, "zero_shot")])
    assert (outcome.scores["drawn"].confidence == alone.scores["drawn"].confidence).all()
    assert (outcome.scores["drawn"].confidence != outcome.scores["animals"].confidence).any()


def test_prompts_are_checked_for_each_backbone(backbone: Backbone, data: Data) -> None:
    class Short:
        name, tokenizer, text = "short", staticmethod(backbone.tokenizer), SimpleNamespace(context_length=6)

    check_texts([job(data, "zero_shot", model=backbone)])
    with pytest.raises(UserError, match="text tower of short reads at most 6"):
        check_texts([job(data, "zero_shot", model=model) for model in (backbone, Short())])
    nothing = make_data(("cat", "_"))
    with pytest.raises(UserError, match="class name '_' of animals reads as nothing"):
        check_texts([job(nothing, "zero_shot", model=backbone)])


@pytest.mark.parametrize("value", [0.0, np.inf])
def test_text_features_without_a_direction_are_refused(value: float) -> None:
    class Broken:
        name, encode_text = "broken", staticmethod(lambda prompts: torch.full((len(prompts), 4), value))

    with pytest.raises(
        UserError, match=r'broken gives text features of the prompt "a \{\}" that are not finite'
    ):
        prompt_features(Broken(), ("cat", "dog"), "a {}")  # type: ignore[arg-type]


def test_a_run_by_names_holds_no_object(backbone: Backbone, data: Data) -> None:
    one = job(data, "coop", targets=(data,), model=backbone)
    unbound = dataclasses.replace(one, tuning=data).unbound()
    assert unbound == one
    assert [unbound.model, unbound.data, unbound.subset, unbound.tuning, unbound.targets] == [None] * 4 + [()]


@pytest.mark.parametrize(("templates", "count"), [("selected", 8), ("all", 81)])
def test_ensemble_averages_unit_features(backbone: Backbone, data: Data, templates: str, count: int) -> None:
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    (outcome,) = run(backbone, "ensemble", [job(data, "ensemble", templates=templates)])
    chosen = {"selected": SIMPLE_IMAGENET_TEMPLATES, "all": OPENAI_IMAGENET_TEMPLATES}[templates]
    per_class = []
    for name in data.class_names:
        prompts = [template(name) for template in chosen] + [f"a photo of a {name}."]
        assert len(prompts) == count
        mean = text_features(backbone, prompts).mean(0)
        per_class.append(mean / np.linalg.norm(mean))
    assert (outcome.scores["animals"].predictions == predict(data, np.stack(per_class))).all()


@pytest.mark.parametrize(
    ("name", "prompts"),
    [("imagenet", 7), ("imagenet:base", 7), ("imagenetv2", 8), ("imagenet_sketch", 8), ("dtd", 8)],
)
def test_only_imagenet_itself_goes_without_its_own_prompt(data: Data, name: str, prompts: int) -> None:
    named = Data(dataclasses.replace(data.dataset, name=name), None)
    method = get_method("ensemble")
    assert len(method.prompts(method.Settings(), named)) == prompts


def official_search(train: tuple, val: tuple) -> float:
    """The official search as its two loops, in which equal fits are made once."""

    @cache
    def accuracy(c: float) -> float:
        return (LogisticRegression(C=c, max_iter=1000).fit(*train).predict(val[0]) == val[1]).mean()

    candidates = [1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6]
    peak = candidates[int(np.argmax([accuracy(c) for c in candidates]))]
    left, right = 0.1 * peak, 10 * peak
    for _ in range(8):
        middle = 10 ** (0.5 * (np.log10(left) + np.log10(right)))
        if accuracy(left) < accuracy(right):
            final, left = right, middle
        else:
            final, right = left, middle
    return final


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(4))
def test_the_probes_c_is_the_official_searchs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, 6))
    labels, val_labels = np.repeat(np.arange(3), 5), np.repeat(np.arange(3), 40)
    train = centres[labels] + 1.5 * rng.normal(size=(15, 6)), labels
    val = centres[val_labels] + 1.5 * rng.normal(size=(120, 6)), val_labels
    log_c, accuracy, model = choose_c(train, val)
    assert accuracy == (model.predict(val[0]) == val[1]).mean()
    assert 10**log_c == pytest.approx(official_search(train, val))
    assert pytest.approx(10**log_c) == model.C


def test_linear_probe_learns_from_the_test_time_crop_alone(backbone: Backbone, data: Data) -> None:
    (outcome,) = run(backbone, "linear_probe", [job(data, "linear_probe", shots=4)])
    subset = data.subset(4, 1)
    features = data.store.train(subset.train)[:, 0].double().numpy()
    model = LogisticRegression(C=outcome.extra["c"], max_iter=1000).fit(features, data.train(subset)[1])
    assert (model.predict(data.test[0]) == outcome.scores["animals"].predictions).all()
    assert outcome.scores["animals"].accuracy > 60


def test_classes_are_matched_by_wordnet_id_where_both_know_theirs(data: Data) -> None:
    def named(classes: tuple[str, ...], ids: tuple[str, ...] = ()) -> Data:
        made = make_data(classes)
        return Data(dataclasses.replace(made.dataset, class_ids=ids), made.store)

    source = named(("missile", "missile", "crane"), ("n04008634", "n03773504", "n02012849"))
    assert matching_classes(source, named(("crane bird", "rocket"), ("n02012849", "n04008634"))) == [2, 0]
    assert matching_classes(source, named(("Crane",))) == [2]
    assert matching_classes(source, named(source.class_names)) == [0, 1, 2]
    with pytest.raises(UserError, match='animals has 2 classes called "missile"'):
        matching_classes(source, named(("missile", "crane")))
    with pytest.raises(UserError, match='"crane" is not among animals'):
        matching_classes(source, named(("crane",), ("n09999999",)))


def test_a_probe_of_two_classes_is_kept_as_it_was_fitted(backbone: Backbone) -> None:
    data = make_data(("cat", "dog"))
    (outcome,) = run(backbone, "linear_probe", [job(data, "linear_probe", shots=4)])
    subset = data.subset(4, 1)
    features = data.store.train(subset.train)[:, 0].double().numpy()
    model = LogisticRegression(C=outcome.extra["c"], max_iter=1000).fit(features, data.train(subset)[1])
    one = dataclasses.replace(job(data, "linear_probe", shots=4), weights=outcome.weights)
    logits = get_method("linear_probe").classifier(backbone, one, data).logits(data.test[0])
    np.testing.assert_allclose(logits[:, 1], model.decision_function(data.test[0]), rtol=1e-4, atol=1e-5)
    probability = model.predict_proba(data.test[0]).max(1)
    np.testing.assert_allclose(outcome.scores["animals"].confidence, probability, atol=2e-3)


def test_linear_probe_on_a_target_answers_only_with_its_classes(backbone: Backbone, data: Data) -> None:
    target = make_data(("old_dog", "Cat"), "sketches", seed=0)
    (outcome,) = run(backbone, "linear_probe", [job(data, "linear_probe", targets=(target,))])
    assert list(outcome.scores) == ["animals", "sketches"]
    assert set(outcome.scores["sketches"].predictions) <= {0, 1}
    again = job(data, "linear_probe", targets=(target,))
    (again,) = run(backbone, "linear_probe", [dataclasses.replace(again, weights=outcome.weights)])
    assert list(again.scores) == ["sketches"]
    assert (again.scores["sketches"].predictions == outcome.scores["sketches"].predictions).all()
    assert (again.scores["sketches"].confidence == outcome.scores["sketches"].confidence).all()
    with pytest.raises(UserError, match='"ship" is not among animals'):
        get_method("linear_probe").check(
            job(data, "linear_probe", targets=(make_data(("cat", "ship"), "b"),))
        )


@pytest.mark.parametrize("position", ["end", "mid", "front"])
@pytest.mark.parametrize("specific", [False, True])
def test_coop_scores_what_it_learned_as_the_plain_way_does(
    backbone: Backbone, data: Data, position: str, specific: bool
) -> None:
    settings = {"context_length": 3, "class_position": position, "class_specific": specific, "epochs": 5}
    (outcome,) = run(backbone, "coop", [job(data, "coop", learning_rate=0.05, **settings)])
    assert outcome.status == "done"
    assert outcome.losses.shape == (5,)
    contexts = torch.from_numpy(outcome.contexts)
    assert contexts.shape == ((3, 3, 16) if specific else (3, 16))
    texts = reference_features(
        backbone.model, backbone.tokenizer, data.class_names, contexts, position
    ).numpy()
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    assert (outcome.scores["animals"].predictions == predict(data, texts)).all()


def test_coop_runs_do_not_depend_on_their_company(backbone: Backbone, data: Data) -> None:
    jobs = [job(data, "coop", seed=seed, context_length=2, epochs=4) for seed in (1, 2)]
    together = run(backbone, "coop", jobs)
    for one, with_company in zip(jobs, together, strict=True):
        (alone,) = run(backbone, "coop", [one])
        np.testing.assert_allclose(alone.contexts, with_company.contexts, atol=1e-6)
    assert not np.allclose(together[0].contexts, together[1].contexts)


def test_coop_trains_on_augmented_views_where_there_are_any(backbone: Backbone) -> None:
    data = make_data(views=2)
    blank = make_data(views=2)
    blank.store._features["train"][:, 0] = 1.0  # the test-time crop, which training must not see
    one, other = (job(d, "coop", context_length=2, epochs=3, learning_rate=0.05) for d in (data, blank))
    a, b = run(backbone, "coop", [one, other])
    assert (a.contexts == b.contexts).all()


def test_coop_from_words_has_their_length(backbone: Backbone, data: Data) -> None:
    one = job(data, "coop", init="a photo of a", epochs=1)
    (outcome,) = run(backbone, "coop", [one])
    assert outcome.contexts.shape == (4, 16)
    assert METHODS["coop"].columns(one, backbone)["context_length"] == 4
    embeddings = backbone.model.token_embedding.weight[backbone.tokenizer(["a photo of a"])[0, 1:5]]
    assert np.abs(outcome.contexts - embeddings.numpy()).max() < 1e-2  # one epoch at 1e-5


def test_unified_contexts_carry_over_to_new_classes_and_specific_ones_by_name(
    backbone: Backbone, data: Data
) -> None:
    unseen, subset = make_data(("ship", "car"), "vehicles"), make_data(("old dog", "cat"), "some")
    (outcome,) = run(
        backbone, "coop", [job(data, "coop", context_length=2, epochs=2, targets=(unseen, subset))]
    )
    assert list(outcome.scores) == ["animals", "vehicles", "some"]
    specific = {"context_length": 2, "epochs": 2, "class_specific": True}
    (outcome,) = run(backbone, "coop", [job(data, "coop", targets=(subset,), **specific)])
    contexts = torch.from_numpy(outcome.contexts[[2, 0]])
    texts = reference_features(
        backbone.model, backbone.tokenizer, subset.class_names, contexts, "end"
    ).numpy()
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    assert (outcome.scores["some"].predictions == predict(subset, texts)).all()


@pytest.mark.parametrize("specific", [False, True])
def test_coop_learns_in_a_prompt_of_words_and_vectors(backbone: Backbone, data: Data, specific: bool) -> None:
    prompt = "a photo of [V]x2 [CLASS], a type of pet."
    one = job(data, "coop", prompt=prompt, class_specific=specific, epochs=5, learning_rate=0.05)
    (outcome,) = run(backbone, "coop", [one])
    texts = reference_mixed_features(
        backbone.model, backbone.tokenizer, data.class_names, torch.from_numpy(outcome.contexts), prompt
    ).numpy()
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    assert (outcome.scores["animals"].predictions == predict(data, texts)).all()
    columns = METHODS["coop"].columns(one, backbone)
    assert (columns["context_length"], columns["class_position"]) == (2, prompt)
    assert prompt in METHODS["coop"].label(one.settings)


def test_a_prompt_that_is_a_named_layout_is_the_same_run(backbone: Backbone, data: Data) -> None:
    def determined(**settings: object) -> dict:
        return METHODS["coop"].key_settings(job(data, "coop", **settings), backbone)

    assert determined(prompt="[V]x4 [CLASS].") == determined(context_length=4)
    assert determined(prompt="[CLASS] [V]x3.") == determined(context_length=3, class_position="front")
    assert determined(prompt="[V]x4 [CLASS]") != determined(context_length=4)
    with pytest.raises(UserError, match=r"4 tokens, but the prompt .* has 2 vectors; give it 4"):
        determined(prompt="[V]x2 [CLASS]", init="a photo of a")


def test_known_contexts_are_only_tested(backbone: Backbone, data: Data) -> None:
    other = make_data(("old dog", "cat"), "some")
    one = job(data, "coop", context_length=2, epochs=3, targets=(other,))
    (first,) = run(backbone, "coop", [one])
    (again,) = run(backbone, "coop", [dataclasses.replace(one, contexts=first.contexts)])
    assert again.losses is None
    assert list(again.scores) == ["some"]
    assert (again.scores["some"].predictions == first.scores["some"].predictions).all()


@pytest.mark.parametrize(
    ("epochs", "shots", "dataset", "expected"),
    [
        ("paper", 16, "dtd", 200), ("paper", 8, "dtd", 200), ("paper", 4, "dtd", 100),
        ("paper", 2, "dtd", 100), ("paper", 1, "dtd", 50),
        ("paper", 16, "imagenet", 50), ("paper", "all", "dtd", 200), (7, 4, "dtd", 7),
        ({1: 3, 4: 9}, 4, "dtd", 9), ("50 steps", 1, "dtd", 50), ("50 steps", 6, "dtd", 50),
    ],
)  # fmt: skip
def test_schedules(epochs: object, shots: int | str, dataset: str, expected: int) -> None:
    data = make_data(name=dataset)
    (settings,) = expand(get_method("coop"), {"epochs": epochs})
    assert (
        epochs_of(RunSpec.of("coop", settings, data, shots=shots, subset=data.subset(shots, 1))) == expected
    )
    assert (settings.schedule_label == "paper") == (epochs == "paper")


def test_a_schedule_in_steps_counts_batches(data: Data) -> None:
    (settings,) = expand(get_method("coop"), {"epochs": "50 steps", "batch_size": 4})
    assert (
        epochs_of(RunSpec.of("coop", settings, data, shots=4, subset=data.subset(4, 1))) == 17
    )  # 3 steps an epoch
    (settings,) = expand(get_method("coop"), {"epochs": "5 steps", "batch_size": 4})
    assert epochs_of(RunSpec.of("coop", settings, data, shots=4, subset=data.subset(4, 1))) == 4  # the fewest


def test_lists_are_crossed() -> None:
    crossed = expand(
        get_method("coop"), {"context_length": [4, 16], "class_specific": [False, True], "init": "an"}
    )
    assert [(s.context_length, s.class_specific) for s in crossed] == [
        (4, False), (4, True), (16, False), (16, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("coop", {"contxt_length": 4}, 'Did you mean "context_length"'),
        ("coop", {"context_length": 0}, "cannot be 0"),
        ("coop", {"class_position": "middle"}, "'end', 'mid' or 'front'"),
        ("coop", {"epochs": "many"}, "N steps"),
        ("coop", {"init": []}, "empty list"),
        ("zero_shot", {"prompts": "a photo"}, "where the class name goes"),
        ("linear_probe", {"c": 1}, 'Unknown setting "c"'),
        ("coop", {"prompt": "a photo of a [CLASS]."}, "at least one vector"),
        ("coop", {"prompt": "[V] [CLASS]", "context_length": 4}, "leave out context_length"),
    ],
)
def test_settings_that_cannot_be_are_named(method: str, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(get_method(method), settings)


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match='Did you mean "linear_probe"'):
        get_method("linear_prob")


def test_validation_images_are_needed_by_the_probe_alone(backbone: Backbone, data: Data) -> None:
    bare = dataclasses.replace(
        data.dataset, splits={k: v for k, v in data.dataset.splits.items() if k != "val"}
    )
    without = Data(bare, data.store, data.views)
    run(backbone, "coop", [job(without, "coop", context_length=1, epochs=1)])
    with pytest.raises(UserError, match="no validation images"):
        get_method("linear_probe").check(job(without, "linear_probe"))


def test_scores() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.2, 0.8, 0.0]]) + 1e-30)
    scores = score(logits, np.array([0, 0, 0, 1]))
    assert scores.accuracy == 75
    assert scores.macro_accuracy == pytest.approx((200 / 3 + 100) / 2)
    assert scores.per_class[:2] == pytest.approx([200 / 3, 100])
    assert np.isnan(scores.per_class[2])
    assert scores.predictions.dtype == np.uint16
    assert scores.predictions.tolist() == [0, 1, 0, 1]
    assert scores.confidence == pytest.approx([0.7, 0.5, 0.6, 0.8], abs=1e-3)
