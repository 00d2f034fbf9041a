"""Checkpoint files of the official CoOp code: where they are, what their paths mean, reading and writing.

    output/DATASET/CoOp/CONFIG_16shots/nctx16_cscFalse_ctpend/seed1/prompt_learner/model.pth.tar-50

A file holds ``epoch`` and ``state_dict``: ``ctx`` (M, width), or (classes, M, width) if class-specific, and the frozen
embeddings around it, ``token_prefix`` (classes, 1, width) of the start token and ``token_suffix``
(classes, 77 - 1 - M, width) of everything after the context when the class name is at the end. A checkpoint
does not contain the class token position; it is part of the path.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcoop.backbones import Backbone, TextTower
from fastcoop.backbones.weights import TorchFile
from fastcoop.errors import UserError
from fastcoop.files import atomic_write, refuse_foreign
from fastcoop.prompts.layout import PLACEHOLDER, PromptLayout, frame_of

MODEL_FOLDER = "prompt_learner"
NAME = re.compile(r"model\.pth\.tar-(\d+)|model-best\.pth\.tar")
POSITIONS = {"end": "end", "middle": "mid", "front": "front"}
WORDS, WORDS_SUFFIX = "a photo of a", "_ctxv1"  # of the official configs that start from words
CONFIG_EPOCHS = (50, 100)  # in the names of official configs; those without a number have 200
ARRAYS = ("ctx", "token_prefix", "token_suffix")


@dataclass(frozen=True, eq=False)
class CoOpFile:
    """An official checkpoint; its arrays have the dtype of the file."""

    path: Path
    epoch: int
    ctx: np.ndarray
    prefix: np.ndarray | None
    suffix: np.ndarray | None


def find_coop_files(place: Path) -> list[Path]:
    """Return ``place`` if it is a file; else the last epoch's checkpoint of each folder below it.

    The best one on validation (``model-best.pth.tar``) is used where there is no other.

    Raises:
        UserError: there is no checkpoint.
    """
    if place.is_file():
        return [place]
    names = ((NAME.fullmatch(path.name), path) for path in place.rglob("model*.pth.tar*"))
    by_epoch = sorted((int(name[1] or -1), path) for name, path in names if name)
    latest = {path.parent: path for _, path in by_epoch}
    if not latest:
        raise UserError(
            f"{place} holds no checkpoints of the official code; expected files such as "
            f"{MODEL_FOLDER}/model.pth.tar-50 in it or below it."
        )
    return sorted(latest.values())


def path_facts(path: Path) -> dict[str, Any]:
    """Return the properties of a run in a path of the official scripts, as far as the path has them.

    They are ``class_position``, ``class_specific``, ``context_length``, ``shots``, ``seed``, and ``words`` that the
    context starts from.
    """
    text, facts = path.as_posix(), dict[str, Any]()
    if layout := re.search(r"nctx(\d+)_csc(True|False)_ctp(end|middle|front)(?=/|$)", text):
        length, specific, position = layout.groups()
        facts |= {"context_length": int(length), "class_specific": specific == "True"}
        facts["class_position"] = POSITIONS[position]
    if config := re.search(r"([^/]*)_(\d+)shots(?=/|$)", text):
        facts["shots"] = int(config[2])
        if config[1].endswith(WORDS_SUFFIX):
            facts["words"] = WORDS
    if seed := re.search(r"seed(\d+)(?=/|$)", text):
        facts["seed"] = int(seed[1])
    return facts


def coop_path(
    out: Path,
    dataset: str,
    backbone: str,
    layout: PromptLayout,
    shots: int | str,
    seed: int,
    epoch: int,
    words: str,
) -> Path:
    """Return the path under ``out`` where the official scripts look for this run's checkpoint.

    The config's name has the backbone (``vit_b16``), the epochs where they are not 200 (``_ep50``), and the words that
    contexts start from (``_ctxv1``). The ":" of half a dataset becomes "-": Windows allows no ":" in names.
    """
    position = next(name for name, ours in POSITIONS.items() if ours == layout.class_position)
    config = re.sub(r"[^a-z0-9]+", "_", backbone.lower().replace("vit-b-", "vit-b")).strip("_")
    config += f"_ep{epoch}" if epoch in CONFIG_EPOCHS else ""
    config += WORDS_SUFFIX if words == WORDS else ""
    run = f"nctx{layout.context_length}_csc{layout.class_specific}_ctp{position}"
    folder = out / dataset.replace(":", "-") / "CoOp" / f"{config}_{shots}shots" / run / f"seed{seed}"
    return folder / MODEL_FOLDER / f"model.pth.tar-{epoch}"


def read_coop_file(path: Path) -> CoOpFile:
    """Read a checkpoint without running anything in it.

    A genuine one pickles its scheduler, and with it an optimizer, so torch's safe loading refuses it.

    Raises:
        UserError: it is missing, damaged, or no checkpoint of CoOp.
    """
    try:
        with TorchFile(path) as file:
            content = file.unpickled()
            content = content if isinstance(content, dict) else {}
            state, epoch = content.get("state_dict"), content.get("epoch")
            if not isinstance(state, dict) or type(epoch) is not int:
                raise UserError(
                    f"{path} should hold a state_dict and an epoch, as the official code saves; it does not."
                )
            if "ctx" not in state:
                raise UserError(f'{path} has no "ctx" in its state_dict; it is not a checkpoint of CoOp.')
            if others := sorted(set(map(str, state)) - {*ARRAYS}):
                raise UserError(
                    f"{path} also holds {others[0]}, which CoOp does not have (CoCoOp does); only CoOp is supported."
                )
            arrays = {name: file.tensor(state[name]) for name in ARRAYS if name in state}
        for array in arrays.values():
            if array.dtype.kind != "f":
                raise ValueError(f"expected floating-point numbers, got {array.dtype}")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except Exception as error:  # damaged pickles raise any exception
        raise UserError(
            f"{path} should be a checkpoint of torch.save, version 1.6 or later, but cannot be read as one ({error}); "
            "if torch itself can load it, save it again there."
        ) from None
    return CoOpFile(path, epoch, arrays["ctx"], arrays.get("token_prefix"), arrays.get("token_suffix"))


def frozen_embeddings(
    backbone: Backbone, class_names: Sequence[str], context_length: int
) -> tuple[Tensor, Tensor]:
    """Return the official ``token_prefix`` and ``token_suffix`` of a class list, float32.

    They are the embeddings of the prompts "X ... X NAME." at all 77 positions, before and after the M placeholders.

    Raises:
        UserError: a prompt does not fit the text tower, or the tower or its tokenizer is of another kind than CLIP's.
    """
    if not isinstance(backbone.text, TextTower):
        raise UserError(
            f"Official files need a causal text tower, which {backbone.name} does not have: "
            f"{backbone.prompt_path.reason}; export with --format safetensors."
        )
    filler = " ".join([PLACEHOLDER] * context_length)
    ids = backbone.tokenize([f"{filler} {name.replace('_', ' ')}." for name in class_names])
    placeholders = ids[:, 1 : 1 + context_length]
    if len(frame_of(backbone.tokenizer).start) != 1 or (placeholders != placeholders[:, :1]).any():
        raise UserError(
            f'Official files need a start token and one token for each "{PLACEHOLDER}", which the tokenizer of '
            f"{backbone.name} does not make; export with --format safetensors."
        )
    embedded = backbone.text.token_embedding.detach().float().cpu()[ids]
    return embedded[:, :1], embedded[:, 1 + context_length :]


def refuse_foreign_checkpoint(path: Path) -> None:
    """Raise UserError if a checkpoint of another program is at ``path``, or named by the ``checkpoint`` beside it."""
    refuse_foreign(path, is_own_torch_file)

    def is_own_pointer(file: Path) -> bool:
        named = file.with_name(file.read_text(encoding="utf-8").strip())
        is_gone = ".pth.tar" in named.name and not named.exists()  # nothing is lost with its name
        return is_gone or is_own_torch_file(named)

    refuse_foreign(path.parent / "checkpoint", is_own_pointer)


def write_coop_file(path: Path, ctx: Tensor, prefix: Tensor, suffix: Tensor, epoch: int) -> None:
    """Write a checkpoint for the official ``load_model``, and the file ``checkpoint`` that names it."""
    state = OrderedDict(ctx=ctx, token_prefix=prefix.to(ctx.dtype), token_suffix=suffix.to(ctx.dtype))
    write_torch_file(path, {"state_dict": state, "epoch": epoch})
    with atomic_write(path.parent / "checkpoint") as part:
        part.write_text(f"{path.name}\n", encoding="utf-8")


def write_torch_file(path: Path, content: Any) -> None:
    """Write a file of ``torch.save``, and the folders above it. Raises OSError where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # torch's own writing to a file ends in RuntimeError on a full disk
    torch.save(content, buffer)
    with atomic_write(path) as part:
        part.write_bytes(buffer.getvalue())


def is_own_torch_file(path: Path) -> bool:
    """Return whether a file is one of `write_torch_file`.

    Torch calls what it saves into memory "archive", and what it saves into a file by the file's name.
    """
    with zipfile.ZipFile(path) as file:
        return file.namelist()[0].startswith("archive/")
