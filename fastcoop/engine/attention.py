"""Attention over a tree, and its backward pass, for many runs of the same tree at once.

A position's keys are two pieces: those that all bundles share (constants and trunk) and those of its own bundle of
paths. Scores against both go into one softmax, so nothing is approximated and nothing is merged afterwards.

Shapes: R runs, H heads, d = width / H, P bundles of T positions, Tq of which ask, S shared keys, B constant keys before
the bundle. Queries arrive scaled (the weights are folded).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcoop.engine.buffers import Buffers


@dataclass(eq=False)
class Saved:
    """What a part's backward pass reads: q, k, v, the shared keys and values and the attention probabilities.

    ``q`` (R, H, P, Tq, d), ``k`` and ``v`` (R, H, P, B + T, d), ``shared_k`` and ``shared_v`` (R, H, S, d),
    ``probabilities`` (R, H, P, Tq, S + B + T).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    shared_k: Tensor
    shared_v: Tensor
    probabilities: Tensor


def attend(saved: Saved, mask: Tensor, buffer: Buffers, out: Tensor) -> None:
    """Fill in ``saved.probabilities`` and write the outputs into ``out`` (R, H, P, Tq, d), contiguous.

    ``mask`` (P or 1, Tq, B + T) is added to the scores against the bundle's own keys.
    """
    q, k, v, probabilities = saved.q, saved.k, saved.v, saved.probabilities
    (R, H, P, T, d), S, K = q.shape, saved.shared_k.shape[2], k.shape[3]
    by_run, by_bundle = (R * H, P * T), (R * H * P, T)
    shared, own = buffer("scores, shared", *by_run, S), buffer("scores, own", *by_bundle, K)
    torch.bmm(q.view(*by_run, d), saved.shared_k.reshape(R * H, S, d).transpose(1, 2), out=shared)
    torch.bmm(q.view(*by_bundle, d), k.view(R * H * P, K, d).transpose(1, 2), out=own)
    own.view(R * H, P, T, K).add_(mask)
    scores = _side_by_side(shared, own, buffer("scores", *probabilities.shape))
    torch.softmax(scores, -1, out=probabilities)
    to_shared, to_own = (
        probabilities.view(*by_run, S + K)[..., :S],
        probabilities.view(*by_bundle, S + K)[..., S:],
    )
    torch.bmm(to_shared, saved.shared_v.reshape(R * H, S, d), out=out.view(*by_run, d))
    out.view(*by_bundle, d).baddbmm_(to_own, v.view(R * H * P, K, d))


def attend_backward(
    grad: Tensor,
    saved: Saved,
    buffer: Buffers,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_shared: tuple[Tensor, Tensor] | None,
) -> None:
    """Write the gradients of q, k and v; add those of the shared keys and values, unless nobody reads them.

    ``grad``, ``grad_q`` (R, H, P, Tq, d); ``grad_k``, ``grad_v`` (R, H, P, T, d), without the constants;
    ``grad_shared`` two (R, H, S, d). All contiguous.
    """
    q, k, v, probabilities = saved.q, saved.k, saved.v, saved.probabilities
    (R, H, P, T, d), S, K, own_keys = q.shape, saved.shared_k.shape[2], k.shape[3], grad_k.shape[3]
    by_run, by_bundle = (R * H, P * T), (R * H * P, T)
    grad_run, grad_bundle = grad.view(*by_run, d), grad.view(*by_bundle, d)

    shared, own = buffer("scores, shared", *by_run, S), buffer("scores, own", *by_bundle, K)
    torch.bmm(grad_run, saved.shared_v.reshape(R * H, S, d).transpose(1, 2), out=shared)
    torch.bmm(grad_bundle, v.view(R * H * P, K, d).transpose(1, 2), out=own)
    of_probabilities = _side_by_side(shared, own, buffer("scores", *probabilities.shape))
    scores = buffer("scores' gradient", *probabilities.shape)
    softmax_backward(of_probabilities, probabilities, scores)

    scores_shared, scores_bundle = scores.view(*by_run, S + K)[..., :S], scores.view(*by_bundle, S + K)
    probs_bundle, q_bundle = probabilities.view(*by_bundle, S + K), q.view(*by_bundle, d)
    torch.bmm(scores_shared, saved.shared_k.reshape(R * H, S, d), out=grad_q.view(*by_run, d))
    grad_q.view(*by_bundle, d).baddbmm_(scores_bundle[..., S:], k.view(R * H * P, K, d))
    of_keys = (R * H * P, own_keys, d)
    torch.bmm(scores_bundle[..., -own_keys:].transpose(1, 2), q_bundle, out=grad_k.view(of_keys))
    torch.bmm(probs_bundle[..., -own_keys:].transpose(1, 2), grad_bundle, out=grad_v.view(of_keys))
    if grad_shared is not None:
        grad_shared_k, grad_shared_v = (shared.view(R * H, S, d) for shared in grad_shared)
        probs_shared = probabilities.view(*by_run, S + K)[..., :S]
        grad_shared_k.baddbmm_(scores_shared.transpose(1, 2), q.view(*by_run, d))
        grad_shared_v.baddbmm_(probs_shared.transpose(1, 2), grad_run)


def softmax_backward(grad: Tensor, probabilities: Tensor, out: Tensor) -> None:
    """Write the gradient of the scores behind ``probabilities`` (softmax over the last axis) into ``out``."""
    fused = getattr(torch, "_softmax_backward_data", None)  # private to torch, in one pass
    if fused is not None:
        fused(grad, probabilities, -1, probabilities.dtype, grad_input=out)
    else:
        torch.mul(grad, probabilities, out=out)
        out.addcmul_(probabilities, out.sum(-1, keepdim=True), value=-1)


def _side_by_side(shared: Tensor, own: Tensor, out: Tensor) -> Tensor:
    """Both pieces of scores, in ``out`` (R, H, P, Tq, S + B + T), for one softmax."""
    pieces = [piece.view(*out.shape[:-1], piece.shape[-1]) for piece in (shared, own)]
    return torch.cat(pieces, -1, out=out)
