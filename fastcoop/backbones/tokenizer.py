"""Tokenizers of text towers: CLIP's own, or one in Hugging Face's format."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcoop.backbones.late import open_clip_part
from fastcoop.backbones.planned import PROBE
from fastcoop.backbones.sources import SMALL_FILES, find_hub_files, has_tokenizer
from fastcoop.checks import shortened
from fastcoop.errors import UserError

DEFAULT_LENGTH = 77  # positions of a text tower whose config does not say how many
NEEDS_TRANSFORMERS = '{} "{}" needs the package transformers; install it (pip install "fastcoop[hf]").'


def load_tokenizer(text_cfg: dict[str, Any], folder: Path | None) -> Callable[..., Tensor]:
    """Return the tokenizer that open_clip gives a text tower: list of n strings -> int64 (n, context_length).

    Tokenizer files in ``folder``, that of the weights, come before those of ``hf_tokenizer_name`` in ``text_cfg``;
    without that name it is CLIP's. A UserError says which files, or that the package transformers, are missing.
    """
    length = text_cfg.get("context_length", DEFAULT_LENGTH)
    options = text_cfg.get("tokenizer_kwargs") or {}
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        module = open_clip_part("tokenizer")
        if not options:
            return _clip_tokenizer(module, length)
        make: Callable[..., Callable[..., Tensor]] = module.SimpleTokenizer
        try:
            return make(context_length=length, **options)
        except Exception as error:  # odd settings may raise any exception
            raise UserError(
                f"CLIP's tokenizer has no settings such as tokenizer_kwargs {shortened(options)}: {error}; correct the "
                "model config."
            ) from error
    own = folder is not None and has_tokenizer(folder)
    source = folder if own else find_hub_files(name, "tokenizer", SMALL_FILES, has_tokenizer)
    try:
        tokenizer: Callable[..., Tensor] = open_clip_part("tokenizer").HFTokenizer(
            str(source), context_length=length, tokenizer_mode=text_cfg.get("tokenizer_mode"),
            trust_remote_code=False, **options,
        )  # fmt: skip
    except ImportError as error:
        if "transformers" not in str(error):  # a tokenizer may need a package of its own
            raise UserError(f'The tokenizer "{name}" cannot be read: {error}') from error
        raise UserError(NEEDS_TRANSFORMERS.format("The tokenizer", name)) from None
    except Exception as error:  # damaged files may raise any exception
        raise UserError(f"The tokenizer in {source} cannot be read: {error}") from error
    return tokenizer


@functools.cache  # its tables take a while to build
def _clip_tokenizer(module: Any, length: int) -> Callable[..., Tensor]:
    own: Callable[..., Tensor] = module._tokenizer  # which open_clip makes when it is imported
    return own if length == DEFAULT_LENGTH else module.SimpleTokenizer(context_length=length)


def check_tokenizer(
    tokenizer: Callable[..., Tensor], tokens: int | None, end_id: int | None, length: int
) -> None:
    """Refuse a tokenizer with tokens that a tower of ``tokens`` tokens lacks, or without its end token."""
    ids = tokenizer(["a"], context_length=length)[0].tolist()
    if tokens is not None and max(ids) >= tokens:
        raise UserError(
            f"The tokenizer makes the token {max(ids)}, but the text tower has {tokens} tokens; name the tower's own "
            "tokenizer in the model config (hf_tokenizer_name), or correct its vocab_size."
        )
    if end_id is not None and end_id not in ids:
        raise UserError(
            f"The text tower reads its output at token {end_id} (eos_id of the model config), which its "
            "tokenizer never makes; name the tower's own tokenizer (hf_tokenizer_name), or correct eos_id."
        )


def tokenizer_facts(tokenizer: Any) -> str | None:
    """Return a hash of a Hugging Face tokenizer's vocabulary and of its tokens of a text; None for CLIP's own."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:
        return None
    facts = sorted(inner.get_vocab().items()), tokenizer([PROBE])[0].tolist()
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
