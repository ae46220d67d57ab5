"""From examples to token ids: what a model is shown, and what it is to answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from kifmerge.models.data import Example
from kifmerge.models.model import LoadedModel

IGNORED = -100  # label of positions without loss
Features = dict[str, Any]

_ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def training_features(loaded: LoadedModel, examples: Sequence[Example]) -> list[Features]:
    """Features with labels, one per example; the loss of language models is on the answer only."""
    if not examples:
        return []
    kind = loaded.options.kind
    if kind == "classifier":
        index = {label: number for number, label in enumerate(loaded.labels)}
        return [
            {**row, "labels": index[example.output]}
            for row, example in zip(prompt_features(loaded, examples), examples, strict=True)
        ]
    rows = prompt_features(loaded, examples)
    answers = [_answer_ids(loaded, example) for example in examples]
    if kind == "seq2seq-lm":
        return [{**row, "labels": answer} for row, answer in zip(rows, answers, strict=True)]
    return [
        {
            "input_ids": row["input_ids"] + answer,
            "attention_mask": [1] * (len(row["input_ids"]) + len(answer)),
            "labels": [IGNORED] * len(row["input_ids"]) + answer,
        }
        for row, answer in zip(rows, answers, strict=True)
    ]


def prompt_features(loaded: LoadedModel, examples: Sequence[Example]) -> list[Features]:
    """Token ids of what the model is given, cut to ``max_tokens``."""
    texts = [prompt(loaded, example) for example in examples]
    encoded = loaded.tokenizer(
        texts,
        truncation=True,
        max_length=loaded.options.max_tokens,
        padding=False,
        # A chat template writes them itself.
        add_special_tokens=loaded.options.template != "chat",
    )
    names = ("input_ids", "attention_mask")
    return [{name: encoded[name][row] for name in names} for row in range(len(texts))]


def prompt(loaded: LoadedModel, example: Example) -> str:
    """The text a model is given: a classifier sees the input alone."""
    if loaded.options.kind == "classifier":
        return example.input
    if loaded.options.template == "alpaca":
        return _ALPACA.format(instruction=example.instruction.strip(), input=example.input.strip())
    if loaded.options.template == "chat":
        messages = [dict(message) for message in example.messages] or [
            {"role": "user", "content": example.instruction + example.input}
        ]
        return str(
            loaded.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )
    return example.instruction + example.input


def _answer_ids(loaded: LoadedModel, example: Example) -> list[int]:
    """Token ids of the answer and the end token; a space parts it from a plain prompt's word."""
    continues = loaded.options.kind == "causal-lm" and loaded.options.template == "plain"
    given = prompt(loaded, example)
    separator = " " if continues and given and not given[-1].isspace() else ""
    ids: list[int] = loaded.tokenizer(separator + example.output, add_special_tokens=False)[
        "input_ids"
    ]
    end = loaded.tokenizer.eos_token_id
    return [*ids[: loaded.options.max_output_tokens - 1], end]


def collator(loaded: LoadedModel) -> Callable[[list[Features]], Features]:
    """Pads the features of one batch to its longest row."""
    if loaded.options.kind == "classifier":
        return DataCollatorWithPadding(loaded.tokenizer)
    return DataCollatorForSeq2Seq(loaded.tokenizer, label_pad_token_id=IGNORED)
