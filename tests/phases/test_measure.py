"""Importance of a model at rest: against plain autograd, under the names of the files."""

from __future__ import annotations

import json
from dataclasses import replace

import oracles
import pytest
import safetensors.torch
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kifmerge.checkpoint.scores import open_scores
from kifmerge.checkpoint.snapshot import read_snapshot
from kifmerge.checkpoint.source import open_source
from kifmerge.errors import DataError, TrainingError
from kifmerge.phases.data import Example
from kifmerge.phases.encode import collator, training_features
from kifmerge.phases.measure import (
    MeasureOptions,
    measure_importance,
    names_in_files,
    write_measurement,
)
from kifmerge.phases.model import LoraOptions, ModelOptions, load_model
from kifmerge.phases.scratch import make_base
from kifmerge.phases.tokenizer import TokenizerOptions

WORDS = ["red", "blue", "green", "yellow", "black", "white"]
EXAMPLES = [
    Example(f"row-{n}", "", " ".join(WORDS[n % 4 : n % 4 + 1 + n % 3]), "ab"[n % 2])
    for n in range(7)
]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "classifier": {
        "model_type": "bert",
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        **SIZES,
    },
    "causal-lm": {
        "model_type": "llama",
        "intermediate_size": 24,
        "max_position_embeddings": 96,
        **SIZES,
    },
    "seq2seq-lm": {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
    },
}
TARGETS = {"classifier": ["query"], "causal-lm": ["q_proj"], "seq2seq-lm": ["q"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    made = {}
    for kind, config in CONFIGS.items():
        words = TokenizerOptions(
            kind="words" if kind == "classifier" else "bytes", vocabulary_size=300
        )
        options = ModelOptions(
            kind=kind,
            config=config,
            pooling="mean" if kind == "classifier" else "own",
            tokenizer=words,
            max_output_tokens=6,
            dropout=0.5,
        )
        made[kind] = make_base(options, [e.input for e in EXAMPLES], folder / kind, seed=0)
    return made


@pytest.fixture(params=list(CONFIGS))
def kind(request):
    return request.param


@pytest.fixture
def load(bases):
    def opened(kind, **changes):
        loaded = load_model(replace(bases[kind], **changes), ["a", "b"], seed=0)
        # Random weights of the usual size have almost the same gradient for every row.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return loaded

    return opened


@pytest.fixture
def loaded(load, kind):
    return load(kind)


def batch_gradients(loaded, examples, batch_size):
    """(weights, gradients) of every batch by plain autograd, per parameter name."""
    loaded.model.eval()
    rows, collate = training_features(loaded, examples), collator(loaded)
    parameters = {n: p for n, p in loaded.model.named_parameters() if p.requires_grad}
    found = {name: [] for name in parameters}
    for start in range(0, len(rows), batch_size):
        batch = dict(collate(rows[start : start + batch_size]))
        loss = loaded.model(**batch).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            unused = torch.zeros_like(parameter)
            found[name].append((parameter.detach(), unused if gradient is None else gradient))
    return found


class TestFigures:
    @pytest.mark.parametrize("sensitivity", ["first", "second", "mixed"])
    def test_mean_over_batches(self, loaded, sensitivity):
        options = MeasureOptions(sensitivity=sensitivity, batch_size=3)
        found = measure_importance(loaded, EXAMPLES, options)
        assert (found.num_samples, found.num_batches, found.num_skipped) == (7, 3, 0)
        steps = batch_gradients(loaded, EXAMPLES, 3)
        assert found.tensors.keys() == {f"score/{name}" for name in steps}
        for name, pairs in steps.items():
            per_batch = [oracles.step_sensitivity(w, g, sensitivity) for w, g in pairs]
            expected = sum(per_batch) / 3
            score = found.tensors[f"score/{name}"]
            torch.testing.assert_close(score.double(), expected, rtol=1e-4, atol=1e-10)
        assert sum(float(score.sum()) for score in found.tensors.values()) > 0

    def test_smoothed_as_in_training(self, loaded):
        options = MeasureOptions(average="ema", batch_size=2)
        found = measure_importance(loaded, EXAMPLES, options)
        for name, pairs in batch_gradients(loaded, EXAMPLES, 2).items():
            sensitivity, uncertainty = oracles.smoothed(pairs)
            for key, expected in (("sensitivity", sensitivity), ("uncertainty", uncertainty)):
                kept = found.tensors[f"{key}/{name}"]
                torch.testing.assert_close(kept.double(), expected, rtol=1e-4, atol=1e-10)

    def test_gradients_are_not_clipped(self, load):
        loaded = load("causal-lm")
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.mul_(3.0)
        pairs = batch_gradients(loaded, EXAMPLES, 7)
        norm = sum(float(g.square().sum()) for [(_, g)] in pairs.values()) ** 0.5
        assert norm > 3.0  # clipping to 1 would be seen
        found = measure_importance(loaded, EXAMPLES, MeasureOptions())
        name, [(weight, gradient)] = next(iter(pairs.items()))
        torch.testing.assert_close(found.tensors[f"score/{name}"], (weight * gradient).abs())

    def test_rows_and_batches_matter_and_repeat(self, loaded):
        def scores(examples, batch_size):
            options = MeasureOptions(batch_size=batch_size)
            tensors = measure_importance(loaded, examples, options).tensors
            return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])

        first = scores(EXAMPLES, 2)
        # Dropout of one half would change every figure.
        assert torch.equal(scores(EXAMPLES, 2), first)
        assert not torch.allclose(scores(EXAMPLES, 7), first, rtol=1e-2)
        assert not torch.allclose(scores(EXAMPLES[:4], 2), first, rtol=1e-2)

    def test_told_of_every_batch(self, loaded):
        counts = []
        measure_importance(loaded, EXAMPLES, MeasureOptions(batch_size=3), on_batch=counts.append)
        assert counts == [3, 3, 1]


class TestModel:
    def test_weights_are_untouched(self, loaded):
        before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
        loaded.model.train()
        measure_importance(loaded, EXAMPLES, MeasureOptions(batch_size=2))
        after = loaded.model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(parameter.grad is None for parameter in loaded.model.parameters())
        assert not loaded.model.training

    def test_no_gradient_is_left_after_an_error(self, load):
        loaded = load("causal-lm")
        tiny.spoil_gradient(loaded.model, "lm_head.weight", 2, float("nan"))
        with pytest.raises(TrainingError):
            measure_importance(loaded, EXAMPLES, MeasureOptions(batch_size=2, nonfinite="raise"))
        assert all(parameter.grad is None for parameter in loaded.model.parameters())

    def test_frozen_parameters_have_no_score(self, load):
        loaded = load("causal-lm")
        for name, parameter in loaded.model.named_parameters():
            parameter.requires_grad_("mlp" in name)
        found = measure_importance(loaded, EXAMPLES, MeasureOptions())
        assert len(found.tensors) == 6
        assert all("mlp" in key for key in found.tensors)

    def test_all_frozen(self, load):
        loaded = load("causal-lm")
        loaded.model.requires_grad_(False)
        with pytest.raises(TrainingError, match="no trainable parameter"):
            measure_importance(loaded, EXAMPLES, MeasureOptions())

    def test_half_precision_is_scored_in_float32(self, load):
        loaded = load("causal-lm")
        loaded.model.bfloat16()
        found = measure_importance(loaded, EXAMPLES, MeasureOptions())
        assert found.dtype == "bfloat16"
        assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}


class TestNames:
    def test_are_those_of_the_files(self, loaded, tmp_path):
        loaded.model.save_pretrained(tmp_path)
        found = measure_importance(loaded, EXAMPLES, MeasureOptions(), open_source(tmp_path))
        kept = safetensors.torch.load_file(tmp_path / "model.safetensors")
        assert {key: tensor.shape for key, tensor in found.tensors.items()} == {
            f"score/{name}": tensor.shape for name, tensor in kept.items()
        }
        assert found.not_in_files == []

    def test_of_an_adapter_are_those_of_the_adapter(self, load, kind, tmp_path):
        loaded = load(kind, lora=LoraOptions(targets=TARGETS[kind], rank=2))
        loaded.model.save_pretrained(tmp_path)
        found = measure_importance(loaded, EXAMPLES, MeasureOptions(), open_source(tmp_path))
        kept = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
        assert found.tensors.keys() == {f"score/{name}" for name in kept}
        assert any("lora_A" in key for key in found.tensors)

    @pytest.fixture
    def gpt2(self):
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8,
            bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        return GPT2LMHeadModel(config)

    def published(self, tmp_path, tensors):
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        safetensors.torch.save_file(copies, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        return open_source(tmp_path)

    def test_of_a_base_without_prefix(self, gpt2, tmp_path):
        files = self.published(tmp_path, dict(gpt2.transformer.named_parameters()))
        found = names_in_files(gpt2, dict(gpt2.named_parameters()), files)
        assert found["transformer.h.0.ln_1.bias"] == ["h.0.ln_1.bias"]
        assert [name for names in found.values() for name in names] == [
            name for name, _ in gpt2.transformer.named_parameters()
        ]

    def test_of_tied_weights_that_are_kept_twice_or_under_the_other_name(self, gpt2, tmp_path):
        tied = {
            "transformer.wte.weight": gpt2.lm_head.weight,
            "lm_head.weight": gpt2.lm_head.weight,
        }
        values = {"transformer.wte.weight": gpt2.lm_head.weight}
        files = self.published(tmp_path, tied)
        assert names_in_files(gpt2, values, files) == {"transformer.wte.weight": list(tied)}
        files = self.published(tmp_path, {"lm_head.weight": gpt2.lm_head.weight})
        assert names_in_files(gpt2, values, files) == {"transformer.wte.weight": ["lm_head.weight"]}

    def test_of_another_shape_or_of_none_are_told(self, gpt2, tmp_path):
        files = self.published(tmp_path, {"lm_head.weight": torch.zeros(2, 3)})
        values = {"transformer.wte.weight": gpt2.lm_head.weight}
        assert names_in_files(gpt2, values, files) == {"transformer.wte.weight": []}

    def test_not_in_files_are_recorded(self, load, tmp_path):
        loaded = load("causal-lm")
        kept = {n: p for n, p in loaded.model.named_parameters() if n != "model.norm.weight"}
        files = self.published(tmp_path, kept)
        found = measure_importance(loaded, EXAMPLES, MeasureOptions(), files)
        assert found.not_in_files == ["model.norm.weight"]
        assert "score/model.norm.weight" in found.tensors

    def test_kept_twice_are_scored_twice(self, gpt2, load, tmp_path):
        loaded = load("causal-lm")
        loaded.model.lm_head.weight = loaded.model.model.embed_tokens.weight
        tied = loaded.model.state_dict(keep_vars=True)
        files = self.published(tmp_path, tied)
        found = measure_importance(loaded, EXAMPLES, MeasureOptions(), files)
        assert found.tensors.keys() == {f"score/{name}" for name in tied}
        assert torch.equal(
            found.tensors["score/lm_head.weight"], found.tensors["score/model.embed_tokens.weight"]
        )
        write_measurement(tmp_path / "snapshot", found, {})
        assert len(read_snapshot(tmp_path / "snapshot").names) == len(tied)


class TestNonfinite:
    def spoilt(self, load, *backwards):
        loaded = load("causal-lm")
        for backward in backwards:
            tiny.spoil_gradient(loaded.model, "lm_head.weight", backward, float("inf"))
        return loaded

    def test_batch_is_left_out_whole_and_counted(self, load):
        found = measure_importance(
            self.spoilt(load, 2), EXAMPLES, MeasureOptions(batch_size=2, nonfinite="skip")
        )
        assert (found.num_samples, found.num_batches, found.num_skipped) == (5, 3, 1)
        rest = [*EXAMPLES[:2], *EXAMPLES[4:]]
        expected = measure_importance(load("causal-lm"), rest, MeasureOptions(batch_size=2))
        assert tiny.same(dict(found.tensors), dict(expected.tensors))

    def test_raise_names_batch_and_parameter(self, load):
        options = MeasureOptions(batch_size=2, nonfinite="raise")
        with pytest.raises(TrainingError, match=r"batch 2 is not finite, in lm_head\.weight\."):
            measure_importance(self.spoilt(load, 2), EXAMPLES, options)

    def test_nothing_left_is_an_error(self, load):
        options = MeasureOptions(batch_size=4)
        with pytest.raises(TrainingError, match="all 2 batches are not finite"):
            measure_importance(self.spoilt(load, 1, 2), EXAMPLES, options)


class TestRefused:
    def test_labels_that_the_model_does_not_know(self, load):
        strange = [*EXAMPLES, Example("x", "", "red", "c")]
        with pytest.raises(DataError, match="labels 'c' are not among those of the model: a, b"):
            measure_importance(load("classifier"), strange, MeasureOptions())
        # To a language model an answer is text.
        assert measure_importance(load("causal-lm"), strange, MeasureOptions()).num_samples == 8

    @pytest.mark.parametrize(
        "options",
        [{"average": "median"}, {"sensitivity": "third"}, {"nonfinite": "keep"}, {"batch_size": 0}],
    )
    def test_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            MeasureOptions(**options)


class TestSnapshot:
    def test_mean_is_read_as_it_is(self, load, tmp_path):
        found = measure_importance(load("causal-lm"), EXAMPLES, MeasureOptions(batch_size=3))
        write_measurement(tmp_path / "s", found, {"model": "org/name"})
        scores = dict(read_snapshot(tmp_path / "s").scores())
        assert tiny.same(scores, {k.partition("/")[2]: v for k, v in found.tensors.items()})
        details = json.loads((tmp_path / "s/importance.json").read_text())
        assert details == {
            "format": "kifmerge.importance",
            "version": 1,
            "model": "org/name",
            "options": {"average": "mean", "sensitivity": "first"},
            "dtype": "float32",
            "batch_size": 3,
            "samples": 7,
            "batches": 3,
            "skipped_batches": 0,
            "not_in_files": [],
        }

    def test_smoothed_one_gives_the_product(self, load, tmp_path):
        options = MeasureOptions(average="ema", sensitivity="mixed")
        found = measure_importance(load("causal-lm"), EXAMPLES, options)
        write_measurement(tmp_path / "s", found, {})
        scores = open_scores(tmp_path / "s")
        name = "lm_head.weight"
        product = found.tensors[f"sensitivity/{name}"] * found.tensors[f"uncertainty/{name}"]
        assert torch.equal(scores.read(name, 0, 10), product.reshape(-1)[:10])
        details = json.loads((tmp_path / "s/importance.json").read_text())
        assert details["options"] == {
            "average": "ema",
            "sensitivity": "mixed",
            "score": "product",
            "betas": [0.85, 0.85],
        }
