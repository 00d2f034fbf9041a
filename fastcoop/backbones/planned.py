"""What a plan needs of a backbone, without torch: how it learns prompts, its device, and CLIP's tokens."""

from __future__ import annotations

import gzip
import html
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ftfy
import numpy as np
import regex

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # in open_clip
MERGES = slice(1, 48895)  # lines of it
PROBE = "A Café's two  sea-lions, (no. 17); x_y!"  # tells tokenizers of one vocabulary apart
START, END = "<start_of_text>", "<end_of_text>"
WORDS = rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"


class PromptPath(NamedTuple):
    """How a model learns prompts."""

    # "shared" (a causal tower: prompts share what they have in common), "plain" (all positions of all) or None.
    path: Literal["shared", "plain"] | None
    reason: str = ""  # why not shared, or why not at all


class DeviceName(str):
    """The name of a device, as a tensor there has it: "cpu:0" is "cpu" and "cuda" is "cuda:0"."""

    @classmethod
    def of(cls, device: str) -> DeviceName:
        """Return the name of the device of `resolve_device`."""
        kind, _, number = device.partition(":")
        return cls(kind if kind == "cpu" else f"{kind}:{number or 0}")

    @property
    def type(self) -> str:
        """The name without its number."""
        return self.partition(":")[0]


class ClipTokenizer:
    """CLIP's byte-pair encoding: the tokens of open_clip's tokenizer, which imports torch."""

    def __init__(self) -> None:
        folder = Path(str(getattr(find_spec("open_clip"), "origin", ""))).parent
        lines = gzip.decompress((folder / VOCABULARY).read_bytes()).decode().split("\n")[MERGES]
        # Each byte is one character that is printed: the byte's own, or one from 256 on.
        own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = {byte: 256 + n for n, byte in enumerate(sorted({*range(256)} - {*own}))}
        self._characters = {byte: chr(byte) for byte in own} | {
            byte: chr(code) for byte, code in others.items()
        }
        letters = [*self._characters.values()]
        merges = [tuple(line.split()) for line in lines]
        pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
        self._ids = {piece: number for number, piece in enumerate(pieces)}
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}
        self._words = regex.compile(WORDS, regex.IGNORECASE)
        self._pieces_of = cache(self._merged)

    def __call__(self, texts: Sequence[str], context_length: int = 77) -> np.ndarray:
        """Return token ids, int64 (n, context_length), padded with zeros; a longer text is cut before its end token."""
        rows = np.zeros((len(texts), context_length), np.int64)
        for row, text in zip(rows, texts, strict=True):
            tokens = [self._ids[START], *self._tokens(text)][: context_length - 1]
            row[: len(tokens) + 1] = [*tokens, self._ids[END]]
        return rows

    def _tokens(self, text: str) -> Iterator[int]:
        text = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
        for word in self._words.findall(text):
            yield from self._pieces_of("".join(self._characters[byte] for byte in word.encode()))

    def _merged(self, word: str) -> list[int]:
        """Return the tokens of a word: of all neighboring pieces, those with the lowest rank are merged first."""
        if word in (START, END):
            return [self._ids[word]]
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while pairs := [pair for pair in pairwise(pieces) if pair in self._ranks]:
            best, merged = min(pairs, key=self._ranks.__getitem__), list[str]()
            for piece in pieces:
                if merged and (merged[-1], piece) == best:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces = merged
        return [self._ids[piece] for piece in pieces]


clip_tokenizer = cache(ClipTokenizer)  # its tables take a while to build


def count_tokens(tokenizer: Any, text: str) -> int:
    """Return how many tokens a text has with its start and end, however long it is."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:  # padding follows the end token, and a byte is one token at most
        ids = tokenizer([text], context_length=4 * len(text) + 8)[0].tolist()
        return max(n for n, token in enumerate(ids) if token != ids[-1]) + 1
    adds_its_own = tokenizer.tokenizer_mode == "clips"  # start, end and class token
    ids = inner(tokenizer.clean_fn(text), add_special_tokens=not adds_its_own, verbose=False)["input_ids"]
    return len(ids) + 3 * adds_its_own
