"""Text towers of open_clip models: causal ones in parts, all others as they are.

Prompts of a `TextTower` share what they have in common; a `PlainTower` computes all positions of all prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastcoop.backbones.late import open_clip
from fastcoop.backbones.planned import PromptPath
from fastcoop.errors import UserError

END_POOLS = ("argmax", "eos")
NOT_OPEN_CLIPS = "it is not one of open_clip's own text transformers"
NO_TABLE = "its text tower has no table of word embeddings"


class NotSharedError(Exception):
    """Why prompts of a text tower cannot share what they have in common."""


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

    is_shared: ClassVar[bool] = True  # whether prompts share what they have in common
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
    def hidden(self) -> int:
        """Size of the hidden layer of a block's MLP."""
        return self.blocks[0].fc.weight.shape[0]

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

    @property
    def vocabulary(self) -> int:
        """Number of token embeddings."""
        return len(self.token_embedding)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @classmethod
    def from_model(cls, model: nn.Module) -> TextTower:
        """Read the tower of an open_clip ``CLIP`` (tower on the model) or ``CustomTextCLIP`` (under ``.text``);
        raise NotSharedError where it is not causal, is not read at the end token, or is built from other blocks."""
        text: Any = getattr(model, "text", model)
        if not hasattr(text, "token_embedding") or not hasattr(text, "transformer"):
            raise NotSharedError(NOT_OPEN_CLIPS)
        blocks = text.transformer.resblocks
        pool = str(getattr(text, "pool_type", None) or getattr(text, "text_pool_type", "argmax"))
        mask = getattr(text, "attn_mask", None)
        norms = [text.ln_final, *(norm for block in blocks for norm in (block.ln_1, block.ln_2))]
        if getattr(text, "cls_emb", None) is not None:
            raise NotSharedError("its output is read at an appended class token, not at the end token")
        if mask is None or not (mask.is_meta or mask.equal(torch.full_like(mask, -torch.inf).triu(1))):
            raise NotSharedError("its attention is not causal")
        if pool not in END_POOLS:
            raise NotSharedError(f'its output is read at "{pool}", not at the end token')
        if not len(blocks):
            raise NotSharedError("it has no layers")
        if any(norm.weight is None or norm.bias is None for norm in norms):
            raise NotSharedError("its layer norms have no weight or no bias")
        for block in blocks:
            is_known = type(block) is open_clip.transformer.ResidualAttentionBlock
            if not is_known or block.attn.in_proj_weight is None:
                kind = type(block).__name__
                raise NotSharedError(f"its blocks are {kind}, not open_clip's ResidualAttentionBlock")
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


@dataclass(frozen=True, eq=False)
class PlainTower:
    """A frozen text tower of any kind, computed by the model's own modules with its embedding step replaced."""

    is_shared: ClassVar[bool] = False
    model: nn.Module  # without its image tower
    embedding: nn.Module | None  # token ids to vectors
    context_length: int  # positions of a prompt
    layers: int  # blocks
    heads: int | None  # attention heads of a block, where known
    dim: int  # size of a projected text feature
    # Padding that its mask hides: prompts are as long as the longest; None: padding is read.
    pad_id: int | None

    @classmethod
    def from_model(cls, model: nn.Module, context_length: int | None = None) -> PlainTower:
        """Return the tower of an open_clip model; ``context_length`` is its tokenizer's, by default its own."""
        text: Any = getattr(model, "text", model)
        alone, others = copy.copy(model), ("visual", "text_decoder")
        alone._modules = {name: part for name, part in model._modules.items() if name not in others}
        is_hf = isinstance(text, open_clip.hf_model.HFTextEncoder)
        blocks: Any = next((part for part in alone.modules() if isinstance(part, nn.ModuleList)), ())
        found = (part.num_heads for part in alone.modules() if isinstance(part, nn.MultiheadAttention))
        if is_hf:
            names = ("num_attention_heads", "num_heads", "encoder_attention_heads")
            found = (getattr(text.config, name) for name in names if hasattr(text.config, name))
        heads = next(found, None)
        projection: Any = getattr(text, "text_projection", text)
        if projection is None:  # open_clip's towers without one put out their width
            dim = text.token_embedding.weight.shape[1]
        elif isinstance(projection, nn.Linear):
            dim = projection.out_features
        else:
            dim = int(text.output_dim if projection is text else projection.shape[1])
        length: Any = context_length or model.context_length
        # A Hugging Face tower gets a mask of the padding, and its pooling leaves it out.
        pad_id = text.config.pad_token_id if is_hf else None
        return cls(alone, _embedding(text), length, len(blocks), heads, dim, pad_id)

    @property
    def token_embedding(self) -> Tensor:
        """The words' vectors (vocabulary, width), before any scale that the tower applies to them."""
        table = _table(self.embedding)
        if table is None:
            raise UserError(
                f"This backbone cannot learn prompts: {NO_TABLE}. Use zero-shot, a linear probe or an adapter with it."
            )
        return table

    @property
    def vocabulary(self) -> int | None:
        """Number of token embeddings; None without a table of them."""
        table = _table(self.embedding)
        return None if table is None else len(table)

    @property
    def width(self) -> int:
        """Size of a context vector."""
        return self.token_embedding.shape[1]

    @cached_property
    def dtype(self) -> torch.dtype:
        return next(weight.dtype for weight in self.model.parameters() if weight.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def map(self, function: Callable[[Tensor], Tensor]) -> PlainTower:
        """Return a copy of the tower with ``function`` applied to every tensor."""
        model = copy.deepcopy(self.model)._apply(function)
        return replace(self, model=model, embedding=_embedding(getattr(model, "text", model)))

    def encode(self, ids: Tensor) -> Tensor:
        """Return the features (n, dim), not normalized, of token ids (n, positions)."""
        model: Any = self.model
        features: Tensor = model.encode_text(ids, normalize=False)  # CoCa's are normalized by default
        return features

    def embed(self, vectors: Tensor) -> Tensor:
        """Return context vectors (n, width) as the embedding step puts them out: some towers scale words."""
        if self.embedding is None or type(self.embedding) is nn.Embedding:
            return vectors
        # As rows of its table, behind the row of padding, which has no gradient.
        first = (getattr(self.embedding, "padding_idx", None) or 0) + 1
        table = torch.cat([vectors.new_zeros(first, vectors.shape[1]), vectors])
        rows = torch.arange(first, len(table), device=vectors.device)
        embedded: Tensor = torch.func.functional_call(self.embedding, {"weight": table}, (rows,))
        return embedded

    def encode_embedded(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Return the features of prompts whose embedding step puts out ``embedded`` (n, positions, width); ``ids``
        (n, positions) say where padding and the end are."""
        assert self.embedding is not None
        hook = self.embedding.register_forward_hook(lambda module, given, words: embedded)
        try:
            return self.encode(ids)
        finally:
            hook.remove()


def text_tower(model: nn.Module, context_length: int | None = None) -> TextTower | PlainTower:
    """Return the text tower of an open_clip model: in parts if it is causal and read at its end token."""
    try:
        return TextTower.from_model(model)
    except NotSharedError:
        return PlainTower.from_model(model, context_length)


def prompt_path(model: nn.Module) -> PromptPath:
    """Return how an open_clip model learns prompts."""
    try:
        TextTower.from_model(model)
    except NotSharedError as reason:
        if PlainTower.from_model(model).vocabulary is None:
            return PromptPath(None, NO_TABLE)
        return PromptPath("plain", str(reason))
    return PromptPath("shared")


def _embedding(text: Any) -> nn.Module | None:
    """Return the module that turns token ids into vectors; None if there is none."""
    found = getattr(text, "token_embedding", None)
    if found is None and isinstance(text, open_clip.hf_model.HFTextEncoder):
        try:
            found = text.transformer.get_input_embeddings()
        except NotImplementedError:  # transformers' models of characters or bytes
            return None
    return found if isinstance(found, nn.Module) else None


def _table(embedding: nn.Module | None) -> Tensor | None:
    """Return the weight (vocabulary, width) of an embedding step; None if it has none."""
    weight = getattr(embedding, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _block(block: Any) -> Block:
    scaled, attn = open_clip.transformer.LayerScale, block.attn
    scales = (one.gamma if isinstance(one, scaled) else None for one in (block.ls_1, block.ls_2))
    return Block(
        block.ln_1, block.ln_2, attn.in_proj_weight, attn.in_proj_bias, attn.out_proj,
        block.mlp.c_fc, block.mlp.c_proj, *scales,
    )  # fmt: skip


def _activation(module: nn.Module) -> str:
    if isinstance(module, open_clip.transformer.QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU) and module.approximate in ("none", "tanh"):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    raise NotSharedError(f"its activation is {type(module).__name__}, not GELU or QuickGELU")
