"""Grouping: members and scores of skill units, against brute force and the authors' traces."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import folders
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from kifmerge.checkpoint.provenance import digest
from kifmerge.checkpoint.scores import Scores, open_scores
from kifmerge.checkpoint.snapshot import write_snapshot
from kifmerge.checkpoint.source import MemorySource, open_source
from kifmerge.checkpoint.units import Unit, Units, UnitSource, read_units, write_units
from kifmerge.errors import CheckpointError, RunError
from kifmerge.fusion.unit_scores import GroupOptions, group_scores
from kifmerge.phases.group import Group, unit_figures
from kifmerge.phases.inspect import inspect_folder
from kifmerge.tensor.importance import ImportanceAccumulator, ImportanceOptions
from kifmerge.tensor.kif import kif, kif_adaptive
from kifmerge.tensor.units import cumulative_scores, important_units, normalise_scores

GOLDEN = Path(__file__).parents[1] / "golden" / "kif_lora"
KINDS = ["tensor", "lora-rank", "layer"]
LORA_SHAPES = {
    "m.h.10.q.lora_A.weight": (3, 7),
    "m.h.10.q.lora_B.weight": (5, 3),
    "m.h.2.c.lora_A.weight": (2, 4, 3, 3),
    "m.h.2.c.lora_B.weight": (6, 2, 1, 1),
    "m.h.2.c.lora_B.bias": (6,),
    "m.wte.lora_embedding_A": (4, 9),
    "m.wte.lora_embedding_B": (5, 4),
    "m.norm.weight": (3,),
    "m.empty": (0, 2),
}


def scores_of(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def group_tensors(tensors, kind, historical=None, **weights):
    source = MemorySource({f"score/{name}": value for name, value in tensors.items()})
    return group_scores(Scores(source, "product"), kind, historical, **weights)


def scores_by_name(units):
    return {unit.name: unit.score for unit in units.units}


class TestScores:
    def test_of_tensors(self):
        tensors = scores_of(LORA_SHAPES)
        found = group_tensors(tensors, "tensor")
        expected = {n: t.double().mean().item() for n, t in tensors.items() if t.numel()}
        assert scores_by_name(found) == pytest.approx(expected, rel=1e-13)
        assert all(unit.members == (unit.name,) for unit in found.units)

    def test_of_ranks(self):
        tensors = {name: value.double() for name, value in scores_of(LORA_SHAPES).items()}
        expected = {"m.norm.weight": tensors["m.norm.weight"].mean().item()}
        expected["m.h.2.c.lora_B.bias"] = tensors["m.h.2.c.lora_B.bias"].mean().item()
        for module, ranks, a, b in (
            ("m.h.10.q", 3, "lora_A.weight", "lora_B.weight"),
            ("m.h.2.c", 2, "lora_A.weight", "lora_B.weight"),
            ("m.wte", 4, "lora_embedding_A", "lora_embedding_B"),
        ):
            for rank in range(ranks):
                row = tensors[f"{module}.{a}"][rank]
                column = tensors[f"{module}.{b}"][:, rank]
                # As the authors compute it: the mean over all pairs of row and column.
                outer = torch.outer(column.flatten(), row.flatten())
                expected[f"{module}[{rank}]"] = outer.mean().item()
        found = group_tensors(tensors, "lora-rank")
        assert scores_by_name(found) == pytest.approx(expected, rel=1e-12)
        assert {u.name: u.members for u in found.units}["m.wte[3]"] == (
            "m.wte.lora_embedding_A[3,:]",
            "m.wte.lora_embedding_B[:,3]",
        )

    def test_of_layers(self):
        tensors = scores_of(LORA_SHAPES)
        found = group_tensors(tensors, "layer")
        layers = {"m.h.2": ".2.", "m.h.10": ".10.", "m.norm": "norm", "m.wte": "wte"}
        expected = {}
        for layer, part in layers.items():
            values = [t.flatten().double() for n, t in tensors.items() if part in n]
            expected[layer] = torch.cat(values).mean().item()
        assert scores_by_name(found) == pytest.approx(expected, rel=1e-13)
        assert found.units[0].members == (
            "m.h.2.c.lora_A.weight",
            "m.h.2.c.lora_B.bias",
            "m.h.2.c.lora_B.weight",
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_order_is_natural(self, kind):
        names = [unit.name for unit in group_tensors(scores_of(LORA_SHAPES), kind).units]
        assert names.index(next(n for n in names if ".2" in n)) == 0
        assert names.index(next(n for n in names if ".10" in n)) < names.index(names[-1])
        if kind == "lora-rank":
            assert names[:3] == ["m.h.2.c[0]", "m.h.2.c[1]", "m.h.2.c.lora_B.bias"]

    @pytest.mark.parametrize("kind", KINDS)
    def test_files_shards_and_their_order_change_nothing(self, tmp_path, kind):
        tensors = scores_of({**LORA_SHAPES, "m.h.10.up": (700, 501)})
        found = group_tensors(tensors, kind)
        assert group_tensors(dict(reversed(tensors.items())), kind) == found
        kept = {f"score/{name}": value for name, value in tensors.items()}
        write_snapshot(tmp_path, kept, {})
        assert group_scores(open_scores(tmp_path), kind) == found

    @pytest.mark.parametrize("kind", KINDS)
    def test_each_element_belongs_to_one_unit(self, kind):
        tensors = scores_of(LORA_SHAPES)
        units = group_tensors(tensors, kind)
        like = MemorySource(tensors)
        source = UnitSource(units, like, [float(n) for n in range(len(units.units))], "units")
        names = [name for name, value in tensors.items() if value.numel()]
        assert source.names() == tuple(names)
        counts = torch.zeros(len(units.units), dtype=torch.int64)
        for name in names:
            numbers = source.read(name, 0, tensors[name].numel()).long()
            counts += torch.bincount(numbers, minlength=len(counts))
        assert int(counts.min()) > 0
        assert int(counts.sum()) == sum(value.numel() for value in tensors.values())

    def test_progress_adds_up_to_all_parameters(self):
        told = []
        tensors = scores_of(LORA_SHAPES)
        source = Scores(MemorySource({f"score/{n}": t for n, t in tensors.items()}), "product")
        group_scores(source, "layer", on_progress=told.append)
        assert sum(told) == sum(value.numel() for value in tensors.values())

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_scores_that_are_not_finite(self, value):
        tensors = scores_of(LORA_SHAPES)
        tensors["m.norm.weight"][1] = value
        with pytest.raises(CheckpointError, match=r"m\.norm\.weight: element 1 is (nan|inf)"):
            group_tensors(tensors, "layer")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"m.h.10.q.lora_B.weight": None}, r"q\.lora_A\.weight: the scores hold no lora_B"),
            ({"m.h.10.q.lora_A.weight": None}, r"q\.lora_B\.weight: the scores hold no lora_A"),
            ({"m.h.10.q.lora_A.weight": (2, 7)}, r"m\.h\.10\.q: .*found \[2, 7\] and \[5, 3\]"),
            ({"m.h.10.q.lora_B.weight": (5,)}, r"lora_B\.weight: expected a matrix, found \[5\]"),
            ({"m.h.10.q": (5,)}, r"m\.h\.10\.q: is both a tensor and a module"),
        ],
    )
    def test_factors_that_make_no_ranks(self, changes, words):
        shapes = {k: s for k, s in {**LORA_SHAPES, **changes}.items() if s is not None}
        with pytest.raises(CheckpointError, match=f"(?s)cannot be grouped by LoRA rank.*{words}"):
            group_tensors(scores_of(shapes), "lora-rank")

    def test_models_without_factors(self):
        with pytest.raises(CheckpointError, match="no tensor is a LoRA factor: group by tensor"):
            group_tensors(scores_of({"m.a": (2,), "m.b": (3,)}), "lora-rank")

    def test_nothing_to_group(self):
        with pytest.raises(CheckpointError, match="no parameter has scores"):
            group_tensors(scores_of({"m.a": (0,)}), "tensor")

    def test_one_unit_is_never_important(self):
        figures = unit_figures(group_tensors(scores_of({"m.a": (9,)}), "tensor"))
        assert figures["important"] == {"fraction": 0.2, "score": 0, "cumulative": 0}


class TestCumulative:
    def historical(self, kind="lora-rank", **changes):
        made = group_tensors({**scores_of(LORA_SHAPES, seed=1), **changes}, kind)
        return Units(kind, tuple(reversed(made.units)))

    def test_of_the_first_task_they_are_its_own(self):
        found = group_tensors(scores_of(LORA_SHAPES), "layer")
        assert all(unit.cumulative == unit.score for unit in found.units)

    @pytest.mark.parametrize("weights", [{}, {"new_weight": 0.5, "cumulative_weight": 0.1}])
    def test_add_up_unit_by_unit(self, weights):
        historical = self.historical()
        found = group_tensors(scores_of(LORA_SHAPES), "lora-rank", historical, **weights)
        before = {unit.name: unit.cumulative for unit in historical.units}
        expected = cumulative_scores(
            [unit.score for unit in found.units],
            [before[unit.name] for unit in found.units],
            **weights,
        )
        assert [unit.cumulative for unit in found.units] == expected
        assert scores_by_name(found) == scores_by_name(
            group_tensors(scores_of(LORA_SHAPES), "lora-rank")
        )

    def test_it_is_the_cumulative_score_that_is_carried_on(self):
        units = [Unit(n, (n,), 5.0, c) for n, c in (("m.a", 0.0), ("m.b", 1.0), ("m.c", 0.25))]
        tensors = {name: torch.tensor([1.0]) for name in ("m.a", "m.b", "m.c")}
        found = group_tensors(tensors, "tensor", Units("tensor", tuple(units)))
        assert [unit.cumulative for unit in found.units] == [0.0, 1.0, 0.25]

    def test_other_kinds(self):
        with pytest.raises(CheckpointError, match="expected units of kind tensor, found layer"):
            group_tensors(scores_of(LORA_SHAPES), "tensor", self.historical("layer"))

    def test_other_units_are_listed(self):
        shapes = {**LORA_SHAPES, "m.norm.weight": None, "m.head": (3,)}
        shapes = {name: shape for name, shape in shapes.items() if shape is not None}
        with pytest.raises(CheckpointError) as caught:
            group_tensors(scores_of(shapes), "lora-rank", self.historical())
        assert "- m.head: not among them" in str(caught.value)
        assert "- m.norm.weight: among them alone" in str(caught.value)
        assert str(caught.value).count("\n") == 2

    def test_ten_differences_are_listed(self):
        shapes = {f"m.x{number}": (2,) for number in range(12)}
        historical = group_tensors(scores_of({"m.y": (2,)}), "tensor")
        with pytest.raises(CheckpointError, match="and 3 more") as caught:
            group_tensors(scores_of(shapes), "tensor", historical)
        assert str(caught.value).count("\n") == 11

    def test_other_members(self):
        historical = self.historical("tensor")
        moved = tuple(
            Unit(u.name, ("m.other",), 1.0, 1.0) if u.name == "m.norm.weight" else u
            for u in historical.units
        )
        with pytest.raises(
            CheckpointError, match=r"expected members m\.norm\.weight, found m\.other"
        ):
            group_tensors(scores_of(LORA_SHAPES), "tensor", Units("tensor", moved))


class Adapted(nn.Module):
    """A module of each kind that peft adapts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 6)
        self.fold = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(6, 5)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor")  # lora_B's bias
@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_ranks_are_what_peft_adds_up(extra):
    targets = {"table": 2, "fold": 3, "out": 4} if extra != {"lora_bias": True} else {"out": 4}
    config = LoraConfig(
        target_modules=list(targets), rank_pattern=targets, init_lora_weights=False, **extra
    )
    model = get_peft_model(Adapted(), config)
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    units = group_tensors(
        {name: torch.rand(value.shape) for name, value in state.items()}, "lora-rank"
    )
    ranks = [number for number, unit in enumerate(units.units) if len(unit.members) == 2]
    assert len(ranks) == sum(targets.values())

    def updates(kept):
        """What the adapter adds to each weight if only some units are not zero."""
        chosen = [number in kept for number in range(len(units.units))]
        source = UnitSource(units, MemorySource(state), chosen, "kept")
        masked = {n: v * source.read(n, 0, v.numel()).view(v.shape) for n, v in state.items()}
        adapted = copy.deepcopy(model)
        set_peft_model_state_dict(adapted, masked)
        modules = {name: getattr(adapted.base_model.model, name) for name in targets}
        return {name: m.get_delta_weight("default").detach() for name, m in modules.items()}

    whole, parts = updates(ranks), [updates([rank]) for rank in ranks]
    for name, delta in whole.items():
        assert delta.abs().max() > 0
        assert torch.allclose(sum(part[name] for part in parts), delta, atol=1e-5)
    for part in parts:
        assert sum(bool(delta.any()) for delta in part.values()) == 1


def test_names_are_those_of_saved_adapters(tmp_path):
    model = tiny.lora_llama()
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    tensors = {name: torch.rand(source.info(name).shape) for name in source.names()}
    units = group_tensors(tensors, "lora-rank")
    assert len(units.units) == 4
    assert UnitSource(units, source, [0.0] * 4, "x").names() == source.names()
    live = {n: torch.rand(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert len(group_tensors(live, "lora-rank").units) == 4


@pytest.fixture
def importance(tmp_path):
    tensors = folders.random_tensors(0, LORA_SHAPES)
    return folders.snapshot(tmp_path / "importance", 0, tensors, role="new", task="sizes")


def run(importance, out, unit="lora-rank", historical_units=None, **options):
    given = GroupOptions(unit=unit, **options)
    return Group(importance, given, historical_units=historical_units).run(out)


class TestFolder:
    def test_holds_the_units_of_the_snapshot(self, importance, tmp_path):
        figures, is_new = run(importance, tmp_path / "units")
        found = read_units(tmp_path / "units")
        assert is_new
        assert found.units == group_scores(open_scores(importance), "lora-rank").units
        assert found.kind == "lora-rank"
        assert [path.name for path in (tmp_path / "units").iterdir()] == ["units.json"]
        assert figures == unit_figures(found)

    def test_details_say_how_it_was_made(self, importance, tmp_path):
        run(importance, tmp_path / "first", "layer")
        details = read_units(tmp_path / "first").details
        assert (details["task"], details["role"]) == ("sizes", "new")
        assert details["snapshot_digest"] == digest(importance)
        assert details["made_by"]["command"] == "group"
        assert details["made_by"]["options"]["unit"] == "layer"
        assert list(details["made_by"]["parents"]) == ["importance"]
        assert "new_weight" not in details

    def test_tasks_add_up(self, importance, tmp_path):
        run(importance, tmp_path / "first", "layer")
        second = folders.snapshot(tmp_path / "second", 1, folders.random_tensors(0, LORA_SHAPES))
        run(second, tmp_path / "both", "layer", tmp_path / "first", new_weight=0.5)
        found, first = read_units(tmp_path / "both"), read_units(tmp_path / "first")
        expected = group_scores(open_scores(second), "layer", first, new_weight=0.5)
        assert found.units == expected.units
        assert (found.details["new_weight"], found.details["cumulative_weight"]) == (0.5, 0.7)
        parent = found.details["made_by"]["parents"]["historical_units"]
        assert parent["digest"] == digest(tmp_path / "first") is not None

    def test_figures_worked_by_hand(self, tmp_path):
        values = [3.0, 9.0, 1.0, 5.0, 7.0, 8.0]
        kept = {f"score/m.w{n}": torch.tensor([value]) for n, value in enumerate(values)}
        write_snapshot(tmp_path / "s", kept, {})
        figures, _ = run(tmp_path / "s", tmp_path / "units", "tensor")
        assert figures["unit"] == "tensor"
        assert figures["num_units"] == 6
        assert figures["important"] == {"fraction": 0.2, "score": 1, "cumulative": 1}
        top = [("m.w1", 9.0), ("m.w5", 8.0), ("m.w4", 7.0), ("m.w3", 5.0), ("m.w0", 3.0)]
        assert figures["top_units"] == [{"name": n, "score": s, "cumulative": s} for n, s in top]

    def test_made_again_does_nothing_and_other_options_are_refused(self, importance, tmp_path):
        figures, _ = run(importance, tmp_path / "units")
        before = (tmp_path / "units").stat()
        assert run(importance, tmp_path / "units") == (figures, False)
        with pytest.raises(RunError, match="made by another group command"):
            run(importance, tmp_path / "units", "layer")
        assert (tmp_path / "units").stat() == before
        grouping = Group(importance, GroupOptions(unit="layer"))
        assert grouping.run(tmp_path / "units", overwrite=True)[1]
        assert read_units(tmp_path / "units").kind == "layer"

    def test_other_historical_scores_are_another_command(self, importance, tmp_path):
        run(importance, tmp_path / "first")
        run(importance, tmp_path / "both", historical_units=tmp_path / "first")
        first = read_units(tmp_path / "first")
        changed = (Unit(first.units[0].name, first.units[0].members, 1.0, 9.0), *first.units[1:])
        write_units(tmp_path / "first", Units(first.kind, changed, first.details))
        with pytest.raises(RunError, match="made by another group command"):
            run(importance, tmp_path / "both", historical_units=tmp_path / "first")

    def test_interrupted_grouping_leaves_nothing(self, importance, tmp_path):
        def fail(num_parameters):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Group(importance, GroupOptions(unit="tensor")).run(tmp_path / "u", on_progress=fail)
        assert [path.name for path in tmp_path.iterdir()] == ["importance"]

    @pytest.mark.parametrize("inside", [".", "importance", "first"])
    def test_inputs_are_not_overwritten(self, importance, tmp_path, inside):
        run(importance, tmp_path / "first")
        grouping = Group(
            importance, GroupOptions(unit="lora-rank"), historical_units=tmp_path / "first"
        )
        with pytest.raises(RunError, match="holds an input"):
            grouping.run(tmp_path / inside, overwrite=True)

    def test_equal_scores_warn(self, tmp_path):
        write_snapshot(tmp_path / "s", {"score/a": torch.ones(2), "score/b": torch.ones(3)}, {})
        with pytest.warns(UserWarning, match="the scores of all units are equal"):
            figures, _ = run(tmp_path / "s", tmp_path / "units", "tensor")
        assert figures["important"]["score"] == 0

    def test_faults_are_found_before_anything_is_read(self, importance, tmp_path):
        folders.snapshot(tmp_path / "full", 0, {"m.w": torch.zeros(2)})
        full, other = GroupOptions(unit="tensor"), tmp_path / "other"
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/full: .*\n.*no tensor is a LoRA"):
            Group(tmp_path / "full", GroupOptions(unit="lora-rank"))
        write_units(other, Units("lora-rank", (Unit("m.v", ("m.v",), 1.0, 1.0),)))
        with pytest.raises(CheckpointError, match=rf"^{other}: .*kind tensor, found lora-rank"):
            Group(tmp_path / "full", full, historical_units=other)
        write_units(other, Units("tensor", (Unit("m.v", ("m.v",), 1.0, 1.0),)))
        with pytest.raises(CheckpointError, match=rf"(?s)^{other}: expected the units.*m\.w: not"):
            Group(tmp_path / "full", full, historical_units=other)

    def test_plan(self, importance, tmp_path):
        plan = Group(importance, GroupOptions(unit="lora-rank")).plan()
        numel = sum(math.prod(shape) for shape in LORA_SHAPES.values())
        assert (plan["num_tensors"], plan["num_parameters"]) == (len(LORA_SHAPES), numel)
        assert (plan["num_units"], plan["read_bytes"]) == (3 + 2 + 4 + 2, 2 * 8 * numel)
        run(importance, tmp_path / "units")
        num_bytes = (tmp_path / "units" / "units.json").stat().st_size
        assert 0.5 * num_bytes < plan["write_bytes"] < 2 * num_bytes

    @pytest.mark.parametrize(
        "options",
        [
            {"unit": "neuron"},
            {"unit": "layer", "new_weight": -0.1},
            {"unit": "layer", "cumulative_weight": 1.1},
            {"unit": "layer", "new_weight": math.nan},
            {"unit": "layer", "new_weight": 0.0, "cumulative_weight": 0.0},
        ],
    )
    def test_impossible_options_are_refused(self, options):
        with pytest.raises(ValueError, match=r"unit|weight"):
            GroupOptions(**options)


class TestInspection:
    def test_of_units(self, importance, tmp_path):
        run(importance, tmp_path / "units")
        found = inspect_folder(str(tmp_path / "units"))
        assert found.kind == "skill units"
        assert found.made_by["command"] == "group"
        facts = found.facts
        assert (facts["unit"], facts["task"], facts["role"]) == ("lora-rank", "sizes", "new")
        assert (facts["num_units"], facts["num_members"], facts["num_tensors"]) == (11, 20, 8)
        assert facts["important"] == unit_figures(read_units(tmp_path / "units"))["important"]
        assert len(facts["top_units"]) == 5
        assert json.loads(json.dumps(found.as_dict())).keys() == {
            "kind", "reference", "made_by", "facts",
        }  # fmt: skip

    def test_other_fractions(self, importance, tmp_path):
        run(importance, tmp_path / "units")
        facts = inspect_folder(str(tmp_path / "units"), 0.5).facts
        assert facts["important"] == {"fraction": 0.5, "score": 5, "cumulative": 5}

    def test_damaged(self, importance, tmp_path):
        run(importance, tmp_path / "units")
        (tmp_path / "units/units.json").write_text('{"format": "kifmerge.units"')
        with pytest.raises(CheckpointError, match=r"units\.json: cannot be read"):
            inspect_folder(str(tmp_path / "units"))


ORDERS = {"param_first": "first", "param_second": "second", "param_mix": "mixed"}


class TestGolden:
    """The authors' released code, replayed: see tests/golden/README.md."""

    @pytest.fixture(scope="class")
    def details(self):
        return json.loads((GOLDEN / "trace.json").read_text())

    @pytest.fixture(scope="class")
    def tensors(self):
        return safetensors.torch.load_file(GOLDEN / "trace.safetensors")

    def part(self, tensors, prefix):
        """Tensors under ``prefix.``, named as on disk."""
        start = f"{prefix}."
        return {
            self.on_disk(key.removeprefix(start)): value
            for key, value in tensors.items()
            if key.startswith(start)
        }

    def on_disk(self, name):
        module, separator, rank = name.partition(".|||")
        return f"{module}[{rank}]" if separator else name.replace(".default", "")

    def units(self, details, tensors, recorded):
        kept = {
            f"{what}/{name}": value
            for what in ("sensitivity", "uncertainty")
            for name, value in self.part(tensors, f"{recorded}.{what}").items()
        }
        assert len(kept) == 48
        kind = "tensor" if recorded == "matrix_units" else "lora-rank"
        return group_scores(Scores(MemorySource(kept), "product"), kind)

    @pytest.mark.parametrize("recorded", ["matrix_units", *(f"rank_units.{o}" for o in ORDERS)])
    def test_scores_of_units(self, details, tensors, recorded):
        found = self.units(details, tensors, recorded)
        names = [self.on_disk(name) for name in details[f"{recorded}.units"]]
        assert [unit.name for unit in found.units] == names
        expected = details[f"{recorded}.scores"]
        assert [unit.score for unit in found.units] == pytest.approx(expected, rel=1e-6, abs=0)

    @pytest.mark.parametrize("recorded", ["matrix_units", *(f"rank_units.{o}" for o in ORDERS)])
    def test_sensitivity_and_uncertainty(self, details, tensors, recorded):
        order = ORDERS.get(recorded.partition(".")[2], "first")
        betas = (details["beta1"], details["beta2"])
        accumulator = ImportanceAccumulator(
            self.part(tensors, "param.1"), ImportanceOptions(sensitivity=order, betas=betas)
        )
        for step in range(1, details["steps"] + 1):
            weights = self.part(tensors, f"param.{step}")
            gradients = self.part(tensors, f"grad.{step}")
            names = list(accumulator.sensitivity)
            accumulator.update([weights[n] for n in names], [gradients[n] for n in names])
        assert accumulator.num_steps == 7
        for what in ("sensitivity", "uncertainty"):
            for name, expected in self.part(tensors, f"{recorded}.{what}").items():
                found = getattr(accumulator, what)[name]
                assert torch.allclose(found, expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("rule", ["three_way", "softmax"])
    def test_cumulative_scores(self, details, rule):
        fuse = details[f"fuse.{rule}"]
        assert fuse["cumulative_units"] == fuse["units"]
        found = cumulative_scores(fuse["present_scores"], fuse["previous_scores"])
        assert found == pytest.approx(fuse["cumulative_scores"], rel=1e-14, abs=1e-15)

    @pytest.mark.parametrize(("rule", "recorded"), [
        ("three_way", "matrix_units"), ("softmax", "rank_units.param_first"),
    ])  # fmt: skip
    def test_fused_weights(self, details, tensors, rule, recorded):
        fuse = details[f"fuse.{rule}"]
        units = self.units(details, tensors, recorded)
        assert [unit.name for unit in units.units] == [self.on_disk(n) for n in fuse["units"]]
        new, historical = (self.part(tensors, f"fuse.{s}") for s in ("present", "previous"))
        like = MemorySource(new)
        prepare = important_units if rule == "three_way" else normalise_scores
        shown = [
            UnitSource(units, like, prepare(fuse[f"{side}_scores"]), side)
            for side in ("present", "previous")
        ]
        expected = self.part(tensors, f"fuse.{rule}.fused")
        assert set(shown[0].names()) == set(new) == set(expected)
        for name, weights in new.items():
            evidence = [s.read(name, 0, weights.numel()).view(weights.shape) for s in shown]
            if rule == "three_way":
                fused = kif(weights, historical[name], *evidence)
            else:
                temperature = details["tau"]
                fused = kif_adaptive(weights, historical[name], *evidence, temperature=temperature)
            assert (fused - expected[name]).abs().max() <= 1e-6

    def test_every_case_of_the_static_rule_occurs(self, details):
        fuse = details["fuse.three_way"]
        sides = [important_units(fuse[f"{side}_scores"]) for side in ("present", "previous")]
        assert len(set(zip(*sides, strict=True))) >= 3
        for scores, important in zip(("present", "previous"), sides, strict=True):
            values = np.array(fuse[f"{scores}_scores"])
            values = (values - values.min()) / (values.max() - values.min())
            assert important == (values > np.percentile(values, 80)).tolist()
