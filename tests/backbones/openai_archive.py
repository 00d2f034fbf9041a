"""An archive as OpenAI publishes its CLIPs: traced, its weights half in float16 and half in float32."""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
from torch import nn

HALF = (nn.Conv1d, nn.Conv2d, nn.Linear)  # what OpenAI's convert_weights makes float16, and these:
HALF_ENDS = ("in_proj_weight", "in_proj_bias", "text_projection", "visual.proj")


def half_names(model: open_clip.CLIP) -> set[str]:
    """The weights that are float16 in OpenAI's files; norms, embeddings and the logit scale are not."""
    names = {name for name, _ in model.named_parameters() if name.endswith(HALF_ENDS)}
    for name, module in model.named_modules():
        if isinstance(module, HALF):
            names |= {f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)}
    return names


def published(model: open_clip.CLIP) -> dict[str, torch.Tensor]:
    """The state dict with the dtypes of OpenAI's files."""
    half = half_names(model)
    return {key: value.half() if key in half else value for key, value in model.state_dict().items()}


def write_archive(model: open_clip.CLIP, path: Path) -> None:
    """Trace ``model`` as OpenAI did (three entry points, three integer buffers) and save it with torch.jit.

    ``model`` is in float32 and stays so; it is traced in float32, for float16 is slow on a CPU, and then its
    weights are converted.
    """
    size = model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    integers = {
        "input_resolution": size,
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
    }

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, module in model.named_children():
                self.add_module(name, module)
            for name, parameter in model.named_parameters(recurse=False):
                self.register_parameter(name, parameter)
            for name, value in integers.items():
                self.register_buffer(name, torch.tensor(value))

        def encode_image(self, image: torch.Tensor) -> torch.Tensor:
            return model.encode_image(image)

        def encode_text(self, text: torch.Tensor) -> torch.Tensor:
            return model.encode_text(text)

        def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            images, texts = self.encode_image(image), self.encode_text(text)
            return self.logit_scale.exp() * images @ texts.t()

    image = torch.zeros(1, 3, size, size)
    text = torch.ones(1, model.context_length, dtype=torch.long)
    inputs = {"forward": (image, text), "encode_image": (image,), "encode_text": (text,)}
    with torch.no_grad():
        archive = torch.jit.trace_module(Whole().eval(), inputs, check_trace=False)
    whole = {name: parameter.data for name, parameter in model.named_parameters()}
    half = half_names(model)
    for name, parameter in archive.named_parameters():
        if name in half:
            parameter.data = parameter.data.half()
    archive.save(str(path))
    for name, parameter in model.named_parameters():
        parameter.data = whole[name]
