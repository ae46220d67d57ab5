import itertools

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.tensor.mask_weights import (
    by_code,
    importance_weights,
    indicator,
    recurrent_kif_weights,
)

SEEDS = st.integers(0, 2**31)
REDUNDANT = st.sampled_from(["average", "drop"])
TABLE_ROWS = torch.tensor([[True, True], [True, False], [False, True], [False, False]])


def draw_masks(seed, num_models, shape=(4, 6)):
    """One parameter in three is important to a model."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) < 1 / 3 for _ in range(num_models)]


def bits(tensors):
    return [tensor.view(torch.int32).tolist() for tensor in tensors]


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
    weights = list(recurrent_kif_weights(TABLE_ROWS[:, 0], TABLE_ROWS[:, 1], **options))
    assert all(weight.dtype == torch.float32 for weight in weights)
    assert torch.equal(torch.stack(weights, 1), torch.tensor(expected).float())


@pytest.mark.parametrize("redundant", ["average", "drop"])
@pytest.mark.parametrize(
    "shares", [[1.0], [1.0, 3.0], [0.1, 0.7, 0.2], [1.0, 2.0, 4.0, 1e-3], [1.5] * 8, [0.7] * 9]
)
def test_weights_of_models_for_every_set_of_them(shares, redundant):
    rows = list(itertools.product([False, True], repeat=len(shares)))
    found = list(importance_weights(list(torch.tensor(rows).T), shares, redundant=redundant))
    assert all(weight.dtype == torch.float32 for weight in found)
    expected = [oracles.model_weights(row, shares, redundant) for row in rows]
    torch.testing.assert_close(
        torch.stack(found, 1).double(), torch.tensor(expected).double(), rtol=3e-7, atol=0
    )
    alone = torch.tensor(rows).sum(1) == 1
    assert torch.equal(torch.stack(found, 1)[alone], torch.tensor(rows)[alone].float())


@pytest.mark.parametrize("num_models", range(1, 10))
@pytest.mark.parametrize("redundant", ["average", "drop"])
def test_weights_by_code_are_those_of_the_elements(num_models, redundant):
    shares = [0.1 + 0.37 * number for number in range(num_models)]
    masks = draw_masks(num_models, num_models, (1001,))
    codes = sum(mask.long() << bit for bit, mask in enumerate(masks))

    def weights_of(masks):
        return importance_weights(masks, shares, redundant=redundant)

    found = by_code(weights_of, num_models)
    assert found.shape == (num_models, 2**num_models)
    assert bits(found[:, codes]) == bits(weights_of(masks))
    if num_models == 2:
        options = {"shared_weights": (0.123, 3.7), "redundant": redundant}
        found = by_code(lambda masks: recurrent_kif_weights(*masks, **options), 2)
        assert bits(found[:, codes]) == bits(recurrent_kif_weights(*masks, **options))


@given(seed=SEEDS, num_models=st.integers(1, 9))
def test_masks_of_any_layout_keep_their_shape(seed, num_models):
    masks = [mask.T for mask in draw_masks(seed, num_models, (3, 5))]
    shares = [1.0] * num_models
    found = list(importance_weights(masks, shares))
    expected = importance_weights([mask.contiguous() for mask in masks], shares)
    assert [tuple(weight.shape) for weight in found] == [(5, 3)] * num_models
    assert all(map(torch.equal, found, expected))


def test_weights_are_the_caller_s_own():
    masks = draw_masks(0, 2)
    for weight in recurrent_kif_weights(*masks):
        weight.zero_()
    again = recurrent_kif_weights(*masks)
    assert all(weight.any() for weight in again)


@given(seed=SEEDS, exponent=st.integers(-20, 20))
def test_only_the_ratios_of_shares_matter(seed, exponent):
    masks = draw_masks(seed, 3)
    shares = [0.2, 0.5, 1.1]
    scaled = importance_weights(masks, [share * 2.0**exponent for share in shares])
    assert all(map(torch.equal, scaled, importance_weights(masks, shares)))


@pytest.mark.parametrize(
    ("num_masks", "shares"),
    [(0, []), (2, [1.0]), (1, [1.0, 1.0]), (2, [1.0, 0.0]), (2, [1.0, -1.0]), (1, [float("inf")]),
     (1, [float("nan")])],
)  # fmt: skip
def test_shares_that_make_no_sense_are_refused(num_masks, shares):
    masks = [torch.ones(2, dtype=torch.bool)] * num_masks
    with pytest.raises(ValueError, match=r"found"):
        importance_weights(masks, shares)


@given(seed=SEEDS)
def test_an_indicator_is_one_where_the_mask_is_true(seed):
    (mask,) = draw_masks(seed, 1)
    found = indicator(mask)
    assert torch.equal(found, torch.where(mask, 1.0, 0.0))
    assert torch.equal(indicator(mask.T), found.T)
