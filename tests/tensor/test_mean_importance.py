"""The plain mean of the sensitivity over batches, against a slow one in float64."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.tensor import grouping
from kifmerge.tensor.importance import (
    ImportanceAccumulator,
    ImportanceOptions,
    MeanAccumulator,
    largest_sensitivity,
)

SHAPES = {"matrix": (7, 5), "vector": (11,), "scalar": (), "empty": (0, 3), "cube": (2, 3, 4)}
KINDS = ["first", "second", "mixed"]


def random_batches(num_batches, *, dtype=torch.float32, seed=0):
    """Weights, and the gradients of several batches, in the order of the names."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES.values()]

    return draw(), [draw() for _ in range(num_batches)]


def accumulated(weights, batches, kind="first"):
    accumulator = MeanAccumulator(dict(zip(SHAPES, weights, strict=True)), kind)
    for gradients in batches:
        assert accumulator.update(weights, gradients)
    return accumulator


def slow_mean(weight, gradients, kind):
    return sum(oracles.step_sensitivity(weight, g, kind) for g in gradients) / len(gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_slow_mean(kind, dtype):
    weights, batches = random_batches(9, dtype=dtype)
    accumulator = accumulated(weights, batches, kind)
    assert list(accumulator.mean) == list(SHAPES)
    for number, (name, found) in enumerate(accumulator.mean.items()):
        expected = slow_mean(weights[number], [gradients[number] for gradients in batches], kind)
        assert found.dtype == torch.float32
        assert found.shape == SHAPES[name]
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-12)
    assert (accumulator.num_batches, accumulator.num_skipped) == (9, 0)


def test_many_batches_stay_exact():
    weight = torch.tensor([3.0])
    accumulator = MeanAccumulator({"w": weight}, "first")
    for number in range(3000):
        accumulator.update([weight], [torch.tensor([float(number % 2)])])
    assert accumulator.mean["w"].item() == pytest.approx(1.5, rel=1e-5)


def test_one_batch_is_its_sensitivity_bit_for_bit():
    weights, batches = random_batches(1)
    accumulator = accumulated(weights, batches)
    for number, found in enumerate(accumulator.mean.values()):
        assert torch.equal(found, (weights[number] * batches[0][number]).abs())


@given(st.integers(1, 40), st.sampled_from(KINDS))
def test_group_size_changes_nothing(limit, kind):
    weights, batches = random_batches(3)
    whole = accumulated(weights, batches, kind)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grouping, "CPU_GROUP_NUMEL", limit)
        cut = accumulated(weights, batches, kind)
    assert all(torch.equal(whole.mean[name], cut.mean[name]) for name in SHAPES)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_batch_with_a_gradient_that_is_not_finite_changes_nothing(bad):
    weights, batches = random_batches(3)
    spoilt = [gradient.clone() for gradient in batches[1]]
    spoilt[1][4] = bad
    accumulator = accumulated(weights, batches[:1])
    assert not accumulator.update(weights, spoilt)
    assert accumulator.update(weights, batches[2])
    assert (accumulator.num_batches, accumulator.num_skipped) == (2, 1)
    expected = accumulated(weights, [batches[0], batches[2]])
    assert all(torch.equal(accumulator.mean[n], expected.mean[n]) for n in SHAPES)


def test_missing_gradient_counts_as_zero():
    weight = torch.tensor([2.0])
    accumulator = MeanAccumulator({"w": weight}, "first")
    accumulator.update([weight], [torch.tensor([3.0])])
    accumulator.update([weight], [None])
    assert accumulator.mean["w"].item() == 3.0


def test_state_is_what_a_snapshot_keeps():
    weights, batches = random_batches(2)
    accumulator = accumulated(weights, batches)
    state = accumulator.state_dict()
    assert list(state) == [f"score/{name}" for name in SHAPES]
    assert all(state[f"score/{name}"] is accumulator.mean[name] for name in SHAPES)


def test_weights_and_gradients_are_left_alone():
    weights, batches = random_batches(2)
    before = [tensor.clone() for tensor in (*weights, *batches[0])]
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    accumulated(parameters, batches)
    assert all(torch.equal(a, b) for a, b in zip(before, (*weights, *batches[0]), strict=True))


def test_reset_forgets_all_batches():
    weights, batches = random_batches(3)
    accumulator = accumulated(weights, batches[:2])
    accumulator.begin()
    accumulator.take("vector", weights[1], torch.full((11,), torch.nan))
    accumulator.reset()
    assert accumulator.num_batches == 0
    assert accumulator.update(weights, batches[2])
    expected = accumulated(weights, batches[2:])
    assert all(torch.equal(accumulator.mean[n], expected.mean[n]) for n in SHAPES)


class TestOneGradientAtATime:
    @pytest.fixture(params=["mean", "smoothed"])
    def make(self, request):
        def mean(weights, kind):
            return MeanAccumulator(dict(zip(SHAPES, weights, strict=True)), kind)

        def smoothed(weights, kind):
            options = ImportanceOptions(sensitivity=kind, betas=(0.8, 0.6))
            return ImportanceAccumulator(dict(zip(SHAPES, weights, strict=True)), options)

        return mean if request.param == "mean" else smoothed

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("limit", [5, 1 << 17])
    def test_is_the_same_as_all_at_once_bit_for_bit(self, make, kind, dtype, limit, monkeypatch):
        monkeypatch.setattr(grouping, "CPU_GROUP_NUMEL", limit)
        weights, batches = random_batches(4, dtype=dtype)
        batches[2][1] = None
        whole, single = make(weights, kind), make(weights, kind)
        for gradients in batches:
            assert whole.update(weights, gradients)
            single.begin()
            # In the order of a backward pass: any will do.
            for name, w, g in reversed([*zip(SHAPES, weights, gradients, strict=True)]):
                single.take(name, w, g)
        found, expected = single.state_dict(), whole.state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert max(float(value.max()) for value in found.values() if value.numel()) > 0

    @pytest.mark.parametrize("limit", [2, 1 << 17])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_a_gradient_that_is_not_finite_is_told(self, make, bad, limit, monkeypatch):
        monkeypatch.setattr(grouping, "CPU_GROUP_NUMEL", limit)
        weights, [gradients] = random_batches(1)
        accumulator = make(weights, "first")
        accumulator.begin()
        for number, (name, w) in enumerate(zip(SHAPES, weights, strict=True)):
            finite = accumulator.take(name, w, gradients[number])
            expected = (w * gradients[number]).abs().max() if w.numel() else torch.tensor(0.0)
            assert torch.equal(finite, expected)
            if w.numel():
                spoilt = gradients[number].clone()
                spoilt.view(-1)[w.numel() // 2] = bad
                assert not accumulator.take(name, w, spoilt).isfinite()
                assert not largest_sensitivity(w, spoilt).isfinite()

    def test_a_product_that_overflows_is_told(self, make):
        weights = [torch.full(shape, 1e20) for shape in SHAPES.values()]
        accumulator = make(weights, "second")
        accumulator.begin()
        assert accumulator.take("vector", weights[1], torch.ones(11)) == float("inf")

    @pytest.mark.parametrize("kind", KINDS)
    def test_largest_is_told_without_taking_in_too(self, make, kind):
        weights, [gradients] = random_batches(1)
        accumulator = make(weights, kind)
        accumulator.begin()
        for name, w, g in zip(SHAPES, weights, gradients, strict=True):
            assert torch.equal(largest_sensitivity(w, g, kind), accumulator.take(name, w, g))

    @pytest.mark.parametrize("limit", [5, 1 << 17])
    def test_parameters_need_not_be_contiguous(self, make, limit, monkeypatch):
        monkeypatch.setattr(grouping, "CPU_GROUP_NUMEL", limit)
        weight, gradient = torch.randn(5, 7).T, torch.randn(7, 5)
        accumulator = make([weight, *random_batches(1)[0][1:]], "first")
        accumulator.begin()
        largest = accumulator.take("matrix", torch.nn.Parameter(weight), gradient)
        assert largest == largest_sensitivity(weight, gradient)
        state = accumulator.state_dict()
        taken = next(value for key, value in state.items() if key.endswith("/matrix"))
        assert taken.argmax() == (weight * gradient).abs().argmax()
