"""Where weights are: in model folders beside their config, in the caches of open_clip and OpenAI, or on the network."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from open_clip.pretrained import download_pretrained

from fastcoop.backbones.weights import expected_sha256, file_sha256
from fastcoop.errors import UserError

HUB_CONFIG = "open_clip_config.json"
CONFIG_KEYS = ("embed_dim", "vision_cfg", "text_cfg")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
OPENAI_CACHE = Path("~/.cache/clip")  # where OpenAI's own package, and so the official CoOp code, keeps them
PREFERRED_STEMS = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")


def read_folder_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Return the open_clip config in ``folder``, its preprocessing settings ({} where it states none), and its file.

    It is ``open_clip_config.json``, else the only ``*.json`` that is a model config.
    """
    found = []
    hub = folder / HUB_CONFIG
    for path in [hub] if hub.is_file() else sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} should be a JSON model config but cannot be read: {error}") from error
        model = content.get("model_cfg", content) if isinstance(content, dict) else None
        if not isinstance(model, dict) or not all(key in model for key in CONFIG_KEYS):
            continue
        if odd := [key for key in CONFIG_KEYS[1:] if not isinstance(model[key], dict)]:
            raise UserError(f"{path}: {odd[0]} should hold keys and values, as in open_clip's configs.")
        found.append((model, content.get("preprocess_cfg") or {}, path))
    if len(found) != 1:
        raise UserError(
            f"{folder} holds {len(found) or 'no'} open_clip model configs; expected {HUB_CONFIG}, or one .json file "
            f"with {', '.join(CONFIG_KEYS)}."
        )
    return found[0]


def is_model_folder(path: Path) -> bool:
    """Return whether ``path`` is a folder with a weights file and a .json file."""
    try:
        suffixes = {file.suffix for file in path.iterdir()}
    except OSError:
        return False
    return ".json" in suffixes and not suffixes.isdisjoint(WEIGHT_SUFFIXES)


def find_weights(folder: Path) -> Path:
    """Return the weights file in ``folder``: one of open_clip's usual names, else the only one."""
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    usual = [folder / f"{stem}{suffix}" for stem in PREFERRED_STEMS for suffix in WEIGHT_SUFFIXES]
    if found := next((path for path in usual if path in files), None):
        return found
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise UserError(
            f"{folder} should hold one weights file ({', '.join(WEIGHT_SUFFIXES)}), found: {names}; "
            "pass the file itself."
        )
    return files[0]


def fetch_weights(model_name: str, tag: str, config: dict[str, Any]) -> Path:
    """Return the local file of open_clip's pretrained ``config`` for a model and tag, downloaded if needed."""
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
            f'The weights "{tag}" of {model_name} are not on this machine and could not be downloaded. Fetch {address} '
            f'where there is a network, then name the file with the model: "{model_name}:FILE", on the command line as '
            'in a grid, or pretrained="FILE" in Python.'
        ) from error
    finally:
        hub.setLevel(level)
