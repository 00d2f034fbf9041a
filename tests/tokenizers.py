"""Tiny tokenizers in Hugging Face's format: a word per token, with the special tokens of known families."""

from __future__ import annotations

from pathlib import Path

# In the order of their ids; what is put around a text ("$A"); what pads.
FAMILIES = {
    "xlm-v": (["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", "<pad>"),
    "mt5": (["<pad>", "</s>", "<unk>"], "$A </s>", "<pad>"),
    "clip": (["<unk>", "<start>", "<end>"], "<start> $A <end>", "<end>"),  # padded with its end token
    "bert": (["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]", "[PAD]"),
}
WORDS = [".", ",", "photo", "this", "a", "the", "of", "cat", "dog", "fish", "lion", "sea", "old", "very"]


def write_tokenizer(folder: Path, family: str, words: list[str] = WORDS) -> int:
    """Write a family's tokenizer of these words to ``folder``; returns the size of its vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special, template, pad = FAMILIES[family]
    ids = {word: number for number, word in enumerate([*special, *words])}
    unknown = next(word for word in special if "unk" in word.lower())
    tokenizer = Tokenizer(WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = Whitespace()
    around = [(word, ids[word]) for word in template.split() if word != "$A"]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=around)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, pad_token=pad)
    fast.save_pretrained(str(folder))
    return len(ids)
