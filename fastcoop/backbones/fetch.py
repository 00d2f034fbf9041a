"""Released weights by tag: found on this machine, or downloaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from open_clip.pretrained import download_pretrained

from fastcoop.backbones.weights import expected_sha256, file_sha256
from fastcoop.errors import UserError

OPENAI_CACHE = Path("~/.cache/clip")  # where OpenAI's own package, and so the official CoOp code, keeps them


def fetch_weights(model_name: str, tag: str, config: dict[str, Any]) -> Path:
    """Return the local file of open_clip's pretrained ``config`` for ``model_name`` and ``tag``.

    Raises:
        UserError: It can be neither found nor downloaded; the message names the file and how to pass it.
    """
    url = config.get("url", "")
    cached = OPENAI_CACHE.expanduser() / Path(url).name
    expected = expected_sha256(url)
    if expected and cached.is_file() and file_sha256(cached).startswith(expected):
        return cached
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it logs every retry
    try:
        return Path(download_pretrained(config))
    except Exception as error:  # a network client may raise any exception
        repository, _, filename = str(config.get("hf_hub", "")).rpartition("/")
        file = filename or "open_clip_model.safetensors"
        address = url or f"https://huggingface.co/{repository}/resolve/main/{file}"
        raise UserError(
            f'The weights "{tag}" of {model_name} are not on this machine and could not be downloaded. '
            f"Fetch {address} where there is a network, then name the file "
            f'with the model: "{model_name}:FILE", on the command line as in a grid, or pretrained="FILE" in Python.'
        ) from error
    finally:
        hub.setLevel(level)
