"""ProKeR (Bendou et al., CVPR 2025): kernel ridge regression from the zero-shot classifier.

The scores of a feature x of length 1 are ``x T + k(x, S) a`` with ``a = (K / lmbda + I)^-1 (Y - S T)``, for samples S,
their classes Y, text features T, and ``k(x, s) = exp(-beta (1 - x s))``. Logits are 100 times the scores, so that they
are those of zero-shot CLIP as ``lmbda`` approaches 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import Field

from fastcoop.errors import UserError
from fastcoop.methods.adapters.base import Adapter, AdapterSettings, Fitted
from fastcoop.methods.adapters.selection import Judge
from fastcoop.methods.adapters.stack import Stack, Texts, Weights, normalized, over
from fastcoop.methods.late import Tensor, torch
from fastcoop.methods.schedule import Coefficient
from fastcoop.methods.spec import RunSpec

KERNEL_BYTES = 4 << 30  # of the largest kernel matrix of float64
IMAGES = 1024  # whose kernel is in float64 at once
# First, last and number of values, of an official configuration.
SEARCHED = {"beta": (0.5, 3.0, 20), "lmbda": (0.001, 1.0, 10)}


class ProKeRSettings(AdapterSettings):
    """Settings of ProKeR.

    Attributes:
        beta: Sharpness of the kernel. None: chosen by ``selection``, 1.7 if it is "fixed".
        lmbda: Weight of the training images against the zero-shot classifier. None: chosen too, 0.1 if it is "fixed".
        samples: "views": each view of an image is a sample. "images": their mean is, for smaller kernels.
    """

    beta: Coefficient | None = Field(None, gt=0)
    lmbda: Coefficient | None = Field(None, gt=0)
    samples: Literal["views", "images"] = "views"


class ProKeRMethod(Adapter[ProKeRSettings]):
    """The kernel of all samples is solved at once."""

    name = "proker"
    title = "ProKeR"
    kinds = ("tip",)
    Settings = ProKeRSettings
    values: ClassVar = {"beta": 1.7, "lmbda": 0.1}  # of the official code, for 16 shots of ImageNet
    by_class: ClassVar = {"dual": ""}
    mixes = False

    def searched(self, settings: ProKeRSettings) -> Mapping[str, Sequence[float]]:
        return {
            name: [first + step * (last - first) / (steps - 1) for step in range(steps)]
            for name, (first, last, steps) in SEARCHED.items()
        }

    def check(self, run: RunSpec[ProKeRSettings]) -> None:
        super().check(run)
        if run.has_learned:
            return
        samples = len(run.subset.train) * (max(1, run.data.views) if run.settings.samples == "views" else 1)
        if 8 * samples**2 > KERNEL_BYTES:
            raise UserError(
                f"The kernel of proker on {run.data.name} has {samples:,} x {samples:,} entries "
                f"({8 * samples**2 / 1e9:.1f} GB), more than {KERNEL_BYTES / 1e9:.1f} GB; set samples to images, or "
                "give it fewer shots."
            )

    def run_bytes(self, images: int, views: int, classes: int, dim: int) -> int:
        return super().run_bytes(images, views, classes, dim) + 24 * (images * max(1, views)) ** 2

    def image_bytes(self, weights: Weights, texts: Texts) -> int:
        return super().image_bytes(weights, texts) if "dual" in weights else 1  # one solution for all images

    def fit(self, stack: Stack, judge: Judge | None) -> Fitted:
        if stack.settings.samples == "views":
            samples = normalized(stack.views).flatten(1, 2)
            Y = stack.onehot.repeat_interleave(stack.views.shape[2], 1)
        else:
            samples, Y = normalized(stack.views.mean(2)), stack.onehot
        return Fitted({"samples": samples, "residual": (Y - samples @ stack.texts.unit.T).mT})

    def scorer(self, weights: Weights, images: Tensor, texts: Texts) -> Callable[..., Tensor]:
        x, samples = normalized(images), weights["samples"]
        zero_shot, similarity = texts.zero_shot(x), x @ samples.mT

        @lru_cache(maxsize=1)  # the search tries all lmbda with one beta
        def kernels(beta: Tensor) -> tuple[Tensor, Any]:
            known = "dual" in weights
            return kernel(similarity, beta), None if known else kernel(samples @ samples.mT, beta)

        def logits(beta: Tensor, lmbda: Tensor) -> Tensor:
            K, own = kernels(beta)
            dual = weights["dual"] if own is None else solve(own, lmbda, weights["residual"])
            a = texts.scale * dual.mT.double()  # sums over samples in float32 lose more digits than `solve`
            return zero_shot + torch.cat([some.double() @ a for some in K.split(IMAGES, 1)], 1).to(zero_shot)

        return logits

    def settle(self, weights: Weights, texts: Texts) -> Weights:
        samples = weights["samples"]
        K = kernel(samples @ samples.mT, weights["beta"])
        kept = {name: one for name, one in weights.items() if name != "residual"}
        return kept | {"dual": solve(K, weights["lmbda"], weights["residual"])}


def kernel(similarity: Tensor, beta: Tensor) -> Tensor:
    """Return the kernel of cosine similarities (runs, n, samples), with a sharpness per run."""
    return ((similarity - 1) * over(beta, similarity)).exp_()


def solve(K: Tensor, lmbda: Tensor, residual: Tensor) -> Tensor:
    """Return the dual weights (runs, classes, samples) of kernels (runs, samples, samples), solved in float64."""
    system = K.double() / over(lmbda.double(), K)
    system.diagonal(dim1=-2, dim2=-1).add_(1)
    return torch.cholesky_solve(residual.mT.double(), torch.linalg.cholesky(system)).mT.to(K.dtype)
