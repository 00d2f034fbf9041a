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


@dataclass
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


def attend(
    q: Tensor, k: Tensor, v: Tensor, shared_k: Tensor, shared_v: Tensor, mask: Tensor, out: Tensor
) -> Saved:
    """Write the outputs into ``out`` (R, H, P, Tq, d), contiguous; return what ``attend_backward`` reads.

    ``mask`` (P or 1, Tq, B + T) is added to the scores against the bundle's own keys. For the others see ``Saved``.
    """
    R, H, P, T, d = q.shape
    S, K = shared_k.shape[2], k.shape[3]
    shared = torch.bmm(q.reshape(R * H, P * T, d), shared_k.reshape(R * H, S, d).transpose(1, 2))
    own = torch.bmm(q.reshape(R * H * P, T, d), k.reshape(R * H * P, K, d).transpose(1, 2)).view(
        R, H, P, T, K
    )
    own += mask
    probabilities = torch.softmax(torch.cat([shared.view(R, H, P, T, S), own], -1), -1)
    by_run, by_bundle = (R * H, P * T), (R * H * P, T)
    torch.bmm(
        probabilities.view(*by_run, S + K)[..., :S], shared_v.reshape(R * H, S, d), out=out.view(*by_run, d)
    )
    out.view(*by_bundle, d).baddbmm_(
        probabilities.view(*by_bundle, S + K)[..., S:], v.reshape(R * H * P, K, d)
    )
    return Saved(q, k, v, shared_k, shared_v, probabilities)


def attend_backward(
    grad: Tensor,
    saved: Saved,
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
    R, H, P, T, d = q.shape
    S, K, own_keys = saved.shared_k.shape[2], k.shape[3], grad_k.shape[3]
    by_run, by_bundle = (R * H, P * T), (R * H * P, T)
    grad_run, grad_bundle = grad.reshape(*by_run, d), grad.reshape(*by_bundle, d)

    shared = torch.bmm(grad_run, saved.shared_v.reshape(R * H, S, d).transpose(1, 2)).view(R, H, P, T, S)
    own = torch.bmm(grad_bundle, v.reshape(R * H * P, K, d).transpose(1, 2)).view(R, H, P, T, K)
    scores = torch._softmax_backward_data(
        torch.cat([shared, own], -1), probabilities, -1, probabilities.dtype
    )

    scores_run, scores_bundle = scores.view(*by_run, S + K), scores.view(*by_bundle, S + K)
    probs_run, probs_bundle = probabilities.view(*by_run, S + K), probabilities.view(*by_bundle, S + K)
    q_run, q_bundle = q.reshape(*by_run, d), q.reshape(*by_bundle, d)
    torch.bmm(scores_run[..., :S], saved.shared_k.reshape(R * H, S, d), out=grad_q.view(*by_run, d))
    grad_q.view(*by_bundle, d).baddbmm_(scores_bundle[..., S:], k.reshape(R * H * P, K, d))
    of_keys = (R * H * P, own_keys, d)
    torch.bmm(scores_bundle[..., -own_keys:].transpose(1, 2), q_bundle, out=grad_k.view(of_keys))
    torch.bmm(probs_bundle[..., -own_keys:].transpose(1, 2), grad_bundle, out=grad_v.view(of_keys))
    if grad_shared is not None:
        grad_shared_k, grad_shared_v = (shared.view(R * H, S, d) for shared in grad_shared)
        grad_shared_k.baddbmm_(scores_run[..., :S].transpose(1, 2), q_run)
        grad_shared_v.baddbmm_(probs_run[..., :S].transpose(1, 2), grad_run)
