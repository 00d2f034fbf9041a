"""The plain path against the model's own output, and against a loop over classes with the tower written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcoop.backbones import Backbone, PlainTower, backbone_from_spec
from fastcoop.engine import (
    FastSchedule,
    PromptEncoder,
    PromptLearner,
    Run,
    RunShape,
    plan_training,
    train,
)
from fastcoop.engine.forest import Trees
from fastcoop.engine.plain import PlainPass, PlainWorkspace
from fastcoop.errors import UserError
from fastcoop.methods.class_tokens import ClassTokenEncoder
from fastcoop.methods.projected_gradient import ProjectedGradient
from fastcoop.prompts import PromptLayout, nearest_words
from fastcoop.prompts.plain import drops_full_stop, plain_prompts, written
from fastcoop.prompts.vectors import word_tokens
from tests.advice import follows
from tests.engine.conftest import tiny_backbone
from tests.engine.plain_towers import DIM, KINDS, WIDTH, plain_backbone, write_plain
from tools.plain_path import on_plain_path

NAMES = ("cat", "sea lion", "very old dog fish")
LAYOUTS = {
    "end": PromptLayout(3, "end"),
    "class-specific": PromptLayout(2, "mid", class_specific=True),
    "written": PromptLayout.written("[V]x2 [CLASS] of [V]."),
}
WORDS_OF = {"end": "a photo of {}.", "class-specific": "a {} photo.", "written": "a photo {} of the."}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    return {kind: plain_backbone(tmp_path_factory.mktemp("tiny"), kind) for kind in KINDS}


def drawn(backbone: Backbone, layout: PromptLayout, names: tuple[str, ...] = NAMES, runs: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    shape = layout.shape(len(names), backbone.text.width)
    return 0.5 * torch.randn(runs, *shape, generator=draw, dtype=torch.float64)


def written_out(backbone: Backbone, ids: Tensor, embedded: Tensor) -> Tensor:
    """One prompt's feature (dim,) of its tokens (positions,) and what enters its first layer, by hand."""
    tower: Any = backbone.model.text
    if hasattr(tower, "pooler"):
        mask = (ids != tower.config.pad_token_id).long()[None]
        scale = getattr(backbone.text.embedding, "embed_scale", 1.0)
        read = tower.transformer(inputs_embeds=scale * embedded[None], attention_mask=mask)
        return tower.proj(tower.pooler(read, mask))[0]
    mask = None
    if tower.cls_emb is not None:
        embedded = torch.cat([embedded, tower.cls_emb[None]])
        mask = tower.attn_mask.clone()
        mask[:, 1:][:, ids == tower.pad_id] = -torch.inf  # open_clip's mask is one place off
    x = tower.transformer((embedded + tower.positional_embedding)[None], attn_mask=mask)
    at = {"last": -1, "argmax": int(ids.argmax())}[tower.pool_type] if tower.cls_emb is None else -1
    x = tower.ln_final(x)[0, at] if tower.cls_emb is None else tower.ln_final(x[0, -1])
    if tower.text_projection is None:
        return x
    project = tower.text_projection
    return project(x) if isinstance(project, torch.nn.Linear) else x @ project


def by_loop(backbone: Backbone, layout: PromptLayout, contexts: Tensor) -> Tensor:
    """Class features (classes, dim) of one run, class after class at all positions."""
    length, features = backbone.text.context_length, []
    for k, name in enumerate(NAMES):
        text = written(layout.pattern, "old").replace("[CLASS]", name)
        other = written(layout.pattern, "dog").replace("[CLASS]", name)
        ids, differing = (backbone.tokenizer([one], context_length=length)[0] for one in (text, other))
        embedded = list(backbone.text.token_embedding[ids])
        vectors = iter(contexts[k] if layout.class_specific else contexts)
        for position in (ids != differing).nonzero()[:, 0].tolist():
            embedded[position] = next(vectors)
        features.append(written_out(backbone, ids, torch.stack(embedded)))
    return torch.stack(features)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_words_is_what_the_model_makes_of_it(backbones: dict[str, Backbone], kind: str) -> None:
    backbone = backbones[kind]
    assert backbone.prompt_path.path == "plain"
    for layout, text in WORDS_OF.items():
        texts = [text.format(name) for name in NAMES]
        prompts = plain_prompts(backbone.tokenizer, NAMES, LAYOUTS[layout], backbone.text.context_length)
        own = backbone.tokenize(texts)
        tokens = own[torch.as_tensor(prompts.vectors >= 0)]  # the words where vectors stand
        contexts = backbone.text.token_embedding[tokens]
        vectors = LAYOUTS[layout].context_length
        contexts = contexts.view(len(NAMES), vectors, -1)
        given = contexts if LAYOUTS[layout].class_specific else contexts[0]
        features, expected = (
            PromptEncoder(backbone, NAMES, LAYOUTS[layout])(given),
            backbone.encode_text(texts),
        )
        assert expected.std(0).min() > 1e-5
        assert (features - expected).abs().max() < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_features_and_gradients_are_those_of_a_loop(
    backbones: dict[str, Backbone], kind: str, layout: str
) -> None:
    backbone, prompt = backbones[kind], LAYOUTS[layout]
    contexts = drawn(backbone, prompt).requires_grad_()
    features = PromptEncoder(backbone, NAMES, prompt)(contexts)
    expected = torch.stack([by_loop(backbone, prompt, one) for one in contexts])
    assert (features - expected).abs().max() < 1e-12
    upstream = torch.randn(features.shape, dtype=features.dtype, generator=torch.Generator().manual_seed(2))
    found, wanted = (torch.autograd.grad(one, contexts, upstream)[0] for one in (features, expected))
    assert wanted.abs().max() > 1e-3
    assert (found - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("position", ["end", "mid", "front"])
@pytest.mark.parametrize("class_specific", [False, True])
def test_a_causal_tower_gives_the_same_on_both_paths(position: Any, class_specific: bool) -> None:
    backbone = tiny_backbone()
    plain, names = on_plain_path(backbone), ("cat", "cat fish", "a big lion")
    assert isinstance(plain.text, PlainTower)
    layout = PromptLayout(4, position, class_specific)
    found = []
    for one in (backbone, plain):
        contexts = drawn(backbone, layout, names).requires_grad_()
        features = PromptEncoder(one, names, layout)(contexts)
        found.append((features, torch.autograd.grad(features.square().sum(), contexts)[0]))
    (shared, shared_grad), (features, grad) = found
    assert (features - shared).abs().max() < 1e-12
    assert (grad - shared_grad).abs().max() < 1e-11


def a_run(layout: PromptLayout, names: tuple[str, ...], seed: int, **options: Any) -> Run:
    draw = torch.Generator().manual_seed(seed)
    contexts = 0.3 * torch.randn(layout.shape(len(names), WIDTH), generator=draw)
    features, labels = torch.randn(12, 2, DIM, generator=draw), torch.arange(12) % len(names)
    return Run(names, layout, contexts, features, labels, 3, seed, 6, learning_rate=0.02, **options)


@pytest.mark.parametrize("kind", ["siglip", "bert"])
def test_runs_in_company_have_the_bits_that_they_have_alone(tmp_path: Path, kind: str) -> None:
    """Also where memory holds no graph, so that each part is computed a second time."""
    backbone = plain_backbone(tmp_path, kind, torch.float32)
    pulled = ProjectedGradient(torch.randn(3, DIM, generator=torch.Generator().manual_seed(9)), 1.0)
    runs = [
        a_run(LAYOUTS["end"], NAMES, 0, objective=pulled),  # two backward passes of one forward pass
        a_run(LAYOUTS["end"], NAMES, 4, schedule=FastSchedule()),
        a_run(LAYOUTS["class-specific"], NAMES[:2], 1),
        a_run(LAYOUTS["end"], NAMES, 2),
        a_run(LAYOUTS["written"], (*NAMES, "lion"), 3),
    ]
    together = train(backbone, runs)
    frugal = train(backbone, runs, memory_budget=0)
    alone = [train(backbone, [run])[0] for run in runs]
    for run, one, other, third in zip(runs, together, alone, frugal, strict=True):
        assert not torch.equal(one.contexts, run.contexts)
        assert torch.equal(one.contexts, other.contexts)
        assert torch.equal(one.contexts, third.contexts)


def test_a_resumed_training_continues_with_the_same_bits(tmp_path: Path) -> None:
    backbone, states = plain_backbone(tmp_path, "mobileclip", torch.float32), []
    runs = [a_run(LAYOUTS["end"], NAMES, seed) for seed in range(2)]
    whole = train(backbone, runs, on_step=lambda state: states.append(state()))
    resumed = train(backbone, runs, state=states[2])
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one.contexts, other.contexts)


def test_what_is_kept_follows_the_memory(backbones: dict[str, Backbone]) -> None:
    backbone, layout, names = backbones["siglip"], LAYOUTS["end"], tuple(f"cat {n}" for n in range(300))
    trees = Trees(backbone)
    of_prompts = trees[names, layout]
    forward = PlainPass(trees.tower, [(of_prompts, 2)])
    # 2,048 positions at most, of one run
    assert [classes.stop - classes.start for _, classes in forward.parts[0]] == [100] * 6
    (cost,) = plan_training(backbone, [RunShape(names, layout, 1)]).runs
    assert cost.tree.rows == 300 * 16
    assert cost.tree.shared_rows < cost.tree.rows / 2
    contexts, kept = drawn(backbone, layout, names), []
    for share in (0.0, 0.4, 2.0):
        workspace = PlainWorkspace(memory_bytes=int(share * cost.tree.activation_bytes))
        features = forward.forward(contexts.flatten(0, -2), workspace)
        grad = forward.backward(torch.ones_like(features), workspace)
        kept.append((len(workspace.graphs), features, grad))
    assert [count for count, _, _ in kept] == [0, 1, 6]
    assert all(torch.equal(kept[0][1], one) and torch.equal(kept[0][2], two) for _, one, two in kept)


def test_a_run_that_memory_does_not_hold_keeps_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = plain_backbone(tmp_path, "siglip", torch.float32)
    run = a_run(LAYOUTS["end"], tuple(f"cat {'old ' * n}" for n in range(9)) * 40, 0)
    (expected,) = train(backbone, [run])
    backward, used = PlainPass.backward, []

    def small_machine(self: PlainPass, grads: Any, workspace: PlainWorkspace) -> list[Tensor]:
        used.append(len(workspace.graphs))
        if len(workspace.graphs) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return backward(self, grads, workspace)

    monkeypatch.setattr(PlainPass, "backward", small_machine)
    (found,) = train(backbone, [run])
    assert used[:2] == [3, 1]
    assert caplog.text.count("Out of memory with one run; continuing with less kept") == 1
    assert torch.equal(found.contexts, expected.contexts)


def test_the_measured_memory_is_what_autograd_keeps(backbones: dict[str, Backbone]) -> None:
    backbone, layout = backbones["mobileclip"], LAYOUTS["end"]
    of_prompts = Trees(backbone)[NAMES * 10, layout]
    kept: dict[int, int] = {}
    pointers = {w.untyped_storage().data_ptr() for w in backbone.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in pointers:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        of_prompts.encode(drawn(backbone, layout, runs=1).requires_grad_(), slice(30))
    assert sum(kept.values()) == pytest.approx(30 * of_prompts.cost.kept_bytes, rel=0.1)


def test_the_public_modules_work(backbones: dict[str, Backbone]) -> None:
    backbone = backbones["bert"]
    learner = PromptLearner(backbone, NAMES, PromptLayout(3), words="a photo of")
    assert (learner() - backbone.encode_text([f"a photo of {name}." for name in NAMES])).abs().max() < 1e-12
    learner().square().sum().backward()
    assert learner.contexts.grad is not None
    encoder = learner.encoder.to(torch.float32)
    assert encoder(learner.contexts).dtype == torch.float32
    assert backbone.dtype == torch.float64  # the backbone itself is not converted
    words = nearest_words(backbone, backbone.text.token_embedding[word_tokens(backbone, "sea dog")])
    assert words.words == [["sea"], ["dog"]]


def test_canonical_text_has_no_full_stop(backbones: dict[str, Backbone]) -> None:
    assert drops_full_stop(backbones["siglip"].tokenizer)
    assert not drops_full_stop(backbones["bert"].tokenizer)
    lengths = [
        plain_prompts(backbones[kind].tokenizer, NAMES, LAYOUTS["end"], 24).lengths.tolist()
        for kind in ("siglip", "mt5")
    ]
    assert lengths[0] == [length - 1 for length in lengths[1]]


@follows("shorten the name or use fewer context vectors")
def test_a_prompt_that_does_not_fit(backbones: dict[str, Backbone]) -> None:
    backbone, long = backbones["siglip"], " ".join(["old"] * 13)
    with pytest.raises(
        UserError, match=r"has 17 tokens with its 3 context vectors.* reads at most 16; shorten"
    ):
        PromptEncoder(backbone, ["cat", long], PromptLayout(3))
    PromptEncoder(backbone, ["cat", long], PromptLayout(2))
    PromptEncoder(backbone, ["cat", long.removesuffix(" old")], PromptLayout(3))


def test_a_tokenizer_without_a_word_of_one_token(tmp_path: Path) -> None:
    backbone = plain_backbone(tmp_path, "mt5", words=[".", "cat", "dog"])
    with pytest.raises(UserError, match=r'its tokenizer has no word that is always one token.*"X" or "Q"'):
        PromptEncoder(backbone, ["cat", "dog"], PromptLayout(2))


def test_a_word_of_two_tokens_does_not_stand_for_a_vector(tmp_path: Path) -> None:
    """Where " X" is two tokens, the space would stay before each vector."""
    folder = write_plain(tmp_path / "tiny", "roberta")
    path = folder / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"]["merges"] = []
    path.write_text(json.dumps(facts))
    backbone = backbone_from_spec(str(folder), device="cpu")
    with pytest.raises(UserError, match="its tokenizer has no word that is always one token"):
        PromptEncoder(backbone, ["cat"], PromptLayout(2))


def as_words(backbone: Backbone, names: list[str], layout: PromptLayout) -> tuple[Tensor, Tensor]:
    """Features of prompts whose vectors are the embeddings of words, and what the model makes of these words."""
    prompts = plain_prompts(backbone.tokenizer, names, layout, backbone.text.context_length)
    ids, vectors = map(torch.as_tensor, (prompts.ids, prompts.vectors))
    contexts = backbone.text.token_embedding[ids[0][vectors[0] >= 0]]
    with torch.no_grad():
        return PromptEncoder(backbone, names, layout)(contexts), backbone.model.encode_text(ids)


@pytest.mark.parametrize(("kind", "end"), [("bert", "[SEP]"), ("roberta", "</s>")])
def test_an_end_token_in_a_class_name_does_not_end_its_prompt(
    backbones: dict[str, Backbone], kind: str, end: str
) -> None:
    features, expected = as_words(backbones[kind], [f"old {end} lion fish", "cat"], PromptLayout(2))
    assert (features - expected).abs().max() < 1e-12


def test_padding_that_the_tower_does_not_mask_is_computed(tmp_path: Path) -> None:
    """The tower's config names another token as padding than the tokenizer pads with."""
    folder = write_plain(tmp_path / "tiny", "bert")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 1}))
    backbone = backbone_from_spec(str(folder), device="cpu", dtype=torch.float64)
    features, expected = as_words(backbone, ["cat", "sea lion"], PromptLayout(2))
    assert (features - expected).abs().max() < 1e-12


def test_what_needs_a_causal_tower_says_so(backbones: dict[str, Backbone]) -> None:
    with pytest.raises(UserError, match=r"needs a causal text tower.* its attention is not causal"):
        ClassTokenEncoder(backbones["siglip"], NAMES, PromptLayout(2), layer=1)
