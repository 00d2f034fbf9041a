"""A frozen CLIP: the open_clip model, its preprocessing, and a content hash."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastcoop.backbones.planned import PromptPath, count_tokens
from fastcoop.backbones.precision import products_in_tf32, torch_defaults
from fastcoop.backbones.text_tower import PlainTower, TextTower, prompt_path, text_tower
from fastcoop.errors import UserError

if TYPE_CHECKING:
    import open_clip

TEXT_BATCH = 256  # prompts encoded at once by the plain text path
RESIZE_MODES = ("shortest", "squash", "longest")


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the (3, size, size) tensor that the image tower was trained on."""

    size: int  # height and width in pixels
    mean: tuple[float, float, float]  # per RGB channel, of values in [0, 1]
    std: tuple[float, float, float]  # per RGB channel, of values in [0, 1]
    interpolation: str = "bicubic"  # or "bilinear"
    # "shortest" (shorter side to ``size``, center crop), "squash" (both sides to ``size``) or "longest" (longer side to
    # ``size``, padded to a square).
    resize_mode: str = "shortest"
    fill_color: int = 0  # of the padding in every channel, 0 to 255

    def facts(self) -> dict[str, Any]:
        """Return the fields as a dict, without the padding's color where it is black."""
        return {name: value for name, value in asdict(self).items() if name != "fill_color" or value}


@dataclass(frozen=True, eq=False, repr=False)
class Backbone:
    """A frozen CLIP.

    Attributes:
        name: Short and safe as a folder name, such as "RN50" or "demo-resnet".
        model: The open_clip model, in eval mode, without gradients.
        digest: sha256 hex of weights, activation, preprocessing and unusual settings: equal digests, equal features.
        tokenizer: open_clip's; list of n strings -> int64 (n, context_length). It truncates without warning.
        preprocess: The image preprocessing of the weights.
        embed_dim: Size of an image or text feature.
        quick_gelu: Whether the towers use OpenAI's QuickGELU.
        trained_tokens: bool (vocabulary,), the token embeddings that were trained; None: all.
        files: The files that it was read from.
        spec: What `backbone_from_spec` loaded it by, a path as an absolute one; its name where that did not load it.
    """

    name: str
    model: open_clip.CLIP | open_clip.CustomTextCLIP | open_clip.CoCa
    digest: str
    tokenizer: Callable[..., Tensor]
    preprocess: Preprocess
    embed_dim: int
    quick_gelu: bool
    trained_tokens: Tensor | None = None
    files: tuple[Path, ...] = ()
    spec: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", self.spec or self.name)

    def __repr__(self) -> str:  # short, since an estimator shows it among its parameters
        return f"Backbone({self.name!r})"

    @property
    def image_size(self) -> int:
        return self.preprocess.size

    @cached_property
    def logit_scale(self) -> float:
        """The factor on cosine similarities, exponentiated: about 100 for CLIP."""
        scale = self.model.logit_scale
        return float(scale.to(torch.promote_types(scale.dtype, torch.float32)).exp())

    @property
    def logit_bias(self) -> float | None:
        """The number that a model trained with sigmoids (SigLIP) adds to its logits, or None. It changes no softmax."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias)

    @cached_property
    def text(self) -> TextTower | PlainTower:
        """The text tower: in parts if its prompts share what they have in common."""
        return text_tower(self.model, getattr(self.tokenizer, "context_length", None))

    @property
    def shared_text(self) -> TextTower:
        """The parts of a causal text tower. Raises UserError for another."""
        text: Any = self.text
        if self.prompt_path.path == "shared":
            return text  # type: ignore[no-any-return]
        raise UserError(
            f"This needs a causal text tower, read at its end token, which {self.name} does not have: "
            f"{self.prompt_path.reason}. Choose another backbone, such as RN50 or ViT-B-16."
        )

    @cached_property
    def prompt_path(self) -> PromptPath:
        """How the backbone learns prompts, and why not otherwise."""
        return prompt_path(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return self.text.dtype

    @property
    def device(self) -> torch.device:
        return self.text.device

    @torch_defaults()
    @torch.no_grad()
    def encode_images(self, images: Tensor, precision: str = "float32") -> Tensor:
        """Encode images, preprocessed and normalized by ``preprocess``.

        Args:
            images: (b, 3, size, size).
            precision: Of the products of a float32 model: "float32", "tf32" (on a GPU) or "bfloat16".

        Returns:
            Features (b, embed_dim), not normalized, on the model's device and in its dtype or bfloat16.
        """
        with self._computing_in(precision):
            features: Tensor = self.model.encode_image(images.to(self.device, self.dtype), normalize=False)
        return features

    @torch_defaults()
    @torch.no_grad()
    def encode_images_both(self, images: Tensor, precision: str = "float32") -> tuple[Tensor, Tensor]:
        """Encode images as `encode_images`, and return also their features before the projection, (b, before)."""
        _ = self.image_projection
        with self._computing_in(precision):
            return encode_both(self.model.visual, images.to(self.device, self.dtype))

    @cached_property
    def image_projection(self) -> ImageProjection:
        """The linear map at the end of the image tower. Raises UserError for a tower that has none."""
        return image_projection(self.model.visual, self.name)

    @contextmanager
    def _computing_in(self, precision: str) -> Iterator[None]:
        in_bfloat16 = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16")
        with products_in_tf32(precision == "tf32"), in_bfloat16:
            yield

    @torch_defaults()
    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode n prompts by open_clip's own code, at all positions.

        Returns:
            Features (n, embed_dim), not normalized.

        Raises:
            UserError: A prompt does not fit the context length.
        """
        ids = self.tokenize(texts).to(self.device)
        # CoCa's are normalized by default.
        return torch.cat([self.model.encode_text(part, normalize=False) for part in ids.split(TEXT_BATCH)])

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token ids, int64 (n, context_length).

        Raises:
            UserError: A text does not fit the context length; open_clip would truncate it.
        """
        length = self.text.context_length
        if too_long := next((text for text in texts if self.count_tokens(text) > length), None):
            limit = f"{length} tokens of {self.name}"
            raise UserError(f'The text "{too_long}" does not fit the {limit}; shorten it.')
        return self.tokenizer(list(texts), context_length=length)

    def count_tokens(self, text: str) -> int:
        """Return how many tokens a text has with its start and end, however long it is."""
        return count_tokens(self.tokenizer, text)


def fingerprint(
    state: Mapping[str, Tensor],
    quick_gelu: bool,
    preprocess: Preprocess,
    unusual: Mapping[str, Any] | None = None,
) -> str:
    """Return the sha256 hex of what determines features: weights, activation, preprocessing and unusual settings.

    Floating-point tensors are hashed as float32, so that files of other dtypes agree.
    """
    facts: dict[str, Any] = {"quick_gelu": quick_gelu, "preprocess": preprocess.facts()}
    if unusual:
        facts["unusual"] = dict(unusual)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for key in sorted(state):
        tensor = state[key].detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"\n{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageProjection:
    """Image features are ``before @ weight + bias``, where ``before`` are the features before the projection."""

    weight: Tensor  # float32 (before, dim), on the model's device; it may be the model's own memory
    bias: Tensor | None  # float32 (dim,)

    @property
    def before_dim(self) -> int:
        """Size of a feature before the projection."""
        return self.weight.shape[0]


def image_projection(visual: nn.Module, name: str) -> ImageProjection:
    """Return the projection of an image tower of the backbone ``name``; UserError if it does not end in one.

    That is ``proj`` of a vision transformer, ``c_proj`` of a ResNet's attention pool, or ``head.proj`` of a timm model.
    """
    if isinstance(matrix := getattr(visual, "proj", None), Tensor):
        return ImageProjection(matrix.detach().float(), None)
    places = (("attnpool", "c_proj"), ("head", "proj"))
    layers = (getattr(getattr(visual, parent, None), name, None) for parent, name in places)
    if (linear := next((layer for layer in layers if isinstance(layer, nn.Linear)), None)) is None:
        raise UserError(
            f"The image tower of {name} does not end in a linear projection, so there are no features before it; use "
            "another backbone, or methods that do not need them."
        )
    bias = None if linear.bias is None else linear.bias.detach().float()
    return ImageProjection(linear.weight.detach().float().T, bias)


def encode_both(visual: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features (b, dim) of an image tower with a projection, and those before it (b, before).

    The features have the same bits as without the latter.
    """
    if isinstance(matrix := getattr(visual, "proj", None), Tensor):
        headless = copy.copy(visual)
        headless._parameters = {**visual._parameters, "proj": None}
        before = _features(headless(images))
        return before @ matrix, before
    # The projection's input. A ResNet's attention pool does not call the layer, but reads its weights, so the pool is
    # computed again with an identity in its place.
    pool = getattr(visual, "attnpool", None)
    seen: list[Tensor] = []
    module = visual.head.proj if pool is None else pool
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        features = _features(visual(images))
    finally:
        hook.remove()
    if pool is None:
        return features, seen[0]
    width, headless = pool.c_proj.in_features, copy.copy(pool)
    identity, like = nn.Linear(width, width, device="meta"), pool.c_proj.weight
    identity.weight = nn.Parameter(torch.eye(width, dtype=like.dtype, device=images.device), False)
    identity.bias = nn.Parameter(identity.weight.new_zeros(width), False)
    headless._modules = {**pool._modules, "c_proj": identity}
    return features, headless(seen[0])


def _features(output: Any) -> Any:
    """Return the features of a tower that may put out its tokens, too (CoCa's)."""
    return output[0] if isinstance(output, tuple) else output
