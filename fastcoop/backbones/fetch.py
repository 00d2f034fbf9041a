"""Released weights by tag: from where they already lie, else downloaded, else a message saying what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from open_clip.pretrained import download_pretrained

from fastcoop.backbones.weights import expected_sha256, file_sha256
from fastcoop.errors import UserError

OPENAI_CACHE = Path("~/.cache/clip")  # where OpenAI's own package, and so the official CoOp code, keeps them


def fetch_weights(model_name: str, tag: str, config: dict[str, Any]) -> Path:
    """The local file of open_clip's pretrained ``config`` for ``model_name`` and ``tag``.

    Raises UserError where it can be neither found nor downloaded, naming the file and how to pass it.
    """
    url = config.get("url", "")
    if url:
        cached = OPENAI_CACHE.expanduser() / Path(url).name
        if cached.is_file() and expected_sha256(url) and file_sha256(cached).startswith(expected_sha256(url)):
            return cached
    try:
        with _quiet_hub():
            return Path(download_pretrained(config))
    except Exception as error:  # whatever a network stack raises, the user needs the same two facts
        raise UserError(
            f'The weights "{tag}" of {model_name} are not on this machine and could not be downloaded. '
            f"Fetch {_address(config)} where there is a network, then name the file "
            f'with the model: "{model_name}:FILE", on the command line as in a grid, or pretrained="FILE" in Python.'
        ) from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub's client logs every retry; without a network that buries the one message that helps."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def _address(config: dict[str, Any]) -> str:
    if config.get("url"):
        return str(config["url"])
    repository, _, filename = str(config.get("hf_hub", "")).rpartition("/")
    return f"https://huggingface.co/{repository}/resolve/main/{filename or 'open_clip_model.safetensors'}"
