"""Opening a checkpoint: what it says of itself, and what its configuration tells."""

from __future__ import annotations

import json

import pytest
import synthetic
import tiny
import torch

from kifmerge.errors import CheckpointError
from kifmerge.models.model import LoraOptions, ModelOptions, load_model
from kifmerge.models.opening import open_model, parted, saved_section
from kifmerge.models.scratch import make_base
from kifmerge.models.tokenizer import TokenizerOptions


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Options of an encoder from scratch."""
    folder = tmp_path_factory.mktemp("base") / "base"
    options = ModelOptions(**{**synthetic.MODEL, "tokenizer": TokenizerOptions()})
    return make_base(options, ["red green blue"], folder, seed=0)


@pytest.fixture
def adapter(base, tmp_path):
    """A checkpoint of ours: an adapter and a head of two labels."""
    lora = LoraOptions(targets=["query", "value"], rank=2, alpha=6)
    options = ModelOptions(
        kind="classifier", reference=base.reference, pooling="mean", max_tokens=7, lora=lora
    )
    loaded = load_model(options, ["b", "a"], seed=3)
    loaded.save(tmp_path / "adapter")
    return tmp_path / "adapter", tiny.trained(loaded.model)


class TestSection:
    @pytest.mark.parametrize(
        ("make", "kind"),
        [(tiny.llama, "causal-lm"), (tiny.t5, "seq2seq-lm"), (tiny.bert, "classifier")],
    )
    def test_kind_of_a_stranger_is_read_from_its_configuration(self, tmp_path, make, kind):
        make().save_pretrained(tmp_path)
        section = saved_section(str(tmp_path), None)
        assert section == {"kind": kind, "reference": str(tmp_path), "lora": None}

    def test_bare_encoder_has_no_kind(self, base):
        assert "kind" not in saved_section(base.reference, None)

    def test_adapter_of_ours_says_all(self, base, adapter):
        section = saved_section(base.reference, str(adapter[0]))
        assert (section["kind"], section["pooling"], section["max_tokens"]) == (
            "classifier",
            "mean",
            7,
        )
        lora = section["lora"]
        assert (lora["rank"], lora["alpha"], sorted(lora["targets"])) == (2, 6, ["query", "value"])

    def test_adapter_of_a_stranger(self, tmp_path):
        tiny.llama().save_pretrained(tmp_path / "base")
        tiny.lora_llama().save_pretrained(tmp_path / "adapter")
        section = saved_section(str(tmp_path / "base"), str(tmp_path / "adapter"))
        assert (section["kind"], section["lora"]["rank"]) == ("causal-lm", 2)

    def test_folder_that_is_no_adapter(self, base, tmp_path):
        with pytest.raises(CheckpointError, match=r"is no adapter: expected .*adapter_config.json"):
            saved_section(base.reference, str(tmp_path))

    def test_adapter_of_another_method(self, base, adapter):
        config = adapter[0] / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}))
        with pytest.raises(CheckpointError, match="expected a LoRA adapter, found IA3"):
            saved_section(base.reference, str(adapter[0]))

    def test_no_such_model(self, tmp_path):
        with pytest.raises(CheckpointError, match="cannot load the model"):
            saved_section(str(tmp_path / "nowhere"), None)


class TestParted:
    def test_adapter_names_its_base(self, base, adapter):
        assert parted(str(adapter[0]), None) == (base.reference, str(adapter[0]))

    def test_base_stays_a_base(self, base):
        assert parted(base.reference, None) == (base.reference, None)
        assert parted(base.reference, "other") == (base.reference, "other")

    def test_adapter_on_an_adapter(self, adapter):
        with pytest.raises(CheckpointError, match="is an adapter itself"):
            parted(str(adapter[0]), "other")

    def test_base_of_a_strangers_adapter(self, adapter):
        (adapter[0] / "kifmerge.json").unlink()
        config = adapter[0] / "adapter_config.json"
        content = json.loads(config.read_text())
        config.write_text(json.dumps({**content, "base_model_name_or_path": "org/base"}))
        assert parted(str(adapter[0]), None) == ("org/base", str(adapter[0]))
        config.write_text(
            json.dumps({**content, "base_model_name_or_path": "org/base", "revision": "v1"})
        )
        assert parted(str(adapter[0]), None) == ("org/base@v1", str(adapter[0]))
        config.write_text(json.dumps({**content, "base_model_name_or_path": None}))
        with pytest.raises(CheckpointError, match="names no base model"):
            parted(str(adapter[0]), None)


class TestOpening:
    def test_adapter_comes_back_with_its_head(self, base, adapter):
        folder, weights = adapter
        options = ModelOptions(
            kind="classifier",
            reference=base.reference,
            pooling="mean",
            lora=LoraOptions(targets=[]),
        )
        loaded = open_model(options, str(folder))
        assert loaded.labels == ["b", "a"]
        assert tiny.same(tiny.trained(loaded.model), weights)

    def test_head_grows_by_further_labels(self, base, adapter):
        options = ModelOptions(
            kind="classifier",
            reference=base.reference,
            pooling="mean",
            lora=LoraOptions(targets=[]),
        )
        loaded = open_model(options, str(adapter[0]), ["c"])
        assert loaded.labels == ["b", "a", "c"]

    def test_whole_classifier_of_ours(self, base, tmp_path):
        options = ModelOptions(kind="classifier", reference=base.reference, pooling="mean")
        made = load_model(options, ["x", "y", "z"], seed=1)
        made.save(tmp_path / "made")
        section = saved_section(str(tmp_path / "made"), None)
        loaded = open_model(ModelOptions(**section), None)
        assert loaded.labels == ["x", "y", "z"]
        assert tiny.same(tiny.trained(loaded.model), tiny.trained(made.model))

    def test_stock_classifier_keeps_its_head(self, base, tmp_path):
        model = tiny.bert()
        model.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
        model.save_pretrained(tmp_path)
        load_model(base, ["any"], seed=0).tokenizer.save_pretrained(tmp_path)
        loaded = open_model(ModelOptions(kind="classifier", reference=str(tmp_path)))
        assert loaded.labels == ["no", "maybe", "yes"]
        assert torch.equal(loaded.model.classifier.weight, model.classifier.weight)
