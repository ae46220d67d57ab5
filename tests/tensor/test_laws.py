"""One table of all fusion rules, and every law that each of them claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kifmerge.tensor.baselines import linear, magmax, task_arithmetic, ties
from kifmerge.tensor.fusion import (
    add_vectors,
    average_models,
    recurrent_kif,
    recurrent_kif_adaptive,
    recurrent_kif_adaptive_models,
    recurrent_kif_models,
)
from kifmerge.tensor.kif import kif, kif_adaptive

TEMPERATURE = 0.25


@dataclass(frozen=True)
class Case:
    """What rules are shown: one tensor per model of each kind, or one number."""

    base: torch.Tensor
    vectors: list[torch.Tensor]
    masks: list[torch.Tensor]
    scores: list[torch.Tensor]
    weights: list[float]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> Case:
        """The same with each tensor changed, or only those of the named fields."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "weights" or (names and field.name not in names):
                continue
            changed[field.name] = (
                change(value) if isinstance(value, torch.Tensor) else [change(t) for t in value]
            )
        return replace(self, **changed)

    def reordered(self, order: list[int]) -> Case:
        """The same models in another order."""
        lists = {
            name: [getattr(self, name)[index] for index in order]
            for name in ("vectors", "masks", "scores", "weights")
        }
        return replace(self, **lists)


@dataclass(frozen=True)
class Rule:
    """A rule as a function of a case, its oracle for one element, and what it claims.

    Attributes:
        apply: the rule; rules on weights take the vectors for the models.
        oracle: (base, vectors, masks, scores, weights) of one element -> fused value, by hand.
        num_models: how many models it takes; None for any number.
        on_weights: whether it works on models, not on task vectors.
        symmetric: whether models may come in any order.
        convex: whether its weights add up to 1, so that equal models stay what they are.
    """

    apply: Callable[[Case], torch.Tensor]
    oracle: Callable[..., float]
    num_models: int | None = None
    on_weights: bool = False
    symmetric: bool = True
    convex: bool = True


def table(redundant):
    return Rule(
        lambda c: recurrent_kif(c.base, *c.vectors, *c.masks, redundant=redundant),
        lambda b, v, m, s, w: (
            b + oracles.weighted(v, oracles.table_weights(*m, redundant=redundant))
        ),
        num_models=2,
        symmetric=False,
        convex=redundant == "average",
    )


def table_of_models(redundant):
    return Rule(
        lambda c: recurrent_kif_models(c.base, c.vectors, c.masks, c.weights, redundant=redundant),
        lambda b, v, m, s, w: b + oracles.weighted(v, oracles.model_weights(m, w, redundant)),
        convex=redundant == "average",
    )


RULES = {
    "recurrent-kif": table("average"),
    "recurrent-kif, drop": table("drop"),
    "recurrent-kif-adaptive": Rule(
        lambda c: recurrent_kif_adaptive(c.base, *c.vectors, *c.scores, temperature=TEMPERATURE),
        lambda b, v, m, s, w: b + oracles.weighted(v, oracles.softmax(s, TEMPERATURE)),
        num_models=2,
    ),
    "recurrent-average": Rule(
        lambda c: add_vectors(c.base, *c.vectors, 0.5, 0.5),
        lambda b, v, m, s, w: b + (v[0] + v[1]) / 2,
        num_models=2,
    ),
    "recurrent-kif of models": table_of_models("average"),
    "recurrent-kif of models, drop": table_of_models("drop"),
    "recurrent-kif-adaptive of models": Rule(
        lambda c: recurrent_kif_adaptive_models(
            c.base, c.vectors, c.scores, temperature=TEMPERATURE
        ),
        lambda b, v, m, s, w: b + oracles.weighted(v, oracles.softmax(s, TEMPERATURE)),
    ),
    "average of models": Rule(
        lambda c: average_models(c.base, c.vectors),
        lambda b, v, m, s, w: b + sum(v) / len(v),
    ),
    "kif": Rule(
        lambda c: kif(*c.vectors, *c.masks),
        lambda b, v, m, s, w: oracles.kif_value(*v, *m),
        num_models=2,
        on_weights=True,
        symmetric=False,
    ),
    "kif-adaptive": Rule(
        lambda c: kif_adaptive(*c.vectors, *c.scores, temperature=TEMPERATURE),
        lambda b, v, m, s, w: oracles.weighted(v, oracles.softmax(s, TEMPERATURE)),
        num_models=2,
        on_weights=True,
    ),
    "linear": Rule(
        lambda c: linear(c.vectors, c.weights),
        lambda b, v, m, s, w: oracles.weighted(v, w) / sum(w),
        on_weights=True,
    ),
    "linear, not normalised": Rule(
        lambda c: linear(c.vectors, c.weights, normalise=False),
        lambda b, v, m, s, w: oracles.weighted(v, w),
        on_weights=True,
        convex=False,
    ),
    "task-arithmetic": Rule(
        lambda c: task_arithmetic(c.base, c.vectors, c.weights, scale=0.3),
        lambda b, v, m, s, w: b + 0.3 * oracles.weighted(v, w),
        convex=False,
    ),
    "ties": Rule(
        lambda c: ties(c.base, c.vectors, c.masks, c.weights),
        lambda b, v, m, s, w: b + oracles.ties_update(v, m, w),
        convex=False,
    ),
    "ties, scaled": Rule(
        lambda c: ties(c.base, c.vectors, c.masks, c.weights, scale=0.3),
        lambda b, v, m, s, w: b + 0.3 * oracles.ties_update(v, m, w),
        convex=False,
    ),
    "ties, nothing trimmed": Rule(
        lambda c: ties(c.base, c.vectors, [torch.ones_like(m) for m in c.masks], c.weights),
        lambda b, v, m, s, w: b + oracles.ties_update(v, [True] * len(v), w),
    ),
    "magmax": Rule(
        lambda c: magmax(c.base, c.vectors),
        lambda b, v, m, s, w: b + oracles.largest(v),
    ),
    "magmax, scaled": Rule(
        lambda c: magmax(c.base, c.vectors, scale=0.3),
        lambda b, v, m, s, w: b + 0.3 * oracles.largest(v),
        convex=False,
    ),
}


def draw(seed, num_models, shape=(7, 5), dtype=torch.float32):
    """A case; zeros among the task vectors, ties among the scores, half of all marked."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(shape, generator=generator) for _ in range(num_models + 1)]
    masks, zeros = (
        [torch.rand(shape, generator=generator) < share for _ in range(num_models)]
        for share in (0.5, 0.1)
    )
    scores = [torch.randint(0, 17, shape, generator=generator) / 16 for _ in range(num_models)]
    weights = (0.1 + torch.rand(num_models, generator=generator)).tolist()
    vectors = [
        v.masked_fill(zero, 0.0).to(dtype) for v, zero in zip(normal[1:], zeros, strict=True)
    ]
    return Case(normal[0].to(dtype), vectors, masks, scores, weights)


def bits(tensor):
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def subset(**claims):
    return [
        name
        for name, rule in RULES.items()
        if all(getattr(rule, claim) is value for claim, value in claims.items())
    ]


def law(names=tuple(RULES), **more):
    """Check something of the named rules on drawn cases, with as many models as each takes."""

    def decorate(check):
        @pytest.mark.parametrize("name", names)
        @settings(max_examples=25)
        @given(data=st.data(), seed=st.integers(0, 2**31))
        def test(name, data, seed):
            rule = RULES[name]
            num_models = rule.num_models or data.draw(st.integers(1, 5), label="num_models")
            check(rule, draw(seed, num_models, **more), data)

        return test

    return decorate


@law()
def test_float64_by_hand(rule, case, data):
    expected = oracles.element_by_element(
        lambda b, v, m, s: rule.oracle(b, v, m, s, case.weights),
        case.base, case.vectors, case.masks, case.scores,
    )  # fmt: skip
    torch.testing.assert_close(rule.apply(case).double(), expected, rtol=3e-6, atol=3e-6)


@law(shape=(131,))
def test_bits_do_not_depend_on_how_tensors_are_cut(rule, case, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, 131), max_size=4), label="cuts"))
    parts = [
        rule.apply(case.map(lambda t, span=slice(*span): t[span]))
        for span in zip([0, *cuts], [*cuts, 131], strict=True)
    ]
    assert torch.equal(bits(torch.cat(parts)), bits(rule.apply(case)))


@law()
def test_bits_do_not_depend_on_the_layout_in_memory(rule, case, data):
    expected = bits(rule.apply(case))
    assert torch.equal(bits(rule.apply(case.map(lambda t: t.mT.contiguous().mT))), expected)
    strided = case.map(lambda t: t.repeat_interleave(2, -1)[:, ::2])
    assert torch.equal(bits(rule.apply(strided)), expected)


@law(shape=(40,))
def test_each_element_is_on_its_own(rule, case, data):
    order = torch.tensor(data.draw(st.permutations(range(40)), label="order"))
    assert torch.equal(
        bits(rule.apply(case.map(lambda t: t[order]))), bits(rule.apply(case)[order])
    )


@law()
def test_arguments_stay_as_they_are(rule, case, data):
    before = case.map(torch.clone)
    rule.apply(case)
    assert torch.equal(case.base, before.base)
    for name in ("vectors", "masks", "scores"):
        assert all(map(torch.equal, getattr(case, name), getattr(before, name))), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4)])
@pytest.mark.parametrize("name", RULES)
def test_dtype_and_shape_are_kept(name, shape, dtype):
    rule = RULES[name]
    found = rule.apply(draw(1, rule.num_models or 3, shape, dtype))
    assert (found.dtype, found.shape) == (dtype, shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RULES)
def test_half_precision_is_computed_in_float32_and_rounded_once(name, dtype):
    rule = RULES[name]
    case = draw(2, rule.num_models or 3, (50, 50), dtype)
    exact = rule.apply(case.map(torch.Tensor.float, "base", "vectors"))
    assert torch.equal(bits(rule.apply(case)), bits(exact.to(dtype)))
    assert not torch.equal(exact.to(dtype).float(), exact)


@law(subset(on_weights=False))
def test_no_change_returns_the_base(rule, case, data):
    assert torch.equal(rule.apply(case.map(torch.zeros_like, "vectors")), case.base)


@law(subset(on_weights=True, convex=True))
def test_equal_models_stay_what_they_are(rule, case, data):
    same = replace(case, vectors=[case.base] * len(case.vectors))
    assert torch.equal(rule.apply(same), case.base)


@law(subset(on_weights=False, convex=True))
def test_equal_vectors_are_added_once(rule, case, data):
    same = replace(case, vectors=[case.vectors[0]] * len(case.vectors))
    torch.testing.assert_close(rule.apply(same), case.base + case.vectors[0], rtol=0, atol=2e-6)


@law(subset(symmetric=True))
def test_models_may_come_in_any_order(rule, case, data):
    order = data.draw(st.permutations(range(len(case.vectors))), label="order")
    found = rule.apply(case.reordered(order))
    torch.testing.assert_close(found, rule.apply(case), rtol=0, atol=3e-6)


@law()
def test_twice_a_quarter_or_the_reverse_of_a_change_is_just_that_of_the_result(rule, case, data):
    case = case.map(torch.zeros_like, "base")
    factor = data.draw(st.sampled_from([0.25, 2.0, -1.0]), label="factor")
    if factor < 0 and not rule.on_weights:
        case = case.map(lambda t: t.where(t != 0, 1.0), "vectors")  # a sum of 0 elects plus
    found = rule.apply(case.map(lambda t: factor * t, "vectors"))
    assert torch.equal(found, factor * rule.apply(case))
