"""The files of a merge: other dtypes, other shards, and what transformers makes of them."""

import json
from dataclasses import replace

import folders
import merges
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merges import Files
from transformers import AutoModelForCausalLM

from kifmerge.checkpoint.source import open_source
from kifmerge.fusion.rules import FusionOptions
from kifmerge.phases.merge import Merge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KIF = FusionOptions()
AVERAGE = FusionOptions(rule="average")


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


class TestDtype:
    @merges.every_rule
    def test_float32_of_bfloat16_is_the_unrounded_result(self, tmp_path, variant):
        files = variant.write(tmp_path / "half", dtype=torch.bfloat16)
        files.merge(**variant.options(), out="exact", dtype="float32")
        files.merge(**variant.options(), out="own")
        as_float32 = [{n: t.float() for n, t in state.items()} for state in files.states]
        whole = variant.write(tmp_path / "whole", states=as_float32)
        whole.merge(**variant.options())
        assert merges.same_bits(files.merged("exact"), whole.merged())
        rounded = {name: value.bfloat16() for name, value in whole.merged().items()}
        assert merges.same_bits(files.merged("own"), rounded)

    @pytest.mark.parametrize("inputs", DTYPES)
    @pytest.mark.parametrize("output", DTYPES)
    def test_rounded_once_from_float32(self, tmp_path, inputs, output):
        files = Files(tmp_path).write(DTYPES[inputs])
        files.merge(AVERAGE, dtype=output)
        files.merge(AVERAGE, out="exact", dtype="float32")
        exact = files.merged("exact")
        expected = {name: value.to(DTYPES[output]) for name, value in exact.items()}
        assert merges.same_bits(files.merged(), expected)

    def test_tensors_that_are_copied_change_theirs_and_whole_numbers_do_not(self, files):
        more = {"frozen": torch.tensor([1.0, 1 / 3]), "steps": torch.arange(3)}
        states = [{**folders.random_tensors(n, merges.SHAPES), **more} for n in range(3)]
        files.write(states=states)
        scored = {name: states[0][name] for name in merges.SHAPES}
        for seed, role in enumerate(merges.TWO):
            folders.snapshot(files.folder / f"{role}-importance", seed, scored)
        files.merge(KIF, dtype="bfloat16")
        found = files.merged()
        assert torch.equal(found["frozen"], more["frozen"].bfloat16())
        assert torch.equal(found["steps"], more["steps"])

    @pytest.mark.parametrize("output", DTYPES)
    def test_transformers_loads_just_that(self, tmp_path, output):
        for number, role in enumerate(("base", "new", "historical")):
            tiny.llama(number).to(torch.bfloat16).save_pretrained(tmp_path / role)
        files = Files(tmp_path)
        files.merge(AVERAGE, dtype=output)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert merges.same_bits(dict(loaded.state_dict()), files.merged())
        assert loaded.dtype == DTYPES[output]

    def test_config_says_so_in_all_its_parts(self, files):
        config = {
            "model_type": "none", "torch_dtype": "float32", "dtype": "float32",
            "text_config": {"dtype": "float32", "other": {"dtype": "kept"}},
            "vision_config": {"dtype": None},
        }  # fmt: skip
        files.write(config=config)
        files.merge(AVERAGE, out="own")
        files.merge(AVERAGE, dtype="float16")
        own, changed = (
            json.loads((files.folder / d / "config.json").read_text()) for d in ("own", "out")
        )
        assert own == config
        expected = {**config, "torch_dtype": "float16", "dtype": "float16"}
        expected["text_config"] = {"dtype": "float16", "other": {"dtype": "kept"}}
        assert changed == expected

    def test_inputs_of_other_dtypes_are_refused_or_allowed(self, files):
        states = [folders.random_tensors(n, merges.SHAPES) for n in range(3)]
        states[1] = {n: t.half() if n == "a.bias" else t for n, t in states[1].items()}
        states[2] = {n: t.bfloat16() for n, t in states[2].items()}
        files.write(states=states)
        files.refused("a.bias: base float32 .*, new float16", "--allow dtype")
        files.merge(KIF, allowed=("dtype",))
        plain = Files(files.folder / "plain")
        plain.write(states=[{n: t.float() for n, t in state.items()} for state in states])
        plain.merge(KIF)
        assert merges.same_bits(files.merged(), plain.merged())

    def test_base_of_mixed_dtypes_keeps_them(self, files):
        """Small tensors of several dtypes, side by side."""
        states = [folders.random_tensors(n, merges.VARIED) for n in range(3)]
        mixed = {
            n: t.to(list(DTYPES.values())[k % 3]) for k, (n, t) in enumerate(states[0].items())
        }
        files.write(states=[mixed, *states[1:]])
        files.merge(KIF, allowed=("dtype",), num_workers=2)
        plain = Files(files.folder / "plain")
        plain.write(states=[{n: t.float() for n, t in mixed.items()}, *states[1:]])
        plain.merge(KIF)
        expected = {n: plain.merged()[n].to(mixed[n].dtype) for n in mixed}
        assert merges.same_bits(files.merged(), expected)


class TestShards:
    @given(
        most_bytes=st.integers(1, 3000),
        num_shards=st.integers(0, 3),
        dtype=st.sampled_from([None, *DTYPES]),
    )
    @settings(max_examples=10)
    def test_sizes_are_respected_and_change_no_bit(
        self, tmp_path_factory, most_bytes, num_shards, dtype
    ):
        files = Files(tmp_path_factory.mktemp("shards"))
        files.write(torch.bfloat16, shapes=merges.VARIED, shards=(num_shards, 0, 2))
        files.merge(KIF, shard_bytes=most_bytes, dtype=dtype)
        files.merge(KIF, out="own", dtype=dtype)
        assert merges.same_bits(files.merged(), files.merged("own"))
        source = open_source(files.folder / "out")
        sizes = [[source.info(n).nbytes for n in names] for names in source.files.values()]
        assert all(sum(of_file) <= most_bytes or len(of_file) == 1 for of_file in sizes)
        total = len(sizes)
        expected = [f"model-{k:05d}-of-{total:05d}.safetensors" for k in range(1, total + 1)]
        assert [*source.files] == (expected if total > 1 else ["model.safetensors"])

    @pytest.mark.parametrize("size", [4_000, 9_000, 10**9])
    def test_transformers_loads_them_without_a_word(self, tmp_path, size):
        for number, role in enumerate(("base", "new", "historical")):
            tiny.llama(number).save_pretrained(tmp_path / role, max_shard_size="6KB")
        files = Files(tmp_path)
        files.merge(AVERAGE, shard_bytes=size)
        loaded = merges.loaded_without_a_word(AutoModelForCausalLM, tmp_path / "out")
        assert merges.same_bits(dict(loaded.state_dict()), files.merged())
        index = tmp_path / "out/model.safetensors.index.json"
        assert index.exists() == (size < 10**9)
        if index.exists():
            metadata = json.loads(index.read_text())["metadata"]
            assert metadata["total_size"] == sum(t.nbytes for t in files.merged().values())

    def test_sharded_output_is_an_input(self, files):
        """As the base of another merge, in the same files."""
        files.write(shapes=merges.VARIED).merge(KIF, shard_bytes=300)
        inputs = replace(files.inputs(), base=files.folder / "out")
        Merge(inputs, KIF, num_workers=2).run(files.folder / "next")
        layouts = [open_source(files.folder / d).files for d in ("out", "next")]
        assert layouts[0] == layouts[1]
        assert len(layouts[0]) == 3
