"""Tiny tokenizers in Hugging Face's format: a word per token, with the special tokens of known families."""

from __future__ import annotations

from pathlib import Path

# In the order of their ids; what is put around a text ("$A"); what pads.
FAMILIES = {
    "xlm-v": (["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", "<pad>"),
    "mt5": (["<pad>", "</s>", "<unk>"], "$A </s>", "<pad>"),
    "clip": (["<unk>", "<start>", "<end>"], "<start> $A <end>", "<end>"),  # padded with its end token
    "siglip": (["<unk>", "</s>"], "$A </s>", "</s>"),  # padded with its end token
    "nllb": (["<s>", "<pad>", "</s>", "<unk>", "eng_Latn"], "eng_Latn $A </s>", "<pad>"),
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
    separator = {"sep_token": "[SEP]"} if "[SEP]" in special else {}  # CLIPA's towers replace it
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, pad_token=pad, **separator)
    fast.save_pretrained(str(folder))
    return len(ids)


def write_pieces(folder: Path, words: list[str] = WORDS) -> int:
    """Write a tokenizer of RoBERTa's kind, where a word behind a space is another token than one at the beginning."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([f"{word} {word} X Q" for word in [*words, "X"] * 3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    fast.save_pretrained(str(folder))
    return tokenizer.get_vocab_size()
