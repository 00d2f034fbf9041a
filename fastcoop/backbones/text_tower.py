"""The parts of a CLIP text tower, read from an open_clip model, or the reason why it cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from open_clip.transformer import LayerScale, QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from fastcoop.errors import UserError

END_POOLS = ("argmax", "eos")
CLS_TOKEN = "its output is read at an appended class token, not at the end token"
NOT_CAUSAL = "its attention is not causal"
NOT_OPEN_CLIPS = "it is not one of open_clip's own text transformers"
READ_ELSEWHERE = 'its output is read at "{}", not at the end token'
# Options of open_clip's text_cfg that make its blocks another kind, which the engine does not compute.
OTHER_BLOCKS = (
    *("block_type", "qk_norm", "scaled_cosine_attn"),
    *("scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"),
)


@dataclass(frozen=True, eq=False)
class Block:
    """One pre-norm residual block: ``x + out(attend(qkv(ln_1 x)))``, then ``x + proj(act(fc(ln_2 x)))``.

    Weights are (out, in), as in ``torch.nn.Linear``; LayerScale's ``scale_1`` and ``scale_2`` (width,) multiply the two
    branches, or are None.
    """

    ln_1: nn.LayerNorm
    ln_2: nn.LayerNorm
    qkv_weight: Tensor
    qkv_bias: Tensor
    out: nn.Linear
    fc: nn.Linear
    proj: nn.Linear
    scale_1: Tensor | None
    scale_2: Tensor | None


@dataclass(frozen=True, eq=False)
class TextTower:
    """A frozen causal text transformer whose output is read at the end token.

    All tensors are the model's own, in its dtype and on its device.
    """

    token_embedding: Tensor  # (vocabulary, width)
    positional_embedding: Tensor  # (context_length, width)
    blocks: tuple[Block, ...]
    ln_final: nn.LayerNorm  # after the last block
    projection: Tensor | None  # (width, dim)
    projection_bias: Tensor | None  # (dim,)
    heads: int  # attention heads of a block
    activation: str  # "gelu", "gelu_tanh" or "quick_gelu"
    end_id: int | None = None  # the token that the output is read at; None: the largest of a text

    @property
    def width(self) -> int:
        """Size of a context vector."""
        return self.token_embedding.shape[1]

    @property
    def context_length(self) -> int:
        """Positions the tower has, 77 for CLIP."""
        return self.positional_embedding.shape[0]

    @property
    def dim(self) -> int:
        """Size of a projected text feature."""
        return self.width if self.projection is None else self.projection.shape[1]

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.token_embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.token_embedding.device

    @classmethod
    def from_model(cls, model: nn.Module) -> TextTower:
        """Read the tower of an open_clip ``CLIP`` (tower on the model) or ``CustomTextCLIP`` (under ``.text``).

        Raises:
            UserError: Prompt learning cannot compute the tower exactly: it is not causal, is not read at the end
                token, or is built from other blocks.
        """
        text: Any = getattr(model, "text", model)
        if not hasattr(text, "token_embedding") or not hasattr(text, "transformer"):
            raise _refused(NOT_OPEN_CLIPS)
        blocks = text.transformer.resblocks
        pool = str(getattr(text, "pool_type", None) or getattr(text, "text_pool_type", "argmax"))
        mask = getattr(text, "attn_mask", None)
        norms = [text.ln_final, *(norm for block in blocks for norm in (block.ln_1, block.ln_2))]
        _refuse(
            (pool not in END_POOLS, READ_ELSEWHERE.format(pool)),
            (getattr(text, "cls_emb", None) is not None, CLS_TOKEN),
            (mask is None or not torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1)), NOT_CAUSAL),
            (not len(blocks), "it has no layers"),
            (
                any(norm.weight is None or norm.bias is None for norm in norms),
                "its layer norms have no weight or no bias",
            ),
        )
        for block in blocks:
            if type(block) is not ResidualAttentionBlock or block.attn.in_proj_weight is None:
                kind = type(block).__name__
                raise _refused(f"its blocks are {kind}, not open_clip's ResidualAttentionBlock")
        projection: Any = text.text_projection
        bias = None
        if isinstance(projection, nn.Linear):
            projection, bias = projection.weight.t(), projection.bias
        end_id: Any = getattr(text, "eos_id" if hasattr(text, "eos_id") else "text_eos_id", None)
        return cls(
            text.token_embedding.weight, text.positional_embedding, tuple(map(_block, blocks)), text.ln_final,
            projection, bias, blocks[0].attn.num_heads, _activation(blocks[0].mlp.gelu),
            int(end_id) if pool == "eos" else None,
        )  # fmt: skip


def refuse_config(config: Mapping[str, Any]) -> None:
    """Refuse an open_clip model config whose tower `TextTower.from_model` would refuse, before it is built."""
    text = config["text_cfg"]
    pool = text.get("pool_type", "argmax")
    other = next((option for option in OTHER_BLOCKS if text.get(option)), None)
    _refuse(
        (text.get("hf_model_name"), f"{NOT_OPEN_CLIPS} but {text.get('hf_model_name')}"),
        (text.get("embed_cls"), CLS_TOKEN),
        (config.get("multimodal_cfg"), "it belongs to a model that also writes captions (CoCa)"),
        (text.get("no_causal_mask"), NOT_CAUSAL),
        (pool not in END_POOLS, READ_ELSEWHERE.format(pool)),
        (other and text.get("block_type") != "default", f"its blocks are not the standard ones ({other})"),
    )


def _refuse(*cases: tuple[Any, str]) -> None:
    """Raise the reason of the first case whose condition holds."""
    for condition, reason in cases:
        if condition:
            raise _refused(reason)


def _refused(reason: str) -> UserError:
    return UserError(
        f"This text tower cannot be used for prompt learning: {reason}. "
        "Choose a CLIP whose text tower is causal and read at the end token, such as RN50 or ViT-B-16."
    )


def _block(block: ResidualAttentionBlock) -> Block:
    scales = (s.gamma if isinstance(s, LayerScale) else None for s in (block.ls_1, block.ls_2))
    attn = block.attn
    return Block(
        block.ln_1, block.ln_2, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj,
        block.mlp.c_fc, block.mlp.c_proj, *scales,
    )  # fmt: skip


def _activation(module: nn.Module) -> str:
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU) and module.approximate in ("none", "tanh"):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    raise _refused(f"its activation is {type(module).__name__}, not GELU or QuickGELU")
