"""Attention over a tree, and its backward pass, for many runs of the same tree at once.

A position's keys are two pieces: those that all bundles share (constants and trunk) and those of its own bundle of
paths. Scores against both go into one softmax, so nothing is approximated and nothing is merged afterwards.

Shapes: R runs, H heads, d = width / H, P bundles of T positions, S shared keys, B constant keys before the bundle.
Queries arrive scaled (the weights are folded).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Saved:
    """What a part's backward pass reads: q, k, v and the attention probabilities.

    ``q`` (R, H, P, Tq, d), ``k`` and ``v`` (R, H, P, B + T, d), ``probabilities`` (R, H, P, Tq, S + B + T).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    probabilities: Tensor


def attend(
    q: Tensor, shared_k: Tensor, shared_v: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return outputs (R, H, P, Tq, d) and probabilities (R, H, P, Tq, S + B + T).

    ``shared_k``, ``shared_v`` (R, H, S, d); ``k``, ``v`` (R, H, P, B + T, d); ``mask`` (P or 1, Tq, B + T) additive.
    """
    R, H, P, T, d = q.shape
    S, K = shared_k.shape[2], k.shape[3]
    shared = torch.bmm(q.reshape(R * H, P * T, d), shared_k.reshape(R * H, S, d).transpose(1, 2))
    own = torch.bmm(q.reshape(R * H * P, T, d), k.reshape(R * H * P, K, d).transpose(1, 2)).view(
        R, H, P, T, K
    )
    own += mask
    probabilities = torch.softmax(torch.cat([shared.view(R, H, P, T, S), own], -1), -1)
    out = torch.bmm(probabilities.view(R * H, P * T, S + K)[..., :S], shared_v.reshape(R * H, S, d))
    out = out.view(R * H * P, T, d)
    out.baddbmm_(probabilities.view(R * H * P, T, S + K)[..., S:], v.reshape(R * H * P, K, d))
    return out.view(R, H, P, T, d), probabilities


def attend_backward(
    grad: Tensor,
    saved: Saved,
    shared_k: Tensor,
    shared_v: Tensor,
    grad_shared_k: Tensor,
    grad_shared_v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; add those of the shared keys and values to the given ones.

    ``grad`` (R, H, P, Tq, d); ``grad_shared_k``, ``grad_shared_v`` (R, H, S, d), contiguous.
    """
    q, k, v, probabilities = saved.q, saved.k, saved.v, saved.probabilities
    R, H, P, T, d = q.shape
    S, K = shared_k.shape[2], k.shape[3]
    by_run, by_path = (R * H, P * T), (R * H * P, T)
    grad_run, grad_path = grad.reshape(*by_run, d), grad.reshape(*by_path, d)

    shared = torch.bmm(grad_run, shared_v.reshape(R * H, S, d).transpose(1, 2)).view(R, H, P, T, S)
    own = torch.bmm(grad_path, v.reshape(R * H * P, K, d).transpose(1, 2)).view(R, H, P, T, K)
    scores = torch._softmax_backward_data(
        torch.cat([shared, own], -1), probabilities, -1, probabilities.dtype
    )

    scores_run, scores_path = scores.view(*by_run, S + K), scores.view(*by_path, S + K)
    probs_run, probs_path = probabilities.view(*by_run, S + K), probabilities.view(*by_path, S + K)
    q_run, q_path = q.reshape(*by_run, d), q.reshape(*by_path, d)
    grad_q = torch.bmm(scores_run[..., :S], shared_k.reshape(R * H, S, d)).view(*by_path, d)
    grad_q.baddbmm_(scores_path[..., S:], k.reshape(R * H * P, K, d))
    grad_k = torch.bmm(scores_path[..., S:].transpose(1, 2), q_path)
    grad_v = torch.bmm(probs_path[..., S:].transpose(1, 2), grad_path)
    grad_shared_k.view(R * H, S, d).baddbmm_(scores_run[..., :S].transpose(1, 2), q_run)
    grad_shared_v.view(R * H, S, d).baddbmm_(probs_run[..., :S].transpose(1, 2), grad_run)
    return grad_q.view(R, H, P, T, d), grad_k.view(R, H, P, K, d), grad_v.view(R, H, P, K, d)
