"""The plain way, for comparison: every prompt at the tower's full length, through the model's own modules."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def tiny_model(
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    layers: int = 3,
    quick_gelu: bool = False,
    width: int = 32,
) -> nn.Module:
    """A small random open_clip CLIP with CLIP's own vocabulary; layer norms are randomised too."""
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    model = CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": width, "heads": 4, "layers": layers},
        quick_gelu=quick_gelu,
    )
    for name, parameter in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
        elif parameter.ndim == 2 and "embedding" not in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    nn.init.normal_(model.token_embedding.weight, std=0.5)
    nn.init.normal_(model.positional_embedding, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def reference_features(
    model: nn.Module,
    tokenizer,
    class_names: Sequence[str],
    contexts: Tensor,
    class_position: str,
) -> Tensor:
    """Class features (classes, dim) of one run, as the official code computes them: 77 tokens, nothing shared.

    ``contexts`` (M, width), or (classes, M, width) if class-specific.
    """
    names = [name.replace("_", " ") for name in class_names]
    M = contexts.shape[-2]
    if contexts.ndim == 2:
        contexts = contexts.expand(len(names), *contexts.shape)
    tokens = tokenizer([" ".join(["X"] * M) + " " + name + "." for name in names])
    lengths = [int((tokenizer([name])[0] != 0).sum()) - 2 for name in names]
    embedded = model.token_embedding(tokens)
    start, tail = embedded[:, :1], embedded[:, 1 + M :]
    before = {"end": M, "mid": M // 2, "front": 0}[class_position]
    rows = []
    for k, length in enumerate(lengths):
        cut = 0 if class_position == "end" else length
        rows.append(
            torch.cat([start[k], contexts[k, :before], tail[k, :cut], contexts[k, before:], tail[k, cut:]])
        )
    x = torch.stack(rows) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ model.text_projection


def reference_mixed_features(
    model: nn.Module, tokenizer, class_names: Sequence[str], contexts: Tensor, prompt: str
) -> Tensor:
    """The same of a prompt of words and vectors, such as "[V]x4 [CLASS], a type of pet.": written out with a
    placeholder for each vector, tokenised whole at 77 tokens, and the placeholders' embeddings replaced. For names
    whose last character does not merge with what follows.
    """
    placeholder = "X"  # one token, and no word of any name or prompt here
    written = re.sub(r"\[V\]x(\d+)", lambda found: " ".join([placeholder] * int(found[1])), prompt)
    names = [name.replace("_", " ") for name in class_names]
    tokens = tokenizer([written.replace("[CLASS]", name) for name in names])
    M = contexts.shape[-2]
    if contexts.ndim == 2:
        contexts = contexts.expand(len(names), *contexts.shape)
    places = tokens == tokenizer([placeholder])[0, 1]
    assert (places.sum(1) == M).all()
    rows = []
    for k in range(len(names)):
        vectors, learned = iter(contexts[k]), places[k].tolist()
        embedded = model.token_embedding(tokens[k])
        rows.append(torch.stack([next(vectors) if learned[i] else embedded[i] for i in range(len(embedded))]))
    x = torch.stack(rows) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ model.text_projection
