"""Merging folders: the same weights as a round in memory, whole or not at all, or an error."""

import itertools
import json
import re
from dataclasses import dataclass, replace

import folders
import pytest
import safetensors.torch
import tiny
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kifmerge.checkpoint import pieces as pieces_module
from kifmerge.checkpoint.mask import MaskSource
from kifmerge.checkpoint.provenance import digest, read_provenance
from kifmerge.checkpoint.snapshot import read_snapshot, write_snapshot
from kifmerge.errors import CheckpointError, RunError
from kifmerge.phases.merge import Merge, MergeInputs, MergeOptions
from kifmerge.phases.presets import RecurrentOptions
from kifmerge.phases.prune import Prune, PruneOptions
from kifmerge.phases.recurrent import RecurrentRounds

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = {
    "recurrent-kif": RecurrentOptions(),
    "recurrent-kif, tensor, drop": RecurrentOptions(
        scope="tensor", redundant="drop", important_fraction=0.5, shared_weights=(1.0, 0.75)
    ),
    "recurrent-kif-adaptive": RecurrentOptions(rule="recurrent-kif-adaptive"),
    "average": RecurrentOptions(rule="average"),
}
every_variant = pytest.mark.parametrize("rule", VARIANTS.values(), ids=VARIANTS)
SHAPES = {"z.weight": (11, 13), "a.weight": (5, 4), "a.bias": (7,), "m.weight": (3, 1, 9)}


@dataclass
class Files:
    """A folder with everything that a merge reads."""

    folder: object

    def write(self, dtype=torch.float32, *, shards=(0, 0, 0), states=None, **save):
        self.states = states or [folders.random_tensors(seed, SHAPES, dtype) for seed in (1, 2, 3)]
        roles = ("base", "new", "historical")
        for role, state, num_shards in zip(roles, self.states, shards, strict=True):
            folders.save(self.folder / role, state, num_shards=num_shards, **save)
        for seed, role in enumerate(("new", "historical")):
            folders.snapshot(self.folder / f"{role}-importance", seed, self.states[0], role=role)
        return self

    def inputs(self, *, importance=True):
        sides = ("new", "historical") if importance else ()
        return MergeInputs(
            **{role: self.folder / role for role in ("base", "new", "historical")},
            importance={side: self.folder / f"{side}-importance" for side in sides},
            masks={},
        )

    def merge(self, rule=VARIANTS["recurrent-kif"], out="out", *, overwrite=False, **options):
        inputs = self.inputs(importance=rule.rule != "average")
        merging = Merge(inputs, rule, MergeOptions(**options))
        return merging.run(self.folder / out, overwrite=overwrite)

    def merged(self, out="out"):
        return folders.load(self.folder / out)

    def in_memory(self, rule):
        """One round of the recurrent loop over the same weights and importance."""
        parameters = {
            name: torch.nn.Parameter(value.clone()) for name, value in self.states[0].items()
        }
        rounds = RecurrentRounds(parameters, rule)
        for role, accumulator in rounds.accumulators.items():
            kept = read_snapshot(self.folder / f"{role}-importance").tensors()
            accumulator.load_state_dict(kept, num_steps=1)
        for number in (1, 2):
            for name, parameter in parameters.items():
                parameter.data.copy_(self.states[number][name])
            if number == 1:
                rounds.begin_outer()
        done = rounds.fuse(inner_steps=1, outer_steps=1, outer_loss=0.0)
        return {name: parameter.detach() for name, parameter in parameters.items()}, done

    def refused(
        self, match, *more, error=CheckpointError, rule=VARIANTS["recurrent-kif"], **options
    ):
        """The merge fails with all of this in its message, and leaves nothing."""
        before = sorted(self.folder.iterdir())
        with pytest.raises(error, match=match) as caught:
            self.merge(rule, **options)
        assert sorted(self.folder.iterdir()) == before
        message = str(caught.value)
        for text in more:
            assert str(text) in message
        return message


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


class TestWeights:
    @every_variant
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equal_a_round_in_memory(self, files, rule, dtype):
        files.write(dtype)
        figures, is_new = files.merge(rule, historical_parent="new")
        expected, done = files.in_memory(rule)
        assert is_new
        assert tiny.same(files.merged(), expected)
        assert all(value.dtype == dtype for value in files.merged().values())
        counts = ("index", "inner_steps", "outer_steps", "outer_loss")
        told = {key: value for key, value in done.as_dict().items() if key not in counts}
        assert {key: figures[key] for key in told} == told
        assert ("both" in told) == (rule.rule == "recurrent-kif")

    @every_variant
    @given(
        shards=st.tuples(*[st.integers(0, 4)] * 3),
        numel=st.integers(1, 40),
        dtype=st.sampled_from(DTYPES),
    )
    @settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_pieces_and_shards_never_change_a_bit(
        self, tmp_path_factory, rule, shards, numel, dtype
    ):
        files = Files(tmp_path_factory.mktemp("shards")).write(dtype, shards=shards)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces_module, "CPU_PIECE_BYTES", 4 * numel)
            files.merge(rule, historical_parent="new")
        assert tiny.same(files.merged(), files.in_memory(rule)[0])
        layout = sorted(path.name for path in (files.folder / "base").glob("model*"))
        assert sorted(path.name for path in (files.folder / "out").glob("model*")) == layout

    @every_variant
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_update_is_the_base_s_own_file(self, files, rule, dtype):
        base = folders.random_tensors(1, SHAPES, dtype)
        files.write(states=[base, base, base])
        files.merge(rule)
        written, own = (files.folder / d / "model.safetensors" for d in ("out", "base"))
        assert written.read_bytes() == own.read_bytes()

    def test_parent_new_and_parent_base(self, files):
        """With the base as parent both vectors begin there; with new the second goes on."""
        files.write()
        base, new, historical = (state["a.bias"].double() for state in files.states)
        average = VARIANTS["average"]
        for parent, start in (("new", new), ("base", base)):
            files.merge(average, f"from-{parent}", historical_parent=parent)
            expected = base + 0.5 * (new - base) + 0.5 * (historical - start)
            found = files.merged(f"from-{parent}")["a.bias"].double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    def test_masks_lead_to_what_their_scores_lead_to(self, files):
        files.write()
        files.merge(out="by-scores")
        for role in ("new", "historical"):
            Prune(files.folder / f"{role}-importance", PruneOptions()).run(
                files.folder / f"{role}-mask"
            )
        masks = {role: files.folder / f"{role}-mask" for role in ("new", "historical")}
        inputs = replace(files.inputs(importance=False), masks=masks)
        merging = Merge(inputs, VARIANTS["recurrent-kif"])
        merging.run(files.folder / "by-masks")
        assert "scope" not in merging.made_by()["options"]
        assert tiny.same(files.merged("by-masks"), files.merged("by-scores"))

    def test_score_kind_is_the_snapshot_s_own(self, files):
        files.write()
        rule = replace(VARIANTS["recurrent-kif"], score="sensitivity")
        for role in ("new", "historical"):
            folders.snapshot(
                files.folder / f"{role}-importance", len(role), files.states[0],
                options={"score": "sensitivity"},
            )  # fmt: skip
        files.merge(rule, historical_parent="new")
        assert tiny.same(files.merged(), files.in_memory(rule)[0])
        assert not tiny.same(files.merged(), files.in_memory(VARIANTS["recurrent-kif"])[0])


class TestParent:
    """Where the historical task vector starts, when nobody says."""

    def parent(self, files):
        return Merge(files.inputs(), VARIANTS["recurrent-kif"]).historical_parent

    def record(self, files, command, role="model", parent="new"):
        made = folders.made_by(command, **{role: files.folder / parent})
        folders.save(files.folder / "historical", files.states[2], provenance=made)

    def test_unknown_history(self, files):
        assert self.parent(files.write()) == "base"

    def test_replayed_from_new(self, files):
        self.record(files.write(), "replay")
        assert self.parent(files) == "new"

    @pytest.mark.parametrize(
        ("command", "role", "parent"),
        [("train", "model", "new"), ("replay", "model", "base"), ("replay", "adapter", "new")],
    )
    def test_made_otherwise(self, files, command, role, parent):
        self.record(files.write(), command, role, parent)
        assert self.parent(files) == "base"

    def test_new_that_has_changed_since(self, files):
        self.record(files.write(), "replay")
        folders.save(files.folder / "new", files.states[0])
        assert self.parent(files) == "base"

    @pytest.mark.parametrize(
        "parents", [None, [], {"model": None}, {"model": {}}, {"model": {"digest": None}}]
    )
    def test_damaged_record_is_no_record(self, files, parents):
        made = {"made_by": {"command": "replay", "parents": parents}}
        files.write()
        folders.save(files.folder / "historical", files.states[2], provenance=made)
        assert self.parent(files) == "base"

    def test_insisting(self, files):
        self.record(files.write(), "replay")
        merging = Merge(
            files.inputs(),
            VARIANTS["recurrent-kif"],
            MergeOptions(historical_parent="base"),
        )
        assert merging.historical_parent == "base"


class TestUnscored:
    """Tensors without scores."""

    def files(self, files, **others):
        extra = {"frozen": [1.0, 2.0, 3.0], "steps": torch.arange(5), "flag": torch.tensor(True)}
        states = []
        for number in range(3):
            more = {k: v if torch.is_tensor(v) else torch.tensor(v) for k, v in extra.items()}
            for name, values in others.items():
                more[name] = values[number]
            states.append({**folders.random_tensors(number, SHAPES), **more})
        files.write(states=states)
        scored = {name: states[0][name] for name in SHAPES}
        for seed, role in enumerate(("new", "historical")):
            folders.snapshot(
                files.folder / f"{role}-importance",
                seed,
                scored,
            )
        return files

    def test_copied_where_all_agree(self, files):
        figures, _ = self.files(files).merge()
        found = files.merged()
        for name in ("frozen", "steps", "flag"):
            assert torch.equal(found[name], files.states[0][name])
        assert (figures["num_copied_tensors"], figures["num_unscored_tensors"]) == (3, 0)

    @pytest.mark.parametrize("differing", [1, 2])
    def test_refused_where_one_differs(self, files, differing):
        frozen = [torch.zeros(3)] * 3
        frozen[differing] = torch.tensor([0.0, 0.0, 1.0])
        message = self.files(files, frozen=frozen).refused(
            "tensors without importance scores differ", "frozen: float32 [3]", "--unscored"
        )
        assert "steps" not in message

    @pytest.mark.parametrize(
        ("choice", "expected"), [("base", 1.0), ("new", 2.0), ("average", 4.5)]
    )
    def test_decided(self, files, choice, expected):
        frozen = [torch.full((3,), x) for x in (1.0, 2.0, 8.0)]
        self.files(files, frozen=frozen).merge(unscored=choice, historical_parent="new")
        assert files.merged()["frozen"].tolist() == [expected] * 3
        assert torch.equal(files.merged()["steps"], torch.arange(5))

    def test_difference_in_one_piece_is_a_difference(self, files, monkeypatch):
        monkeypatch.setattr(pieces_module, "CPU_PIECE_BYTES", 32)
        frozen = [torch.zeros(30) for _ in range(3)]
        frozen[1][9] = 1.0
        self.files(files, frozen=frozen).refused("frozen: float32")
        files.merge(VARIANTS["recurrent-kif"], unscored="average", historical_parent="base")
        assert files.merged()["frozen"].nonzero().tolist() == [[9]]

    def test_whole_numbers_have_no_average(self, files):
        steps = [torch.arange(5) + number for number in range(3)]
        self.files(files, steps=steps).refused(
            "cannot be averaged", "steps: int64 [5]", unscored="average"
        )
        files.merge(unscored="new")
        assert torch.equal(files.merged()["steps"], steps[1])

    def test_average_takes_all_that_can_be_averaged(self, files):
        frozen = [torch.full((3,), x) for x in (1.0, 2.0, 8.0)]
        self.files(files, frozen=frozen).merge(VARIANTS["average"], historical_parent="new")
        assert files.merged()["frozen"].tolist() == [4.5] * 3
        assert torch.equal(files.merged()["steps"], torch.arange(5))


class TestRefusals:
    @pytest.mark.parametrize("role", ["base", "new", "historical"])
    def test_missing_folder(self, files, role):
        files.write()
        (files.folder / role).rename(files.folder / "elsewhere")
        files.refused("no such folder", files.folder / role)

    @pytest.mark.parametrize("role", ["base", "new", "historical"])
    def test_truncated_file(self, files, role):
        path = files.write().folder / role / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        files.refused("truncated", path)

    @pytest.mark.parametrize("side", ["new", "historical"])
    def test_truncated_snapshot(self, files, side):
        path = files.write().folder / f"{side}-importance" / "importance.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        files.refused("truncated", path)

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"a.bias": torch.zeros(8)}, "a.bias: base float32 [7], new float32 [8]"),
            ({"a.bias": torch.zeros(7).half()}, "a.bias: base float32 [7], new float16 [7]"),
            ({"a.bias": None}, "a.bias: base float32 [7], new none"),
            ({"extra": torch.zeros(1)}, "extra: base none, new float32 [1]"),
        ],
    )
    def test_other_names_shapes_dtypes(self, files, changes, text):
        files.write()
        state = {**files.states[1], **changes}
        folders.save(files.folder / "new", {k: v for k, v in state.items() if v is not None})
        files.refused("these are different models", text, files.folder / "new")

    def test_ten_problems_are_listed(self, files):
        files.write()
        folders.save(files.folder / "historical", {f"w{n}": torch.zeros(1) for n in range(30)})
        message = files.refused("these are different models", "and 24 more")
        assert message.count("\n  - ") == 11

    @pytest.mark.parametrize("role", ["base", "new", "historical"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_weights_that_are_not_finite(self, files, role, value, monkeypatch):
        monkeypatch.setattr(pieces_module, "CPU_PIECE_BYTES", 64)
        files.write(torch.bfloat16)
        number = ["base", "new", "historical"].index(role)
        files.states[number]["z.weight"][3, 2] = value
        folders.save(files.folder / role, files.states[number])
        files.refused(
            rf"z\.weight: element 41 is {value}", files.folder / role / "model.safetensors"
        )

    @pytest.mark.parametrize(
        "rule", [VARIANTS["recurrent-kif"], VARIANTS["recurrent-kif-adaptive"]]
    )
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_scores_that_are_not_finite(self, files, rule, value):
        files.write()
        scores = {f"score/{name}": torch.rand(shape) for name, shape in SHAPES.items()}
        scores["score/a.bias"][5] = value
        write_snapshot(files.folder / "new-importance", scores, {})
        path = files.folder / "new-importance/importance.safetensors"
        files.refused(rf"a\.bias: element 5 is {value}", path, rule=rule)

    @pytest.mark.parametrize(
        ("scores", "text"),
        [
            ({"other": (3,)}, "other: [3], not in the model"),
            ({**SHAPES, "a.bias": (8,)}, "a.bias: [8], the model has [7]"),
        ],
    )
    def test_snapshot_of_another_model(self, files, scores, text):
        files.write()
        path = folders.snapshot(
            files.folder / "new-importance", 0, folders.random_tensors(0, scores)
        )
        files.refused("is of another model", text, path)

    def test_snapshots_of_different_parameters(self, files):
        files.write()
        some = {name: files.states[0][name] for name in ("a.bias", "a.weight")}
        folders.snapshot(files.folder / "historical-importance", 0, some)
        files.refused("of different parameters", "z.weight is in one of them only")

    def test_scores_of_whole_numbers(self, files):
        states = [{**folders.random_tensors(n, SHAPES), "n": torch.arange(3)} for n in range(3)]
        files.write(states=states)
        files.refused("n: int64 .* not a floating-point tensor")

    @pytest.mark.parametrize(
        ("tensors", "text"),
        [
            ({"sensitivity/w": torch.zeros(2)}, "uncertainty/w: expected [2], found none"),
            ({"uncertainty/w": torch.zeros(2)}, "sensitivity/w: expected [2], found none"),
            ({"score/w": torch.zeros(2).long()}, "score/w: expected float32 or bfloat16"),
            ({"w": torch.zeros(2)}, "w: expected one of score/NAME"),
            ({}, "expected at least one tensor"),
        ],
    )
    def test_damaged_snapshot(self, files, tensors, text):
        files.write()
        write_snapshot(files.folder / "new-importance", tensors, {})
        files.refused("holds no importance snapshot", text, files.folder / "new-importance")

    def test_missing_snapshot(self, files):
        files.write()
        (files.folder / "new-importance/importance.json").unlink()
        files.refused("holds no importance snapshot", files.folder / "new-importance")

    def test_mask_of_another_model(self, files):
        files.write()
        folders.snapshot(files.folder / "s", 0, {"w": torch.zeros(9)})
        for side in ("new", "historical"):
            Prune(files.folder / "s", PruneOptions()).run(files.folder / f"{side}-mask")
        masks = {side: files.folder / f"{side}-mask" for side in ("new", "historical")}
        inputs = replace(files.inputs(importance=False), masks=masks)
        with pytest.raises(CheckpointError, match=r"(?s)is of another model.*w: \[9\]"):
            Merge(inputs, VARIANTS["recurrent-kif"])

    @pytest.mark.parametrize(
        ("rule", "importance", "masks", "match"),
        [
            ("recurrent-kif", (), (), "recurrent-kif takes importance .* found none"),
            ("recurrent-kif", ("new",), (), "found new importance"),
            ("recurrent-kif", ("new",), ("historical",), "found new importance, historical mask"),
            ("recurrent-kif-adaptive", (), ("new", "historical"), "takes importance snapshots"),
            ("average", ("new", "historical"), (), "average takes no importance"),
        ],
    )
    def test_importance_that_the_rule_does_not_take(self, files, rule, importance, masks, match):
        files.write()
        inputs = replace(
            files.inputs(),
            importance={side: files.folder / f"{side}-importance" for side in importance},
            masks=dict.fromkeys(masks, files.folder),
        )
        with pytest.raises(ValueError, match=match):
            Merge(inputs, RecurrentOptions(rule=rule))

    def test_labels_in_another_order(self, files):
        files.write()
        for number, role in enumerate(("base", "new", "historical")):
            labels = ["yes", "no"] if role != "new" else ["no", "yes"]
            made = {"labels": labels, "model": {"kind": "classifier", "pooling": "own"}}
            folders.save(files.folder / role, files.states[number], provenance=made)
        files.refused("labels: base .'yes', 'no'., new .'no', 'yes'.")

    def test_equal_scores_warn(self, files):
        files.write()
        scores = {f"score/{name}": torch.ones(shape) for name, shape in SHAPES.items()}
        write_snapshot(files.folder / "new-importance", scores, {})
        with pytest.warns(UserWarning, match="the new importance scores are all equal"):
            files.merge()


class TestFolder:
    def test_model_loads_and_says_where_it_comes_from(self, tmp_path):
        models = [tiny.llama(seed) for seed in range(3)]
        for role, model in zip(("base", "new", "historical"), models, strict=True):
            model.save_pretrained(tmp_path / role)
        (tmp_path / "base/tokenizer.json").write_text("{}")
        (tmp_path / "base/README.md").write_text("another model's card")
        files = Files(tmp_path)
        for seed, side in enumerate(("new", "historical")):
            folders.snapshot(tmp_path / f"{side}-importance", seed, tiny.trained(models[0]))
        files.merge()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert tiny.same(tiny.trained(loaded), {n: files.merged()[n] for n in tiny.trained(loaded)})
        assert not tiny.same(tiny.trained(loaded), tiny.trained(models[0]))
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names == {"README.md", "config.json", "generation_config.json", "kifmerge.json",
                         "model.safetensors", "tokenizer.json"}  # fmt: skip
        made = read_provenance(tmp_path / "out")["made_by"]
        assert made["command"] == "merge"
        assert made["options"] == {
            "rule": "recurrent-kif", "important_fraction": 0.2, "scope": "global",
            "shared_weights": [0.4, 0.6], "redundant": "average", "historical_parent": "base",
            "unscored": None, "space": None,
        }  # fmt: skip
        assert list(made["parents"]) == [
            "base", "new", "historical", "new_importance", "historical_importance",
        ]  # fmt: skip
        assert made["parents"]["new"]["digest"] == digest(tmp_path / "new")
        card = (tmp_path / "out/README.md").read_text()
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["base_model_relation"] == "merge"
        assert front["base_model"] == [str(tmp_path / r) for r in ("base", "new", "historical")]
        assert (front["library_name"], front["tags"]) == ("transformers", ["merge", "kifmerge"])
        assert "recurrent-kif" in card
        assert digest(tmp_path / "new")[:12] in card

    def test_what_the_base_says_of_itself_is_kept(self, files):
        own = {"labels": ["a"], "model": {"kind": "classifier"}, "strange": {"x": 1}}
        own |= folders.made_by("train")
        files.write(provenance=own)
        files.merge()
        found = read_provenance(files.folder / "out")
        assert {key: found[key] for key in ("labels", "model", "strange")} == {
            key: own[key] for key in ("labels", "model", "strange")
        }
        assert found["made_by"]["command"] == "merge"

    def test_made_again_does_nothing(self, files):
        files.write()
        figures, _ = files.merge()
        before = (files.folder / "out").stat()
        assert files.merge() == (figures, False)
        assert (files.folder / "out").stat() == before

    def test_other_options_need_another_folder_or_overwrite(self, files):
        files.write()
        files.merge()
        rule = replace(VARIANTS["recurrent-kif"], redundant="drop")
        files.refused("made by another merge command", error=RunError, rule=rule)
        before = files.merged()
        files.merge(rule, overwrite=True)
        assert not tiny.same(files.merged(), before)

    def test_folder_of_somebody_else_is_left_alone(self, files):
        files.write()
        (files.folder / "out").mkdir()
        (files.folder / "out/thesis.txt").write_text("mine")
        files.refused("not of ours", error=RunError)

    def test_inputs_are_not_overwritten_with_their_folder(self, files):
        files.write()
        with pytest.raises(RunError, match="holds an input"):
            Merge(files.inputs(), VARIANTS["recurrent-kif"]).run(files.folder, overwrite=True)

    @pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("boom")])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_interrupted_merge_leaves_what_was_there(self, files, monkeypatch, failure, overwrite):
        files.write()
        if overwrite:
            files.merge(VARIANTS["average"])
        before = sorted(path for path in files.folder.rglob("*"))
        monkeypatch.setattr(pieces_module, "CPU_PIECE_BYTES", 64)
        calls = itertools.count()

        def fail_in_the_middle(num_fused):
            if next(calls) == 4:
                raise failure

        merging = Merge(files.inputs(), VARIANTS["recurrent-kif"])
        with pytest.raises(type(failure)):
            merging.run(files.folder / "out", overwrite=overwrite, on_progress=fail_in_the_middle)
        assert next(calls) == 5
        assert sorted(path for path in files.folder.rglob("*")) == before

    def test_plan_counts_tensors_and_bytes(self, files):
        plan = Merge(files.write().inputs(), VARIANTS["recurrent-kif"]).plan()
        numel = sum(value.numel() for value in files.states[0].values())
        assert (plan.num_tensors, plan.num_parameters) == (4, numel)
        assert plan.write_bytes == 4 * numel
        assert plan.read_bytes == 2 * 3 * 4 * numel + 4 * 2 * 8 * numel
        assert (plan.weight_passes, plan.importance_passes) == (2, 4)


class TestAdapters:
    def write(self, tmp_path, *, base_config=None, new_config=None, historical_config=None):
        """Three adapters of one base."""
        configs = (base_config, new_config, historical_config)
        for seed, (role, config) in enumerate(
            zip(("base", "new", "historical"), configs, strict=True)
        ):
            adapter = tiny.with_lora(tiny.llama(), seed)
            adapter.save_pretrained(tmp_path / role)
            path = tmp_path / role / "adapter_config.json"
            changed = {**json.loads(path.read_text()), "base_model_name_or_path": "org/base"}
            path.write_text(json.dumps({**changed, **(config or {})}))
        kept = safetensors.torch.load_file(tmp_path / "base/adapter_model.safetensors")
        for seed, side in enumerate(("new", "historical")):
            folders.snapshot(tmp_path / f"{side}-importance", seed, kept)
        return Files(tmp_path)

    def record(self, files, role, command, **parents):
        path = files.folder / role / "kifmerge.json"
        header = {"format": "kifmerge.checkpoint", "version": 1}
        path.write_text(json.dumps({**header, **folders.made_by(command, **parents)}))

    def test_adapter_loads_on_its_base(self, tmp_path):
        files = self.write(tmp_path)
        files.merge()
        model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")
        expected = {
            n.replace(".default", ""): p for n, p in model.named_parameters() if "lora" in n
        }
        assert len(expected) == 4
        assert tiny.same(files.merged(), {n: expected[n].detach() for n in files.merged()})
        card = (tmp_path / "out/README.md").read_text()
        front = yaml.safe_load(card.split("---\n")[1])
        assert (front["base_model"], front["library_name"]) == (["org/base"], "peft")

    @pytest.mark.parametrize(
        "change",
        [{"r": 4}, {"lora_alpha": 99}, {"target_modules": ["q_proj"]}, {"use_rslora": True},
         {"base_model_name_or_path": "org/other"}, {"fan_in_fan_out": True}],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("role", ["base", "new", "historical"])
    def test_adapters_of_other_settings_or_bases(self, tmp_path, role, change):
        files = self.write(tmp_path, **{f"{role}_config": change})
        files.refused("these are different models", f"{next(iter(change))}: base ")

    def test_what_does_not_change_the_meaning(self, tmp_path):
        new = {"inference_mode": False, "lora_dropout": 0.5, "peft_version": "0.1",
               "target_modules": ["v_proj", "q_proj"]}  # fmt: skip
        files = self.write(
            tmp_path, base_config={"target_modules": ["q_proj", "v_proj"]}, new_config=new
        )
        files.merge()

    def test_same_base_folder_by_two_paths(self, tmp_path):
        (tmp_path / "model").mkdir()
        twice = {"base_model_name_or_path": str(tmp_path / "new" / ".." / "model")}
        once = {"base_model_name_or_path": str(tmp_path / "model")}
        files = self.write(tmp_path, base_config=once, new_config=twice, historical_config=once)
        files.merge()

    def test_adapter_beside_a_whole_model(self, tmp_path):
        files = self.write(tmp_path)
        (tmp_path / "new/adapter_config.json").unlink()
        (tmp_path / "new/adapter_model.safetensors").rename(tmp_path / "new/model.safetensors")
        files.refused("base is an adapter, new a whole model")

    def test_independent_adapters_are_refused(self, tmp_path):
        """Both on a whole model: nothing says that their factors have a common basis."""
        files = self.write(tmp_path)
        tiny.llama().save_pretrained(tmp_path / "model")
        (tmp_path / "base").rename(tmp_path / "elsewhere")
        (tmp_path / "model").rename(tmp_path / "base")
        files.refused("factors of independent adapters have no common basis", "--space factor")

    def test_independent_adapters_by_insistence(self, tmp_path):
        """The base has no factors: task vectors are the adapters themselves."""
        self.test_independent_adapters_are_refused(tmp_path)
        files = Files(tmp_path)
        files.merge(VARIANTS["average"], space="factor")
        new, historical = (folders.load(tmp_path / role) for role in ("new", "historical"))
        for name, value in files.merged().items():
            torch.testing.assert_close(value, 0.5 * new[name] + 0.5 * historical[name])
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")

    def test_one_trained_from_the_other_needs_no_insistence(self, tmp_path):
        self.test_independent_adapters_are_refused(tmp_path)
        files = Files(tmp_path)
        self.record(files, "historical", "replay", adapter=tmp_path / "new")
        merging = Merge(files.inputs(), VARIANTS["recurrent-kif"])
        assert merging.historical_parent == "new"

    def test_adapter_of_another_folder_than_the_base(self, tmp_path):
        (tmp_path / "other").mkdir()
        config = {"base_model_name_or_path": str(tmp_path / "other")}
        files = self.write(tmp_path, new_config=config, historical_config=config)
        (tmp_path / "base/adapter_config.json").unlink()
        (tmp_path / "base/adapter_model.safetensors").rename(tmp_path / "base/model.safetensors")
        files.refused("is an adapter of .*other, not of .*base", space="factor")

    @pytest.mark.parametrize("role", ["new", "historical"])
    def test_adapter_known_to_be_trained_afresh(self, tmp_path, role):
        """Giving a base declares that both come from it; a record that says otherwise counts."""
        files = self.write(tmp_path)
        self.record(files, role, "train", model=tmp_path)
        files.refused(f"{role} .* was trained from a fresh adapter", "--space factor")
        files.merge(space="factor")

    @pytest.mark.parametrize("command", ["train", "merge"])
    def test_adapter_trained_from_some_adapter_is_believed(self, tmp_path, command):
        files = self.write(tmp_path)
        self.record(files, "new", command, adapter=tmp_path / "base")
        files.merge()


def test_messages_are_for_people(files):
    """No message shows a class or a module."""
    files.write()
    folders.save(files.folder / "new", {"w": torch.zeros(1)})
    message = files.refused("different models")
    assert not re.search(r"torch\.|TensorInfo|object at", message)


def test_masks_of_a_merge_are_read_in_slices(files):
    files.write()
    Prune(files.folder / "new-importance", PruneOptions()).run(files.folder / "mask")
    source = MaskSource(files.folder / "mask")
    whole = source.read("z.weight", 0, 143)
    assert torch.equal(source.read("z.weight", 5, 99), whole[5:99])
