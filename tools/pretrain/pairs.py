"""What pretraining is shown: batches of painted pictures with a word or a caption for each."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import open_clip
import torch

from fastcoop.demo.paint import COLORS, CONTRAST, MIN_CONTRAST, PAIRS, Variation, paint
from tools.pretrain.captions import MAX_FILLERS, caption, sentence, style_of, vocabulary, words_of
from tools.pretrain.plan import atlas, candidates, held_out
from tools.pretrain.rarities import Rarities, phrases

BATCH = 256
COMMON = 8  # glyphs that have a word, for the first stage to learn it
EASY = 0.2  # share of the first stage in which pictures go from plain to as varied as they get
EARLY = 0.25  # share of the second stage with short captions
RARE_WORDS = 40  # of a batch's pictures in the first stage are no icons
RARE = 8  # in the later ones
VARIATION = Variation(rotation=20, scale=(0.55, 1.5), shift=0.15, noise=0.12)
NAMES = tuple(COLORS)
LIGHT_ON_DARK = (CONTRAST > MIN_CONTRAST).nonzero()


class Pairs:
    """Batches of pictures and what is said of them, from the glyphs that pretraining may see."""

    def __init__(self, seed: int) -> None:
        world = atlas()
        kept_out = held_out(candidates())
        self.glyphs = [glyph for glyph in world.glyphs if glyph.key not in kept_out]
        self.drawings = torch.from_numpy(world.drawings[[world.index[glyph.key] for glyph in self.glyphs]])
        self.reseed(seed)
        self.rarities = Rarities(self.drawings.numpy(), seed)
        self.ids = vocabulary(self.glyphs, [*COLORS, *phrases()])
        self.heads = self._by(lambda words: words[0])
        self.badges = self._by(lambda words: words[-1] if len(words) > 1 else None)
        self.names = self._by(lambda words: " ".join(sorted(words)))
        members: dict[str, list[int]] = defaultdict(list)
        for i, glyph in enumerate(self.glyphs):
            for word in {*words_of(glyph), *style_of(glyph)}:
                members[word].append(i)
        self.words = [group for group in members.values() if len(group) >= COMMON]
        self.has_word = torch.zeros(len(self.glyphs), len(self.words), dtype=torch.bool)
        for column, group in enumerate(self.words):
            self.has_word[group, column] = True
        self.word_count = len(self.words) + len(self.rarities.names)

    def reseed(self, seed: int) -> None:
        """Draw from here on as this seed says, so that each stage is the same however the ones before it went."""
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)

    def _by(self, key: Any) -> list[list[int]]:
        groups: dict[str, list[int]] = defaultdict(list)
        for i, glyph in enumerate(self.glyphs):
            if (group := key(words_of(glyph))) is not None:
                groups[group].append(i)
        return list(groups.values())

    def _draw(self, groups: list[list[int]]) -> list[int]:
        """One glyph from each of a batch of groups, large groups more often."""
        order = sorted(groups, key=lambda group: self.rng.random() ** (1 / len(group)), reverse=True)
        return [self.rng.choice(group) for group in order[:BATCH]]

    def word_batch(self, size: int, share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures (n, 3, size, size), a word of each (n,) int64, and the words (n, words) bool not to rank it among.

        share: of the stage that is done; pictures begin plain and grow more varied.
        """
        weights = [len(group) ** 0.5 for group in self.words]
        targets = self.rng.choices(range(len(self.words)), weights, k=BATCH - RARE_WORDS)
        chosen = [self.rng.choice(self.words[target]) for target in targets]
        rare, named = self.rarities.draw(RARE_WORDS, self.rng)
        ease = max(0.0, 1 - share / EASY)
        pairs = LIGHT_ON_DARK if self.rng.random() < ease else PAIRS
        drawings = torch.cat([self.drawings[chosen], rare])
        pictures, _ = paint(drawings, size, self.generator, reduced(VARIATION, 1 - ease), pairs)
        others = torch.zeros(BATCH, self.word_count, dtype=torch.bool)
        others[: len(chosen), : len(self.words)] = self.has_word[chosen]
        others[: len(chosen), len(self.words) :] = True  # icons and the rest are told apart among themselves
        others[len(chosen) :, : len(self.words)] = True
        labels = torch.tensor([*targets, *(len(self.words) + i for i in named)])
        others[torch.arange(BATCH), labels] = False
        return normalize(pictures), labels, others

    def batch(self, size: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (n, 3, size, size) normalised, and token ids (n, longest) int64 padded with 0.

        share: of the stage that is done; early captions are short and name one word.
        """
        early, kind = share < EARLY, self.rng.random()
        if kind < 0.5:
            chosen, part = self._draw(self.heads), "head"
        elif kind < 0.7:
            chosen, part = self._draw(self.badges), "badge"
        else:
            chosen, part = [self.rng.choice(group) for group in self.rng.sample(self.names, BATCH)], "all"
        rare, said_of_rare = self.rarities.say(RARE, self.rng)
        chosen = chosen[: BATCH - RARE]
        drawings = torch.cat([self.drawings[chosen], rare])
        pictures, colors = paint(drawings, size, self.generator, VARIATION)
        most = 0 if early else self.rng.choice((0, 4, 10, MAX_FILLERS))
        sentences = []
        for i, (front, ground) in zip(chosen, colors.tolist(), strict=False):
            said = "all" if part == "head" and not early and self.rng.random() < 0.4 else part
            named = (NAMES[front], NAMES[ground])
            phrase = caption(self.glyphs[i], said, named, most > 0, self.rng)
            sentences.append(sentence(phrase, most, self.rng))
        sentences += [sentence(phrase, most, self.rng) for phrase in said_of_rare]
        longest = max(map(len, sentences))
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sentences])
        return normalize(pictures), padded


def normalize(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in 0..1 with CLIP's mean and spread taken out, as open_clip's transforms do."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    return (pictures - mean) / torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]


def reduced(variation: Variation, share: float) -> Variation:
    """Only ``share`` of the variation: 0 is upright, centered, full size and without noise."""
    low, high = (1 + share * (end - 1) for end in variation.scale)
    return Variation(
        variation.rotation * share, (low, high), variation.shift * share, variation.noise * share
    )
