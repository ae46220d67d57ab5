import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.tensor.fusion import (
    add_vectors,
    normalise,
    recurrent_kif,
    recurrent_kif_adaptive,
    recurrent_kif_weights,
    score_bounds,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = st.integers(0, 2**31)
TABLE_ROWS = torch.tensor([[True, True], [True, False], [False, True], [False, False]])


def draw(seed, shape=(4, 6), dtype=torch.float32):
    """Base, two task vectors and two score tensors in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    base, new, historical = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    scores = [torch.rand(shape, generator=generator) for _ in range(2)]
    return base, new, historical, scores


def every_rule(base, new, historical, scores):
    """Results of all rules on the same input."""
    masks = [score > 0.6 for score in scores]
    return {
        "average": add_vectors(base, new, historical, 0.5, 0.5),
        "table": recurrent_kif(base, new, historical, *masks),
        "table, dropped": recurrent_kif(base, new, historical, *masks, redundant="drop"),
        "adaptive": recurrent_kif_adaptive(base, new, historical, *scores, temperature=0.25),
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(0.4, 0.6), (1, 0), (0, 1), (0.5, 0.5)]),
        ({"redundant": "drop"}, [(0.4, 0.6), (1, 0), (0, 1), (0, 0)]),
        (
            {"shared_weights": (1.0, 1.0), "redundant": "drop"},
            [(1, 1), (1, 0), (0, 1), (0, 0)],
        ),
        ({"shared_weights": (0.3, 0.7)}, [(0.3, 0.7), (1, 0), (0, 1), (0.5, 0.5)]),
    ],
)
def test_weights_are_those_of_the_table(options, expected):
    weights = recurrent_kif_weights(TABLE_ROWS[:, 0], TABLE_ROWS[:, 1], **options)
    assert all(weight.dtype == torch.float32 for weight in weights)
    torch.testing.assert_close(torch.stack(weights, 1), torch.tensor(expected).float())


def test_fusion_by_hand():
    found = recurrent_kif(
        torch.full((4,), 10.0), torch.full((4,), 1.0), torch.full((4,), -2.0),
        TABLE_ROWS[:, 0], TABLE_ROWS[:, 1],
    )  # fmt: skip
    torch.testing.assert_close(found, torch.tensor([9.2, 11.0, 8.0, 9.5]))


@given(seed=SEEDS, redundant=st.sampled_from(["average", "drop"]))
def test_table_fusion_equals_the_oracle(seed, redundant):
    base, new, historical, scores = draw(seed)
    masks = [score > 0.6 for score in scores]
    found = recurrent_kif(base, new, historical, *masks, redundant=redundant)
    weights = oracles.masked_weights(*masks, redundant=redundant)
    expected = oracles.fused(
        base, base.double() + new.double(), base.double() + new.double() + historical, weights
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@given(seed=SEEDS, temperature=st.sampled_from([0.05, 0.25, 1.0, 10.0]))
def test_adaptive_fusion_equals_the_oracle(seed, temperature):
    base, new, historical, scores = draw(seed)
    found = recurrent_kif_adaptive(base, new, historical, *scores, temperature=temperature)
    weights = oracles.softmax_weights(*scores, temperature)
    expected = oracles.fused(
        base, base.double() + new.double(), base.double() + new.double() + historical, weights
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=SEEDS, shape=st.lists(st.integers(0, 4), max_size=3))
def test_every_rule_keeps_dtype_and_shape(dtype, seed, shape):
    base, new, historical, scores = draw(seed, tuple(shape), dtype)
    for rule, found in every_rule(base, new, historical, scores).items():
        assert (found.dtype, found.shape) == (dtype, base.shape), rule


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=SEEDS)
def test_every_rule_returns_the_base_when_nothing_changed(dtype, seed):
    base, _, _, scores = draw(seed, dtype=dtype)
    zero = torch.zeros_like(base)
    for rule, found in every_rule(base, zero, zero, scores).items():
        assert torch.equal(found, base), rule


@given(seed=SEEDS)
def test_every_rule_works_element_by_element(seed):
    base, new, historical, scores = draw(seed, (12,))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    whole = every_rule(base, new, historical, scores)
    shuffled = every_rule(base[order], new[order], historical[order], [s[order] for s in scores])
    assert all(torch.equal(whole[rule][order], shuffled[rule]) for rule in whole)


@given(seed=SEEDS)
def test_no_rule_changes_its_arguments(seed):
    arguments = draw(seed)
    base, new, historical, scores = draw(seed)
    every_rule(base, new, historical, scores)
    assert all(map(torch.equal, (base, new, historical), arguments[:3]))
    assert all(map(torch.equal, scores, arguments[3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    base, new, historical = (torch.tensor([x], dtype=dtype) for x in (1.0, 2**-8, 2**-8))
    # Each vector alone would be lost, or rounded twice, in half precision.
    expected = (base.float() + new.float() + historical.float()).to(dtype)
    assert torch.equal(add_vectors(base, new, historical, 1.0, 1.0), expected)
    assert not torch.equal(expected, base)


@given(seed=SEEDS)
def test_average_is_the_table_with_nothing_important(seed):
    base, new, historical, _ = draw(seed)
    nothing = torch.zeros_like(base, dtype=torch.bool)
    found = recurrent_kif(base, new, historical, nothing, nothing)
    assert torch.equal(found, add_vectors(base, new, historical, 0.5, 0.5))


@given(seed=SEEDS, temperature=st.sampled_from([0.01, 0.25, 100.0]))
def test_adaptive_with_equal_scores_is_the_average(seed, temperature):
    base, new, historical, scores = draw(seed)
    found = recurrent_kif_adaptive(
        base, new, historical, scores[0], scores[0], temperature=temperature
    )
    assert torch.equal(found, add_vectors(base, new, historical, 0.5, 0.5))


@given(seed=SEEDS)
def test_adaptive_at_a_small_temperature_is_a_choice(seed):
    base, new, historical, scores = draw(seed)
    scores[1] += torch.where(scores[1] > scores[0], 0.5, -0.5)
    found = recurrent_kif_adaptive(base, new, historical, *scores, temperature=1e-3)
    chosen = torch.where(scores[0] > scores[1], new, historical)
    torch.testing.assert_close(found, base + chosen)


def test_bounds_are_those_of_all_tensors_together():
    scores = [torch.tensor([[0.5, 3.0]]), torch.ones(0), torch.tensor(-1.0).bfloat16()]
    assert score_bounds(scores) == (-1.0, 3.0)


@given(seed=SEEDS)
def test_normalised_scores_equal_the_oracle(seed):
    _, _, _, scores = draw(seed)
    bounds = score_bounds(scores)
    for found, expected in zip(
        (normalise(s, bounds) for s in scores), oracles.min_max(scores), strict=True
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 3.5, -1.0])
def test_constant_scores_normalise_to_zero(value):
    scores = torch.full((2, 3), value)
    assert torch.equal(normalise(scores, score_bounds([scores])), torch.zeros(2, 3))
