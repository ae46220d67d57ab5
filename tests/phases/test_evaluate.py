"""Predictions in the order of their rows, whatever the batches; scores worked by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.models.data import Example
from kifmerge.models.model import ModelOptions, load_model
from kifmerge.models.scratch import make_base
from kifmerge.models.tokenizer import TokenizerOptions
from kifmerge.phases.evaluate import (
    Prediction,
    predict,
    read_predictions,
    score_predictions,
    write_predictions,
)

WORDS = ["red", "blue", "green", "yellow", "black", "white", "grey", "pink", "brown", "violet"]
# Of many lengths, longest neither first nor last.
EXAMPLES = [
    Example(f"row-{n}", "", " ".join(WORDS[n % 4 : n % 4 + 1 + (5 * n) % 7]), "cd"[n % 2])
    for n in range(11)
]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "classifier": {
        "model_type": "bert",
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        **SIZES,
    },
    "llama": {
        "model_type": "llama",
        "intermediate_size": 24,
        "max_position_embeddings": 96,
        **SIZES,
    },
    "t5": {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
    },
    # Absolute positions: padding on the left would move every word of an encoder's input.
    "bart": {
        "model_type": "bart",
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 96,
    },
}
KINDS = {"llama": "causal-lm", "t5": "seq2seq-lm", "bart": "seq2seq-lm"}


@pytest.fixture(scope="module", params=list(CONFIGS))
def loaded(request, tmp_path_factory):
    kind = KINDS.get(request.param, "classifier")
    options = ModelOptions(
        kind=kind,
        config=CONFIGS[request.param],
        pooling="mean" if kind == "classifier" else "own",
        tokenizer=TokenizerOptions(
            kind="words" if kind == "classifier" else "bytes", vocabulary_size=300
        ),
        dropout=0.0,
        max_output_tokens=6,
    )
    folder = tmp_path_factory.mktemp("base") / "base"
    options = make_base(options, [e.input for e in EXAMPLES], folder, seed=0)
    made = load_model(options, ["a", "b", "c", "d"], seed=0)
    # Random weights of the usual size answer everything alike; larger ones do not.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if kind == "classifier":
            texts = [e.input for e in EXAMPLES]
            batch = made.tokenizer(texts, padding=True, return_tensors="pt")
            made.model.eval()
            mean = made.model(batch["input_ids"], batch["attention_mask"]).logits.mean(0)
            made.model.classifier.bias.sub_(mean)  # now no label is every row's best
    return made


class TestPredict:
    def test_batch_size_changes_nothing(self, loaded):
        one_by_one = predict(loaded, EXAMPLES, ["c", "d"], batch_size=1)
        assert len({p.prediction for p in one_by_one}) > 1
        for batch_size in (4, 11, 50):
            assert predict(loaded, EXAMPLES, ["c", "d"], batch_size=batch_size) == one_by_one

    def test_order_is_that_of_the_rows(self, loaded):
        found = predict(loaded, EXAMPLES, ["c", "d"], batch_size=4)
        assert [p.id for p in found] == [e.id for e in EXAMPLES]
        assert [p.reference for p in found] == [e.output for e in EXAMPLES]
        backwards = predict(loaded, EXAMPLES[::-1], ["c", "d"], batch_size=4)
        assert backwards == found[::-1]

    def test_is_told_of_every_batch(self, loaded):
        counts = []
        predict(loaded, EXAMPLES, [], batch_size=4, on_batch=counts.append)
        assert counts == [4, 4, 3]

    def test_own_labels_are_a_classifier_s(self, loaded):
        found = predict(loaded, EXAMPLES, ["c", "d", "unheard of"], batch_size=4)
        if loaded.options.kind != "classifier":
            assert {p.own_prediction for p in found} == {None}
            return
        assert {p.own_prediction for p in found} <= {"c", "d"}
        assert {p.prediction for p in found} - {"c", "d"}
        for p in found:
            assert p.own_prediction == p.prediction or p.prediction not in ("c", "d")

    def test_leaves_the_model_evaluating_and_the_generator_alone(self, loaded):
        loaded.model.train()
        before = torch.random.get_rng_state()
        predict(loaded, EXAMPLES[:2], [], batch_size=2)
        assert not loaded.model.training
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_own_labels_unknown_to_the_head(self, loaded):
        found = predict(loaded, EXAMPLES[:3], ["x", "y"], batch_size=2)
        assert [p.own_prediction for p in found] == [None] * 3


def scored(pairs, metric="exact-match"):
    rows = [Prediction(str(n), *pair) for n, pair in enumerate(pairs)]
    return score_predictions(rows, metric)


class TestScores:
    def test_exact_match_is_trimmed_and_lower_cased(self):
        pairs = [(" Yes\n", "yes"), ("YES", "Yes "), ("yes.", "yes"), ("", "yes")]
        assert scored(pairs) == {"score": 0.5}

    @pytest.mark.parametrize(
        ("prediction", "reference", "expected"),
        [
            # The longest common subsequence has 3 of 4 and 3 of 6 words: 2 * 3 / (4 + 6).
            ("the cat the mat", "the cat sat on the rug", 0.6),
            # Order counts: 1 of 2 and 1 of 2.
            ("b a", "a b", 0.5),
            ("Same Words!", "same words", 1.0),
            ("nothing", "alike here", 0.0),
            ("", "empty", 0.0),
        ],
    )
    def test_rouge_l(self, prediction, reference, expected):
        assert scored([(prediction, reference)], "rouge-l")["score"] == pytest.approx(expected)

    def test_rouge_l_is_a_mean_over_rows(self):
        pairs = [("a b", "a b"), ("b a", "a b"), ("c", "a b")]
        assert scored(pairs, "rouge-l") == {"score": pytest.approx(0.5)}

    def test_own_labels(self):
        pairs = [("x", "a", "a"), ("a", "a", "a"), ("x", "a", "b"), ("x", "a", "b")]
        assert scored(pairs) == {"score": 0.25, "own_labels_score": 0.5}


texts = st.text(max_size=20)


class TestFile:
    @given(st.lists(st.builds(Prediction, texts, texts, texts, st.none() | texts)))
    def test_round_trip(self, tmp_path_factory, predictions):
        path = tmp_path_factory.mktemp("kept") / "task.jsonl"
        write_predictions(path, predictions)
        assert read_predictions(path) == predictions
