"""The engine over live tensors: the oracle's values, and laws that hold for every rule."""

from dataclasses import replace
from unittest import mock

import merge_oracle
import merges
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kifmerge.checkpoint.scores import Scores
from kifmerge.checkpoint.sink import MemorySink
from kifmerge.checkpoint.source import MemorySource
from kifmerge.checkpoint.workers import Workers
from kifmerge.fusion.evidence import evidence_from_scores, evidence_from_vectors
from kifmerge.fusion.fuse import Overlap, fuse
from kifmerge.fusion.rules import FusionOptions
from kifmerge.fusion.weights import Weights
from kifmerge.tensor import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Masks and units kept in files are a matter of files.
VARIANTS = {
    name: variant
    for name, variant in merges.VARIANTS.items()
    if variant.evidence in (None, "importance")
}
TWO_SIDED = merges.VARIANTS["recurrent-kif"]


class Case:
    """States of a model, the base first, and scores of what the others find important."""

    def __init__(self, sizes, dtype, seed, *, roles=merges.TWO):
        generator = torch.Generator().manual_seed(seed)
        names = [f"w{number}" for number in range(len(sizes))]
        shapes = [(size, 3) if size % 2 else (size,) for size in sizes]
        self.roles = roles
        self.shapes = dict(zip(names, shapes, strict=True))

        def draw():
            return {n: torch.randn(s, generator=generator) for n, s in self.shapes.items()}

        self.states = [{n: t.to(dtype) for n, t in draw().items()} for _ in ("base", *roles)]
        self.importance = {r: {n: t.square() for n, t in draw().items()} for r in roles}

    def scores(self, role):
        return self.importance[role]

    def sources(self):
        return {
            role: Scores(MemorySource({f"score/{n}": v for n, v in scores.items()}), "product")
            for role, scores in self.importance.items()
        }

    def weights(self, variant):
        base, *models = map(MemorySource, self.states)
        parents = [None, 0] if variant.parent == "new" else []
        return Weights(base=base if variant.base else None, models=models, parents=parents)

    def evidence(self, variant, workers):
        if variant.rule.needs == "largest":
            names = list(self.shapes)
            return evidence_from_vectors(self.weights(variant), names, variant.rule, workers)
        return evidence_from_scores(self.sources(), variant.rule, workers)

    def fused(self, variant, *, most_bytes=None, num_workers=0, out=None):
        out = out or {name: torch.full_like(value, 7) for name, value in self.states[0].items()}
        sink, workers = MemorySink(out), Workers(num_workers)
        told = []
        self.overlap = fuse(
            self.states[0], self.weights(variant), self.evidence(variant, workers), variant.rule,
            sink, workers=workers, most_bytes=most_bytes, on_progress=told.append,
        )  # fmt: skip
        workers.close()
        sink.commit()
        assert sum(told) == sum(value.numel() for value in out.values())
        return out


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=5)
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
few = settings(max_examples=20)


@every_variant
@few
@given(sizes=sizes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
def test_fused_weights_are_the_oracle_s(variant, sizes, dtype, seed):
    case = Case(sizes, dtype, seed, roles=variant.roles)
    found, expected = case.fused(variant), merge_oracle.expected(case, variant)
    for name, value in found.items():
        # Float32 on the way, and once rounded to the dtype.
        tolerance = 2 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(value.double(), expected[name], rtol=tolerance, atol=4e-6)


# Of a linear merge only the weighted mean.
COMPILED = ("recurrent-kif", "average", "linear", "task-arithmetic", "ties")


@pytest.mark.skipif(not native.is_built(), reason="there was no C compiler")
@every_variant
@few
@given(sizes=sizes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
def test_the_compiled_part_gives_torch_s_bits(variant, sizes, dtype, seed):
    case = Case(sizes, dtype, seed, roles=variant.roles)
    summed = native.Summation.add_up
    with (
        mock.patch.object(native.Summation, "add_up", autospec=True, side_effect=summed) as add_up,
        mock.patch.object(native, "ties", wraps=native.ties) as ties,
    ):
        compiled, overlap = case.fused(variant), case.overlap
    assert (add_up.called or ties.called) == (
        variant.rule.rule in COMPILED and variant.rule.normalise
    )
    with mock.patch.object(native, "is_built", return_value=False):
        assert merges.same_bits(case.fused(variant), compiled)
    assert case.overlap.counts == overlap.counts
    assert case.overlap.num_marked == overlap.num_marked


@pytest.mark.parametrize("parent", ["new", "base"])
@pytest.mark.parametrize("name", ["recurrent-kif", "recurrent-kif-adaptive", "average", "ties"])
def test_historical_vector_starts_where_it_is_told(name, parent):
    variant = replace(merges.VARIANTS[name], parent=parent, num_models=None)
    case = Case([30, 7], torch.float32, 3)
    found, expected = case.fused(variant), merge_oracle.expected(case, variant)
    assert all(torch.allclose(found[n].double(), expected[n], atol=4e-6) for n in found)
    other = case.fused(replace(variant, parent={"new": "base", "base": "new"}[parent]))
    assert not any(torch.equal(found[n], other[n]) for n in found)


@every_variant
@few
@given(sizes=sizes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
def test_models_that_are_the_base_give_just_that(variant, sizes, dtype, seed):
    case = Case(sizes, dtype, seed, roles=variant.roles)
    case.states = [case.states[0]] * len(case.states)
    assert merges.same_bits(case.fused(variant), case.states[0]) == variant.keeps_equal


@every_variant
@few
@given(
    sizes=sizes,
    dtype=st.sampled_from(DTYPES),
    most_bytes=st.integers(1, 500),
    num_workers=st.integers(0, 3),
)
def test_pieces_and_workers_never_change_a_bit(variant, sizes, dtype, most_bytes, num_workers):
    case = Case(sizes, dtype, 5, roles=variant.roles)
    whole, shares = case.fused(variant), case.overlap.shares(variant.roles)
    cut = case.fused(variant, most_bytes=most_bytes, num_workers=num_workers)
    assert merges.same_bits(cut, whole)
    assert case.overlap.shares(variant.roles) == shares


@every_variant
@few
@given(sizes=sizes, dtype=st.sampled_from(DTYPES))
def test_order_of_tensors_never_changes_a_bit(variant, sizes, dtype):
    case = Case(sizes, dtype, 6, roles=variant.roles)
    straight = case.fused(variant)
    for part in (*case.states, *case.importance.values()):
        for name in reversed(list(part)):
            part[name] = part.pop(name)
    assert next(iter(case.states[0])) == list(straight)[-1]
    assert merges.same_bits(case.fused(variant), straight)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_and_shape_are_kept(variant, dtype):
    case = Case([5, 8], dtype, 0, roles=variant.roles)
    for name, value in case.fused(variant).items():
        assert (value.dtype, tuple(value.shape)) == (dtype, case.shapes[name])


@every_variant
@pytest.mark.parametrize("num_workers", [0, 2])
def test_sources_and_sink_may_share_memory(variant, num_workers):
    case = Case([9, 30, 4], torch.float32, 1, roles=variant.roles)
    expected = case.fused(variant)
    found = case.fused(variant, most_bytes=32, num_workers=num_workers, out=case.states[-1])
    assert found is case.states[-1]
    assert merges.same_bits(found, expected)


@pytest.mark.parametrize("where", ["base", "first model", "last model", "sink"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_one_tensor_may_be_kept_otherwise_in_one_place(where, dtype):
    """Small tensors share a piece only where all of them are kept alike."""
    case = Case([4, 6, 8], torch.float32, 2)
    index = {"base": 0, "first model": 1, "last model": -1}.get(where)
    if index is not None:
        case.states[index]["w1"] = case.states[index]["w1"].to(dtype)
    every = [{n: state[n].float() for n in state} for state in case.states]
    kept_in = {n: torch.zeros_like(t) for n, t in every[0].items()}
    if where == "sink":
        kept_in["w1"] = kept_in["w1"].to(dtype)
    found = case.fused(TWO_SIDED, out=kept_in)
    case.states = every
    expected = {n: t.to(kept_in[n].dtype) for n, t in case.fused(TWO_SIDED, out=None).items()}
    assert merges.same_bits(found, expected)


class TestOverlap:
    @few
    @given(sizes=sizes, seed=st.integers(0, 1000))
    def test_shares_of_two_sides(self, sizes, seed):
        case = Case(sizes, torch.float32, seed)
        rule = replace(TWO_SIDED.rule, important_fraction=0.3)
        case.fused(replace(TWO_SIDED, rule=rule))
        sides = [oracles.masks(list(s.values()), "0.3") for s in case.importance.values()]
        new, historical = (torch.cat([mask.flatten() for mask in side]) for side in sides)
        expected = {
            "both": new & historical,
            "new_only": new & ~historical,
            "historical_only": historical & ~new,
            "neither": ~new & ~historical,
        }
        assert case.overlap.shares() == pytest.approx(
            {key: mask.double().mean().item() for key, mask in expected.items()}
        )

    @pytest.mark.parametrize("num_models", [3, 5])
    def test_shares_of_many_models(self, num_models):
        roles = merges.roles_of(num_models)
        case = Case([40, 33], torch.float32, 4, roles=roles)
        rule = FusionOptions(important_fraction=0.3, weights=(1.0,) * num_models)
        case.fused(merges.Variant(rule, "importance", num_models))
        sides = [oracles.masks(list(s.values()), "0.3") for s in case.importance.values()]
        marks = torch.stack([torch.cat([m.flatten() for m in side]) for side in sides])
        votes = marks.sum(0)
        expected = {
            "all": votes == num_models,
            **{f"{role}_only": marks[n] & (votes == 1) for n, role in enumerate(roles)},
            "several": (votes > 1) & (votes < num_models),
            "none": votes == 0,
        }
        found = case.overlap.shares(roles)
        assert found == pytest.approx({k: v.double().mean().item() for k, v in expected.items()})
        assert list(found) == list(expected)

    def test_one_model_shares_with_nobody(self):
        case = Case([40, 33], torch.float32, 4, roles=merges.roles_of(1))
        rule = FusionOptions(important_fraction=0.3, weights=(1.0,))
        case.fused(merges.Variant(rule, "importance", 1))
        found = case.overlap.shares(["model_1"])
        assert min(found.values()) >= 0.0
        assert sum(found.values()) == pytest.approx(1.0)

    def test_adds_up(self):
        total = Overlap([1, 2, 3, 4], 10) + Overlap() + Overlap([3, 2, 1, 0], 6)
        assert (total.counts, total.num_marked) == ([4, 4, 4, 4], 16)
        assert total.shares() == dict.fromkeys(
            ["both", "new_only", "historical_only", "neither"], 0.25
        )
        assert (Overlap().counts, Overlap().shares()) == ([], {})

    @pytest.mark.parametrize("name", ["average", "ties", "recurrent-kif-adaptive", "linear"])
    def test_rules_without_masks_of_importance_have_none(self, name):
        variant = VARIANTS[name]
        case = Case([5, 8], torch.float32, 0, roles=variant.roles)
        case.fused(variant)
        assert case.overlap.shares() == {}


class TestWarnings:
    @pytest.mark.parametrize("scope", ["global", "tensor"])
    def test_equal_scores_mark_nothing_and_warn(self, scope):
        case = Case([5, 8], torch.float32, 0)
        case.importance["historical"] = {n: torch.ones(s) for n, s in case.shapes.items()}
        with pytest.warns(UserWarning, match="the historical importance scores are all equal"):
            case.fused(replace(TWO_SIDED, rule=FusionOptions(scope=scope)))
        shares = case.overlap.shares()
        assert shares["both"] == shares["historical_only"] == 0.0

    def test_one_tensor_of_equal_scores_is_no_reason(self):
        case = Case([5, 8], torch.float32, 0)
        case.importance["new"]["w0"].fill_(1.0)
        case.fused(replace(TWO_SIDED, rule=FusionOptions(scope="tensor")))
        shares = case.overlap.shares()
        assert shares["both"] + shares["new_only"] > 0

    def test_nothing_asked_for_is_no_reason(self):
        case = Case([5, 8], torch.float32, 0)
        case.fused(replace(TWO_SIDED, rule=FusionOptions(important_fraction=0.0)))
        assert case.overlap.shares()["neither"] == 1.0
