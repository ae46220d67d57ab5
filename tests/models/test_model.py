"""Models from scratch, saved and loaded again, with heads that grow and adapters that fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from kifmerge.errors import CheckpointError
from kifmerge.models.data import Example
from kifmerge.models.encode import collator, prompt_features, training_features
from kifmerge.models.model import LoraOptions, ModelOptions, known_labels, load_model
from kifmerge.models.scratch import make_base
from kifmerge.models.tokenizer import TokenizerOptions, train_tokenizer

TEXTS = ["the red fox runs", "a blue bird sings", "one small green frog jumps", "yes", "no"]
EXAMPLES = [Example(str(n), "", text, "ab"[n % 2]) for n, text in enumerate(TEXTS)]
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    },
    "t5": {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
    },
}
MADE = {
    "mean": ModelOptions(kind="classifier", config=CONFIGS["bert"], pooling="mean", dropout=0.0),
    "normalised-mean": ModelOptions(
        kind="classifier", config=CONFIGS["bert"], pooling="normalised-mean", dropout=0.0
    ),
    "own": ModelOptions(kind="classifier", config=CONFIGS["bert"], pooling="own", dropout=0.0),
    "llama-own": ModelOptions(kind="classifier", config=CONFIGS["llama"]),
    "causal-lm": ModelOptions(
        kind="causal-lm",
        config=CONFIGS["llama"],
        tokenizer=TokenizerOptions(kind="bytes", vocabulary_size=300),
    ),
    "seq2seq-lm": ModelOptions(
        kind="seq2seq-lm",
        config=CONFIGS["t5"],
        tokenizer=TokenizerOptions(kind="bytes", vocabulary_size=300),
        dropout=0.0,
    ),
}
TARGETS = {
    "mean": ["query", "value"],
    "normalised-mean": ["query", "value"],
    "own": ["query", "value"],
    "llama-own": ["q_proj", "v_proj"],
    "causal-lm": ["q_proj", "v_proj"],
    "seq2seq-lm": ["q", "v"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Options with a base on disk, by name; ``lora`` ones with an adapter on top."""
    folder = tmp_path_factory.mktemp("bases")
    made = {name: make_base(o, TEXTS, folder / name, seed=0) for name, o in MADE.items()}
    for name in list(made):
        lora = LoraOptions(targets=TARGETS[name], rank=2, alpha=4, dropout=0.0)
        made[f"{name} lora"] = dataclasses.replace(made[name], lora=lora)
    return made


def logits(loaded) -> torch.Tensor:
    loaded.model.eval()
    batch = loaded.tokenizer.pad(prompt_features(loaded, EXAMPLES), return_tensors="pt")
    if loaded.options.kind == "seq2seq-lm":
        batch["decoder_input_ids"] = torch.zeros(len(EXAMPLES), 1, dtype=torch.long)
    with torch.no_grad():
        return loaded.model(**batch).logits


def loss(loaded) -> torch.Tensor:
    return loaded.model(**collator(loaded)(training_features(loaded, EXAMPLES))).loss


def spoil(loaded) -> None:
    """Move every trainable weight away from where it was loaded."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)


def heads(loaded) -> dict[str, torch.Tensor]:
    """Weights and biases of every classification head."""
    return {
        name: p.detach().clone()
        for name, p in loaded.model.named_parameters()
        if {"classifier", "score"} & set(name.split("."))
    }


ALL = [name + lora for name in MADE for lora in ("", " lora")]
CLASSIFIERS = [name for name in ALL if "lm" not in name]


class TestScratch:
    @pytest.mark.parametrize("name", list(MADE))
    def test_is_an_ordinary_checkpoint(self, bases, name):
        config = json.loads((Path(bases[name].reference) / "config.json").read_text())
        assert config["model_type"] == MADE[name].config["model_type"]
        loaded = load_model(bases[name], ["a", "b"], seed=0)
        assert config["vocab_size"] == len(loaded.tokenizer)
        assert loaded.tokenizer.pad_token_id == 0
        assert loaded.tokenizer.eos_token_id == 1

    @pytest.mark.parametrize("name", ["mean", "causal-lm"])
    def test_depends_on_the_seed_alone(self, bases, tmp_path, name):
        for seed, expected in ((0, True), (1, False)):
            again = make_base(MADE[name], TEXTS, tmp_path / str(seed), seed=seed)
            one, two = (load_model(o, ["a", "b"], seed=0) for o in (bases[name], again))
            assert torch.equal(logits(one), logits(two)) == expected

    def test_is_made_once(self, bases):
        again = make_base(MADE["mean"], ["other"], Path(bases["mean"].reference), seed=9)
        assert again == bases["mean"]

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"model_type": "brt"}, "brt"),
            ({"hidden_size": "wide"}, "wide"),
            ({"num_attention_heads": 3}, "heads"),
        ],
    )
    def test_configuration_that_cannot_be(self, tmp_path, change, words):
        options = dataclasses.replace(MADE["mean"], config={**CONFIGS["bert"], **change})
        with pytest.raises(CheckpointError, match=words):
            make_base(options, TEXTS, tmp_path / "base", seed=0)
        assert list(tmp_path.iterdir()) == []

    def test_tokenizer_that_cannot_be_loaded(self, tmp_path):
        options = dataclasses.replace(MADE["mean"], tokenizer="none/such")
        with pytest.raises(CheckpointError, match="none/such"):
            make_base(options, TEXTS, tmp_path / "base", seed=0)

    @pytest.mark.parametrize("num_labels", [1, 2, 4])
    @pytest.mark.parametrize("name", ["mean", "own", "llama-own"])
    def test_any_number_of_labels(self, bases, name, num_labels):
        loaded = load_model(bases[name], list("abcd")[:num_labels], seed=0)
        assert logits(loaded).shape == (len(EXAMPLES), num_labels)


class TestSaveAndLoad:
    @pytest.mark.parametrize("name", ALL)
    def test_logits_are_equal(self, bases, tmp_path, name):
        loaded = load_model(bases[name], ["a", "b"], seed=0)
        spoil(loaded)
        expected = logits(loaded)
        loaded.save(tmp_path / "saved")
        again = load_model(bases[name], ["a", "b"], seed=5, checkpoint=tmp_path / "saved")
        assert torch.equal(logits(again), expected)
        assert again.labels == loaded.labels
        trainable = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
        assert {n for n, p in again.model.named_parameters() if p.requires_grad} == trainable

    @pytest.mark.parametrize("name", ["mean", "mean lora", "causal-lm"])
    def test_saving_again_gives_the_same_bytes(self, bases, tmp_path, name):
        loaded = load_model(bases[name], ["a", "b"], seed=0)
        loaded.save(tmp_path / "one")
        load_model(bases[name], ["a", "b"], seed=5, checkpoint=tmp_path / "one").save(
            tmp_path / "two"
        )
        (weights,) = (tmp_path / "one").glob("*.safetensors")
        assert weights.read_bytes() == (tmp_path / "two" / weights.name).read_bytes()

    @pytest.mark.parametrize("name", ["mean", "mean lora"])
    def test_provenance(self, bases, tmp_path, name):
        load_model(bases[name], ["a", "b"], seed=0).save(tmp_path)
        provenance = json.loads((tmp_path / "kifmerge.json").read_text())
        assert provenance["format"] == "kifmerge.checkpoint"
        section = provenance["model"]
        assert (section["kind"], section["pooling"]) == ("classifier", "mean")
        assert section["reference"] == bases[name].reference
        assert known_labels(tmp_path) == ["a", "b"]

    def test_dropout_is_set_everywhere(self, bases):
        options = dataclasses.replace(bases["own"], dropout=0.25)
        model = load_model(options, ["a", "b"], seed=0).model
        rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        assert rates == {0.25}

    def test_mean_pooling_leaves_padding_out(self, bases):
        loaded = load_model(bases["mean"], ["a", "b"], seed=0)
        together = logits(loaded)
        for row, example in enumerate(EXAMPLES):
            batch = loaded.tokenizer(example.input, return_tensors="pt")
            batch.pop("token_type_ids", None)
            with torch.no_grad():
                alone = loaded.model(**batch).logits[0]
            assert torch.allclose(alone, together[row], atol=1e-6)

    def test_normalised_mean_does_not_depend_on_the_scale_of_the_encoder(self, bases):
        loaded = load_model(bases["normalised-mean"], ["a", "b"], seed=0)
        before = logits(loaded)
        norm = loaded.model.encoder.encoder.layer[-1].output.LayerNorm
        with torch.no_grad():
            norm.weight.mul_(8.0)
            norm.bias.mul_(8.0)
        assert torch.allclose(logits(loaded), before, atol=1e-4)


class TestHead:
    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_grows_and_keeps_its_rows(self, bases, name):
        loaded = load_model(bases[name], ["a", "b"], seed=0)
        spoil(loaded)
        before, old_logits = heads(loaded), logits(loaded)
        loaded.grow_labels(["b", "c", "a", "d", "e"], seed=3)
        assert loaded.labels == ["a", "b", "c", "d", "e"]
        after = heads(loaded)
        assert after.keys() == before.keys()
        assert len(after) >= (2 if "lora" in name and "llama" not in name else 1)
        for key, value in after.items():
            assert value.shape[0] == 5
            assert torch.equal(value[:2], before[key])
            if value.dim() == 1:
                assert not value[2:].any()
            else:
                assert 0.001 < value[2:].std() < 0.1
        # A wider matrix may add up in another order.
        assert torch.allclose(logits(loaded)[:, :2], old_logits, atol=1e-6)
        assert logits(loaded).shape[1] == 5

    @pytest.mark.parametrize("name", [n for n in CLASSIFIERS if "lora" in n])
    def test_both_copies_under_an_adapter_grow_alike(self, bases, name):
        loaded = load_model(bases[name], ["a", "b"], seed=0)
        loaded.grow_labels(["c"], seed=3)
        weights = [value for value in heads(loaded).values() if value.dim() == 2]
        assert len(weights) == 2
        assert torch.equal(*weights)

    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_trains_after_growing(self, bases, name):
        loaded = load_model(bases[name], ["z", "b"], seed=0)
        before = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
        loaded.grow_labels(["a", "c"], seed=3)
        assert {n for n, p in loaded.model.named_parameters() if p.requires_grad} == before
        loss(loaded).backward()
        trained = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
        head = [p for n, p in trained.items() if {"classifier", "score"} & set(n.split("."))]
        assert all(p.grad is not None and p.grad[:4].any() for p in head)

    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_grown_one_is_saved_and_loaded(self, bases, tmp_path, name):
        loaded = load_model(bases[name], ["a", "b"], seed=0)
        loaded.grow_labels(["c", "d"], seed=3)
        spoil(loaded)
        loaded.save(tmp_path)
        again = load_model(bases[name], ["a"], seed=9, checkpoint=tmp_path)
        assert again.labels == ["a", "b", "c", "d"]
        assert torch.equal(logits(again), logits(loaded))

    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_loading_a_checkpoint_for_more_labels(self, bases, tmp_path, name):
        loaded = load_model(bases[name], ["b", "a"], seed=0)
        spoil(loaded)
        loaded.save(tmp_path)
        again = load_model(bases[name], ["a", "b", "c"], seed=9, checkpoint=tmp_path)
        assert again.labels == ["b", "a", "c"]
        assert torch.allclose(logits(again)[:, :2], logits(loaded), atol=1e-6)

    def test_new_rows_depend_on_the_seed(self, bases):
        grown = []
        for seed in (3, 3, 4):
            loaded = load_model(bases["mean"], ["a", "b"], seed=0)
            loaded.grow_labels(["c"], seed=seed)
            grown.append(heads(loaded)["classifier.weight"][2:])
        assert torch.equal(grown[0], grown[1])
        assert not torch.equal(grown[0], grown[2])

    def test_config_names_the_labels(self, bases):
        loaded = load_model(bases["own"], ["a", "b"], seed=0)
        loaded.grow_labels(["c"], seed=0)
        assert loaded.model.config.id2label == {0: "a", 1: "b", 2: "c"}
        assert loaded.model.config.label2id == {"a": 0, "b": 1, "c": 2}
        assert loaded.model.num_labels == 3

    def test_language_models_have_none(self, bases):
        loaded = load_model(bases["causal-lm"], ["a", "b"], seed=0)
        before = tiny.trained(loaded.model)
        loaded.grow_labels(["c"], seed=0)
        assert loaded.labels == []
        assert tiny.same(tiny.trained(loaded.model), before)

    def test_published_head_for_other_labels_is_replaced(self, bases, tmp_path):
        """A classifier from the Hub is a base like any other: its head is of no use."""
        load_model(bases["own"], ["a", "b"], seed=0).save(tmp_path)
        options = dataclasses.replace(bases["own"], reference=str(tmp_path))
        loaded = load_model(options, ["x", "y", "z"], seed=0)
        assert logits(loaded).shape[1] == 3


class TestRefusals:
    @pytest.mark.parametrize("targets", [["q_proj", "w"], r".*\.attn\..*"])
    def test_targets_that_match_nothing(self, bases, targets):
        options = dataclasses.replace(bases["mean"], lora=LoraOptions(targets=targets))
        with pytest.raises(CheckpointError) as caught:
            load_model(options, ["a", "b"], seed=0)
        message = str(caught.value)
        assert f"LoRA targets {targets!r} match no module of {options.reference}" in message
        for name in ("query", "key", "value", "dense", "classifier"):
            assert name in message

    @pytest.mark.parametrize(
        ("reference", "words"),
        [
            ("none/such", "none/such: no such folder here; on the Hub, .*HF_HUB_OFFLINE is set"),
            ("none", "cannot load the model none: .*Expected"),
            ("folder", "cannot load the model folder: .*Expected"),
        ],
    )
    @pytest.mark.parametrize("kind", ["causal-lm", "classifier"])
    def test_model_that_is_not_there(self, tmp_path, monkeypatch, reference, kind, words):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder").mkdir()
        with pytest.raises(CheckpointError, match=words):
            load_model(ModelOptions(kind=kind, reference=reference), ["a"], seed=0)

    def test_model_of_another_kind(self, bases):
        options = dataclasses.replace(bases["mean"], kind="seq2seq-lm")
        with pytest.raises(CheckpointError, match="cannot load the model"):
            load_model(options, [], seed=0)

    def test_pickle_is_refused(self, bases, tmp_path):
        loaded = load_model(bases["causal-lm"], [], seed=0)
        loaded.save(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(loaded.model.state_dict(), tmp_path / "pytorch_model.bin")
        options = dataclasses.replace(bases["causal-lm"], reference=str(tmp_path))
        with pytest.raises(CheckpointError, match="safetensors"):
            load_model(options, [], seed=0)

    def test_damaged_weights(self, bases, tmp_path):
        load_model(bases["causal-lm"], [], seed=0).save(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:200])
        options = dataclasses.replace(bases["causal-lm"], reference=str(tmp_path))
        with pytest.raises(CheckpointError, match="cannot load the model"):
            load_model(options, [], seed=0)

    def test_damaged_configuration(self, bases, tmp_path):
        load_model(bases["causal-lm"], [], seed=0).save(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "llama", ')
        options = dataclasses.replace(bases["causal-lm"], reference=str(tmp_path))
        with pytest.raises(CheckpointError, match="cannot load the model"):
            load_model(options, [], seed=0)


class TestTokenizer:
    def test_words_are_lower_cased_and_counted(self):
        options = TokenizerOptions(kind="words", vocabulary_size=5)
        tokenizer = train_tokenizer(["b B a", "a b c"], options, max_tokens=8)
        assert len(tokenizer) == 5
        assert tokenizer("B a c, b")["input_ids"] == [3, 4, 2, 2, 3]

    def test_bytes_can_write_anything(self):
        options = TokenizerOptions(kind="bytes", vocabulary_size=300)
        tokenizer = train_tokenizer(["plain text"], options, max_tokens=8)
        for text in ("héllo wörld", "日本", "a\n\tb  c", "🦊"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
