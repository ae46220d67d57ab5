"""Merging folders: the same weights as a round in memory, as by brute force, for all rules."""

import random
import shutil
from dataclasses import replace

import folders
import merge_oracle
import merges
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merges import Files, every_rule, every_variant

from kifmerge.checkpoint.header import read_header
from kifmerge.checkpoint.mask import MaskSource
from kifmerge.checkpoint.provenance import read_provenance
from kifmerge.checkpoint.scores import Scores
from kifmerge.checkpoint.sink import MemorySink
from kifmerge.checkpoint.source import MemorySource
from kifmerge.checkpoint.units import read_units
from kifmerge.checkpoint.workers import Workers
from kifmerge.fusion.evidence import (
    NOTHING,
    evidence_from_masks,
    evidence_from_scores,
    evidence_from_units,
    evidence_from_vectors,
)
from kifmerge.fusion.fuse import fuse
from kifmerge.fusion.rules import FusionOptions
from kifmerge.fusion.weights import Weights
from kifmerge.training.presets import RecurrentOptions

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OF_THE_LOOP = {
    "recurrent-kif": RecurrentOptions(),
    "recurrent-kif, tensor, drop": RecurrentOptions(
        scope="tensor", redundant="drop", important_fraction=0.5, shared_weights=(1.0, 0.75)
    ),
    "recurrent-kif-adaptive": RecurrentOptions(rule="recurrent-kif-adaptive"),
    "average": RecurrentOptions(rule="average"),
}
every_rule_of_the_loop = pytest.mark.parametrize("options", OF_THE_LOOP.values(), ids=OF_THE_LOOP)
KIF = FusionOptions()
AVERAGE = FusionOptions(rule="average")


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


class TestLikeTheLoop:
    """A merge of the two sides of a round is that round."""

    @every_rule_of_the_loop
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_weights_and_figures(self, files, options, dtype):
        files.write(dtype)
        figures, is_new = files.merge(options.fusion, historical_parent="new")
        expected, done = files.in_memory(options)
        assert is_new
        assert merges.same_bits(files.merged(), expected)
        assert all(value.dtype == dtype for value in files.merged().values())
        counts = ("index", "inner_steps", "outer_steps", "outer_loss")
        told = {key: value for key, value in done.as_dict().items() if key not in counts}
        assert {key: figures[key] for key in told} == told
        assert ("both" in told) == (options.rule == "recurrent-kif")

    @every_rule_of_the_loop
    @given(
        shards=st.tuples(*[st.integers(0, 4)] * 3),
        numel=st.integers(1, 40),
        dtype=st.sampled_from(DTYPES),
        num_workers=st.integers(0, 3),
    )
    @settings(max_examples=8)
    def test_pieces_workers_and_shards_never_change_a_bit(
        self, tmp_path_factory, options, shards, numel, dtype, num_workers
    ):
        files = Files(tmp_path_factory.mktemp("shards")).write(dtype, shards=shards)
        with pytest.MonkeyPatch.context() as patch:
            merges.cut_small(patch, 4 * numel)
            files.merge(options.fusion, historical_parent="new", num_workers=num_workers)
        assert merges.same_bits(files.merged(), files.in_memory(options)[0])
        layout = sorted(path.name for path in (files.folder / "base").glob("model*"))
        assert sorted(path.name for path in (files.folder / "out").glob("model*")) == layout

    def test_score_kind_is_the_snapshot_s_own(self, files):
        files.write()
        options = RecurrentOptions(score="sensitivity")
        for role in merges.TWO:
            folders.snapshot(
                files.folder / f"{role}-importance", len(role), files.states[0],
                options={"score": "sensitivity"},
            )  # fmt: skip
        files.merge(options.fusion, historical_parent="new")
        assert merges.same_bits(files.merged(), files.in_memory(options)[0])
        assert not tiny.same(files.merged(), files.in_memory(RecurrentOptions())[0])


@every_variant
@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_by_brute_force(tmp_path, variant, dtype):
    files = variant.write(tmp_path, dtype=dtype)
    files.merge(**variant.options())
    expected, found = merge_oracle.expected(files, variant), files.merged()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value.dtype, value.shape) == (dtype, expected[name].shape)
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(value.double(), expected[name], rtol=tolerance, atol=4e-6)
        changed = value.numel() == 0 or not torch.equal(value, files.states[0][name])
        assert changed or value.numel() < 9


def from_memory(files, variant):
    """The same merge over live tensors, sources and sink, in one piece and one thread."""
    base, *models = (MemorySource(state) for state in files.states)
    parents = [None, 0] if variant.parent == "new" else []
    weights = Weights(base=base if variant.base else None, models=models, parents=parents)
    out = {name: tensor.clone() for name, tensor in files.states[0].items()}
    evidence = NOTHING
    if variant.evidence == "masks":
        kept = {role: MaskSource(files.folder / f"{role}-mask") for role in files.roles}
        masks = {r: {n: m.read(n, 0, m.info(n).numel) for n in m.names()} for r, m in kept.items()}
        evidence = evidence_from_masks({r: MemorySource(mask) for r, mask in masks.items()})
    elif variant.evidence == "units":
        units = {role: read_units(files.folder / f"{role}-units") for role in files.roles}
        evidence = evidence_from_units(units, base, variant.rule)
    elif variant.evidence == "importance":
        kept = {
            role: {f"score/{n}": score for n, score in files.scores(role).items()}
            for role in files.roles
        }
        live = {role: Scores(MemorySource(scores), "product") for role, scores in kept.items()}
        evidence = evidence_from_scores(live, variant.rule)
    elif variant.rule.needs == "largest":
        evidence = evidence_from_vectors(weights, list(out), variant.rule, Workers(0))
    sink = MemorySink(out)
    fuse(out, weights, evidence, variant.rule, sink)
    sink.commit()
    return out


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_depend_on_the_content_alone(tmp_path, variant, dtype):
    """Not on pieces, workers, or the shards of any input; the same as over live tensors."""
    drawn = random.Random(str(variant))
    like = 0 if variant.base else 1  # whose files the output's are like
    found = set()
    for number in range(3):
        shards = [drawn.randrange(4) for _ in ("base", *variant.roles)]
        shards[like] = 0
        files = variant.write(
            tmp_path / str(number), dtype=dtype, shards=shards, snapshot_shards=number + 1
        )
        with pytest.MonkeyPatch.context() as patch:
            merges.cut_small(patch, drawn.choice([1, 36, 100, 260, 1000]))
            files.merge(**variant.options(), num_workers=number)
        assert merges.same_bits(files.merged(), from_memory(files, variant))
        found.add((files.folder / "out/model.safetensors").read_bytes())
    assert len(found) == 1


@every_rule
@pytest.mark.parametrize("num_shards", [0, 3])
def test_output_has_the_files_of_the_base(tmp_path, variant, num_shards):
    shards = [0] * (len(variant.roles) + 1)
    like = "base" if variant.base else variant.roles[0]
    shards[0 if variant.base else 1] = num_shards
    files = variant.write(tmp_path, shards=shards)
    files.merge(**variant.options())
    layouts = [
        {p.name: list(read_header(p)) for p in sorted((tmp_path / d).glob("*.safetensors"))}
        for d in (like, "out")
    ]
    assert layouts[0] == layouts[1]
    indexes = [list((tmp_path / d).glob("*.index.json")) for d in (like, "out")]
    assert len(indexes[0]) == len(indexes[1]) == (num_shards > 0)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_models_that_are_the_base_give_its_own_file(tmp_path, variant, dtype):
    base = folders.random_tensors(1, merges.VARIED, dtype)
    files = variant.write(tmp_path, states=[base] * (len(variant.roles) + 1))
    files.merge(**variant.options())
    written, own = (tmp_path / d / "model.safetensors" for d in ("out", "base"))
    assert (written.read_bytes() == own.read_bytes()) == variant.keeps_equal


class TestManyModels:
    """Laws of the rules for any number of models, where two are the two sides."""

    def two_ways(self, folder, evidence):
        """Two models, once as new and historical, and once as the first and the second."""
        how = {"dtype": torch.bfloat16, "shapes": merges.VARIED}
        sides = Files(folder / "sides").write(**how)
        models = Files(folder / "models", merges.roles_of(2)).write(**how)
        if evidence == "masks":
            sides.make_masks(), models.make_masks()
        if evidence == "units":
            models.make_units()
            for role, other in zip(sides.roles, models.roles, strict=True):
                # Without a task before it the historical side has no scores but its own.
                shutil.copytree(models.folder / f"{other}-units", sides.folder / f"{role}-units")
        return sides, models

    @pytest.mark.parametrize("evidence", ["importance", "masks", "units"])
    @pytest.mark.parametrize("redundant", ["average", "drop"])
    def test_two_with_the_weights_of_the_table_are_the_two_sides(
        self, tmp_path, evidence, redundant
    ):
        sides, models = self.two_ways(tmp_path, evidence)
        rule = FusionOptions(redundant=redundant, important_fraction=0.5)
        sides.merge(rule, evidence=evidence, historical_parent="base")
        models.merge(replace(rule, weights=(0.4, 0.6)), evidence=evidence)
        found = [(files.folder / "out/model.safetensors").read_bytes() for files in (sides, models)]
        assert found[0] == found[1]
        models.merge(replace(rule, weights=(0.6, 0.4)), out="other", evidence=evidence)
        assert (models.folder / "other/model.safetensors").read_bytes() != found[0]

    @pytest.mark.parametrize("name", ["recurrent-kif-adaptive", "average", "ties", "magmax"])
    def test_two_are_the_two_sides(self, tmp_path, name):
        evidence = "importance" if name == "recurrent-kif-adaptive" else None
        for files in self.two_ways(tmp_path, evidence):
            options = {} if files.roles[0] != "new" else {"historical_parent": "base"}
            files.merge(FusionOptions(rule=name), evidence=evidence, **options)
        first, second = (
            (tmp_path / d / "out/model.safetensors").read_bytes() for d in ("sides", "models")
        )
        assert first == second

    def test_figures_tell_each_model_s_threshold_and_share(self, tmp_path):
        files = Files(tmp_path, merges.roles_of(3)).write()
        rule = FusionOptions(weights=(1.0, 2.0, 3.0), important_fraction=0.3)
        figures, _ = files.merge(rule)
        masks = {}
        for role in files.roles:
            scores = torch.cat([score.flatten() for score in files.scores(role).values()])
            threshold = figures[f"{role}_threshold"]
            assert threshold in scores.tolist()
            masks[role] = scores > threshold
        votes = sum(mask.int() for mask in masks.values())
        shares = {f"{role}_only": mask & (votes == 1) for role, mask in masks.items()}
        shares |= {"all": votes == 3, "several": votes == 2, "none": votes == 0}
        for key, mask in shares.items():
            assert figures[key] == pytest.approx(mask.double().mean().item()), key
        assert figures["historical_parent"] is None


def test_masks_lead_to_what_their_scores_lead_to(files):
    files.write().make_masks()
    files.merge(KIF, out="by-scores")
    files.merge(KIF, out="by-masks", evidence="masks")
    recorded = read_provenance(files.folder / "by-masks")["made_by"]["options"]
    assert not {"scope", "important_fraction"} & recorded.keys()
    assert merges.same_bits(files.merged("by-masks"), files.merged("by-scores"))


class TestParent:
    """Where the historical task vector starts, when nobody says."""

    def test_parent_new_and_parent_base(self, files):
        """With the base as parent both vectors begin there; with new the second goes on."""
        files.write()
        base, new, historical = (state["a.bias"].double() for state in files.states)
        for parent, start in (("new", new), ("base", base)):
            files.merge(AVERAGE, f"from-{parent}", historical_parent=parent)
            expected = base + 0.5 * (new - base) + 0.5 * (historical - start)
            found = files.merged(f"from-{parent}")["a.bias"].double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    def parent(self, files):
        return files.open(KIF).historical_parent

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
        assert files.open(KIF, historical_parent="base").historical_parent == "base"

    def test_any_number_of_models_start_at_the_base(self, tmp_path):
        files = Files(tmp_path, merges.roles_of(2)).write()
        made = folders.made_by("replay", model=tmp_path / "model_1")
        folders.save(tmp_path / "model_2", files.states[2], provenance=made)
        assert files.open(AVERAGE).historical_parent is None
