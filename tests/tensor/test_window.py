"""One pass finds what two do, or says that it does not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kifmerge.tensor import window
from kifmerge.tensor.selection import importance_threshold, kth_smallest, threshold_rank
from kifmerge.tensor.window import value_near

pytestmark = pytest.mark.usefixtures("all_built_or_not")

NUMEL = 1000
KINDS = {
    "even": lambda g: torch.rand(NUMEL, generator=g),
    "long tail": lambda g: torch.randn(NUMEL, generator=g).pow(6),
    "ties": lambda g: torch.randint(0, 5, (NUMEL,), generator=g) / 4,
    "equal": lambda g: torch.full((NUMEL,), 0.3),
    "zeros": lambda g: torch.zeros(NUMEL),
    "tiny": lambda g: torch.rand(NUMEL, generator=g) * 1e-40,
    "huge": lambda g: torch.rand(NUMEL, generator=g) * 3e38,
    "infinite": lambda g: torch.where(torch.rand(NUMEL, generator=g) < 0.5, math.inf, 1.0),
}
FRACTIONS = (0.0, 0.001, 0.2, 0.5, 1.0)


def values_of(kind, seed=0):
    return KINDS[kind](torch.Generator().manual_seed(seed))


def threshold_near(guess, parts, fraction):
    values = [part() if callable(part) else part for part in parts[:]]  # not a pass
    return value_near(guess, parts, threshold_rank(sum(v.numel() for v in values), fraction))


class Passes(list):
    """Parts, and how often they were gone through."""

    num = 0

    def __iter__(self):
        self.num += 1
        return super().__iter__()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_a_perfect_guess_needs_one_pass(kind, fraction):
    parts = Passes(values_of(kind).split(300))
    expected = importance_threshold(parts, fraction)
    parts.num = 0
    assert threshold_near(expected.value, parts, fraction) == expected
    assert parts.num == 1


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 99),
    fraction=st.sampled_from(FRACTIONS),
    guess=st.floats(0, 3e38) | st.floats(0, 2) | st.sampled_from([math.inf, math.nan, -1.0]),
    size=st.sampled_from([7, 64, NUMEL]),
)
def test_no_guess_leads_to_another_value(kind, seed, fraction, guess, size):
    parts = values_of(kind, seed).split(size)
    found = threshold_near(guess, parts, fraction)
    assert found in (None, importance_threshold(parts, fraction))


@pytest.mark.parametrize("factor", [0.93, 0.97, 1.03, 1.07])
def test_a_guess_that_is_a_little_off_needs_two_passes(factor):
    parts = Passes(torch.rand(100_000, generator=torch.Generator().manual_seed(0)).split(30_000))
    expected = importance_threshold(parts, 0.2)
    parts.num = 0
    assert threshold_near(factor * expected.value, parts, 0.2) == expected
    assert parts.num == 2


@pytest.mark.parametrize("factor", [1e-3, 0.3, 3.0, 1e3])
def test_a_guess_that_is_far_off_finds_nothing(factor):
    parts = values_of("even").split(300)
    value = importance_threshold(parts, 0.5).value
    assert threshold_near(factor * value, parts, 0.5) is None


def test_every_rank_is_found_near_its_value():
    values = values_of("ties")
    for rank in (1, 2, 300, NUMEL - 1, NUMEL):
        expected = kth_smallest([values], rank)
        assert value_near(expected, [values], rank).value == expected


@pytest.mark.parametrize("odd", [math.nan, -math.nan, -1.0, -0.0, -math.inf])
def test_values_without_order_and_with_a_sign_are_left_to_others(odd):
    values = values_of("even")
    guess = importance_threshold([values], 0.2).value
    assert threshold_near(guess, [values], 0.2) is not None
    values[17] = odd
    assert threshold_near(guess, [values], 0.2) is None


def test_no_scores_are_left_to_others():
    assert value_near(1.0, [], 1) is None
    assert value_near(1.0, [torch.empty(0)], 1) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_taken_in_float32(dtype):
    values = values_of("even").to(dtype)
    expected = importance_threshold([values], 0.2)
    assert threshold_near(expected.value, [values], 0.2) == expected


def test_parts_may_be_functions_and_of_any_shape():
    values = values_of("even").reshape(10, 100).T
    parts = [lambda: values[:50], values[50:]]
    expected = importance_threshold([values], 0.2)
    assert threshold_near(expected.value, parts, 0.2) == expected


def test_processes_add_up():
    first, second = values_of("even").split([300, 700])
    expected = importance_threshold([first, second], 0.2)
    seen = []
    rank = threshold_rank(NUMEL, 0.2)
    value_near(expected.value, [second], rank, reduce_counts=lambda c: seen.append(c) or c)
    added = iter(seen)
    found = value_near(
        expected.value, [first], rank, reduce_counts=lambda counts: counts + next(added)
    )
    assert found == expected


def test_very_many_in_the_window_are_counted_in_batches(monkeypatch):
    monkeypatch.setattr(window, "_BATCH_NUMEL", 100)
    parts = values_of("equal").split(70)
    assert threshold_near(0.3, parts, 0.2) == importance_threshold(parts, 0.2)
