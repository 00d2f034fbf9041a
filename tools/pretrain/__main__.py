"""Pretrain the demo's backbones from scratch: ``python -m tools.pretrain resnet`` (then ``vit``).

In three stages. The image tower first learns to name pictures by single words, since two small towers started
together from nothing stay at chance for very long; then both learn contrastively from (icon, caption) pairs, with
open_clip's loss; then the text tower goes on alone, since it is the slower one to learn.

No glyph of the demo's test sets, nor any near-duplicate of one, is ever shown. The model card says what comes out.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.loss import ClipLoss
from torch import nn

from fastcoop.backbones.load import EMBEDDED_WEIGHTS
from fastcoop.backbones.weights import read_weights
from fastcoop.progress import progress
from tools.pretrain.captions import END, VECTOR
from tools.pretrain.pairs import BATCH, Pairs
from tools.pretrain.sparse import write_sparse_model

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4}
VISION: dict[str, dict[str, Any]] = {
    "resnet": {"image_size": 32, "layers": [2, 2, 2, 2], "width": 16, "head_width": 64},
    "vit": {"image_size": 32, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
}
WORD_STEPS = {"resnet": 2000, "vit": 2400}  # of the image tower alone
PAIR_STEPS = {"resnet": 1400, "vit": 1400}  # of both towers
TEXT_STEPS = 1000  # of the text tower alone
WORD_RATE = {"resnet": 3e-3, "vit": 1e-3}
TEXT_RATE, IMAGE_RATE, LAST_RATE = 1.5e-3, 3e-4, 7e-4  # in the second stage, and of the third
TEACHER = {
    "vit": "demo-resnet"
}  # a transformer image tower alone hardly starts to learn in the time there is
TEACHING = 8.0  # weight of the teacher's lesson
WORD_SCALE = 20.0  # of the logits, in the first stage
FIRST_SCALE, LAST_SCALE = 30.0, 100.0  # in the second: rises over the first half, CLIP's own after that
VECTOR_SPREAD = (0.01, 0.05)  # of random vectors in captions; contexts start at 0.02 and grow
SEED = 0


def config_of(name: str) -> dict[str, Any]:
    """The open_clip config of a demo backbone."""
    return {"embed_dim": 128, "vision_cfg": VISION[name], "text_cfg": TEXT}


def load_model(path: Path) -> open_clip.CLIP:
    """A backbone from a sparse model file: float32, in evaluation mode."""
    weights = read_weights(path)
    assert weights.config is not None
    model = open_clip.CLIP(**weights.config)
    model.load_state_dict(weights.state)
    return model.eval()


def encode_captions(
    model: open_clip.CLIP, rows: nn.Embedding, ids: torch.Tensor, ends: torch.Tensor, parts: int = 4
) -> torch.Tensor:
    """Caption features (n, dim), in ``parts`` by length, each cut to its longest (exact: the tower is causal).

    rows: embeddings of the tokens that occur; ids (n, length) index it, and -1 is a random vector. ends (n,):
    position of the end token.
    """
    order = ends.argsort(stable=True)
    features = []
    for part in order.chunk(parts):
        length = int(ends[part].max()) + 1
        spread = torch.empty(len(part), 1, 1).uniform_(*VECTOR_SPREAD)
        learned = ids[part, :length, None] < 0
        x = torch.where(
            learned, spread * torch.randn(len(part), length, 128), rows(ids[part, :length].clamp(min=0))
        )
        x = x + model.positional_embedding[:length]
        x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
        features.append(model.ln_final(x)[torch.arange(len(x)), ends[part]] @ model.text_projection)
    return torch.cat(features)[order.argsort()]


def learn_words(
    name: str, model: open_clip.CLIP, pairs: Pairs, steps: int, teacher: open_clip.CLIP | None
) -> float:
    """First stage: the image tower learns the common words of a picture's name. Returns the recent loss.

    With a teacher it also learns to give the teacher's features (another backbone's, of the same size pictures),
    as they differ from their mean: most of a feature is the same for all pictures.
    """
    table = nn.Parameter(torch.randn(pairs.word_count, model.visual.output_dim) / 128**0.5)
    optimizer = torch.optim.AdamW(
        [
            *_groups(model.visual, WORD_RATE[name]),
            {"params": [table], "lr": WORD_RATE[name], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    recent = math.log(len(pairs.words))
    mean = None
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
                    here = shown.mean(0)
                    mean = here if mean is None else mean.lerp(here, 0.05)
                alike = nn.functional.cosine_similarity(images - mean, shown - mean)
                loss = loss + TEACHING * (1 - alike).mean()
            recent = _step(optimizer, loss, step, steps, recent)
            advance(1, f"loss {recent:.2f}")
    return recent


def learn_pairs(
    name: str, model: open_clip.CLIP, rows: nn.Embedding, pairs: Pairs, steps: int, both: bool
) -> float:
    """Second stage: both towers learn which caption goes with which picture. Third: the text tower alone does.

    Returns the recent loss.
    """
    position = torch.full((TEXT["vocab_size"],), -1)
    position[pairs.ids] = torch.arange(len(pairs.ids))
    position[VECTOR] = -1
    rate = TEXT_RATE if both else LAST_RATE
    groups = [
        *_groups(model, rate, but="visual."),
        {"params": [*rows.parameters()], "lr": rate, "weight_decay": 0.0},
        *(_groups(model.visual, IMAGE_RATE) if both else ()),
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    model.visual.train(both)
    loss_of, recent = ClipLoss(), math.log(BATCH)
    with progress(f"demo-{name}, {'pictures and captions' if both else 'captions'}", steps) as advance:
        for step in range(steps):
            share = step / steps if both else 1.0
            pictures, ids = pairs.batch(VISION[name]["image_size"], share)
            ends = (ids == END).int().argmax(1)
            with torch.set_grad_enabled(both):
                pictures = pictures.contiguous(memory_format=torch.channels_last)
                images = model.encode_image(pictures, normalize=True)
            texts = nn.functional.normalize(encode_captions(model, rows, position[ids], ends), dim=-1)
            scale = torch.tensor(FIRST_SCALE * (LAST_SCALE / FIRST_SCALE) ** min(1.0, 2 * share))
            recent = _step(optimizer, loss_of(images, texts, scale), step, steps, recent)
            advance(1, f"loss {recent:.2f}")
    return recent


def pretrain(name: str, out: Path) -> None:
    """Train ``demo-<name>`` and write it to ``out``. A stopped training goes on after its last finished stage."""
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

    def words() -> float:
        teacher = load_model(out.with_name(f"{TEACHER[name]}.safetensors")) if name in TEACHER else None
        return learn_words(name, model, pairs, WORD_STEPS[name], teacher)

    stages = {
        "words": words,
        "pairs": lambda: learn_pairs(name, model, rows, pairs, PAIR_STEPS[name], both=True),
        "text": lambda: learn_pairs(name, model, rows, pairs, TEXT_STEPS, both=False),
    }
    kept = out.with_suffix(".unfinished.pt")
    if kept.is_file():
        before = torch.load(kept, weights_only=True)
        model.load_state_dict(before["model"])
        rows.load_state_dict(before["rows"])
        facts = before["facts"]
    for number, (stage, learn) in enumerate(stages.items(), start=1):
        if f"{stage}_loss" in facts:
            continue
        pairs.reseed(SEED + number)
        began = time.time()
        facts[f"{stage}_loss"] = round(learn(), 3)
        facts[f"{stage}_minutes"] = round((time.time() - began) / 60, 1)
        torch.save({"model": model.state_dict(), "rows": rows.state_dict(), "facts": facts}, kept)
    _save(name, model, rows, pairs, out, facts)
    kept.unlink()


def _step(
    optimizer: torch.optim.Optimizer, loss: torch.Tensor, step: int, steps: int, recent: float
) -> float:
    """One step, on a cosine from each group's rate to 0 after a short warm-up. Returns the running loss."""
    for group in optimizer.param_groups:
        peak = group.setdefault("peak", group["lr"])
        group["lr"] = peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
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
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain", description=__doc__)
    parser.add_argument("name", choices=sorted(VISION))
    parser.add_argument("--out", type=Path, help="where to write (default: over the committed weights)")
    given = parser.parse_args(arguments)
    pretrain(given.name, given.out or EMBEDDED_WEIGHTS / f"demo-{given.name}.safetensors")


if __name__ == "__main__":
    main()
