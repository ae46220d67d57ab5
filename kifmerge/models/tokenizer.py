"""Tokenizers for models from scratch, trained on the texts of the tasks themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerOptions:
    """A tokenizer to train.

    Attributes:
        kind: ``words``: lower-cased words and marks, the most frequent kept, for classifiers;
            ``bytes``: byte-level BPE, which can write any text, for language models.
        vocabulary_size: at most so many entries, special tokens included.
    """

    kind: Literal["words", "bytes"] = "words"
    vocabulary_size: int = 8192


def train_tokenizer(
    texts: Iterable[str], options: TokenizerOptions, *, max_tokens: int
) -> PreTrainedTokenizerFast:
    """Train a tokenizer; deterministic in the texts. Pad is 0, end 1, unknown 2.

    >>> tokenizer = train_tokenizer(["a b", "b c"], TokenizerOptions(), max_tokens=8)
    >>> tokenizer("b B z")["input_ids"]
    [3, 3, 2]
    """
    special = [PAD, END, UNKNOWN]
    trainer: trainers.Trainer
    if options.kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(
            vocab_size=options.vocabulary_size, special_tokens=special, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=options.vocabulary_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=max_tokens,
    )
