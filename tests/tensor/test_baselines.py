import itertools

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.tensor.baselines import linear, magmax, task_arithmetic, ties

SEEDS = st.integers(0, 2**31)


def draw(seed, num_models, shape=(6, 7)):
    """Base, task vectors and masks."""
    generator = torch.Generator().manual_seed(seed)
    base, *vectors = (torch.randn(shape, generator=generator) for _ in range(num_models + 1))
    return base, vectors, [torch.rand(shape, generator=generator) < 0.5 for _ in vectors]


def every(values, num_models):
    """One tensor per model: all rows of values, so that each meets each."""
    return list(torch.tensor(list(itertools.product(values, repeat=num_models))).T)


@given(seed=SEEDS, weights=st.lists(st.floats(-2, 3, width=16), min_size=1, max_size=5))
def test_linear_of_equal_models_is_that_model_whatever_the_weights(seed, weights):
    model, _, _ = draw(seed, 0)
    if sum(weights) == 0:
        weights[0] += 0.5
    assert torch.equal(linear([model] * len(weights), weights), model)


@given(seed=SEEDS, weights=st.sampled_from([[1.5, -0.5], [-0.5, 1.0, 1.0], [-2.0, 0.5, 0.25]]))
def test_linear_takes_negative_weights(seed, weights):
    _, models, _ = draw(seed, len(weights))
    expected = sum(w * m.double() for w, m in zip(weights, models, strict=True)) / sum(weights)
    torch.testing.assert_close(linear(models, weights).double(), expected, rtol=1e-6, atol=3e-6)


def test_linear_returns_no_model_itself():
    model = torch.ones(3)
    linear([model], [2.0]).zero_()
    assert torch.equal(model, torch.ones(3))


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
def test_linear_of_models_of_one_base_rounds_less_than_the_quotient_of_sums(weights):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20000, generator=generator)
    models = [base + 0.05 * torch.randn(20000, generator=generator) for _ in weights]
    exact = sum(w * m.double() for w, m in zip(weights, models, strict=True)) / sum(weights)
    quotient = sum(w * m for w, m in zip(weights, models, strict=True)) / sum(weights)
    ours, theirs = (
        float((x.double() - exact).square().mean().sqrt())
        for x in (linear(models, weights), quotient)
    )
    assert ours < 0.85 * theirs


def test_a_model_of_weight_zero_leaves_nothing_behind():
    models = [torch.full((2,), 1e30), torch.tensor([0.1, 3.0])]
    assert torch.equal(linear(models, [0.0, 1.0]), models[1])


@pytest.mark.parametrize(
    "weights", [[], [1.0], [1.0, 1.0, 1.0], [1.0, -1.0], [0.0, 0.0], [float("inf"), 1.0]]
)
def test_weights_that_make_no_mean_are_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        linear([torch.ones(2), torch.ones(2)], weights)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [float("nan"), 1.0]])
def test_one_finite_weight_for_each_task_vector(weights):
    base, vectors, masks = draw(0, 2)
    with pytest.raises(ValueError, match="weight"):
        task_arithmetic(base, vectors, weights)
    with pytest.raises(ValueError, match="weight"):
        ties(base, vectors, masks, weights)


def test_at_least_one_model():
    for rule in (task_arithmetic, magmax):
        with pytest.raises(ValueError, match="at least one"):
            rule(torch.ones(1), [], *([[]] if rule is task_arithmetic else []))


def test_one_mask_for_each_task_vector():
    base, vectors, masks = draw(0, 3)
    with pytest.raises(ValueError, match="zip"):
        ties(base, vectors, masks[:2], [1.0, 1.0, 1.0])


@given(seed=SEEDS, num_models=st.integers(1, 4))
def test_task_arithmetic_as_it_is_written_gives_the_same_bits(seed, num_models):
    base, vectors, _ = draw(seed, num_models)
    weights = [0.3, -1.2, 0.7, 1.0][:num_models]
    total = torch.zeros_like(base)
    for weight, vector in zip(weights, vectors, strict=True):
        total = total + weight * vector
    assert torch.equal(task_arithmetic(base, vectors, weights), base + total)


@given(seed=SEEDS, num_models=st.integers(1, 4))
def test_ties_as_it_is_written_gives_the_same_bits(seed, num_models):
    base, vectors, masks = draw(seed, num_models)
    weights = torch.tensor([0.3, 1.2, 0.7, 1.0][:num_models])
    weighted = weights[:, None, None] * torch.stack(vectors) * torch.stack(masks)
    elected = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agree = weighted.sign() == elected
    divisor = (weights[:, None, None] * agree).sum(0)
    mean = (weighted * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    assert torch.equal(ties(base, vectors, masks, weights.tolist()), base + mean)


@pytest.mark.parametrize(
    "weights", [[1.0, 1.0, 1.0], [1.0, 2.0, 0.5], [1.0, -1.0, 2.0], [0.0, 1.0, 1.0], [0.0] * 3]
)
def test_ties_on_every_mixture_of_small_numbers_is_that_of_the_oracle(weights):
    vectors = every([-2.0, -1.0, 0.0, 1.0, 2.0], 3)
    for keep in itertools.product([False, True], repeat=3):
        kept = [torch.full_like(vectors[0], k, dtype=torch.bool) for k in keep]
        found = ties(torch.zeros_like(vectors[0]), vectors, kept, weights)
        expected = oracles.element_by_element(
            lambda values, keep=keep: oracles.ties_update(values, keep, weights), vectors
        )
        torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=0)


def test_a_sum_of_zero_elects_plus():
    one, yes = torch.ones(1), torch.tensor([True])
    assert ties(0 * one, [-2 * one, 2 * one], [yes, yes], [1.0, 1.0]).tolist() == [2.0]
    assert ties(0 * one, [-2 * one, 1 * one], [yes, yes], [1.0, 2.0]).tolist() == [1.0]


def test_weights_count_in_the_election():
    one, yes = torch.ones(1), torch.tensor([True])
    vectors = [3 * one, -2 * one]
    assert ties(0 * one, vectors, [yes, yes], [1.0, 1.0]).tolist() == [3.0]
    assert ties(0 * one, vectors, [yes, yes], [1.0, 2.0]).tolist() == [-2.0]


def test_a_negative_weight_adds_the_reversed_vector():
    one, yes = torch.ones(1), torch.tensor([True])
    assert ties(0 * one, [4 * one], [yes], [-0.5]).tolist() == [-4.0]
    assert ties(0 * one, [4 * one, -2 * one], [yes, yes], [1.0, -1.0]).tolist() == [3.0]


def test_magmax_on_every_mixture_of_small_numbers_takes_the_first_of_the_largest():
    vectors = every([-2.0, -1.0, 0.0, 1.0, 2.0], 3)
    expected = oracles.element_by_element(oracles.largest, vectors)
    assert torch.equal(magmax(torch.zeros_like(vectors[0]), vectors).double(), expected)


@given(seed=SEEDS, num_models=st.integers(1, 5))
def test_magmax_takes_values_as_they_are(seed, num_models):
    _, vectors, _ = draw(seed, num_models)
    expected = oracles.element_by_element(oracles.largest, vectors)
    assert torch.equal(magmax(torch.zeros_like(vectors[0]), vectors).double(), expected)
