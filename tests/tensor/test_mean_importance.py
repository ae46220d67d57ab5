"""The plain mean of the sensitivity over batches, against a slow one in float64."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.tensor import importance
from kifmerge.tensor.importance import MeanAccumulator

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
        patched.setattr(importance, "CPU_GROUP_NUMEL", limit)
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
