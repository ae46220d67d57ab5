"""KIF on live models: units under the names of files, fusion in place, elements that may train."""

from __future__ import annotations

import pytest
import safetensors.torch
import tiny
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from kifmerge.checkpoint.scores import Scores
from kifmerge.checkpoint.source import MemorySource, open_source
from kifmerge.checkpoint.units import Unit, Units
from kifmerge.errors import CheckpointError, TrainingError
from kifmerge.fusion.unit_scores import group_scores
from kifmerge.models.classifier import grow_head
from kifmerge.tensor.importance import ImportanceAccumulator
from kifmerge.training.importance import as_in_checkpoint, trained_parameters
from kifmerge.training.kif import (
    fuse_task,
    fuse_units,
    important_elements,
    refuse_converted,
    task_units,
)
from kifmerge.training.presets import KifOptions


def units_of(model, cumulative, score=None) -> Units:
    """Tensor units of a live model, in the order of its parameters."""
    names = list(as_in_checkpoint(model, tiny.trained(model)))
    score = cumulative if score is None else score
    pairs = zip(names, score, cumulative, strict=True)
    return Units("tensor", tuple(Unit(n, (n,), s, c) for n, s, c in pairs))


def one_high(number, high):
    """Scores of which the given ones are important."""
    return [float(index in high) for index in range(number)]


class TestFuse:
    def test_unit_by_unit_in_place(self, tmp_path):
        """Of eight tensors, one is important to both sides, one to each, the rest to neither."""
        before = tiny.lora_llama(seed=1, target_modules=["q_proj", "v_proj", "k_proj", "o_proj"])
        model = tiny.lora_llama(seed=2, target_modules=["q_proj", "v_proj", "k_proj", "o_proj"])
        before.save_pretrained(tmp_path)
        old, new = tiny.trained(before), tiny.trained(model)
        units = {
            "new": units_of(model, [9.0] * 8, one_high(8, {0, 1})),
            "historical": units_of(model, one_high(8, {0, 2}), [9.0] * 8),
        }
        shares = fuse_units(
            model, open_source(tmp_path), units, "kif", KifOptions(important_fraction=0.25)
        )
        found = tiny.trained(model)
        names = list(found)
        torch.testing.assert_close(found[names[0]], 0.3 * new[names[0]] + 0.7 * old[names[0]])
        assert torch.equal(found[names[1]], new[names[1]])
        assert torch.equal(found[names[2]], old[names[2]])
        for name in names[3:]:
            torch.testing.assert_close(found[name], 0.5 * new[name] + 0.5 * old[name])
        sizes = [value.numel() for value in new.values()]
        assert shares["both"] == sizes[0] / sum(sizes)
        assert shares["neither"] == pytest.approx(sum(sizes[3:]) / sum(sizes))

    def test_adaptive(self, tmp_path):
        before, model = tiny.lora_llama(seed=1), tiny.lora_llama(seed=2)
        before.save_pretrained(tmp_path)
        old, new = tiny.trained(before), tiny.trained(model)
        units = {
            "new": units_of(model, [0.0] * 4, [3.0, 5.0, 4.0, 3.0]),
            "historical": units_of(model, [10.0, 10.0, 30.0, 20.0], [0.0] * 4),
        }
        fuse_units(
            model, open_source(tmp_path), units, "kif-adaptive", KifOptions(temperature=0.5)
        )  # fmt: skip
        scores = torch.tensor([[0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.5]])
        shares = torch.softmax(scores / 0.5, 0)[0].tolist()
        for name, share, value in zip(old, shares, tiny.trained(model).values(), strict=True):
            torch.testing.assert_close(value, share * new[name] + (1 - share) * old[name])

    def test_rows_that_a_head_has_gained_are_the_new_ones(self, tmp_path):
        before, model = tiny.bert(seed=1), tiny.bert(seed=2)
        before.save_pretrained(tmp_path)
        grow_head(model, 5, seed=3)
        new, old = tiny.trained(model), tiny.trained(before)
        units = units_of(model, [1.0] * len(new))
        fuse_units(
            model, open_source(tmp_path), {"new": units, "historical": units}, "kif", KifOptions()
        )
        found = tiny.trained(model)
        for name in ("classifier.weight", "classifier.bias"):
            assert torch.equal(found[name][3:], new[name][3:])
            halves = 0.5 * new[name][:3] + 0.5 * old[name]
            torch.testing.assert_close(found[name][:3], halves)

    def test_rows_that_a_head_has_lost_are_an_error(self, tmp_path):
        before, model = tiny.bert(seed=1), tiny.bert(seed=2)
        grow_head(before, 5, seed=3)
        before.save_pretrained(tmp_path)
        units = units_of(model, [1.0] * len(tiny.trained(model)))
        with pytest.raises(CheckpointError, match=r"classifier.* expected \[3, 16\], or fewer"):
            fuse_units(
                model,
                open_source(tmp_path),
                {"new": units, "historical": units},
                "kif",
                KifOptions(),
            )

    def test_stacked_experts_are_refused(self):
        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_hidden_layers=1))
        with pytest.raises(TrainingError, match=r"saved in other pieces.*train --kif"):
            refuse_converted(model)
        for converted_not in (tiny.llama(), tiny.t5(), tiny.bert(), tiny.lora_llama()):
            refuse_converted(converted_not)


def scored(model, directory, seed):
    """Write scores as training leaves them; returns the accumulator."""
    parameters = trained_parameters(model)
    accumulator = ImportanceAccumulator(parameters)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        gradients = [torch.randn(p.shape, generator=generator) for p in parameters.values()]
        accumulator.accumulate([p.detach() for p in parameters.values()], gradients)
    safetensors.torch.save_file(accumulator.state_dict(), directory / "scores.safetensors")
    (directory / "scores.json").write_text('{"num_steps": 2}')
    return accumulator


class TestTask:
    @pytest.mark.parametrize("unit", ["tensor", "lora-rank", "layer"])
    def test_units_go_by_the_names_of_the_files(self, tmp_path, unit):
        model = tiny.lora_llama()
        accumulator = scored(model, tmp_path, 0)
        model.save_pretrained(tmp_path)
        units = task_units(model, tmp_path, KifOptions(unit=unit), None)
        saved = open_source(tmp_path)
        members = {m.partition("[")[0] for u in units.units for m in u.members}
        assert members == set(saved.names())
        by_hand = {
            f"{kind}/{saved_name}": accumulator.state_dict()[f"{kind}/{name}"]
            for kind in ("sensitivity", "uncertainty")
            for name, saved_name in zip(
                accumulator.sensitivity,
                as_in_checkpoint(model, accumulator.sensitivity),
                strict=True,
            )
        }
        expected = group_scores(Scores(MemorySource(by_hand), "product"), unit)
        assert units.units == expected.units
        assert all(u.score == u.cumulative for u in units.units)

    def test_first_one_stays_as_it_is(self, tmp_path):
        model = tiny.lora_llama()
        scored(model, tmp_path, 0)
        before = tiny.trained(model)
        fused = fuse_task(model, None, tmp_path, "kif", KifOptions())
        assert tiny.same(before, tiny.trained(model))
        assert (fused.historical, dict(fused.shares)) == (None, {})

    def test_all_scores_alike_are_a_warning(self, tmp_path):
        model = tiny.lora_llama()
        accumulator = ImportanceAccumulator(trained_parameters(model))
        safetensors.torch.save_file(accumulator.state_dict(), tmp_path / "scores.safetensors")
        (tmp_path / "scores.json").write_text('{"num_steps": 0}')
        with pytest.warns(UserWarning, match="no unit is important"):
            fuse_task(model, None, tmp_path, "kif", KifOptions())


class TestImportantElements:
    def test_of_tensors(self):
        model = tiny.lora_llama()
        marks = important_elements(model, units_of(model, [1.0, 5.0, 2.0, 3.0]), 0.2)
        assert [bool(mark.all()) for mark in marks.values()] == [False, True, False, False]
        assert [bool(mark.any()) for mark in marks.values()] == [False, True, False, False]
        shapes = {name: value.shape for name, value in tiny.trained(model).items()}
        assert {name: mark.shape for name, mark in marks.items()} == shapes

    def test_of_ranks(self, tmp_path):
        """One row of A and one column of B."""
        model = tiny.lora_llama()
        units = []
        for module in ("q_proj", "v_proj"):
            base = f"base_model.model.model.layers.0.self_attn.{module}"
            for rank in (0, 1):
                members = (f"{base}.lora_A.weight[{rank},:]", f"{base}.lora_B.weight[:,{rank}]")
                high = float((module, rank) == ("v_proj", 1))
                units.append(Unit(f"{module}[{rank}]", members, 0.0, high))
        marks = important_elements(model, Units("lora-rank", tuple(units)), 0.2)
        for name, mark in marks.items():
            expected = torch.zeros_like(mark)
            if "v_proj.lora_A" in name:
                expected[1, :] = True
            if "v_proj.lora_B" in name:
                expected[:, 1] = True
            assert torch.equal(mark, expected), name
