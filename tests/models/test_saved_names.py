"""How a checkpoint's files keep parameters: other names, tied ones, experts, patterns, shards."""

from __future__ import annotations

import weakref

import pytest
import safetensors.torch
import tiny
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from kifmerge.checkpoint.source import open_source
from kifmerge.errors import CheckpointError
from kifmerge.models.saved_names import (
    SavedTensors,
    chosen,
    names_in_files,
    saved_groups,
    shards,
)


def save(tmp_path, tensors):
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(copies, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return open_source(tmp_path)


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@pytest.fixture
def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
        num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    return MixtralForCausalLM(config)


class TestNamesInFiles:
    def test_of_a_base_without_prefix(self, gpt2, tmp_path):
        files = save(tmp_path, dict(gpt2.transformer.named_parameters()))
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
        files = save(tmp_path, tied)
        assert names_in_files(gpt2, values, files) == {"transformer.wte.weight": list(tied)}
        files = save(tmp_path, {"lm_head.weight": gpt2.lm_head.weight})
        assert names_in_files(gpt2, values, files) == {"transformer.wte.weight": ["lm_head.weight"]}

    def test_of_another_shape_or_of_none_are_told(self, gpt2, tmp_path):
        files = save(tmp_path, {"lm_head.weight": torch.zeros(2, 3)})
        values = {"transformer.wte.weight": gpt2.lm_head.weight}
        assert names_in_files(gpt2, values, files) == {"transformer.wte.weight": []}


def as_saved(model, files=None, patterns=()):
    """The parameters themselves under the names of the files, in place of accumulators."""
    parameters = dict(model.named_parameters())
    groups = chosen(saved_groups(model, parameters, files), patterns)
    state = {f"score/{name}": value.detach() for name, value in parameters.items()}
    return SavedTensors(model, state, groups)


class TestSavedTensors:
    @pytest.mark.parametrize("make", [tiny.llama, tiny.bert, tiny.t5])
    def test_are_the_very_tensors_where_names_and_pieces_are_the_same(self, make, tmp_path):
        model = make()
        model.save_pretrained(tmp_path)
        tensors = as_saved(model, open_source(tmp_path))
        kept = safetensors.torch.load_file(tmp_path / "model.safetensors")
        assert set(tensors) == {f"score/{name}" for name in kept}
        memory = {parameter.data_ptr() for parameter in model.parameters()}
        assert {value.data_ptr() for value in tensors.values()} == memory

    def test_of_an_adapter(self, tmp_path):
        model = tiny.lora_llama()
        model.save_pretrained(tmp_path)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        groups = saved_groups(model, parameters, open_source(tmp_path))
        state = {f"score/{name}": value.detach() for name, value in parameters.items()}
        kept = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
        tensors = SavedTensors(model, state, groups)
        assert set(tensors) == {f"score/{name}" for name in kept}
        assert all(torch.equal(tensors[f"score/{name}"], kept[name]) for name in kept)

    @pytest.mark.parametrize("with_files", [True, False])
    def test_experts_are_those_of_the_files(self, mixtral, tmp_path, with_files):
        mixtral.save_pretrained(tmp_path)
        tensors = as_saved(mixtral, open_source(tmp_path) if with_files else None)
        kept = safetensors.torch.load_file(tmp_path / "model.safetensors")
        assert any("experts.2.w3" in name for name in kept)
        assert set(tensors) == {f"score/{name}" for name in kept}
        assert all(torch.equal(tensors[f"score/{name}"], kept[name]) for name in kept)

    def test_experts_of_one_layer_are_converted_at_a_time(self, mixtral):
        class State(dict):
            gone = staticmethod(lambda: None)

            def __getitem__(self, key):
                assert self.gone() is None, "two layers would be there at once"
                return super().__getitem__(key)

        parameters = dict(mixtral.named_parameters())
        state = State({f"score/{name}": value.detach() for name, value in parameters.items()})
        tensors = SavedTensors(mixtral, state, saved_groups(mixtral, parameters, None))
        experts = [key for key in tensors if "w2" in key]
        assert len(experts) == 6
        first, second = tensors[experts[0]], tensors[experts[2]]
        assert tensors[experts[0]] is first
        assert second.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        state.gone = weakref.ref(first)
        del first, second
        assert state.gone() is not None
        assert tensors[experts[3]] is not None

    def test_parameters_that_files_hold_as_one_tensor_belong_together(self, mixtral):
        """The other way round than experts: pieces in memory, one tensor in the files."""
        from transformers.core_model_loading import Chunk, WeightConverter

        names = [".q_proj.weight", ".k_proj.weight", ".v_proj.weight"]
        mixtral._weight_conversions = [
            WeightConverter(".qkv.weight", names, operations=[Chunk(dim=0)])
        ]
        parameters = {
            n: p for n, p in mixtral.named_parameters() if ".1." in n and "self_attn" in n
        }
        groups = saved_groups(mixtral, parameters, None)
        attention = "model.layers.1.self_attn"
        assert [(sorted(group.parameters), list(group.names)) for group in groups] == [
            (sorted(attention + name for name in names), [f"{attention}.qkv.weight"]),
            ([f"{attention}.o_proj.weight"], [f"{attention}.o_proj.weight"]),
        ]
        tensors = SavedTensors(mixtral, {f"score/{n}": p for n, p in parameters.items()}, groups)
        expected = torch.cat([parameters[attention + name] for name in names])
        assert torch.equal(tensors[f"score/{attention}.qkv.weight"], expected)

    def test_of_several_kinds(self, mixtral):
        parameters = dict(mixtral.named_parameters())
        groups = saved_groups(mixtral, parameters, None)
        state = {
            f"{kind}/{name}": value.detach() + number
            for number, kind in enumerate(("sensitivity", "uncertainty"))
            for name, value in parameters.items()
        }
        tensors = SavedTensors(mixtral, state, groups)
        assert len(tensors) == len(list(tensors)) == 2 * len(as_saved(mixtral))
        name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
        one, other = tensors[f"sensitivity/{name}"], tensors[f"uncertainty/{name}"]
        assert torch.equal(one + 1, other)


class TestChosen:
    def names(self, model, *patterns, files=None):
        return [key.removeprefix("score/") for key in as_saved(model, files, patterns)]

    def test_whole_names_match(self):
        model = tiny.llama(num_hidden_layers=2)
        found = self.names(model, "*.q_proj.weight", "model.norm.*")
        assert found == [
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.1.self_attn.q_proj.weight",
            "model.norm.weight",
        ]
        assert self.names(model, "*") == self.names(model)

    @pytest.mark.parametrize(
        ("pattern", "nearest"),
        [
            ("q_proj", r"try \*q_proj\*"),
            ("*.Q_proj.weight", r"try model\.layers\.\*\.self_attn\.q_proj\.weight or "),
            ("*.h.3.*", "try "),
        ],
    )
    def test_no_match_is_an_error_that_names_the_nearest(self, pattern, nearest):
        with pytest.raises(CheckpointError, match=nearest) as caught:
            self.names(tiny.llama(num_hidden_layers=2), "*norm*", pattern)
        assert pattern in str(caught.value)
        assert "*norm*" not in str(caught.value)

    def test_names_are_those_of_the_files(self, gpt2, tmp_path):
        files = save(tmp_path, dict(gpt2.transformer.named_parameters()))
        assert self.names(gpt2, "h.0.attn.*.weight", files=files) == [
            "h.0.attn.c_attn.weight",
            "h.0.attn.c_proj.weight",
        ]
        with pytest.raises(CheckpointError, match="transformer"):
            self.names(gpt2, "transformer.h.0.attn.*.weight", files=files)

    def test_tied_weights_go_together(self, gpt2, tmp_path):
        head = gpt2.lm_head.weight
        files = save(tmp_path, {"transformer.wte.weight": head, "lm_head.weight": head})
        found = self.names(gpt2, "lm_head.*", files=files)
        assert found == ["transformer.wte.weight", "lm_head.weight"]

    def test_single_experts(self, mixtral):
        found = self.names(mixtral, "*.1.block_sparse_moe.experts.2.w[13].*")
        prefix = "model.layers.1.block_sparse_moe.experts.2"
        assert sorted(found) == [f"{prefix}.w1.weight", f"{prefix}.w3.weight"]

    def test_only_what_was_chosen_can_be_missing(self, mixtral, tmp_path):
        files = save(tmp_path, {"model.norm.weight": mixtral.model.norm.weight})
        groups = saved_groups(mixtral, dict(mixtral.named_parameters()), files)
        assert not groups[-2].not_in_files
        ((norm,), (head,)) = (
            [g.not_in_files for g in chosen(groups, [p])] for p in ("model.norm.*", "lm_head*")
        )
        assert norm == ()
        assert head == ("lm_head.weight",)
        name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
        (expert,) = chosen(groups, [name])
        assert expert.not_in_files == (name,)


class TestShards:
    def test_follow_those_of_the_files(self, mixtral, tmp_path):
        mixtral.save_pretrained(tmp_path, max_shard_size="8KB")
        files = open_source(tmp_path)
        assert len(files.files) > 3
        tensors = as_saved(mixtral, files)
        found = [[key.removeprefix("score/") for key in keys] for keys in shards(tensors, files)]
        assert [sorted(keys) for keys in found] == [sorted(keys) for keys in files.files.values()]

    def test_leave_out_files_without_a_chosen_tensor(self, mixtral, tmp_path):
        mixtral.save_pretrained(tmp_path, max_shard_size="8KB")
        files = open_source(tmp_path)
        names = [name for keys in files.files.values() for name in keys if "norm" in name]
        tensors = as_saved(mixtral, files, ["*norm*"])
        found = shards(tensors, files)
        assert [key for keys in found for key in sorted(keys)]
        assert sorted(key.removeprefix("score/") for keys in found for key in keys) == sorted(names)
        assert len(found) == len({files.where(name) for name in names}) < len(files.files)

    def test_take_what_no_file_holds_last(self, mixtral, tmp_path):
        mixtral.save_pretrained(tmp_path, max_shard_size="8KB")
        files = open_source(tmp_path)
        tensors = {**as_saved(mixtral, files), "score/extra": torch.ones(1)}
        found = shards({k: tensors[k] for k in sorted(tensors)}, files)
        assert found[-1][-1] == "score/extra"
        assert len(found) == len(files.files)
        assert shards({"score/extra": torch.ones(1)}, files) == [["score/extra"]]
        assert shards(tensors, None) == [list(tensors)]
