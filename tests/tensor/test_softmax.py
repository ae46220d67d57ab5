import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.tensor.softmax import softmax_weights

SCORES = st.lists(
    st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6), min_size=1, max_size=6
)
TEMPERATURES = st.sampled_from([0.02, 0.25, 1.0, 100.0])


@given(scores=SCORES, temperature=TEMPERATURES)
def test_weights_equal_the_quotient_in_float64(scores, temperature):
    tensors = [torch.tensor(row) for row in scores]
    found = torch.stack(softmax_weights(tensors, temperature=temperature))
    expected = torch.softmax(torch.tensor(scores, dtype=torch.float64) / temperature, dim=0)
    assert found.dtype == torch.float32
    # The scores over t are rounded to float32 first: 1/t of it shows in the exponent.
    tolerance = 1e-6 + 2.0**-23 / temperature
    smallest = 1e-37 if len(scores) != 2 else 2.0**-23  # 1 - w_1 is no better than w_1 near 1
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=smallest)


@given(scores=SCORES, temperature=TEMPERATURES)
def test_weights_add_up_to_one(scores, temperature):
    weights = softmax_weights([torch.tensor(row) for row in scores], temperature=temperature)
    total = torch.stack(weights).double().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=3e-7)


def test_the_second_of_two_weights_is_what_the_first_leaves():
    scores = torch.rand(2, 200, generator=torch.Generator().manual_seed(0))
    first, second = softmax_weights(list(scores), temperature=0.25)
    assert torch.equal(second, 1.0 - first)


@pytest.mark.parametrize("num_models", [1, 2, 3, 7])
def test_equal_scores_share_alike(num_models):
    weights = softmax_weights([torch.full((3,), 0.3)] * num_models, temperature=0.01)
    assert all(torch.equal(weight, torch.full((3,), 1 / num_models)) for weight in weights)


@pytest.mark.parametrize("num_models", [2, 3])
@pytest.mark.parametrize("temperature", [1e-3, 1e-30])
def test_a_small_temperature_is_a_choice(num_models, temperature):
    scores = [torch.tensor([0.0, 1.0]), *[torch.tensor([0.5, 0.5])] * (num_models - 1)]
    weights = torch.stack(softmax_weights(scores, temperature=temperature))
    assert weights[0].tolist() == [pytest.approx(0, abs=1e-37), 1.0]
    torch.testing.assert_close(weights.sum(0), torch.ones(2))


@pytest.mark.parametrize("num_models", [2, 3])
def test_weights_are_right_to_a_few_units_in_the_last_place(num_models):
    steps = torch.linspace(0, 1, 20001)
    scores = [steps, *[torch.zeros_like(steps)] * (num_models - 1)]
    found = softmax_weights(scores, temperature=0.0625)[0].double()  # a division without rounding
    expected = 1 / (1 + (num_models - 1) * torch.exp(-steps.double() / 0.0625))
    assert ((found - expected).abs() / expected).max() < 3 * 2.0**-24


@given(cuts=st.lists(st.integers(0, 131), max_size=4), num_models=st.integers(1, 4))
def test_bits_do_not_depend_on_how_scores_are_cut(cuts, num_models):
    scores = list(torch.rand(num_models, 131, generator=torch.Generator().manual_seed(num_models)))
    parts = [
        torch.stack(softmax_weights([score[a:b] for score in scores], temperature=0.25))
        for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 131], strict=True)
    ]
    assert torch.equal(torch.cat(parts, 1), torch.stack(softmax_weights(scores, temperature=0.25)))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_must_be_above_zero(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        softmax_weights([torch.ones(1)] * 2, temperature=temperature)


def test_scores_of_no_model_are_refused():
    with pytest.raises(ValueError, match="at least one model"):
        softmax_weights([], temperature=1.0)
