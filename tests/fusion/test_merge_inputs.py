"""What a merge refuses before it writes, and what becomes of tensors that no rule can judge."""

import re
from dataclasses import replace

import folders
import merges
import pytest
import torch
from merges import SHAPES, Files

from kifmerge.checkpoint.mask import MaskSource
from kifmerge.checkpoint.snapshot import write_snapshot
from kifmerge.fusion.inputs import MergeInputs
from kifmerge.fusion.rules import FusionOptions
from kifmerge.phases.merge import Merge, MergeOptions
from kifmerge.phases.prune import Prune, PruneInputs, PruneOptions

KIF = FusionOptions()
AVERAGE = FusionOptions(rule="average")
ROLES = ["base", "new", "historical"]


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


class TestUnscored:
    """Tensors without scores."""

    def files(self, files, **others):
        extra = {"frozen": [1.0, 2.0, 3.0], "steps": torch.arange(5), "flag": torch.tensor(True)}
        states = []
        for number in range(len(files.roles) + 1):
            more = {k: v if torch.is_tensor(v) else torch.tensor(v) for k, v in extra.items()}
            for name, values in others.items():
                more[name] = values[number]
            states.append({**folders.random_tensors(number, SHAPES), **more})
        files.write(states=states)
        scored = {name: states[0][name] for name in SHAPES}
        for seed, role in enumerate(files.roles):
            folders.snapshot(files.folder / f"{role}-importance", seed, scored)
        return files

    def test_copied_where_all_agree(self, files):
        figures, _ = self.files(files).merge(KIF)
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
        figures, _ = self.files(files, frozen=frozen).merge(
            KIF, unscored=choice, historical_parent="new"
        )
        assert files.merged()["frozen"].tolist() == [expected] * 3
        assert torch.equal(files.merged()["steps"], torch.arange(5))
        assert (figures["num_copied_tensors"], figures["num_unscored_tensors"]) == (2, 1)

    @pytest.mark.parametrize(("choice", "expected"), [("base", 1.0), ("average", 5.0)])
    def test_decided_for_many_models(self, tmp_path, choice, expected):
        files = Files(tmp_path, merges.roles_of(3))
        frozen = [torch.full((3,), x) for x in (1.0, 2.0, 8.0, 5.0)]
        rule = FusionOptions(weights=(1.0, 5.0, 3.0))
        self.files(files, frozen=frozen).merge(rule, unscored=choice)
        assert files.merged()["frozen"].tolist() == pytest.approx([expected] * 3)

    def test_mean_of_models_without_a_base(self, files):
        frozen = [torch.full((3,), x) for x in (1.0, 2.0, 8.0)]
        rule = FusionOptions(rule="kif")
        self.files(files, frozen=frozen).merge(rule, base=False, unscored="average")
        assert files.merged()["frozen"].tolist() == [5.0] * 3

    @pytest.mark.parametrize("differing", [1, 2, 3])
    def test_refused_where_one_of_many_differs(self, tmp_path, differing):
        files = Files(tmp_path, merges.roles_of(3))
        steps = [torch.arange(5)] * 4
        steps[differing] = torch.arange(5) + 1
        rule = FusionOptions(weights=(1.0, 1.0, 1.0))
        self.files(files, steps=steps).refused("differ between the inputs", "steps", rule=rule)

    def test_difference_in_one_piece_is_a_difference(self, files, monkeypatch):
        merges.cut_small(monkeypatch, 32)
        frozen = [torch.zeros(30) for _ in range(3)]
        frozen[1][9] = 1.0
        self.files(files, frozen=frozen).refused("frozen: float32", num_workers=2)
        files.merge(KIF, unscored="average", historical_parent="base")
        assert files.merged()["frozen"].nonzero().tolist() == [[9]]

    def test_zeros_of_two_signs_differ(self, files):
        """Taken as they are, bit for bit."""
        frozen = [torch.zeros(3), torch.zeros(3), -torch.zeros(3)]
        self.files(files, frozen=frozen).refused("frozen: float32")

    def test_whole_numbers_have_no_average(self, files):
        steps = [torch.arange(5) + number for number in range(3)]
        self.files(files, steps=steps).refused(
            "cannot be averaged", "steps: int64 [5]", unscored="average"
        )
        files.merge(KIF, unscored="new")
        assert torch.equal(files.merged()["steps"], steps[1])

    def test_average_takes_all_that_can_be_averaged(self, files):
        frozen = [torch.full((3,), x) for x in (1.0, 2.0, 8.0)]
        self.files(files, frozen=frozen).merge(AVERAGE, historical_parent="new")
        assert files.merged()["frozen"].tolist() == [4.5] * 3
        assert torch.equal(files.merged()["steps"], torch.arange(5))

    def test_they_lie_where_the_base_has_them(self, tmp_path):
        """In the middle of a file, between tensors with scores, in shards."""
        states = []
        for number in range(3):
            drawn = folders.random_tensors(number, {f"{n}.weight": (9,) for n in "abcdefgh"})
            fixed = folders.random_tensors(9, {f"{n}.weight": (9,) for n in "bdg"})
            states.append({**drawn, **fixed})
        files = Files(tmp_path).write(states=states, shards=(2, 0, 3))
        scored = {n: states[0][n] for n in states[0] if n[0] not in "bdg"}
        for seed, role in enumerate(files.roles):
            folders.snapshot(tmp_path / f"{role}-importance", seed, scored)
        files.merge(KIF, num_workers=2)
        for name, value in files.merged().items():
            assert torch.equal(value, states[0][name]) == (name[0] in "bdg")


class TestFiles:
    @pytest.mark.parametrize("role", ROLES)
    def test_missing_folder(self, files, role):
        files.write()
        (files.folder / role).rename(files.folder / "elsewhere")
        files.refused("no such folder", files.folder / role)

    @pytest.mark.parametrize("role", ROLES)
    def test_truncated_file(self, files, role):
        path = files.write().folder / role / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        files.refused("truncated", path)

    @pytest.mark.parametrize("side", merges.TWO)
    def test_truncated_snapshot(self, files, side):
        path = files.write().folder / f"{side}-importance" / "importance.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        files.refused("truncated", path)

    @pytest.mark.parametrize("side", merges.TWO)
    @pytest.mark.parametrize("kind", ["mask", "units"])
    def test_missing_mask_or_units(self, files, side, kind):
        files.write().make_masks().make_units()
        (files.folder / f"{side}-{kind}").rename(files.folder / "elsewhere")
        evidence = {"mask": "masks"}.get(kind, kind)
        files.refused("holds no", files.folder / f"{side}-{kind}", evidence=evidence)

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

    def test_last_of_many_models(self, tmp_path):
        files = Files(tmp_path, merges.roles_of(4)).write()
        folders.save(tmp_path / "model_4", {**files.states[4], "a.bias": torch.zeros(1)})
        files.refused("a.bias: base float32", "model_4 float32 [1]", rule=AVERAGE)

    def test_labels_in_another_order(self, files):
        files.write()
        for number, role in enumerate(ROLES):
            labels = ["yes", "no"] if role != "new" else ["no", "yes"]
            made = {"labels": labels, "model": {"kind": "classifier", "pooling": "own"}}
            folders.save(files.folder / role, files.states[number], provenance=made)
        files.refused("labels: base .'yes', 'no'., new .'no', 'yes'.")

    def test_messages_are_for_people(self, files):
        """No message shows a class or a module."""
        files.write()
        folders.save(files.folder / "new", {"w": torch.zeros(1)})
        message = files.refused("different models")
        assert not re.search(r"torch\.|TensorInfo|object at", message)


class TestEvidence:
    @pytest.mark.parametrize(
        "rule", [KIF, FusionOptions(rule="recurrent-kif-adaptive"), FusionOptions(rule="kif")],
        ids=lambda rule: rule.rule,
    )  # fmt: skip
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_scores_that_are_not_finite(self, files, rule, value):
        files.write()
        scores = {f"score/{name}": torch.rand(shape) for name, shape in SHAPES.items()}
        scores["score/a.bias"][5] = value
        write_snapshot(files.folder / "new-importance", scores, {})
        path = files.folder / "new-importance/importance.safetensors"
        files.refused(rf"a\.bias: element 5 is {value}", path, rule=rule, nonfinite="keep")

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
        for side in merges.TWO:
            inputs = PruneInputs(importance=files.folder / "s")
            Prune(inputs, PruneOptions()).run(files.folder / f"{side}-mask")
        files.refused(r"(?s)is of another model.*w: \[9\]", evidence="masks")

    @pytest.mark.parametrize("rule", [KIF, FusionOptions(rule="kif")], ids=lambda rule: rule.rule)
    def test_units_of_another_model(self, files, rule):
        files.write().make_units()
        path = files.folder / "new-units/units.json"
        path.write_text(path.read_text().replace("a.bias", "a.base"))
        files.refused("holds units of another model", "a.base: no such tensor", rule=rule,
                      evidence="units")  # fmt: skip

    def test_equal_scores_warn(self, files):
        files.write()
        scores = {f"score/{name}": torch.ones(shape) for name, shape in SHAPES.items()}
        write_snapshot(files.folder / "new-importance", scores, {})
        with pytest.warns(UserWarning, match="the new importance scores are all equal"):
            files.merge(KIF)

    def test_masks_are_read_in_slices(self, files):
        files.write().make_masks()
        source = MaskSource(files.folder / "new-mask")
        whole = source.read("z.weight", 0, 143)
        assert torch.equal(source.read("z.weight", 5, 99), whole[5:99])


class TestWhatRulesTake:
    @pytest.mark.parametrize(
        ("rule", "importance", "masks", "units", "match"),
        [
            ("recurrent-kif", (), (), (), "recurrent-kif takes importance .* found none"),
            ("recurrent-kif", ("new",), (), (), "found new importance"),
            ("recurrent-kif", ("new",), ("historical",), (),
             "found new importance, historical mask"),
            ("recurrent-kif", merges.TWO, merges.TWO, (), "takes importance snapshots of all"),
            ("recurrent-kif", merges.TWO, (), ("new",), "found .*, new units"),
            ("recurrent-kif-adaptive", (), merges.TWO, (), "takes importance snapshots"),
            ("average", merges.TWO, (), (), "average takes no importance"),
            ("linear", (), (), ("new",), "linear takes no importance, found new units"),
            ("ties", (), merges.TWO, (), "ties takes no importance"),
            ("kif", (), (), (), "kif takes units of both sides, or .* found none"),
            ("kif", merges.TWO, (), merges.TWO, "kif takes units of both sides"),
            ("kif-adaptive", (), merges.TWO, (), "kif-adaptive takes units of both"),
        ],
    )  # fmt: skip
    def test_importance_that_the_rule_does_not_take(
        self, files, rule, importance, masks, units, match
    ):
        files.write()
        inputs = replace(
            files.inputs(),
            importance={side: files.folder / f"{side}-importance" for side in importance},
            masks=dict.fromkeys(masks, files.folder),
            units=dict.fromkeys(units, files.folder),
        )
        with pytest.raises(ValueError, match=match):
            Merge(inputs, FusionOptions(rule=rule))

    @pytest.mark.parametrize("rule", ["kif", "kif-adaptive"])
    def test_rules_of_two_sides(self, tmp_path, rule):
        files = Files(tmp_path, merges.roles_of(2)).write()
        with pytest.raises(ValueError, match=f"{rule} takes one new and one historical model"):
            files.open(FusionOptions(rule=rule))

    @pytest.mark.parametrize(
        "rule", ["recurrent-kif", "recurrent-kif-adaptive", "average", "task-arithmetic", "ties",
                 "magmax"],
    )  # fmt: skip
    def test_rules_on_task_vectors_take_a_base(self, files, rule):
        files.write()
        with pytest.raises(ValueError, match=f"{rule} works on task vectors: it takes a base"):
            files.open(FusionOptions(rule=rule), base=False)

    @pytest.mark.parametrize("rule", ["recurrent-kif", "linear", "task-arithmetic", "ties"])
    def test_one_weight_for_each_model(self, tmp_path, rule):
        files = Files(tmp_path, merges.roles_of(3)).write()
        with pytest.raises(ValueError, match="one weight for each of 3 models, found 2"):
            files.open(FusionOptions(rule=rule, weights=(1.0, 2.0)))

    def test_models_without_weights_are_all_alike(self, tmp_path):
        files = Files(tmp_path, merges.roles_of(3)).write()
        files.merge(KIF)
        files.merge(replace(KIF, weights=(1.0, 1.0, 1.0)), out="told")
        assert merges.same_bits(files.merged(), files.merged("told"))

    def test_parents_are_named_by_role(self, tmp_path):
        inputs = MergeInputs(
            base=tmp_path / "b",
            models={"model_1": tmp_path / "1", "model_2": tmp_path / "2"},
            units={"model_1": tmp_path / "u1", "model_2": tmp_path / "u2"},
            config_from=tmp_path / "c",
        )
        names = ["base", "model_1", "model_2", "model_1_units", "model_2_units", "config_from"]
        assert list(inputs.parents) == names
        assert not inputs.is_two_sided

    @pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"shard_bytes": 0}], ids=str)
    def test_impossible_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            MergeOptions(**options)
