"""Importance of a model at rest: against plain autograd, under the names of the files."""

from __future__ import annotations

import json
from dataclasses import replace

import oracles
import pytest
import safetensors.torch
import tiny
import torch

from kifmerge.checkpoint.scores import open_scores
from kifmerge.checkpoint.snapshot import read_snapshot
from kifmerge.checkpoint.source import open_source
from kifmerge.errors import CheckpointError, DataError, TrainingError
from kifmerge.models.data import Example
from kifmerge.models.encode import collator, training_features
from kifmerge.models.model import LoraOptions, ModelOptions, load_model
from kifmerge.models.scratch import make_base
from kifmerge.models.tokenizer import TokenizerOptions
from kifmerge.phases.measure import (
    MeasureOptions,
    measure_importance,
    write_measurement,
)

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
        assert found.model_dtype == "bfloat16"
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

    def published(self, tmp_path, tensors):
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        safetensors.torch.save_file(copies, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        return open_source(tmp_path)

    def test_not_in_files_are_recorded(self, load, tmp_path):
        loaded = load("causal-lm")
        kept = {n: p for n, p in loaded.model.named_parameters() if n != "model.norm.weight"}
        files = self.published(tmp_path, kept)
        found = measure_importance(loaded, EXAMPLES, MeasureOptions(), files)
        assert found.not_in_files == ["model.norm.weight"]
        assert "score/model.norm.weight" in found.tensors

    def test_kept_twice_are_scored_twice(self, load, tmp_path):
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


class TestTargets:
    def test_scores_are_those_of_measuring_all(self, loaded):
        every = measure_importance(loaded, EXAMPLES, MeasureOptions(batch_size=3)).tensors
        pattern = "*.0.*bias" if loaded.options.kind == "classifier" else "*.0.*weight"
        options = MeasureOptions(batch_size=3, targets=(pattern, "*[Nn]orm*"))
        found = measure_importance(loaded, EXAMPLES, options).tensors
        assert 0 < len(found) < len(every)
        assert tiny.same(dict(found), {key: every[key] for key in found})
        assert {key for key in every if ".0." in key and key.endswith(pattern[-4:])} <= set(found)

    def test_no_other_gradient_is_made(self, load):
        loaded = load("causal-lm")
        made = []
        for name, parameter in loaded.model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: made.append(name))
        frozen = loaded.model.model.norm.weight.requires_grad_(False)
        options = MeasureOptions(batch_size=7, targets=("*.1.*proj.weight",))
        found = measure_importance(loaded, EXAMPLES, options)
        assert {f"score/{name}" for name in made} == found.tensors.keys()
        assert len(made) == 7
        # What was frozen stays so, and nothing else is.
        assert [p for p in loaded.model.parameters() if not p.requires_grad] == [frozen]

    def test_that_the_loss_does_not_reach(self, load):
        loaded = load("causal-lm")
        loaded.model.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
        options = MeasureOptions(targets=("idle",))
        with pytest.raises(TrainingError, match="depends on none"):
            measure_importance(loaded, EXAMPLES, options)
        found = measure_importance(loaded, EXAMPLES, MeasureOptions(targets=("idle", "*norm*")))
        assert torch.equal(found.tensors["score/idle"], torch.zeros(2))

    def test_without_a_match(self, load):
        options = MeasureOptions(targets=("*norm*", "query"))
        with pytest.raises(CheckpointError, match=r"query: try \*query\*"):
            measure_importance(load("classifier"), EXAMPLES, options)

    def test_are_recorded(self, load, tmp_path):
        options = MeasureOptions(targets=("*norm*", "lm_head.weight"))
        found = measure_importance(load("causal-lm"), EXAMPLES, options)
        write_measurement(tmp_path / "s", found, {})
        details = json.loads((tmp_path / "s/importance.json").read_text())
        assert details["targets"] == ["*norm*", "lm_head.weight"]
        assert len(read_snapshot(tmp_path / "s").names) == 6


class TestExperts:
    @pytest.fixture(scope="class")
    def base(self, tmp_path_factory):
        config = {
            "model_type": "mixtral",
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 96,
            **SIZES,
        }
        words = TokenizerOptions(kind="bytes", vocabulary_size=300)
        options = ModelOptions(
            kind="causal-lm", config=config, tokenizer=words, max_output_tokens=6
        )
        folder = tmp_path_factory.mktemp("experts")
        return make_base(options, [e.input for e in EXAMPLES], folder / "base", seed=0)

    def test_are_scored_one_by_one_as_the_files_keep_them(self, base, tmp_path):
        loaded = load_model(base, [], seed=0)
        loaded.model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
        files = open_source(tmp_path / "m")
        found = measure_importance(loaded, EXAMPLES, MeasureOptions(batch_size=3), files)
        assert found.tensors.keys() == {f"score/{name}" for name in files.names()}
        assert found.not_in_files == []
        write_measurement(tmp_path / "s", found, {})
        scores = open_scores(tmp_path / "s")
        assert all(scores.info(name).shape == files.info(name).shape for name in files.names())
        # By plain autograd on the stacked tensors, taken apart by hand.
        steps = batch_gradients(loaded, EXAMPLES, 3)
        pairs = steps["model.layers.1.mlp.experts.gate_up_proj"]
        stacked = sum(oracles.step_sensitivity(w, g, "first") for w, g in pairs) / 3
        for expert in range(4):
            for part, rows in (("w1", slice(0, 24)), ("w3", slice(24, 48))):
                name = f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight"
                score = found.tensors[f"score/{name}"].double()
                expected = stacked[expert, rows]
                torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-10)
                assert float(expected.sum()) > 0
                kept = scores.read(name, 0, score.numel())
                assert torch.equal(kept.double(), score.reshape(-1))

    def test_may_be_targets(self, base, tmp_path):
        loaded = load_model(base, [], seed=0)
        loaded.model.save_pretrained(tmp_path)
        options = MeasureOptions(targets=("*.experts.3.w2.*",), average="ema")
        found = measure_importance(loaded, EXAMPLES, options, open_source(tmp_path))
        assert sorted(found.tensors) == [
            f"{kind}/model.layers.{layer}.block_sparse_moe.experts.3.w2.weight"
            for kind in ("sensitivity", "uncertainty")
            for layer in range(2)
        ]


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
        match = r"batch 2 cannot be used: w\*g is not finite in lm_head\.weight\."
        with pytest.raises(TrainingError, match=match):
            measure_importance(self.spoilt(load, 2), EXAMPLES, options)

    @pytest.mark.parametrize("average", ["mean", "ema"])
    def test_beginning_anew_is_said_and_gives_the_same(self, load, average):
        said, counts = [], []
        options = MeasureOptions(batch_size=2, average=average)
        found = measure_importance(
            self.spoilt(load, 3),
            EXAMPLES,
            options,
            on_batch=counts.append,
            say=said.append,
        )
        (text,) = said
        assert text == (
            "batch 3 is left out, w*g is not finite in lm_head.weight: measuring anew, which takes "
            "longer"
        )
        assert counts == [2, 2, 2, 1]
        rest = [*EXAMPLES[:4], *EXAMPLES[6:]]
        expected = measure_importance(load("causal-lm"), rest, options)
        assert tiny.same(dict(found.tensors), dict(expected.tensors))

    def test_row_that_overflows_on_the_way_back_alone(self, load):
        loaded = load("causal-lm")
        rows = [row["input_ids"] for row in training_features(loaded, EXAMPLES)]
        seen = [token for row in rows for token in row[:-2]]
        token = next(token for token in seen if sum(token in row for row in rows) < 4)
        with torch.no_grad():  # its norm is infinite, and what is divided by that is zero
            loaded.model.model.embed_tokens.weight[token] = 3e38
        options = MeasureOptions(batch_size=1)
        found = measure_importance(loaded, EXAMPLES, options)
        rest = [e for e, row in zip(EXAMPLES, rows, strict=True) if token not in row]
        assert found.num_skipped == len(EXAMPLES) - len(rest) > 0
        expected = measure_importance(loaded, rest, options)
        assert expected.num_skipped == 0
        assert tiny.same(dict(found.tensors), dict(expected.tensors))

    def test_loss_that_is_not_finite(self, load):
        loaded = load("causal-lm")
        with torch.no_grad():
            loaded.model.model.norm.weight.mul_(1e38)
            loaded.model.lm_head.weight.mul_(1e38)
        said = []
        with pytest.raises(TrainingError, match="of all 4 batches are not finite"):
            measure_importance(loaded, EXAMPLES, MeasureOptions(batch_size=2), say=said.append)
        assert said == []
        options = MeasureOptions(batch_size=2, nonfinite="raise")
        with pytest.raises(TrainingError, match="batch 1 cannot be used: its loss is nan"):
            measure_importance(loaded, EXAMPLES, options)

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_weights_are_refused_by_name(self, load, value, tmp_path):
        loaded = load("causal-lm")
        with torch.no_grad():
            loaded.model.model.norm.weight[3] = value
        with pytest.raises(CheckpointError, match=r"NaN or infinity:\n  - model\.norm\.weight$"):
            measure_importance(loaded, EXAMPLES, MeasureOptions())
        loaded.model.save_pretrained(tmp_path)
        match = rf"model\.norm\.weight in {tmp_path}/model\.safetensors$"
        with pytest.raises(CheckpointError, match=match):
            measure_importance(loaded, EXAMPLES, MeasureOptions(), open_source(tmp_path))
        # What is not looked at may be as it is, if it does no harm.
        with pytest.raises(TrainingError, match="nothing was measured"):
            measure_importance(loaded, EXAMPLES, MeasureOptions(targets=("*.0.*",)))

    def test_nothing_left_is_an_error(self, load):
        options = MeasureOptions(batch_size=4)
        with pytest.raises(TrainingError, match="of all 2 batches are not finite"):
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
        [
            {"average": "median"},
            {"sensitivity": "third"},
            {"nonfinite": "keep"},
            {"batch_size": 0},
            {"dtype": "float16"},
        ],
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
            "targets": [],
            "dtype": "float32",
            "model_dtype": "float32",
            "batch_size": 3,
            "samples": 7,
            "batches": 3,
            "skipped_batches": 0,
            "not_in_files": [],
        }

    def test_half_the_size(self, load, tmp_path):
        loaded = load("causal-lm")
        found = measure_importance(loaded, EXAMPLES, MeasureOptions(dtype="bfloat16"))
        assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
        write_measurement(tmp_path / "s", found, {})
        kept = safetensors.torch.load_file(tmp_path / "s/importance.safetensors")
        expected = {key: value.bfloat16() for key, value in found.tensors.items()}
        assert tiny.same(kept, expected)
        details = json.loads((tmp_path / "s/importance.json").read_text())
        assert (details["dtype"], details["model_dtype"]) == ("bfloat16", "float32")

    @pytest.mark.parametrize("average", ["mean", "ema"])
    def test_shards_are_those_of_the_model(self, loaded, tmp_path, average):
        loaded.model.save_pretrained(tmp_path / "m", max_shard_size="8KB")
        files = open_source(tmp_path / "m")
        assert len(files.files) > 1
        found = measure_importance(loaded, EXAMPLES, MeasureOptions(average=average), files)
        write_measurement(tmp_path / "s", found, {})
        for file, names in files.files.items():
            kept = safetensors.torch.load_file(
                tmp_path / "s" / file.replace("model-", "importance-")
            )
            assert {key.partition("/")[2] for key in kept} == set(names)
            assert all(torch.equal(kept[key], found.tensors[key]) for key in kept)
        assert read_snapshot(tmp_path / "s").names == tuple(sorted(files.names()))

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
