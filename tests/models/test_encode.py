"""What a model is shown and what it answers: prompts, templates, labels, truncation."""

from __future__ import annotations

import dataclasses

import pytest
from tokenizers.processors import TemplateProcessing

from kifmerge.models.data import Example
from kifmerge.models.encode import (
    IGNORED,
    collator,
    prompt,
    prompt_features,
    training_features,
)
from kifmerge.models.model import LoadedModel, ModelOptions
from kifmerge.models.tokenizer import TokenizerOptions, train_tokenizer

EXAMPLE = Example("1", "Which colour is it?\n", "The sky.\n\nAnswer:", "light blue")
LABELS = ["dark red", "light blue"]
END = 1


@pytest.fixture
def load():
    """Something to encode for: a tokenizer and options, the model itself is not asked."""

    def make(kind, *, bos=False, chat_template=None, **options):
        texts = [EXAMPLE.instruction + EXAMPLE.input + EXAMPLE.output]
        words = TokenizerOptions(kind="bytes", vocabulary_size=400)
        tokenizer = train_tokenizer(texts, words, max_tokens=512)
        if bos:
            tokenizer.add_special_tokens({"bos_token": "<s>"})
            tokenizer._tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
            )
        tokenizer.chat_template = chat_template
        return LoadedModel(None, tokenizer, ModelOptions(kind=kind, **options), LABELS)

    return make


def text_of(loaded, ids) -> str:
    return loaded.tokenizer.decode([i for i in ids if i != IGNORED])


class TestCausal:
    def test_loss_is_on_the_answer_and_its_end(self, load):
        loaded = load("causal-lm")
        (row,) = training_features(loaded, [EXAMPLE])
        num_prompt = len(prompt_features(loaded, [EXAMPLE])[0]["input_ids"])
        assert row["labels"][:num_prompt] == [IGNORED] * num_prompt
        assert row["labels"][num_prompt:] == row["input_ids"][num_prompt:]
        assert row["labels"][-1] == END
        assert text_of(loaded, row["labels"]) == " light blue</s>"
        assert text_of(loaded, row["input_ids"]) == (
            "Which colour is it?\nThe sky.\n\nAnswer: light blue</s>"
        )
        assert row["attention_mask"] == [1] * len(row["input_ids"])

    def test_prompt_is_how_training_rows_begin(self, load):
        loaded = load("causal-lm")
        (row,), (given,) = training_features(loaded, [EXAMPLE]), prompt_features(loaded, [EXAMPLE])
        assert row["input_ids"][: len(given["input_ids"])] == given["input_ids"]

    def test_answer_after_white_space_gets_no_second_one(self, load):
        loaded = load("causal-lm")
        for given in ("Answer:\n", "Answer: ", ""):
            (row,) = training_features(loaded, [Example("1", "", given, "blue")])
            assert text_of(loaded, row["labels"]) == "blue</s>"

    @pytest.mark.parametrize("max_tokens", [1, 4])
    def test_long_prompt_keeps_the_answer(self, load, max_tokens):
        loaded = load("causal-lm", max_tokens=max_tokens)
        (row,) = training_features(loaded, [EXAMPLE])
        assert row["labels"][:max_tokens] == [IGNORED] * max_tokens
        assert text_of(loaded, row["labels"]) == " light blue</s>"

    @pytest.mark.parametrize("kind", ["causal-lm", "seq2seq-lm"])
    def test_long_answer_keeps_its_end(self, load, kind):
        loaded = load(kind, max_output_tokens=3)
        long = dataclasses.replace(EXAMPLE, output="light blue " * 20)
        (row,) = training_features(loaded, [long])
        answer = [i for i in row["labels"] if i != IGNORED]
        assert len(answer) == 3
        assert answer[-1] == END
        assert long.output.startswith(text_of(loaded, answer[:-1]).strip())


class TestSeq2Seq:
    def test_prompt_in_answer_out(self, load):
        loaded = load("seq2seq-lm")
        (row,) = training_features(loaded, [EXAMPLE])
        assert text_of(loaded, row["input_ids"]) == EXAMPLE.instruction + EXAMPLE.input
        assert text_of(loaded, row["labels"]) == "light blue</s>"

    def test_long_prompt_keeps_the_answer(self, load):
        (row,) = training_features(load("seq2seq-lm", max_tokens=2), [EXAMPLE])
        assert len(row["input_ids"]) == 2
        assert row["labels"][-1] == END


class TestClassifier:
    def test_sees_the_input_alone(self, load):
        loaded = load("classifier")
        (row,) = training_features(loaded, [EXAMPLE])
        assert text_of(loaded, row["input_ids"]) == EXAMPLE.input
        assert row["labels"] == 1

    def test_is_cut(self, load):
        (row,) = training_features(load("classifier", max_tokens=3), [EXAMPLE])
        assert len(row["input_ids"]) == len(row["attention_mask"]) == 3


class TestTemplates:
    def test_plain(self, load):
        assert prompt(load("causal-lm"), EXAMPLE) == EXAMPLE.instruction + EXAMPLE.input

    def test_alpaca(self, load):
        given = prompt(load("causal-lm", template="alpaca"), EXAMPLE)
        assert given.startswith("Below is an instruction that describes a task")
        assert given.endswith(
            "### Instruction:\nWhich colour is it?\n\n### Input:\nThe sky.\n\nAnswer:"
            "\n\n### Response:\n"
        )

    def test_alpaca_answer_follows_its_own_line(self, load):
        loaded = load("causal-lm", template="alpaca")
        (row,) = training_features(loaded, [EXAMPLE])
        assert text_of(loaded, row["labels"]) == "light blue</s>"

    CHAT = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )

    def test_chat(self, load):
        loaded = load("causal-lm", template="chat", chat_template=self.CHAT)
        assert prompt(loaded, EXAMPLE) == (
            "[user]Which colour is it?\nThe sky.\n\nAnswer:[assistant]"
        )
        (row,) = training_features(loaded, [EXAMPLE])
        assert text_of(loaded, row["labels"]) == "light blue</s>"

    def test_chat_with_earlier_turns(self, load):
        loaded = load("causal-lm", template="chat", chat_template=self.CHAT)
        turns = ({"role": "system", "content": "a"}, {"role": "user", "content": "b"})
        example = Example("1", "", "b", "c", turns)
        assert prompt(loaded, example) == "[system]a[user]b[assistant]"

    def test_chat_template_that_writes_the_first_token_gets_no_second(self, load):
        loaded = load("causal-lm", bos=True, template="chat", chat_template="<s>" + self.CHAT)
        (row,) = prompt_features(loaded, [EXAMPLE])
        assert row["input_ids"].count(loaded.tokenizer.bos_token_id) == 1

    def test_plain_prompt_gets_the_first_token(self, load):
        loaded = load("causal-lm", bos=True)
        (row,) = training_features(loaded, [EXAMPLE])
        assert row["input_ids"][0] == loaded.tokenizer.bos_token_id
        assert row["input_ids"].count(loaded.tokenizer.bos_token_id) == 1


class TestCollator:
    @pytest.mark.parametrize("kind", ["causal-lm", "seq2seq-lm"])
    def test_pads_to_the_longest(self, load, kind):
        loaded = load(kind)
        rows = training_features(loaded, [EXAMPLE, Example("2", "", "Hi", "ho")])
        longest = max(len(row["labels"]) for row in rows)
        batch = collator(loaded)(rows)
        assert batch["labels"].shape == (2, longest)
        for row, ids, mask, labels in zip(
            rows, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            assert ids[mask.bool()].tolist() == row["input_ids"]
            assert not ids[~mask.bool()].any()
            kept = labels[labels != IGNORED].tolist()
            assert kept == [label for label in row["labels"] if label != IGNORED]

    def test_of_a_classifier_keeps_one_label_a_row(self, load):
        loaded = load("classifier")
        rows = training_features(loaded, [EXAMPLE, Example("2", "", "Hi", "dark red")])
        assert collator(loaded)(rows)["labels"].tolist() == [1, 0]


def test_no_examples_make_no_features(load):
    assert training_features(load("causal-lm"), []) == []
