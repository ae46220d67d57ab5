import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.tensor.fusion import (
    add_vectors,
    average_models,
    normalise,
    recurrent_kif,
    recurrent_kif_adaptive,
    recurrent_kif_adaptive_models,
    recurrent_kif_models,
    score_bounds,
)

SEEDS = st.integers(0, 2**31)
REDUNDANT = st.sampled_from(["average", "drop"])
SHARED_WEIGHTS = [(0.4, 0.6), (1.0, 1.0), (0.3, 0.7), (0.123, 3.7)]
TABLE_ROWS = torch.tensor([[True, True], [True, False], [False, True], [False, False]])


def draw(seed, shape=(4, 6)):
    """Base, two task vectors and two score tensors in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    base, new, historical = (torch.randn(shape, generator=generator) for _ in range(3))
    scores = [torch.rand(shape, generator=generator) for _ in range(2)]
    return base, new, historical, scores


def draw_models(seed, num_models, shape=(4, 6)):
    """Base, task vectors and masks; one parameter in three is important to a model."""
    generator = torch.Generator().manual_seed(seed)
    base, *vectors = (torch.randn(shape, generator=generator) for _ in range(num_models + 1))
    masks = [torch.rand(shape, generator=generator) < 1 / 3 for _ in range(num_models)]
    return base, vectors, masks


def bits(tensor):
    return tensor.view(torch.int32)


def test_fusion_by_hand():
    found = recurrent_kif(
        torch.full((4,), 10.0), torch.full((4,), 1.0), torch.full((4,), -2.0),
        TABLE_ROWS[:, 0], TABLE_ROWS[:, 1],
    )  # fmt: skip
    torch.testing.assert_close(found, torch.tensor([9.2, 11.0, 8.0, 9.5]))


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


@given(seed=SEEDS, redundant=REDUNDANT, shared_weights=st.sampled_from(SHARED_WEIGHTS))
def test_the_table_as_it_is_written_gives_the_same_bits(seed, redundant, shared_weights):
    base, new, historical, scores = draw(seed)
    masks = [score > 0.5 for score in scores]
    neither = 0.5 if redundant == "average" else 0.0
    table = torch.tensor([[neither] * 2, [0.0, 1.0], [1.0, 0.0], shared_weights])
    weights = table[2 * masks[0].long() + masks[1].long()]
    expected = base + weights[..., 0] * new + weights[..., 1] * historical
    found = recurrent_kif(
        base, new, historical, *masks, shared_weights=shared_weights, redundant=redundant
    )
    assert torch.equal(bits(found), bits(expected))


@given(seed=SEEDS, redundant=REDUNDANT, shares=st.sampled_from([(0.4, 0.6), (2.0, 3.0)]))
def test_two_models_of_the_table_s_shares_are_two_sides_to_the_bit(seed, redundant, shares):
    base, vectors, masks = draw_models(seed, 2)
    found = recurrent_kif_models(base, vectors, masks, shares, redundant=redundant)
    assert torch.equal(
        bits(found), bits(recurrent_kif(base, *vectors, *masks, redundant=redundant))
    )


@given(seed=SEEDS, temperature=st.sampled_from([0.01, 0.25, 100.0]))
def test_adaptive_of_two_models_is_that_of_two_sides_to_the_bit(seed, temperature):
    base, new, historical, scores = draw(seed)
    found = recurrent_kif_adaptive_models(base, [new, historical], scores, temperature=temperature)
    expected = recurrent_kif_adaptive(base, new, historical, *scores, temperature=temperature)
    assert torch.equal(bits(found), bits(expected))


@given(seed=SEEDS)
def test_average_of_two_models_is_half_and_half_to_the_bit(seed):
    base, vectors, _ = draw_models(seed, 2)
    expected = add_vectors(base, *vectors, 0.5, 0.5)
    assert torch.equal(bits(average_models(base, vectors)), bits(expected))


@given(seed=SEEDS, num_models=st.integers(1, 40))
def test_what_no_model_prefers_is_averaged_to_the_bit(seed, num_models):
    base, vectors, _ = draw_models(seed, num_models)
    expected = bits(average_models(base, vectors))
    nothing, same = torch.zeros_like(base, dtype=torch.bool), torch.full_like(base, 0.3)
    masked = recurrent_kif_models(base, vectors, [nothing] * num_models, [1.5] * num_models)
    adaptive = recurrent_kif_adaptive_models(base, vectors, [same] * num_models, temperature=0.25)
    assert torch.equal(bits(masked), expected)
    assert torch.equal(bits(adaptive), expected)


def test_models_must_be_as_many_as_what_is_known_of_them():
    base, vectors, masks = draw_models(0, 3)
    scores = [mask.float() for mask in masks]
    with pytest.raises(ValueError, match="zip"):
        recurrent_kif_models(base, vectors, masks[:2], [1.0, 1.0])
    with pytest.raises(ValueError, match="zip"):
        recurrent_kif_adaptive_models(base, vectors, scores[:2], temperature=1.0)
    with pytest.raises(ValueError, match="at least one task vector"):
        average_models(base, [])


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
