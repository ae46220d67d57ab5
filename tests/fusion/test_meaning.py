"""Whether inputs mean the same: both sides of what differs are said, refused or allowed by name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import typing

import folders
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kifmerge.errors import CheckpointError
from kifmerge.fusion.agreement import open_checkpoint
from kifmerge.fusion.config import config_differences, label_names
from kifmerge.fusion.meaning import MEANINGS, Difference, check_meaning
from kifmerge.fusion.tokens import chat_templates
from kifmerge.models.tokenizer import TokenizerOptions, train_tokenizer

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40,
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "max_position_embeddings": 32,
}  # fmt: skip
TEXTS = ["one two three", "two three four", "Three four five"]


class Folders:
    """Checkpoints of one small shape, and what check_meaning says of them."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, role, *, config=None, tensors=None, **save):
        folders.save(
            self.folder / role,
            folders.random_tensors(0) if tensors is None else tensors,
            config={**CONFIG, **(config or {})},
            **save,
        )
        return self.folder / role

    def write(self, role, name, content):
        path = self.folder / role / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    def check(self, *allowed, roles=("base", "new")):
        check_meaning([open_checkpoint(role, self.folder / role) for role in roles], allowed)

    def refused(self, *texts, allow=(), **others):
        """All of the texts are in the message, and the names that would allow it, and no others."""
        with pytest.raises(CheckpointError, match="these are different models") as caught:
            self.check(**others)
        message = str(caught.value)
        for text in texts:
            assert text in message
        assert set(re.findall(r"--allow (\S+)", message)) == set(allow)
        if allow and "cannot be merged" not in message:
            self.check(*allow, **others)
        for name in allow:
            left = set(allow) - {name}
            with pytest.raises(CheckpointError):
                self.check(*left, **others)
        return message

    def agree(self, **others):
        self.check(**others)


@pytest.fixture
def pair(tmp_path):
    made = Folders(tmp_path)
    made.save("base")
    made.save("new")
    return made


def tokenizer_file(directory, change=lambda content: None, **options):
    """A tokenizer.json of a word-level or byte-level tokenizer, changed as its JSON."""
    made = train_tokenizer(TEXTS, TokenizerOptions(**options), max_tokens=8)
    content = json.loads(made.backend_tokenizer.to_str())
    change(content)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return content


class TestNames:
    def test_every_difference_has_a_meaning(self):
        assert set(MEANINGS) == set(typing.get_args(Difference))

    def test_equal_checkpoints_agree(self, pair):
        pair.agree()


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"hidden_act": "gelu"}, "hidden_act: base 'silu', new 'gelu'"),
            ({"num_attention_heads": 4, "head_dim": 8}, "num_attention_heads: base 2, new 4"),
            ({"rms_norm_eps": 1e-5}, "rms_norm_eps: base 1e-06, new 1e-05"),
            ({"tie_word_embeddings": True}, "tie_word_embeddings: base False, new True"),
            ({"rope_theta": 5e5}, "rope_parameters.rope_theta: base 10000.0, new 500000.0"),
            ({"vocab_size": 41}, "vocab_size: base 40, new 41"),
            ({"max_position_embeddings": 64}, "max_position_embeddings: base 32, new 64"),
            (
                {"rope_scaling": {"type": "linear", "factor": 4.0}},
                "rope_parameters.factor: base nothing, new 4.0",
            ),
            ({"attention_bias": True}, "attention_bias: base False, new True"),
            ({"architectures": ["LlamaModel"]}, "architectures: base ['LlamaForCausalLM']"),
            ({"my_own_switch": 3}, "my_own_switch: base nothing, new 3"),
        ],
        ids=str,
    )
    def test_what_decides_how_weights_are_read(self, pair, changes, text):
        pair.save("new", config=changes)
        pair.refused(text, allow=["config"])

    @pytest.mark.parametrize(
        "changes",
        [
            {"_name_or_path": "x", "transformers_version": "4.1", "_commit_hash": "abc"},
            {"torch_dtype": "bfloat16", "dtype": "float32", "use_cache": False},
            {"attention_dropout": 0.5, "initializer_range": 1.0, "pretraining_tp": 2},
            {"eos_token_id": [2, 3], "bos_token_id": 7, "pad_token_id": 0},
            {"temperature": 0.5, "do_sample": True, "max_length": 9, "unsloth_version": "1"},
        ],
        ids=str,
    )
    def test_what_does_not(self, pair, changes):
        pair.save("new", config=changes)
        pair.agree()

    @pytest.mark.parametrize(
        "changes",
        [
            {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
            {"attention_bias": False, "mlp_bias": False, "head_dim": 8},
            {"hidden_act": "silu"},
            {"rope_scaling": None},
        ],
        ids=str,
    )
    def test_other_words_for_the_same(self, pair, changes):
        """What another version of transformers writes of the same model."""
        config = {
            k: v for k, v in CONFIG.items() if k != "rope_theta" or "rope_par" not in str(changes)
        }
        folders.save(pair.folder / "new", folders.random_tensors(0), config={**config, **changes})
        pair.agree()

    def test_kind_of_rope_in_old_and_new_words(self, pair):
        pair.save("base", config={"rope_scaling": {"type": "linear", "factor": 4.0}})
        rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
        pair.save("new", config={"rope_parameters": rope, "rope_theta": None})
        pair.agree()

    def test_model_that_transformers_does_not_know(self, pair):
        for role, rate in (("base", 1), ("new", 2)):
            pair.save(role, config={"model_type": "mine", "rate": rate, "use_cache": rate == 1})
        message = pair.refused("rate: base 1, new 2", allow=["config"])
        assert "use_cache" not in message

    def test_configuration_that_transformers_refuses(self, pair):
        pair.save("new", config={"hidden_size": "many", "attention_bias": True})
        message = pair.refused(
            "hidden_size: base 16, new 'many'", "attention_bias: base nothing", allow=["config"]
        )
        assert message.count("\n  - ") == 2

    def test_other_kind_of_model(self, pair):
        pair.save("new", config={"model_type": "mistral"})
        pair.refused("model_type: base 'llama', new 'mistral'", allow=["config"])

    def test_inner_configurations(self):
        left = {"text_config": {"hidden_size": 8, "dtype": "float32"}}
        right = {"text_config": {"hidden_size": 9, "dtype": "bfloat16"}}
        assert config_differences(left, right) == {"text_config.hidden_size": (8, 9)}

    def test_folder_without_configuration_differs_from_nothing(self, pair):
        (pair.folder / "new/config.json").unlink()
        pair.agree()
        pair.save("third", config={"rms_norm_eps": 1e-5})
        text = "rms_norm_eps: base 1e-06, third 1e-05"
        pair.refused(text, allow=["config"], roles=("new", "base", "third"))

    @pytest.mark.slow
    def test_no_transformers_where_files_agree(self, pair):
        """Importing it costs more than many a merge."""
        code = (
            "import sys; from pathlib import Path\n"
            "from kifmerge.fusion.agreement import open_checkpoint\n"
            "from kifmerge.fusion.meaning import check_meaning\n"
            f"folder = Path({str(pair.folder)!r})\n"
            "check_meaning([open_checkpoint(r, folder / r) for r in ('base', 'new')])\n"
            "assert not {'transformers', 'tokenizers'} & sys.modules.keys()"
        )
        for role in ("base", "new"):
            pair.write(role, "tokenizer.json", "{}")
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def test_saved_models_of_one_kind_agree(self, tmp_path):
        pair = Folders(tmp_path)
        for make in (tiny.llama, tiny.t5, tiny.bert):
            for seed, role in enumerate(("base", "new")):
                shutil.rmtree(tmp_path / role, ignore_errors=True)
                make(seed).save_pretrained(tmp_path / role)
            pair.agree()


class TestLabels:
    def labels(self, pair, role, names):
        pair.save(role, config={"id2label": dict(enumerate(names))})

    def test_other_order(self, pair):
        self.labels(pair, "base", ["no", "yes"])
        self.labels(pair, "new", ["yes", "no"])
        pair.refused("labels: base ['no', 'yes'], new ['yes', 'no']", allow=["labels"])

    @pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], []])
    def test_labels_without_names_are_not_known(self, pair, names):
        self.labels(pair, "base", ["no", "yes"])
        self.labels(pair, "new", names)
        pair.agree()

    def test_own_record_counts_as_much(self, pair):
        self.labels(pair, "base", ["no", "yes"])
        pair.save("new", provenance={"labels": ["yes", "no"]})
        pair.refused("labels: base ['no', 'yes'], new ['yes', 'no']", allow=["labels"])

    def test_order_is_that_of_the_numbers(self):
        assert label_names({"id2label": {"10": "b", "9": "a"}}) == ["a", "b"]
        assert label_names({"id2label": {"x": "b"}}) is None

    def test_own_record_of_another_kind(self, pair):
        pair.save("base", provenance={"model": {"kind": "classifier", "pooling": "mean"}})
        pair.save("new", provenance={"model": {"kind": "classifier", "pooling": "own"}})
        pair.refused("pooling: base 'mean', new 'own'", allow=["config"])


class TestTensors:
    def save(self, pair, **changes):
        state = {**folders.random_tensors(0), **changes}
        pair.save("new", tensors={k: v for k, v in state.items() if v is not None})

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"a.bias": torch.zeros(8)}, "a.bias: base float32 [4], new float32 [8]"),
            ({"a.bias": torch.zeros(8).half()}, "a.bias: base float32 [4], new float16 [8]"),
            ({"a.bias": torch.zeros(4).long()}, "a.bias: base float32 [4], new int64 [4]"),
            ({"a.bias": None}, "a.bias: base float32 [4], new none"),
            ({"extra": torch.zeros(1)}, "extra: base none, new float32 [1]"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_never_merged(self, pair, changes, text):
        self.save(pair, **changes)
        message = pair.refused(text)
        assert "Names, shapes and kinds that differ cannot be merged." in message
        with pytest.raises(CheckpointError, match="cannot be merged"):
            pair.check(*MEANINGS)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes_can_be_allowed(self, pair, dtype):
        self.save(pair, **{"a.bias": torch.zeros(4, dtype=dtype)})
        found = str(dtype).removeprefix("torch.")
        pair.refused(f"a.bias: base float32 [4], new {found} [4]", allow=["dtype"])

    def test_tied_copy_is_explained(self, tmp_path):
        """One file keeps the head that the other leaves out, since it is the embeddings."""
        pair = Folders(tmp_path)
        for seed, role in enumerate(("base", "new")):
            tiny.llama(seed, tie_word_embeddings=True).save_pretrained(tmp_path / role)
        pair.agree()
        kept = folders.load(tmp_path / "new")
        kept["lm_head.weight"] = kept["model.embed_tokens.weight"].clone()
        config = json.loads((tmp_path / "new/config.json").read_text())
        folders.save(tmp_path / "new", kept, config=config)
        message = pair.refused(
            "lm_head.weight: base none, since its config.json ties it to the embeddings",
            "new float32 [40, 16], a copy of the embeddings that its config.json ties it to",
        )
        assert "none, new" not in message

    def test_tied_by_default(self, tmp_path):
        """A configuration that says nothing means the default of its model."""
        pair = Folders(tmp_path)
        for role in ("base", "new"):
            tiny.t5().save_pretrained(tmp_path / role)
            config = json.loads((tmp_path / role / "config.json").read_text())
            config.pop("tie_word_embeddings", None)
            (tmp_path / role / "config.json").write_text(json.dumps(config))
        kept = folders.load(tmp_path / "new")
        kept["encoder.embed_tokens.weight"] = kept["shared.weight"].clone()
        folders.save(tmp_path / "new", kept, config=config)
        pair.refused("encoder.embed_tokens.weight: base none, since its config.json ties it")

    def test_head_of_its_own_where_the_other_ties_it(self, tmp_path):
        pair = Folders(tmp_path)
        tiny.llama(0, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
        tiny.llama(1).save_pretrained(tmp_path / "new")
        pair.refused(
            "lm_head.weight: base none, since its config.json ties it to the embeddings",
            "new float32 [40, 16] of its own",
            "tie_word_embeddings: base True, new False",
            allow=["config"],
        )

    def test_untied_head_that_is_missing_is_missing(self, pair):
        state = {**folders.random_tensors(0), "lm_head.weight": torch.zeros(2)}
        pair.save("new", tensors=state)
        message = pair.refused("lm_head.weight: base none, new float32 [2] of its own")
        assert "ties" not in message


class TestVocabulary:
    """tokenizer.json: the words and what they are cut by."""

    def both(self, pair, change=lambda content: None, **options):
        tokenizer_file(pair.folder / "base", **options)
        return tokenizer_file(pair.folder / "new", change, **options)

    @pytest.mark.parametrize("kind", ["words", "bytes"])
    def test_equal_tokenizers_agree(self, pair, kind):
        self.both(pair, kind=kind)
        pair.agree()

    @pytest.mark.parametrize("kind", ["words", "bytes"])
    def test_other_spelling_of_one_tokenizer(self, pair, kind):
        """Merges as strings, defaults left out, padding and truncation as last used."""

        def old(content):
            content["padding"] = {
                "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
            }  # fmt: skip
            content["truncation"] = None
            if kind == "bytes":
                content["model"]["merges"] = [" ".join(m) for m in content["model"]["merges"]]
                del content["model"]["ignore_merges"], content["model"]["byte_fallback"]
                del content["pre_tokenizer"]["use_regex"]

        changed = self.both(pair, old, kind=kind)
        assert json.loads((pair.folder / "base/tokenizer.json").read_text()) != changed
        pair.agree()

    def test_words_at_other_places(self, pair):
        def swap(content):
            vocab = content["model"]["vocab"]
            vocab["two"], vocab["four"] = vocab["four"], vocab["two"]

        vocab = self.both(pair, swap)["model"]["vocab"]
        pair.refused(
            f"token 'two': base {vocab['four']}, new {vocab['two']}",
            f"token 'four': base {vocab['two']}, new {vocab['four']}",
            allow=["vocab"],
        )

    def test_added_token(self, pair):
        def add(content):
            added, vocab = content["added_tokens"], content["model"]["vocab"]
            added.append({**added[0], "id": len(vocab), "content": "<x>"})

        number = len(self.both(pair, add)["model"]["vocab"])
        pair.refused(f"token '<x>': base none, new {number}", allow=["vocab"])

    def test_hundreds_of_words_are_counted(self, pair):
        def shift(content):
            content["model"]["vocab"] |= {f"word{n}": 100 + n for n in range(300)}

        self.both(pair, shift)
        message = pair.refused("300 tokens of the vocabulary", "token 'word0'", allow=["vocab"])
        assert message.count("\n  - ") <= 11

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (
                lambda c: c.update(normalizer=None),
                'normalizer: base {"type": "Lowercase"}, new null',
            ),
            (lambda c: c["pre_tokenizer"].update(type="WhitespaceSplit"), "pre_tokenizer: base"),
            (
                lambda c: c.update(post_processor={"type": "ByteLevel", "trim_offsets": True}),
                "post_processor: base",
            ),
            (lambda c: c["added_tokens"][0].update(lstrip=True), "added token '<pad>': base"),
            (lambda c: c["model"].update(unk_token="one"), "model: base"),
        ],
        ids=["normalizer", "pre_tokenizer", "post_processor", "added", "model"],
    )
    def test_text_cut_in_another_way(self, pair, change, text):
        self.both(pair, change)
        pair.refused(text, allow=["tokenizer"])

    def test_merges(self, pair):
        def swap(content):
            merges = content["model"]["merges"]
            merges[0], merges[1] = merges[1], merges[0]

        number = len(self.both(pair, swap, kind="bytes")["model"]["merges"])
        pair.refused(f"merges: base {number} entries (sha256 ", allow=["tokenizer"])

    def test_unigram_scores(self, pair):
        for role, score in (("base", -1.0), ("new", -1.5)):
            model = models.Unigram([("<unk>", 0.0), ("a", score), ("b", -2.0)], unk_id=0)
            Tokenizer(model).save(str(pair.folder / role / "tokenizer.json"))
        pair.refused("scores: base [0.0, -1.0, -2.0], new [0.0, -1.5, -2.0]", allow=["tokenizer"])

    def test_unigram_places(self, pair):
        for role, words in (("base", "ab"), ("new", "ba")):
            model = models.Unigram([("<unk>", 0.0), *[(w, -1.0) for w in words]], unk_id=0)
            Tokenizer(model).save(str(pair.folder / role / "tokenizer.json"))
        pair.refused("token 'a': base 1, new 2", allow=["vocab"])

    def test_slow_tokenizer_files(self, pair):
        for role in ("base", "new"):
            pair.write(role, "vocab.json", {"a": 0, "b": 1, "ab": 2})
            pair.write(role, "merges.txt", "#version: 0.2\na b\n")
        pair.agree()
        pair.write("new", "merges.txt", "#version: 0.2\nb a\n")
        pair.refused('merges: base ["a b"], new ["b a"]', allow=["tokenizer"])
        pair.write("new", "merges.txt", "a b\n")
        pair.write("new", "added_tokens.json", {"<x>": 3})
        pair.refused("token '<x>': base none, new 3", allow=["vocab"])

    def test_fast_and_slow_files_of_one_tokenizer(self, pair):
        content = tokenizer_file(pair.folder / "base", kind="bytes")
        pair.write("new", "vocab.json", content["model"]["vocab"])
        pair.write("new", "merges.txt", "\n".join(" ".join(m) for m in content["model"]["merges"]))
        pair.agree()
        pair.write("new", "vocab.json", {**content["model"]["vocab"], "zzz": 7777})
        pair.refused("token 'zzz': base none, new 7777", allow=["vocab"])

    def test_word_piece_files(self, pair):
        pair.write("base", "vocab.txt", "[PAD]\na\nb\n")
        pair.write("new", "vocab.txt", "[PAD]\nb\na\n")
        pair.refused("token 'a': base 1, new 2", allow=["vocab"])

    def test_files_that_are_not_read(self, pair):
        pair.write("base", "tokenizer.model", "one")
        pair.write("new", "tokenizer.model", "one")
        pair.agree()
        pair.write("new", "added_tokens.json", {"<x>": 7})
        pair.refused("token '<x>': base none, new 7", allow=["vocab"])
        pair.write("new", "tokenizer.model", "two")
        pair.refused("tokenizer.model: base sha256 ", allow=["vocab"])
        (pair.folder / "new/tokenizer.model").unlink()
        tokenizer_file(pair.folder / "new")
        pair.refused(
            "tokenizer files, which do not compare: base tokenizer.model, new tokenizer.json",
            allow=["vocab"],
        )

    def test_readable_file_decides_over_one_that_is_not(self, pair):
        self.both(pair)
        pair.write("base", "tokenizer.model", "one")
        pair.write("new", "tokenizer.model", "two")
        pair.agree()

    def test_missing_tokenizer_is_fine(self, pair):
        tokenizer_file(pair.folder / "base")
        pair.agree()

    def test_first_that_has_one_is_compared_with(self, pair):
        pair.save("third")
        tokenizer_file(pair.folder / "new")
        tokenizer_file(pair.folder / "third", lambda c: c["model"]["vocab"].update(zzz=77))
        text = "token 'zzz': new none, third 77"
        pair.refused(text, allow=["vocab"], roles=("base", "new", "third"))

    @pytest.mark.parametrize(
        "content", ["[]", "{", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "b"}}}']
    )
    def test_damaged_file_is_named(self, pair, content):
        tokenizer_file(pair.folder / "base")
        pair.write("new", "tokenizer.json", content)
        with pytest.raises(CheckpointError, match=r"new/tokenizer\.json: "):
            pair.check()

    def test_saved_by_transformers(self, pair):
        """The files that save_pretrained writes of one tokenizer agree, of another they do not."""
        made = train_tokenizer(TEXTS, TokenizerOptions(), max_tokens=8)
        made.save_pretrained(pair.folder / "base")
        PreTrainedTokenizerFast.from_pretrained(
            pair.folder / "base", padding_side="left"
        ).save_pretrained(pair.folder / "new")
        pair.agree()
        made.add_tokens(["<extra>"])
        made.save_pretrained(pair.folder / "new")
        pair.refused("token '<extra>': base none", allow=["vocab"])


class TestSpecialTokens:
    @pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
    def test_other_end_of_text(self, pair, file):
        for role, token in (("base", "</s>"), ("new", {"content": "<|end|>", "lstrip": False})):
            tokenizer_file(pair.folder / role)
            pair.write(role, file, {"eos_token": token, "pad_token": "<pad>"})
        message = pair.refused('eos_token: base "</s>", new "<|end|>"', allow=["tokenizer"])
        assert "pad_token" not in message

    def test_written_in_other_files_and_forms(self, pair):
        tokenizer_file(pair.folder / "base")
        tokenizer_file(pair.folder / "new")
        more = {"additional_special_tokens": ["<a>", "<b>"], "eos_token": "</s>"}
        pair.write("base", "special_tokens_map.json", more)
        more = {"additional_special_tokens": [{"content": "<b>"}, "<a>"], "eos_token": "</s>"}
        pair.write("new", "tokenizer_config.json", {**more, "bos_token": "<s>"})
        pair.agree()


class TestChatTemplate:
    def test_files_of_all_versions_are_read(self, tmp_path):
        pair = Folders(tmp_path)
        pair.write("a", "tokenizer_config.json", {"chat_template": "T"})
        pair.write("b", "chat_template.json", {"chat_template": "T"})
        pair.write("c", "chat_template.jinja", "T")
        named = [{"name": "default", "template": "T"}, {"name": "tools", "template": "U"}]
        pair.write("d", "tokenizer_config.json", {"chat_template": named})
        pair.write("e", "additional_chat_templates/tools.jinja", "U")
        found = {role: chat_templates(tmp_path / role) for role in "abcde"}
        assert found["a"] == found["b"] == found["c"] == {"default": "T"}
        assert found["d"] == {"default": "T", "tools": "U"}
        assert found["e"] == {"tools": "U"}

    def test_the_differing_line_is_shown(self, pair):
        pair.write("base", "chat_template.jinja", "same\n{{ a }}\nend")
        pair.write("new", "tokenizer_config.json", {"chat_template": "same\n{{ b }}\nend"})
        pair.refused(
            'chat template default: base line 2 "{{ a }}", new line 2 "{{ b }}"',
            allow=["chat-template"],
        )
        pair.write("new", "tokenizer_config.json", {"chat_template": "same"})
        pair.refused('base line 2 "{{ a }}", new ends before it', allow=["chat-template"])

    def test_a_template_on_one_side_is_none_of_the_other_s(self, pair):
        pair.write("base", "chat_template.jinja", "x")
        pair.agree()
        pair.write("new", "additional_chat_templates/tools.jinja", "y")
        pair.agree()


ADAPTER = {"base_model_name_or_path": "org/base", "r": 2, "lora_alpha": 4, "peft_type": "LORA"}


class TestAdapters:
    def pair(self, tmp_path, new, base=None):
        made = Folders(tmp_path)
        for role, changes in (("base", base or {}), ("new", new)):
            config = {**ADAPTER, **changes}
            folders.save(
                tmp_path / role, folders.random_tensors(0), stem="adapter_model", config=config
            )
        return made

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"r": 4}, "r: base 2, new 4"),
            ({"lora_alpha": 8}, "lora_alpha: base 4, new 8"),
            ({"use_rslora": True}, "use_rslora: base None, new True"),
            ({"use_dora": True}, "use_dora: base None, new True"),
            ({"target_modules": ["q"]}, "target_modules: base None, new ['q']"),
            ({"rank_pattern": {"q": 4}}, "rank_pattern: base None, new {'q': 4}"),
            ({"bias": "all"}, "bias: base None, new 'all'"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_other_settings(self, tmp_path, changes, text):
        self.pair(tmp_path, changes).refused(text, allow=["adapter"])

    def test_other_base(self, tmp_path):
        pair = self.pair(tmp_path, {"base_model_name_or_path": "org/other"})
        pair.refused(
            "base_model_name_or_path: base 'org/base', new 'org/other'", allow=["adapter-base"]
        )

    @pytest.mark.parametrize(
        "changes",
        [
            {"use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}},
            {"peft_version": "9", "inference_mode": True, "lora_dropout": 0.5, "task_type": "X"},
            {"qalora_group_size": 16, "megatron_core": "megatron.core", "use_qalora": False},
        ],
        ids=str,
    )
    def test_what_another_version_of_peft_writes(self, tmp_path, changes):
        self.pair(tmp_path, changes).agree()

    def test_order_of_modules_does_not_matter(self, tmp_path):
        pair = self.pair(tmp_path, {"target_modules": ["a", "b"]}, {"target_modules": ["b", "a"]})
        pair.agree()

    def test_saved_by_peft(self, tmp_path):
        for seed, role in enumerate(("base", "new")):
            tiny.lora_llama(seed).save_pretrained(tmp_path / role)
        Folders(tmp_path).agree()
        tiny.lora_llama(0, use_dora=True).save_pretrained(tmp_path / "new")
        Folders(tmp_path).refused("use_dora", "lora_magnitude_vector", allow=["adapter"])

    def test_tokenizers_beside_adapters(self, tmp_path):
        pair = self.pair(tmp_path, {})
        tokenizer_file(tmp_path / "base")
        tokenizer_file(tmp_path / "new", lambda c: c["model"]["vocab"].update(zzz=77))
        pair.refused("token 'zzz': base none, new 77", allow=["vocab"])

    def test_adapter_beside_a_model(self, tmp_path):
        pair = self.pair(tmp_path, {})
        pair.save("model", config={"hidden_act": "gelu"})
        message = pair.refused("new is an adapter, model a whole model", roles=("new", "model"))
        assert message.count("\n  - ") == 1


class TestList:
    def test_every_kind_is_seen_beside_a_flood_of_one(self, pair):
        tensors = {f"w{n}": torch.zeros(1) for n in range(50)}
        pair.save("base", tensors=tensors)
        tensors = {name: value.half() for name, value in tensors.items()}
        pair.save("new", tensors=tensors, config={"rms_norm_eps": 0.5, "hidden_act": "relu"})
        pair.write("base", "chat_template.jinja", "x")
        pair.write("new", "chat_template.jinja", "y")
        message = pair.refused(
            "rms_norm_eps", "hidden_act", "chat template", "w0: base float32 [1]", "and 43 more",
            allow=["config", "dtype", "chat-template"],
        )  # fmt: skip
        assert message.count("\n  - ") == 11
        places = [message.index(x) for x in ("rms_norm_eps", "chat template", "w0: base")]
        assert places == sorted(places)

    def test_last_kind_is_seen_behind_a_flood_of_the_first(self, pair):
        tensors = {"w": torch.zeros(1), "v": torch.zeros(1)}
        pair.save("base", tensors=tensors)
        changes = {f"switch_{n:02d}": n for n in range(30)}
        pair.save("new", tensors={n: t.half() for n, t in tensors.items()}, config=changes)
        message = pair.refused(
            "switch_00: ", "switch_07: ", "v: base float32 [1], new float16 [1]", "w: base",
            "and 22 more", allow=["config", "dtype"],
        )  # fmt: skip
        assert "switch_08" not in message

    def test_all_models_are_compared(self, pair):
        for number in range(3):
            pair.save(f"model {number}", config={"rms_norm_eps": number + 1.0})
        roles = ("base", "model 0", "model 1", "model 2")
        pair.refused(
            *[f"rms_norm_eps: base 1e-06, model {n} {n + 1.0}" for n in range(3)],
            str(pair.folder / "model 2"), allow=["config"], roles=roles,
        )  # fmt: skip

    def test_advice_says_what_allowing_means(self, pair):
        pair.save("new", config={"rms_norm_eps": 0.5})
        message = pair.refused(allow=["config"])
        assert f"--allow config if that is meant: {MEANINGS['config']}." in message
