"""Gradients taken in one by one: freed at once, and all parameters of a batch alike or none."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from kifmerge.errors import TrainingError
from kifmerge.tensor.importance import ImportanceAccumulator, MeanAccumulator
from kifmerge.training.intake import GradientIntake, take_in

SIZES = (6, 5, 4)


class Network(nn.Module):
    """Three layers; an embedding that is tied to the output; one parameter that is never used."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(7, SIZES[0])
        self.layers = nn.ModuleList(
            nn.Linear(a, b)
            for a, b in zip((*SIZES, SIZES[0])[:-1], (*SIZES[1:], SIZES[0]), strict=True)
        )
        self.output = nn.Linear(SIZES[0], 7, bias=False)
        self.output.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


class Poison(torch.autograd.Function):
    """The identity, whose gradient is a value times what it should be."""

    @staticmethod
    def forward(context, values, factor):
        context.factor = factor
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * context.factor, None


class Batches:
    """Losses of some batches; of some of them the loss, or a gradient midway, is not finite."""

    def __init__(self, network, num_batches, faults=()):
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, 7, (num_batches, 2, 5), generator=generator)
        self.network = network
        self.faults = dict(faults)
        self.asked = []

    def __call__(self, number):
        self.asked.append(number)
        fault = self.faults.get(number)
        inputs, targets = self.tokens[number]
        hidden = self.network.embedding(inputs)
        for place, layer in enumerate(self.network.layers):
            hidden = torch.tanh(layer(hidden))
            if fault == place:
                hidden = Poison.apply(hidden, float("inf"))
        loss = nn.functional.cross_entropy(self.network.output(hidden), targets)
        return loss * float("nan") if fault == "loss" else loss


def accumulators(network, kind):
    parameters = dict(network.named_parameters())
    made = (
        MeanAccumulator(parameters, "first")
        if kind == "mean"
        else ImportanceAccumulator(parameters)
    )
    return parameters, made


def state_of(network, batches, numbers, kind="mean"):
    """Accumulators of the ordinary way: all gradients of a batch at once."""
    parameters, made = accumulators(network, kind)
    for number in numbers:
        gradients = torch.autograd.grad(
            batches(number), list(parameters.values()), allow_unused=True
        )
        assert made.update(list(parameters.values()), gradients)
    return made.state_dict()


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in expected
    )


class Watching:
    """An accumulator that looks around while it takes in."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.mean = MeanAccumulator(parameters, "first")
        self.taken = []
        self.last = lambda: None

    def begin(self):
        self.mean.begin()

    def take(self, name, weight, gradient):
        assert weight is self.parameters[name]
        assert self.last() is None, "the gradient before is still alive"
        assert all(parameter.grad is None for parameter in self.parameters.values())
        self.taken.append((name, gradient is not None))
        if gradient is not None:
            self.last = weakref.ref(gradient)
        return self.mean.take(name, weight, gradient)

    def reset(self):
        self.mean.reset()


class TestIntake:
    def test_no_two_gradients_are_there_at_once(self):
        network = Network()
        watching = Watching(dict(network.named_parameters()))
        with GradientIntake(watching.parameters, watching, "first") as intake:
            assert intake.take(Batches(network, 1)(0)) == []
        assert watching.last() is None
        names = [name for name, has_gradient in watching.taken if has_gradient]
        assert sorted(names) == sorted(n for n in watching.parameters if n != "unused")
        assert watching.taken[-1] == ("unused", False)
        # From the loss on downwards, tied weights once, when the last part of them is there.
        assert names[0].startswith("layers.2")
        assert names[-1] == "embedding.weight"

    @pytest.mark.parametrize("kind", ["mean", "smoothed"])
    def test_equals_all_at_once_bit_for_bit(self, kind):
        network = Network()
        batches = Batches(network, 5)
        parameters, accumulator = accumulators(network, kind)
        with GradientIntake(parameters, accumulator, "first") as intake:
            assert take_in(5, batches, intake) == []
        assert same(accumulator.state_dict(), state_of(network, batches, range(5), kind))

    def test_parameter_that_a_loss_does_not_reach_counts_as_zero(self):
        network = Network()
        parameters, accumulator = accumulators(network, "mean")
        with GradientIntake(parameters, accumulator, "first") as intake:
            intake.take((network.unused * 2).sum())
            intake.take(Batches(network, 1)(0))
        # |w * 2| in one batch of two, and what the other batch alone would give.
        assert torch.equal(accumulator.mean["unused"], network.unused.abs())
        alone = state_of(network, Batches(network, 1), [0])["score/layers.0.weight"]
        assert torch.equal(accumulator.mean["layers.0.weight"], alone / 2)

    def test_loss_that_reaches_none(self):
        network = Network()
        parameters, accumulator = accumulators(network, "mean")
        other = nn.Parameter(torch.ones(1))
        with GradientIntake(parameters, accumulator, "first") as intake:
            for loss in (torch.ones(()), other.sum()):
                with pytest.raises(TrainingError, match="depends on none of the parameters"):
                    intake.take(loss)

    def test_gradient_in_parts_is_refused(self):
        network = Network()
        parameters, accumulator = accumulators(network, "mean")
        layer = network.layers[0]
        hidden = torch.ones(2, SIZES[0], requires_grad=True)
        first = checkpoint(layer, hidden, use_reentrant=True)
        second = checkpoint(layer, hidden + first.sum(), use_reentrant=True)
        with (
            GradientIntake(parameters, accumulator, "first") as intake,
            pytest.raises(TrainingError, match=r"layers\.0\.\w+ comes in several parts"),
        ):
            intake.take(second.sum())

    def test_nothing_is_left_behind(self):
        network = Network()
        parameters, accumulator = accumulators(network, "mean")
        loss = Batches(network, 1)
        loss(0).backward()
        with GradientIntake(parameters, accumulator, "first") as intake:
            assert all(parameter.grad is None for parameter in parameters.values())
            intake.take(loss(0))
        loss(0).backward()
        assert all(p.grad is not None for n, p in parameters.items() if n != "unused")
        assert accumulator.num_batches == 1

        def fails(number):
            network.layers[0].weight.grad = torch.ones(SIZES[1], SIZES[0])
            raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"), intake:
            take_in(1, fails, intake)
        assert all(parameter.grad is None for parameter in parameters.values())

    @pytest.mark.parametrize("kind", ["mean", "smoothed"])
    def test_hooks_look_at_no_value(self, kind):
        """Tensors without values would tell: on a device each look waits for all before it."""
        network = Network().to("meta")
        batches = Batches(network, 1)
        batches.tokens = batches.tokens.to("meta")
        parameters, accumulator = accumulators(network, kind)
        with GradientIntake(parameters, accumulator, "first"):
            accumulator.begin()
            batches(0).backward()
            assert all(parameter.grad is None for parameter in parameters.values())
            with pytest.raises(RuntimeError, match="meta"):
                bool(batches(0).isfinite())

    def test_check_takes_nothing_in(self):
        network = Network()
        parameters, accumulator = accumulators(network, "mean")
        with GradientIntake(parameters, accumulator, "first") as intake:
            assert intake.check(Batches(network, 1)(0)) == []
            bad = intake.check(Batches(network, 1, {0: 1})(0))
            assert bad == intake.take(Batches(network, 1, {0: 1})(0))
        # Those before the fault, and the tied one, whose gradient ends there.
        assert bad == [
            "embedding.weight",
            *(f"layers.{k}.{w}" for k in (0, 1) for w in ("weight", "bias")),
        ]
        assert all(parameter.grad is None for parameter in parameters.values())
        accumulator.reset()
        assert accumulator.num_batches == 0


class TestFaults:
    @given(
        num_batches=st.integers(1, 7),
        faults=st.dictionaries(st.integers(0, 6), st.sampled_from(["loss", 0, 1, 2])),
        kind=st.sampled_from(["mean", "smoothed"]),
    )
    @settings(deadline=None, max_examples=60)
    def test_bad_batches_are_left_out_whole(self, num_batches, faults, kind):
        network = Network()
        batches = Batches(network, num_batches, faults)
        parameters, accumulator = accumulators(network, kind)
        told, problems = [], []
        with GradientIntake(parameters, accumulator, "first") as intake:
            left_out = take_in(
                num_batches,
                batches,
                intake,
                on_batch=told.append,
                on_fault=lambda number, fault, anew: problems.append((number, fault, anew)),
            )
        bad = sorted(number for number in faults if number < num_batches)
        assert left_out == bad
        assert told == list(range(num_batches))
        assert [number for number, _, _ in problems] == bad
        assert all(parameter.grad is None for parameter in parameters.values())
        # However many faults there are, never much more than twice the work.
        assert len(batches.asked) <= 2 * num_batches
        # A loss is looked at before anything is taken in.
        if all(faults[number] == "loss" for number in bad):
            assert len(batches.asked) == num_batches
            assert not any(anew for _, _, anew in problems)
        good = [number for number in range(num_batches) if number not in bad]
        assert same(accumulator.state_dict(), state_of(network, batches, good, kind))

    def test_are_described(self):
        network = Network()
        parameters, accumulator = accumulators(network, "mean")
        problems = []
        with GradientIntake(parameters, accumulator, "first") as intake:
            take_in(
                3,
                Batches(network, 3, {0: "loss", 1: 1, 2: 0}),
                intake,
                on_fault=lambda *fault: problems.append(fault),
            )
        several = "w*g is not finite in embedding.weight, layers.0.weight, layers.0.bias"
        assert problems == [
            (0, "its loss is nan", False),
            (1, f"{several} and 2 more", True),
            (2, several, False),  # found by checking first
        ]

    def test_batch_that_goes_bad_when_it_is_asked_for_again(self):
        """Devices whose sums have no fixed order may do this near the largest number."""
        network = Network()
        batches = Batches(network, 5)
        parameters, accumulator = accumulators(network, "mean")

        def loss_of(number):
            if number == 1:
                batches.faults = {1: 1}
            if batches.asked.count(3) == 1 and number == 3:
                batches.faults = {3: 1}
            return batches(number)

        with GradientIntake(parameters, accumulator, "first") as intake:
            assert take_in(5, loss_of, intake) == [1, 3]
        batches.faults = {}
        assert same(accumulator.state_dict(), state_of(network, batches, [0, 2, 4]))
        assert accumulator.num_batches == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestDevice:
    @pytest.fixture
    def network(self):
        return Network().cuda()

    @pytest.fixture
    def batches(self, network):
        batches = Batches(network, 4, {1: 1})
        batches.tokens = batches.tokens.cuda()
        return batches

    @pytest.mark.parametrize("kind", ["mean", "smoothed"])
    def test_equals_the_cpu(self, network, batches, kind):
        parameters, accumulator = accumulators(network, kind)
        with GradientIntake(parameters, accumulator, "first") as intake:
            assert take_in(4, batches, intake) == [1]
        host = Network()
        expected = state_of(host, Batches(host, 4), [0, 2, 3], kind)
        for key, value in accumulator.state_dict().items():
            assert value.is_cuda
            torch.testing.assert_close(value.cpu(), expected[key], rtol=1e-4, atol=1e-6)

    def test_hooks_wait_for_nothing(self, network, batches):
        parameters, accumulator = accumulators(network, "mean")
        with GradientIntake(parameters, accumulator, "first") as intake:
            intake.take(batches(0))  # whatever waits at first use
            loss = batches(0)
            accumulator.begin()
            torch.cuda.set_sync_debug_mode("error")
            try:
                loss.backward()
                with pytest.raises(RuntimeError, match="synchron"):
                    float(loss)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert accumulator.num_batches == 2
        assert bool(accumulator.mean["layers.0.weight"].isfinite().all())
