"""Pretrain the demo's backbones from scratch: ``python -m fastcoop.demo.pretrain resnet`` (or ``vit``).

The image tower first learns to name pictures by single words, since two small towers started together from
nothing stay at chance for very long; then both learn contrastively from (icon, caption) pairs, with open_clip's
loss. No glyph of the demo's test sets, nor any near-duplicate of one, is ever shown. The model card says what
comes out.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.loss import ClipLoss
from torch import nn

from fastcoop.backbones.sparse import write_sparse_model
from fastcoop.demo.captions import END, MAX_FILLERS, behind_fillers, caption, tokens, vocabulary
from fastcoop.demo.paint import LIGHT_ON_DARK, NAMES, PAIRS, Manner, paint
from fastcoop.demo.rarities import Rarities, phrases
from fastcoop.demo.weights import load_model, weights_path
from fastcoop.demo.world import atlas, held_out, plan
from fastcoop.progress import progress

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4}
VISION: dict[str, dict[str, Any]] = {
    "resnet": {"image_size": 32, "layers": [2, 2, 2, 2], "width": 16, "head_width": 64},
    "vit": {"image_size": 32, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
}
BATCH = 256
WORD_STEPS = {"resnet": 2000, "vit": 1200}  # of the image tower alone
PAIR_STEPS = {"resnet": 1400, "vit": 1400}  # of both towers
WORD_RATE = {"resnet": 3e-3, "vit": 1e-3}
TEXT_RATE, IMAGE_RATE = 1.5e-3, 3e-4  # in the second stage
COMMON = 8  # glyphs that have a word, for the first stage to learn it
EASY = 0.2  # share of the first stage in which pictures go from plain to as varied as they get
RARE = 8  # of a batch's pictures in the second stage are no icons
EARLY = 0.25  # share of the second stage with short captions
TEACHER = {
    "vit": "demo-resnet"
}  # a transformer image tower alone hardly starts to learn in the time there is
TEACHING = 8.0  # weight of the teacher's lesson
WORD_SCALE = 20.0  # of the logits, in the first stage
FIRST_SCALE, LAST_SCALE = 30.0, 100.0  # in the second: rises over the first half, CLIP's own after that
MANNER = Manner(rotation=20, scale=(0.55, 1.5), shift=0.15, noise=0.12)
SEED = 0


def config_of(name: str) -> dict[str, Any]:
    """The open_clip config of a demo backbone."""
    return {"embed_dim": 128, "vision_cfg": VISION[name], "text_cfg": TEXT}


class Pairs:
    """Batches of pictures and what is said of them, from the glyphs that pretraining may see."""

    def __init__(self, seed: int) -> None:
        world = atlas()
        kept_out = held_out(plan())
        self.glyphs = [glyph for glyph in world.glyphs if glyph.key not in kept_out]
        self.masks = torch.from_numpy(world.masks[[world.index[glyph.key] for glyph in self.glyphs]])
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.rarities = Rarities(self.masks.numpy(), seed)
        self.ids = vocabulary(self.glyphs, [*NAMES, *phrases()])
        self.heads = self._by(lambda words: words[0])
        self.badges = self._by(lambda words: words[-1] if len(words) > 1 else None)
        self.names = self._by(lambda words: " ".join(sorted(words)))
        members: dict[str, list[int]] = defaultdict(list)
        for i, glyph in enumerate(self.glyphs):
            for word in {*glyph.words, *glyph.style}:
                members[word].append(i)
        self.words = [group for group in members.values() if len(group) >= COMMON]
        self.has_word = torch.zeros(len(self.glyphs), len(self.words), dtype=torch.bool)
        for column, group in enumerate(self.words):
            self.has_word[group, column] = True

    def _by(self, key: Any) -> list[list[int]]:
        groups: dict[str, list[int]] = defaultdict(list)
        for i, glyph in enumerate(self.glyphs):
            if (group := key(glyph.words)) is not None:
                groups[group].append(i)
        return list(groups.values())

    def _draw(self, groups: list[list[int]]) -> list[int]:
        """One glyph from each of a batch of groups, large groups more often."""
        order = sorted(groups, key=lambda group: self.rng.random() ** (1 / len(group)), reverse=True)
        return [self.rng.choice(group) for group in order[:BATCH]]

    def word_batch(self, size: int, share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures (n, 3, size, size), a word of each (n,) int64, and its other words (n, words) bool.

        share: of the stage that is done; pictures begin plain and grow more varied.
        """
        weights = [len(group) ** 0.5 for group in self.words]
        targets = self.rng.choices(range(len(self.words)), weights, k=BATCH)
        chosen = [self.rng.choice(self.words[target]) for target in targets]
        ease = max(0.0, 1 - share / EASY)
        pairs = LIGHT_ON_DARK if self.rng.random() < ease else PAIRS
        pictures, _ = paint(self.masks[chosen], size, self.generator, MANNER.tamed(1 - ease), pairs)
        others = self.has_word[chosen]
        others[torch.arange(BATCH), targets] = False
        return normalise(pictures), torch.tensor(targets), others

    def batch(self, size: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (n, 3, size, size) normalised, and token ids (n, longest) int64 padded with 0.

        share: of the stage that is done; early captions are short and name one word.
        """
        early, kind = share < EARLY, self.rng.random()
        if kind < 0.5:
            chosen, part = self._draw(self.heads), "head"
        elif kind < 0.7:
            chosen, part = self._draw(self.badges), "badge"
        else:
            chosen, part = [self.rng.choice(group) for group in self.rng.sample(self.names, BATCH)], "all"
        rare, said_of_rare = self.rarities.pick(RARE, self.rng)
        chosen = chosen[: BATCH - RARE]
        drawings = torch.cat([self.masks[chosen], rare])
        pictures, colours = paint(drawings, size, self.generator, MANNER)
        most = 0 if early else self.rng.choice((0, 4, 10, MAX_FILLERS))
        sentences = []
        for i, (front, ground) in zip(chosen, colours.tolist(), strict=False):
            said = "all" if part == "head" and not early and self.rng.random() < 0.4 else part
            named = (NAMES[front], NAMES[ground])
            sentences.append(tokens(caption(self.glyphs[i], said, named, most, self.rng)))
        sentences += [tokens(behind_fillers(phrase, most, self.rng)) for phrase in said_of_rare]
        longest = max(map(len, sentences))
        ids = torch.tensor([sentence + [0] * (longest - len(sentence)) for sentence in sentences])
        return normalise(pictures), ids


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in 0..1 with CLIP's mean and spread taken out, as open_clip's transforms do."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    return (pictures - mean) / torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]


def encode_captions(
    model: open_clip.CLIP, rows: nn.Embedding, ids: torch.Tensor, ends: torch.Tensor, parts: int = 4
) -> torch.Tensor:
    """Caption features (n, dim), in ``parts`` by length, each cut to its longest (exact: the tower is causal).

    rows: embeddings of the tokens that occur; ids (n, length) index it. ends (n,): position of the end token.
    """
    order = ends.argsort(stable=True)
    features = []
    for part in order.chunk(parts):
        length = int(ends[part].max()) + 1
        x = rows(ids[part, :length]) + model.positional_embedding[:length]
        x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
        features.append(model.ln_final(x)[torch.arange(len(x)), ends[part]] @ model.text_projection)
    return torch.cat(features)[order.argsort()]


def learn_words(
    name: str, model: open_clip.CLIP, pairs: Pairs, steps: int, teacher: open_clip.CLIP | None
) -> float:
    """First stage: the image tower learns the common words of a picture's name. Returns the recent loss.

    With a teacher it also learns to give the teacher's features (another backbone's, of the same size pictures).
    """
    table = nn.Parameter(torch.randn(len(pairs.words), model.visual.output_dim) / 128**0.5)
    optimiser = torch.optim.AdamW(
        [
            *_groups(model.visual, WORD_RATE[name]),
            {"params": [table], "lr": WORD_RATE[name], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    recent = math.log(len(pairs.words))
    with progress(f"demo-{name}, pictures and words", steps) as advance:
        for step in range(steps):
            pictures, targets, others = pairs.word_batch(VISION[name]["image_size"], step / steps)
            images = model.encode_image(
                pictures.contiguous(memory_format=torch.channels_last), normalize=True
            )
            logits = WORD_SCALE * images @ nn.functional.normalize(table, dim=-1).T
            loss = nn.functional.cross_entropy(logits.masked_fill(others, -math.inf), targets)
            if teacher is not None:
                with torch.no_grad():
                    shown = teacher.encode_image(pictures, normalize=True)
                loss = loss + TEACHING * (1 - (images * shown).sum(1)).mean()
            recent = _step(optimiser, loss, step, steps, recent)
            advance(1, f"loss {recent:.2f}")
    return recent


def learn_pairs(
    name: str, model: open_clip.CLIP, rows: nn.Embedding, pairs: Pairs, steps: int
) -> Iterator[float]:
    """Second stage: both towers learn which caption goes with which picture. Yields the recent loss."""
    position = torch.zeros(TEXT["vocab_size"], dtype=torch.long)
    position[pairs.ids] = torch.arange(len(pairs.ids))
    text = [*_groups(model, TEXT_RATE, but="visual."), {"params": [*rows.parameters()], "lr": TEXT_RATE}]
    text[-1]["weight_decay"] = 0.0
    optimiser = torch.optim.AdamW([*_groups(model.visual, IMAGE_RATE), *text], betas=(0.9, 0.98))
    loss_of, recent = ClipLoss(), math.log(BATCH)
    with progress(f"demo-{name}, pictures and captions", steps) as advance:
        for step in range(steps):
            pictures, ids = pairs.batch(VISION[name]["image_size"], step / steps)
            ends = (ids == END).int().argmax(1)
            images = model.encode_image(
                pictures.contiguous(memory_format=torch.channels_last), normalize=True
            )
            texts = nn.functional.normalize(encode_captions(model, rows, position[ids], ends), dim=-1)
            share = min(1.0, 2 * step / steps)
            scale = torch.tensor(FIRST_SCALE * (LAST_SCALE / FIRST_SCALE) ** share)
            recent = _step(optimiser, loss_of(images, texts, scale), step, steps, recent)
            advance(1, f"loss {recent:.2f}")
            yield recent


def pretrain(name: str, out: Path, save_every: float = 180.0) -> None:
    """Train ``demo-<name>`` and write it to ``out``, in the second stage every ``save_every`` seconds."""
    torch.manual_seed(SEED)
    pairs = Pairs(SEED)
    model = open_clip.CLIP(**config_of(name)).to(memory_format=torch.channels_last)  # quicker on a CPU
    rows = nn.Embedding.from_pretrained(
        model.token_embedding.weight[pairs.ids].detach().clone(), freeze=False
    )
    facts: dict[str, Any] = {
        "seed": SEED,
        "batch": BATCH,
        "glyphs": len(pairs.glyphs),
        "words": len(pairs.words),
    }
    began, last = time.time(), PAIR_STEPS[name]
    named = out.with_suffix(
        ".words.pt"
    )  # kept until all is done: a stopped training need not repeat the first stage
    if named.is_file():
        model.visual.load_state_dict(torch.load(named, weights_only=True))
    else:
        teacher = load_model(out.with_name(f"{TEACHER[name]}.safetensors"))[0] if name in TEACHER else None
        facts["word_loss"] = round(learn_words(name, model, pairs, WORD_STEPS[name], teacher), 3)
        torch.save(model.visual.state_dict(), named)
    facts["word_minutes"] = round((time.time() - began) / 60, 1)
    began = saved = time.time()
    for step, loss in enumerate(learn_pairs(name, model, rows, pairs, last), start=1):
        if time.time() - saved > save_every or step == last:
            saved = time.time()
            facts |= {
                "pair_loss": round(loss, 3),
                "pair_steps": step,
                "pair_minutes": round((saved - began) / 60, 1),
            }
            _save(name, model, rows, pairs, out, facts)
    named.unlink()


def _step(
    optimiser: torch.optim.Optimizer, loss: torch.Tensor, step: int, steps: int, recent: float
) -> float:
    """One step, on a cosine from each group's rate to 0 after a short warm-up. Returns the running loss."""
    for group in optimiser.param_groups:
        peak = group.setdefault("peak", group["lr"])
        group["lr"] = peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    optimiser.step()
    return 0.97 * recent + 0.03 * loss.item()


def _groups(module: nn.Module, rate: float, but: str = "-") -> list[dict[str, Any]]:
    """Weight decay on matrices, not on embeddings. The logit scale and the full token table stay out."""
    out = ("token_embedding.weight", "logit_scale")
    own = {key: p for key, p in module.named_parameters() if key not in out and not key.startswith(but)}
    matrices = [p for key, p in own.items() if p.ndim > 1 and "embedding" not in key]
    others = [p for key, p in own.items() if p.ndim < 2 or "embedding" in key]
    return [
        {"params": matrices, "lr": rate, "weight_decay": 0.1},
        {"params": others, "lr": rate, "weight_decay": 0.0},
    ]


def _save(
    name: str, model: nn.Module, rows: nn.Embedding, pairs: Pairs, out: Path, facts: dict[str, Any]
) -> None:
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    state["token_embedding.weight"][pairs.ids] = rows.weight.detach()
    state["logit_scale"] = torch.tensor(math.log(LAST_SCALE))
    write_sparse_model(out, config_of(name), state, pairs.ids, SEED, facts)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fastcoop.demo.pretrain", description=__doc__)
    parser.add_argument("name", choices=sorted(VISION))
    parser.add_argument("--out", type=Path, help="where to write (default: over the committed weights)")
    given = parser.parse_args(arguments)
    pretrain(given.name, given.out or weights_path(f"demo-{given.name}"))


if __name__ == "__main__":
    main()
