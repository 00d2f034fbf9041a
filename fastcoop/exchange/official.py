"""The official code's checkpoints of a prompt learner: what is in them, where they lie, and what their path says.

    output/DATASET/CoOp/CONFIG_16shots/nctx16_cscFalse_ctpend/seed1/prompt_learner/model.pth.tar-50

holds ``state_dict`` and ``epoch``; the state dict ``ctx`` (M, width), or (classes, M, width) if class-specific,
and the frozen embeddings around it, ``token_prefix`` (classes, 1, width) of the start token and ``token_suffix``
(classes, 77 - 1 - M, width) of all that follows the context when the class stands at the end. Where the class really
stands is in the path alone.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcoop.backbones import Backbone
from fastcoop.errors import UserError
from fastcoop.exchange.unpickle import Checkpoint, state_dict_of
from fastcoop.files import atomic_write
from fastcoop.prompts.layout import PLACEHOLDER, PromptLayout

MODEL_FOLDER = "prompt_learner"
POSITIONS = {"end": "end", "middle": "mid", "front": "front"}
WORDS = {"_ctxv1": "a photo of a"}  # of the official configs that start from words
CONFIG_EPOCHS = (50, 100)  # of those that are not called after their backbone alone, whose number is 200


@dataclass(frozen=True)
class PathFacts:
    """What a checkpoint's path says, None where it does not: class position, class-specific, M, shots, seed, words."""

    class_position: str | None
    class_specific: bool | None
    context_length: int | None
    shots: int | None
    seed: int | None
    words: str | None


@dataclass(frozen=True, eq=False)
class Official:
    """An official checkpoint. ``ctx`` is float16 or float32, as it was saved; ``prefix`` and ``suffix`` may be None."""

    path: Path
    ctx: np.ndarray
    prefix: np.ndarray | None
    suffix: np.ndarray | None
    epoch: int


def find_checkpoints(place: Path) -> list[Path]:
    """``place`` itself if it is a file; else, of each folder of checkpoints below it, the last epoch's.

    The best one on validation (``model-best.pth.tar``) is taken where there is no other. Raises UserError if there
    is none at all.
    """
    if place.is_file():
        return [place]
    latest: dict[Path, tuple[int, Path]] = {}
    for path in sorted(place.rglob("model*.pth.tar*")):
        number = re.fullmatch(r"model\.pth\.tar-(\d+)", path.name)
        if not number and path.name != "model-best.pth.tar":
            continue
        epoch = int(number[1]) if number else -1
        latest[path.parent] = max(latest.get(path.parent, (-2, path)), (epoch, path))
    if not latest:
        raise UserError(
            f"{place} holds no checkpoints of the official code; expected files such as "
            f"{MODEL_FOLDER}/model.pth.tar-50 in it or below it."
        )
    return [path for _, path in latest.values()]


def path_facts(path: Path) -> PathFacts:
    """Read a path as the official scripts write it; "middle" reads "mid"."""
    text = path.as_posix()
    layout = re.search(r"nctx(\d+)_csc(True|False)_ctp(end|middle|front)(?=/|$)", text)
    config = re.search(r"([^/]*)_(\d+)shots(?=/|$)", text)
    seed = re.search(r"seed(\d+)(?=/|$)", text)
    words = next((given for end, given in WORDS.items() if config and config[1].endswith(end)), None)
    return PathFacts(
        class_position=POSITIONS[layout[3]] if layout else None,
        class_specific=layout[2] == "True" if layout else None,
        context_length=int(layout[1]) if layout else None,
        shots=int(config[2]) if config else None,
        seed=int(seed[1]) if seed else None,
        words=words,
    )


def official_path(
    out: Path,
    dataset: str,
    backbone: str,
    layout: PromptLayout,
    shots: int | str,
    seed: int,
    epoch: int,
    words: str,
) -> Path:
    """Where the official scripts would look for this run's checkpoint under ``out``.

    Their folder is called after the config, which is called after the backbone (``vit_b16``), its epochs where they
    are not 200 (``_ep50``), and the words that contexts start from (``_ctxv1``). The ":" of half a dataset is no
    character for a folder on Windows, so a "-" stands for it.
    """
    position = next(name for name, ours in POSITIONS.items() if ours == layout.class_position)
    config = re.sub(r"[^a-z0-9]+", "_", backbone.lower().replace("vit-b-", "vit-b")).strip("_")
    config += f"_ep{epoch}" if epoch in CONFIG_EPOCHS else ""
    config += next((end for end, given in WORDS.items() if given == words), "")
    middle = f"nctx{layout.context_length}_csc{layout.class_specific}_ctp{position}"
    folder = (
        out
        / dataset.replace(":", "-")
        / "CoOp"
        / f"{config}_{shots}shots"
        / middle
        / f"seed{seed}"
        / MODEL_FOLDER
    )
    return folder / f"model.pth.tar-{epoch}"


def read_official(path: Path) -> Official:
    """Read a checkpoint, running nothing in it. Raises UserError if it is none of CoOp's."""
    checkpoint = Checkpoint(path)
    state, epoch = state_dict_of(checkpoint)
    if "ctx" not in state:
        raise UserError(f'{path} has no "ctx" in its state_dict; it is not a checkpoint of CoOp.')
    others = sorted(set(map(str, state)) - {"ctx", "token_prefix", "token_suffix"})
    if others:
        raise UserError(
            f"{path} also holds {others[0]}, which CoOp does not have (CoCoOp does); only CoOp is read here."
        )
    prefix, suffix = (
        checkpoint.tensor(state[name]) if name in state else None for name in ("token_prefix", "token_suffix")
    )
    return Official(path, checkpoint.tensor(state["ctx"]), prefix, suffix, epoch)


def frozen_embeddings(
    backbone: Backbone, class_names: Sequence[str], context_length: int
) -> tuple[Tensor, Tensor]:
    """The official ``token_prefix`` and ``token_suffix``, float32, of a class list: embeddings of the prompt
    "X ... X NAME." at all 77 positions, before and after the M placeholders.

    Raises UserError for a prompt that does not fit the text tower.
    """
    filler = " ".join([PLACEHOLDER] * context_length)
    names = [name.replace("_", " ") for name in class_names]
    ids = backbone.tokenize([f"{filler} {name}." for name in names])
    embedded = backbone.text.token_embedding.detach().float().cpu()[ids]
    return embedded[:, :1], embedded[:, 1 + context_length :]


def write_official(path: Path, ctx: Tensor, prefix: Tensor, suffix: Tensor, epoch: int) -> None:
    """Write a checkpoint that the official ``load_model`` takes, and the ``checkpoint`` file that names it."""
    state = OrderedDict(ctx=ctx, token_prefix=prefix.to(ctx.dtype), token_suffix=suffix.to(ctx.dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        torch.save({"state_dict": state, "epoch": epoch}, part)
    with atomic_write(path.parent / "checkpoint") as part:
        part.write_text(f"{path.name}\n", encoding="utf-8")
