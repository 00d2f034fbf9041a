"""The plain way, for comparison: every prompt at the tower's full length, through the model's own modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def tiny_model(
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    layers: int = 3,
    quick_gelu: bool = False,
    width: int = 32,
    kind: str = "CLIP",
    **text_cfg: Any,
) -> nn.Module:
    """A small random open_clip CLIP with CLIP's own vocabulary; layer norms are randomised too.

    ``kind``: "CLIP", with its tower on the model, or "CustomTextCLIP", with it under ``.text``.
    """
    import open_clip.model

    torch.manual_seed(seed)
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": 4, "layers": layers}
    model = getattr(open_clip.model, kind)(
        embed_dim=24,
        vision_cfg={"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        text_cfg=text | text_cfg,
        quick_gelu=quick_gelu,
    )
    for name, parameter in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
        elif parameter.ndim == 2 and "embedding" not in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("gamma"):
            nn.init.normal_(parameter, mean=0.7, std=0.3)
    tower = getattr(model, "text", model)
    nn.init.normal_(tower.token_embedding.weight, std=0.5)
    nn.init.normal_(tower.positional_embedding, std=0.3)
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
    tower = getattr(model, "text", model)
    texts = [" ".join(["X"] * M) + " " + name + "." for name in names]
    tokens = tokenizer(texts, context_length=len(tower.positional_embedding))
    lengths = [int((tokenizer([name])[0] != 0).sum()) - 2 for name in names]
    embedded = tower.token_embedding(tokens)
    start, tail = embedded[:, :1], embedded[:, 1 + M :]
    before = {"end": M, "mid": M // 2, "front": 0}[class_position]
    rows = []
    for k, length in enumerate(lengths):
        cut = 0 if class_position == "end" else length
        rows.append(
            torch.cat([start[k], contexts[k, :before], tail[k, :cut], contexts[k, before:], tail[k, cut:]])
        )
    return _read(tower, torch.stack(rows), tokens)


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
    return _read(model, torch.stack(rows), tokens)


def _read(tower: Any, embedded: Tensor, tokens: Tensor) -> Tensor:
    """The tower's output (classes, dim) at the end of each row of ``embedded`` (classes, 77, width)."""
    x = embedded + tower.positional_embedding
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
    x = x[torch.arange(len(x)), tokens.argmax(-1)]
    if tower.text_projection is None:
        return x
    return (
        tower.text_projection(x)
        if isinstance(tower.text_projection, nn.Linear)
        else x @ tower.text_projection
    )
