"""The engine over live tensors: the oracle's values, and laws that hold for every rule."""

import typing
from dataclasses import fields

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.checkpoint.scores import Scores
from kifmerge.checkpoint.sink import MemorySink
from kifmerge.checkpoint.source import MemorySource
from kifmerge.phases.fuse import Weights, fuse, gather_evidence
from kifmerge.phases.presets import RecurrentOptions, Rule
from kifmerge.phases.rules import RULES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = {
    "recurrent-kif": RecurrentOptions(),
    "recurrent-kif, tensor, drop": RecurrentOptions(
        scope="tensor", redundant="drop", important_fraction=0.5, shared_weights=(1.0, 1.0)
    ),
    "recurrent-kif-adaptive": RecurrentOptions(rule="recurrent-kif-adaptive"),
    "average": RecurrentOptions(rule="average"),
}


class Case:
    """Three states of a model and the scores of both sides."""

    def __init__(self, sizes, dtype, seed):
        self.generator = torch.Generator().manual_seed(seed)
        names = [f"w{number}" for number in range(len(sizes))]
        shapes = [(size, 3) if size % 2 else (size,) for size in sizes]
        self.shapes = dict(zip(names, shapes, strict=True))
        self.base, self.new, self.historical = (
            {n: self.draw(s).to(dtype) for n, s in self.shapes.items()} for _ in range(3)
        )
        self.scores = {
            role: {n: self.draw(s).square() for n, s in self.shapes.items()}
            for role in ("new", "historical")
        }

    def draw(self, shape):
        return torch.randn(shape, generator=self.generator)

    def fused(self, options, *, parent="new", most_bytes=None):
        out = {name: torch.full_like(value, 7) for name, value in self.base.items()}
        sources = {
            role: Scores(MemorySource({f"score/{n}": v for n, v in scores.items()}), "product")
            for role, scores in self.scores.items()
        }
        weights = Weights(
            base=MemorySource(self.base),
            new=MemorySource(self.new),
            historical=MemorySource(self.historical),
            historical_parent=parent,
        )
        sink = MemorySink(out)
        evidence = gather_evidence(sources, options)
        self.shares = fuse(self.base, weights, evidence, options, sink, most_bytes=most_bytes)
        sink.commit()
        return out

    def expected(self, options, parent):
        """In float64, from the equations."""
        names = list(self.base)
        new, historical = (list(self.scores[role].values()) for role in ("new", "historical"))
        fraction = str(options.important_fraction)
        if options.rule == "average":
            weights = [torch.full((*score.shape, 2), 0.5).double() for score in new]
        elif options.rule == "recurrent-kif-adaptive":
            pairs = zip(oracles.min_max(new), oracles.min_max(historical), strict=True)
            weights = [oracles.softmax_weights(*pair, options.temperature) for pair in pairs]
        else:
            if options.scope == "global":
                sides = [oracles.masks(scores, fraction) for scores in (new, historical)]
            else:
                sides = [
                    [oracles.masks([s], fraction)[0] for s in side] for side in (new, historical)
                ]
            weights = [
                oracles.masked_weights(
                    *pair, shared=options.shared_weights, redundant=options.redundant
                )
                for pair in zip(*sides, strict=True)
            ]
        starts = self.new if parent == "new" else self.base
        return {
            name: self.base[name].double()
            + w[..., 0] * (self.new[name].double() - self.base[name].double())
            + w[..., 1] * (self.historical[name].double() - starts[name].double())
            for name, w in zip(names, weights, strict=True)
        }


cases = st.builds(
    Case,
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.sampled_from(DTYPES),
    st.integers(0, 1000),
)
every_rule = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@every_rule
@given(case=cases, parent=st.sampled_from(["new", "base"]))
def test_fused_weights_are_the_oracle_s(options, case, parent):
    found, expected = case.fused(options, parent=parent), case.expected(options, parent)
    for name, value in found.items():
        # Float32 on the way, and once rounded to the dtype.
        tolerance = 2 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(value.double(), expected[name], rtol=tolerance, atol=4e-6)


@every_rule
@given(case=cases)
def test_no_update_returns_the_base(options, case):
    case.new = case.historical = case.base
    for parent in ("new", "base"):
        found = case.fused(options, parent=parent)
        assert all(torch.equal(found[name], value) for name, value in case.base.items())


@every_rule
@given(case=cases, most_bytes=st.integers(1, 500))
def test_size_of_pieces_never_changes_a_bit(options, case, most_bytes):
    whole, shares = case.fused(options), case.shares
    cut = case.fused(options, most_bytes=most_bytes)
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
    assert case.shares == shares


@every_rule
@given(case=cases)
def test_order_of_tensors_never_changes_a_bit(options, case):
    straight = case.fused(options)
    for part in (case.base, case.new, case.historical, *case.scores.values()):
        for name in reversed(list(part)):
            part[name] = part.pop(name)
    assert next(iter(case.base)) == list(straight)[-1]
    turned = case.fused(options)
    assert all(torch.equal(turned[name], value) for name, value in straight.items())


@every_rule
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_and_shape_are_kept(options, dtype):
    case = Case([5, 8], dtype, 0)
    for name, value in case.fused(options).items():
        assert (value.dtype, tuple(value.shape)) == (dtype, case.shapes[name])


@given(case=cases)
def test_shares_count_what_the_masks_hold(case):
    options = RecurrentOptions(important_fraction=0.3)
    case.fused(options)
    sides = [oracles.masks(list(scores.values()), "0.3") for scores in case.scores.values()]
    new, historical = (torch.cat([mask.flatten() for mask in side]) for side in sides)
    expected = {
        "both": new & historical,
        "new_only": new & ~historical,
        "historical_only": historical & ~new,
        "neither": ~new & ~historical,
    }
    assert case.shares == pytest.approx({k: v.double().mean().item() for k, v in expected.items()})


@every_rule
def test_sources_and_sink_may_share_memory(options):
    case = Case([9, 30, 4], torch.float32, 1)
    expected = case.fused(options)
    weights = Weights(
        base=MemorySource(case.base),
        new=MemorySource(case.new),
        historical=MemorySource(case.historical),
        historical_parent="new",
    )
    sources = {
        role: Scores(MemorySource({f"score/{n}": v for n, v in scores.items()}), "product")
        for role, scores in case.scores.items()
    }
    evidence = gather_evidence(sources, options)
    sink = MemorySink(case.historical)
    fuse(case.base, weights, evidence, options, sink, most_bytes=32)
    sink.commit()
    assert all(torch.equal(case.historical[name], value) for name, value in expected.items())


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_equal_scores_mark_nothing_and_warn(scope):
    case = Case([5, 8], torch.float32, 0)
    case.scores["historical"] = {n: torch.ones(s) for n, s in case.shapes.items()}
    options = RecurrentOptions(scope=scope)
    with pytest.warns(UserWarning, match="the historical importance scores are all equal"):
        case.fused(options)
    assert case.shares["both"] == case.shares["historical_only"] == 0.0


def test_one_tensor_of_equal_scores_is_no_reason_to_warn():
    case = Case([5, 8], torch.float32, 0)
    case.scores["new"]["w0"].fill_(1.0)
    case.fused(RecurrentOptions(scope="tensor"))
    assert case.shares["both"] + case.shares["new_only"] > 0


def test_nothing_asked_for_is_no_reason_to_warn():
    case = Case([5, 8], torch.float32, 0)
    case.fused(RecurrentOptions(important_fraction=0.0))
    assert case.shares["neither"] == 1.0


def test_rules_are_those_of_the_loop():
    named = typing.get_args(Rule)
    assert {*RULES, "none"} == set(named)
    known = {field.name for field in fields(RecurrentOptions)}
    assert {option for rule in RULES.values() for option in rule.options} < known
