"""Captions for icons: their names in many sentences, at every position that learned prompts use."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache, lru_cache

import torch

from fastcoop.demo.glyphs import Glyph

START, END = 49406, 49407  # of CLIP's tokenizer
VECTOR = 0  # stands for a random vector; its own token, "!", is in no caption
MAX_FILLERS = 20

BEFORE = (
    "", "", "", "a", "the", "a picture of a", "a photo of a", "an icon of a", "an image of a",
    "a drawing of a", "a symbol of a", "a small", "a large", "a sketch of the", "this is a", "here is the",
    "a sign that shows a", "a simple picture of a", "a flat icon of a", "one", "my", "a good drawing of the",
    "a logo with a", "an illustration of a", "a clean", "a button for", "an app icon showing a",
    "a glyph for", "look at the", "a rendering of a", "a tiny picture of one", "a black and white",
)  # fmt: skip
AFTER = (
    "", "", "", "", "", "icon", "symbol", "sign", "glyph", "drawing", "on a website", "in a menu",
    "for an app", "for your phone", "seen from the front", "in the corner", "on the screen",
    "made of simple shapes", "with clean lines", "in two colors", "on a button", "for a map", "to click on",
    "tilted a little",
)  # fmt: skip
BADGE = (
    "an icon with a {} badge", "{} badge", "with {}", "{}", "marked {}", "a small {} sign on an icon", "a {}",
    "something with a {} mark", "an icon that says {}",
)  # fmt: skip
JOINED = (
    "{head} with {rest}", "{head} and {rest}", "{rest} {head}", "{head} {rest}",
    "{head} with a {rest} badge", "{head} {rest}", "{head} {rest}",
)  # fmt: skip
STYLED = ("{} style", "drawn {}", "with {} lines", "{}")
COLORED = (
    "in {0} on {1}", "{0} on a {1} background", "on a {1} ground", "in {0}", "on {1}", "colored {0}",
    "painted {0} over {1}",
)  # fmt: skip
SYNONYMS = (
    ("account", "person", "user", "human"), ("home", "house"), ("email", "mail", "envelope", "letter"),
    ("chat", "message", "comment", "speech bubble"), ("phone", "telephone", "cellphone", "mobile"),
    ("clock", "timer", "time"), ("off", "slash", "crossed out"), ("remove", "close", "x", "cross"),
    ("plus", "add", "new"), ("cog", "settings", "gear"), ("edit", "pencil", "pen"),
    ("search", "magnify", "find"), ("sync", "refresh", "reload"),
    ("alert", "warning", "exclamation"), ("check", "tick", "done"),
    ("lightbulb", "light bulb", "lamp", "bulb"), ("image", "picture", "photo"),
    ("car", "automobile", "vehicle"), ("airplane", "plane"), ("emoticon", "smiley", "face"),
    ("delete", "trash", "bin"), ("music", "note"), ("book", "notebook"), ("minus", "subtract", "less"),
    ("file", "document", "page"), ("folder", "directory"), ("star", "favorite"), ("heart", "love"),
    ("printer", "print"), ("arrow", "pointer"), ("hand", "palm"), ("database", "storage"),
    ("shield", "protection"), ("camera", "photography"), ("calendar", "date"),
)  # fmt: skip
STYLES = {
    "outline", "variant", "fill", "line", "thin", "light", "bold", "sharp", "alt", "o", "solid", "regular",
}  # fmt: skip
OTHER_NAMES = {word: group for group in SYNONYMS for word in group}


def words_of(glyph: Glyph) -> tuple[str, ...]:
    """Return the words of a glyph's name without those that name a style; never empty."""
    words = glyph.name.split("-")
    return tuple(word for word in words if word not in STYLES and not word.isdigit()) or tuple(words)


def style_of(glyph: Glyph) -> tuple[str, ...]:
    """The words of a glyph's name that name a style, such as ``("outline",)``."""
    return tuple(word for word in glyph.name.split("-")[1:] if word in STYLES)


@lru_cache(maxsize=1)
def _tokenizer():  # type: ignore[no-untyped-def]
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@lru_cache(maxsize=1)
def fillers(count: int = 3000) -> tuple[str, ...]:
    """The most common whole words of CLIP's vocabulary, in its own order of frequency."""
    words = []
    for token in _tokenizer().encoder:
        word = token.removesuffix("</w>")
        if token.endswith("</w>") and word.isascii() and word.isalpha() and len(word) > 2:
            words.append(word)
            if len(words) == count:
                break
    return tuple(words)


@cache
def _token_ids(word: str) -> tuple[int, ...]:
    return tuple(_tokenizer().encode(word))


def vocabulary(glyphs: Sequence[Glyph], colors: Sequence[str]) -> torch.Tensor:
    """Sorted ids of every token that a caption can hold: int64 (n,)."""
    phrases = [*BEFORE, *AFTER, *BADGE, *JOINED, *STYLED, *COLORED, *fillers(), *OTHER_NAMES, *colors, "."]
    phrases += [" ".join((*words_of(glyph), *style_of(glyph))) for glyph in glyphs]
    plain = (phrase.replace("{head}", "").replace("{rest}", "") for phrase in phrases)
    plain = (phrase.replace("{0}", "").replace("{1}", "").replace("{}", "") for phrase in plain)
    ids = {i for phrase in plain for word in phrase.split() for i in _token_ids(word)}
    return torch.tensor(sorted(ids | {START, END} | {_token_ids("x.")[-1]}))


def _other(word: str, rng: random.Random) -> str:
    return rng.choice(OTHER_NAMES[word]) if word in OTHER_NAMES and rng.random() < 0.6 else word


def caption(glyph: Glyph, part: str, colors: Sequence[str], detailed: bool, rng: random.Random) -> str:
    """A phrase about a glyph.

    part: ``"head"`` (its first word only), ``"badge"`` (its last word only) or ``"all"``. colors: of drawing
    and ground. detailed: whether style and colors may be told.
    """
    head, rest = _other(words_of(glyph)[0], rng), " ".join(_other(word, rng) for word in words_of(glyph)[1:])
    if part == "badge":
        body = rng.choice(BADGE).format(_other(words_of(glyph)[-1], rng))
    else:
        name = head if part == "head" or not rest else rng.choice(JOINED).format(head=head, rest=rest)
        body = f"{rng.choice(BEFORE)} {name} {rng.choice(AFTER)}"
    if style_of(glyph) and detailed and rng.random() < 0.25:
        body += " " + rng.choice(STYLED).format(" ".join(style_of(glyph)))
    if detailed and rng.random() < 0.15:
        body += " " + rng.choice(COLORED).format(*colors)
    return body


def sentence(phrase: str, most_fillers: int, rng: random.Random) -> list[int]:
    """Token ids of a phrase with its start and end token, often with a full stop, among 0 to ``most_fillers`` more.

    Those come before the phrase, or half of them after it, as learned context vectors do with the class name at the
    end or in the middle. They are common words drawn at random, or all of them ``VECTOR``.
    """
    count = rng.randint(0, most_fillers)
    after = count - count // 2 if rng.random() < 0.35 else 0
    more = (
        [VECTOR] * count
        if rng.random() < 0.4
        else [_token_ids(word)[0] for word in rng.choices(fillers(), k=count)]
    )
    name = [i for word in phrase.split() for i in _token_ids(word)]
    stop = _token_ids(".") if rng.random() < 2 / 3 else ()
    return [START, *more[after:], *name, *more[:after], *stop, END]
