"""The frozen tower's weights, with everything foldable folded into its matrices.

Exact rewritings, so that a step does less per node:
- a layer norm's affine goes into the matrix behind it: (x * g + b) W' = x (g W)' + b W';
- the attention's 1 / sqrt(d) goes into the query rows;
- QuickGELU(x) = x sigmoid(1.702 x) = silu(1.702 x) / 1.702, the factors going into the matrices around it;
- LayerScale goes into the matrix before it;
- the bias behind a layer norm goes into its matrix too (``_absorb``): a product alone is cheaper than one onto a bias.
Matrices are stored (in, out), so that forward is ``x @ w`` and backward ``g @ w.T``, both as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcoop.backbones.text_tower import Block, TextTower
from fastcoop.engine.precision import own_precision

QUICK = 1.702
LIFT = 0.25  # added to every number of a normal row; small beside them, for bfloat16's sake


@dataclass(frozen=True, eq=False)
class FoldedBlock:
    """``qkv`` (width, 3 width), ``out`` (width, width), ``fc`` (width, hidden), ``proj`` (hidden, width).

    ``qkv`` and ``fc`` have the layer norm before them and their bias folded in, the other two have their biases beside.
    """

    qkv: Tensor
    out: Tensor
    out_bias: Tensor
    fc: Tensor
    proj: Tensor
    proj_bias: Tensor
    eps_1: float
    eps_2: float


@dataclass(frozen=True, eq=False)
class FoldedTower:
    """A text tower ready for the engine; ``projection`` (width, dim) has the final layer norm and its bias folded in.

    ``gain`` and ``shift`` (width,) are all that is left of every layer norm's affine: ones and LIFT.
    """

    blocks: tuple[FoldedBlock, ...]
    token_embedding: Tensor
    positional_embedding: Tensor
    projection: Tensor
    gain: Tensor
    shift: Tensor
    eps_final: float
    heads: int
    activation: str  # "silu", "gelu" or "gelu_tanh"

    @property
    def width(self) -> int:
        return self.token_embedding.shape[1]

    @property
    def hidden(self) -> int:
        return self.blocks[0].fc.shape[1]

    @property
    def dim(self) -> int:
        return self.projection.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.dtype

    @property
    def device(self) -> torch.device:
        return self.projection.device

    def layer_norm(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Normal rows of ``x`` (..., width), lifted; their means and reciprocal deviations (..., 1).

        Only with a gain, even of ones, is a CPU's layer norm vectorised.
        """
        return torch.native_layer_norm(x, x.shape[-1:], self.gain, self.shift, eps)


@torch.no_grad()
@own_precision
def fold(tower: TextTower, dtype: torch.dtype | None = None) -> FoldedTower:
    """Fold ``tower`` for the engine. Folding is done in float64 and rounded once, to ``dtype`` (the tower's own)."""
    to = dtype or tower.dtype
    quick = tower.activation == "quick_gelu"
    identity = torch.eye(tower.width, device=tower.device, dtype=torch.float64)
    projection = identity if tower.projection is None else tower.projection.double()
    gain, shift = tower.ln_final.weight.double(), tower.ln_final.bias.double()
    bias = shift @ projection
    if tower.projection_bias is not None:
        bias = bias + tower.projection_bias.double()
    return FoldedTower(
        blocks=tuple(_fold_block(block, tower.heads, quick, to) for block in tower.blocks),
        token_embedding=tower.token_embedding.detach().to(to),
        positional_embedding=tower.positional_embedding.detach().to(to),
        projection=_absorb(gain[:, None] * projection, bias).to(to).contiguous(),
        gain=torch.ones(tower.width, dtype=to, device=tower.device),
        shift=torch.full((tower.width,), LIFT, dtype=to, device=tower.device),
        eps_final=tower.ln_final.eps,
        heads=tower.heads,
        activation="silu" if quick else tower.activation,
    )


def _fold_block(block: Block, heads: int, quick: bool, to: torch.dtype) -> FoldedBlock:
    width = block.out.weight.shape[0]
    qkv, qkv_bias = block.qkv_weight.double().t(), block.qkv_bias.double()
    out, out_bias = block.out.weight.double().t(), block.out.bias.double()
    fc, fc_bias = block.fc.weight.double().t(), block.fc.bias.double()
    proj, proj_bias = block.proj.weight.double().t(), block.proj.bias.double()

    qkv_bias = qkv_bias + block.ln_1.bias.double() @ qkv
    qkv = block.ln_1.weight.double()[:, None] * qkv
    query = torch.ones_like(qkv_bias)
    query[:width] = (width // heads) ** -0.5
    qkv, qkv_bias = qkv * query, qkv_bias * query

    fc_bias = fc_bias + block.ln_2.bias.double() @ fc
    fc = block.ln_2.weight.double()[:, None] * fc
    if quick:
        fc, fc_bias, proj = fc * QUICK, fc_bias * QUICK, proj / QUICK
    if block.scale_1 is not None:
        out, out_bias = out * block.scale_1.double(), out_bias * block.scale_1.double()
    if block.scale_2 is not None:
        proj, proj_bias = proj * block.scale_2.double(), proj_bias * block.scale_2.double()

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(to).contiguous()

    return FoldedBlock(
        qkv=rounded(_absorb(qkv, qkv_bias)),
        out=rounded(out),
        out_bias=rounded(out_bias),
        fc=rounded(_absorb(fc, fc_bias)),
        proj=rounded(proj),
        proj_bias=rounded(proj_bias),
        eps_1=block.ln_1.eps,
        eps_2=block.ln_2.eps,
    )


def _absorb(matrix: Tensor, bias: Tensor) -> Tensor:
    """The matrix that gives ``x @ matrix + bias`` for a lifted normal row: ``(x + LIFT) @ result``.

    A normal row sums to zero, so what all entries of a column have in common does nothing to it. What they had is taken
    away, so that LIFT adds nothing; what they are given instead makes LIFT add the bias.
    """
    return matrix - matrix.mean(0) + bias / (LIFT * len(matrix))
