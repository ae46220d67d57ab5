import itertools
from concurrent.futures import ThreadPoolExecutor

import oracles
import pytest
import torch

from kifmerge.tensor import grouping
from kifmerge.tensor.importance import (
    ImportanceAccumulator,
    ImportanceOptions,
    all_finite,
    score,
)

SHAPES = {"matrix": (7, 5), "vector": (11,), "scalar": (), "cube": (2, 3, 4)}
KINDS = ["first", "second", "mixed"]


def random_steps(num_steps=4, *, shapes=SHAPES, dtype=torch.float32, seed=0):
    """(weights, gradients) of several steps, in the order of the names."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return [torch.randn(s, generator=generator).to(dtype) for s in shapes.values()]

    return [(draw(), draw()) for _ in range(num_steps)]


def accumulated(steps, *, shapes=SHAPES, **options):
    weights = dict(zip(shapes, steps[0][0], strict=True))
    accumulator = ImportanceAccumulator(weights, ImportanceOptions(**options))
    for step_weights, gradients in steps:
        assert accumulator.update(step_weights, gradients)
    return accumulator


def assert_equals_oracle(accumulator, steps, **options):
    for number, name in enumerate(accumulator.sensitivity):
        own_steps = [(weights[number], gradients[number]) for weights, gradients in steps]
        sensitivity, uncertainty = oracles.smoothed(own_steps, **options)
        for found, expected in (
            (accumulator.sensitivity[name], sensitivity),
            (accumulator.uncertainty[name], uncertainty),
        ):
            torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("betas", [(0.85, 0.85), (0.55, 0.9), (0.0, 0.0), (0.999, 0.5)])
def test_accumulators_equal_the_oracle(kind, betas):
    steps = random_steps()
    accumulator = accumulated(steps, sensitivity=kind, betas=betas)
    assert_equals_oracle(accumulator, steps, kind=kind, betas=betas)
    assert (accumulator.num_steps, accumulator.num_skipped) == (4, 0)


def test_first_step_is_not_bias_corrected():
    weights, gradients = torch.tensor([2.0]), torch.tensor([-3.0])
    accumulator = ImportanceAccumulator({"w": weights}, ImportanceOptions(betas=(0.75, 0.5)))
    accumulator.update([weights], [gradients])
    assert accumulator.sensitivity["w"].item() == 0.25 * 6
    assert accumulator.uncertainty["w"].item() == 0.5 * (6 - 0.25 * 6)


@pytest.mark.parametrize(("kind", "factor"), [("product", 1.0), ("sensitivity", 0.0)])
def test_score_is_the_product_or_the_sensitivity_alone(kind, factor):
    steps = random_steps()
    accumulator = accumulated(steps, score=kind)
    scores = dict(accumulator.scores())
    assert list(scores) == list(SHAPES)
    for number, name in enumerate(SHAPES):
        sensitivity, uncertainty = oracles.smoothed([(w[number], g[number]) for w, g in steps])
        expected = sensitivity * uncertainty if factor else sensitivity
        torch.testing.assert_close(scores[name].double(), expected, rtol=4e-6, atol=1e-12)


def test_sensitivity_score_is_a_copy_that_leaves_the_accumulator_alone():
    sensitivity = torch.ones(3)
    score(sensitivity, torch.ones(3), "sensitivity").zero_()
    assert torch.equal(sensitivity, torch.ones(3))


def test_missing_gradient_counts_as_zero():
    steps = random_steps()
    for number, (_, gradients) in enumerate(steps):
        gradients[number % 2] = None
    assert_equals_oracle(accumulated(steps), steps)


def test_bfloat16_weights_are_accumulated_in_float32():
    steps = random_steps(dtype=torch.bfloat16)
    accumulator = accumulated(steps)
    assert all(s.dtype == torch.float32 for s in accumulator.state_dict().values())
    assert_equals_oracle(accumulator, steps)


def test_float32_weights_may_have_bfloat16_gradients():
    steps = [(w, [g.bfloat16() for g in gradients]) for w, gradients in random_steps()]
    assert_equals_oracle(accumulated(steps), steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 3, 10, 40])
def test_cutting_and_bundling_tensors_changes_nothing(monkeypatch, kind, limit):
    steps = random_steps()
    steps[1][1][0] = None
    whole = accumulated(steps, sensitivity=kind).state_dict()
    monkeypatch.setattr(grouping, "CPU_GROUP_NUMEL", limit)
    cut = accumulated(steps, sensitivity=kind).state_dict()
    assert all(torch.equal(cut[key], value) for key, value in whole.items())


def test_large_tensor_is_cut_into_pieces_of_the_limit(monkeypatch):
    monkeypatch.setattr(grouping, "CPU_GROUP_NUMEL", 10)
    sizes = []
    update_group = ImportanceAccumulator._update_group

    def recording(self, group):
        sizes.append(sum(tensor.numel() for tensor in group[0]))
        update_group(self, group)

    monkeypatch.setattr(ImportanceAccumulator, "_update_group", recording)
    accumulated(random_steps(1))
    assert sum(sizes) == 7 * 5 + 11 + 1 + 2 * 3 * 4
    assert max(sizes) <= 10


def test_transposed_weights_are_matched_with_their_own_scores(monkeypatch):
    monkeypatch.setattr(grouping, "CPU_GROUP_NUMEL", 8)
    shapes = {"matrix": (5, 7)}
    steps = [([w[0].T], [g[0].T.contiguous()]) for w, g in random_steps()]
    assert not steps[0][0][0].is_contiguous()
    assert_equals_oracle(accumulated(steps, shapes=shapes), steps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", range(len(SHAPES)))
def test_nonfinite_gradient_leaves_every_parameter_out_and_is_counted(bad, place):
    steps = random_steps(3)
    accumulator = accumulated(steps[:2])
    before = {key: value.clone() for key, value in accumulator.state_dict().items()}
    weights, gradients = steps[2]
    gradients[place].view(-1)[-1] = bad
    assert not accumulator.update(weights, gradients)
    assert all(torch.equal(value, before[k]) for k, value in accumulator.state_dict().items())
    assert (accumulator.num_steps, accumulator.num_skipped) == (2, 1)


def test_large_but_finite_gradients_are_finite():
    assert all_finite([torch.full((1000,), 3e38), None, torch.full((9,), 6e4).half()])
    assert all_finite([None]) is True
    assert not all_finite([torch.ones(3), torch.tensor([1.0, float("-inf")]).bfloat16()])


def test_parameter_without_elements_is_no_obstacle():
    steps = random_steps(1, shapes={"none": (0, 3), "vector": (4,)})
    accumulator = accumulated(steps, shapes={"none": (0, 3), "vector": (4,)})
    assert accumulator.num_steps == 1


def test_update_happens_in_place():
    steps = random_steps()
    accumulator = accumulated(steps[:1])
    before = {key: value.data_ptr() for key, value in accumulator.state_dict().items()}
    for weights, gradients in steps[1:]:
        accumulator.update(weights, gradients)
    accumulator.reset()
    assert before == {key: value.data_ptr() for key, value in accumulator.state_dict().items()}


def test_update_changes_neither_weights_nor_gradients():
    weights, gradients = random_steps(1)[0]
    before = [tensor.clone() for tensor in (*weights, *gradients)]
    accumulated([(weights, gradients)], sensitivity="mixed")
    assert all(map(torch.equal, before, (*weights, *gradients)))


def test_reset_begins_anew_but_remembers_skipped_steps():
    steps = random_steps(3)
    accumulator = accumulated(steps[:2])
    accumulator.update(steps[0][0], [torch.full_like(g, torch.nan) for g in steps[0][1]])
    accumulator.reset()
    assert (accumulator.num_steps, accumulator.num_skipped) == (0, 1)
    assert not any(value.any() for value in accumulator.state_dict().values())
    accumulator.update(*steps[2])
    assert_equals_oracle(accumulator, steps[2:])


def test_state_goes_round():
    steps = random_steps(4)
    half_way = accumulated(steps[:2])
    state = {key: value.clone() for key, value in half_way.state_dict().items()}
    other = ImportanceAccumulator(dict(zip(SHAPES, steps[0][0], strict=True)))
    other.load_state_dict(state, num_steps=half_way.num_steps)
    for weights, gradients in steps[2:]:
        other.update(weights, gradients)
    expected = accumulated(steps)
    assert other.num_steps == 4
    assert set(state) == {
        f"{kind}/{name}" for kind, name in itertools.product(("sensitivity", "uncertainty"), SHAPES)
    }
    assert all(
        torch.equal(value, expected.state_dict()[key]) for key, value in other.state_dict().items()
    )


def test_another_number_of_tensors_is_refused():
    weights, gradients = random_steps(1)[0]
    accumulator = accumulated([(weights, gradients)])
    with pytest.raises(ValueError, match="zip"):
        accumulator.update(weights[:-1], gradients)


@pytest.mark.parametrize("betas", [(1.0, 0.5), (0.5, 1.0), (-0.1, 0.5)])
def test_smoothing_factors_outside_0_to_1_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        ImportanceOptions(betas=betas)


@pytest.mark.parametrize("beta", [0.55, 0.85, 0.95])
def test_bfloat16_accumulators_stay_near_those_in_float32(beta):
    steps = random_steps(60, shapes={"matrix": (70, 50)})
    exact = accumulated(steps, shapes={"matrix": 0}, betas=(beta, beta))
    half = accumulated(
        steps, shapes={"matrix": 0}, betas=(beta, beta), accumulator_dtype="bfloat16"
    )
    for found, expected in (
        (half.sensitivity["matrix"], exact.sensitivity["matrix"]),
        (half.uncertainty["matrix"], exact.uncertainty["matrix"]),
    ):
        assert found.dtype == torch.bfloat16
        errors = (found.float() - expected).abs() / expected
        assert 0 < float(errors.mean()) < 0.006
        assert float(errors.quantile(0.99)) < 0.02


def test_bfloat16_step_is_computed_in_float32_and_rounded_once():
    weights, gradients = torch.randn(100), torch.randn(100)
    exact, half = (
        ImportanceAccumulator({"w": weights}, ImportanceOptions(accumulator_dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    for accumulator in (exact, half):
        accumulator.begin()
        accumulator.take("w", weights, gradients)
    assert torch.equal(half.sensitivity["w"], exact.sensitivity["w"].bfloat16())
    assert torch.equal(half.uncertainty["w"], exact.uncertainty["w"].bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulator_dtype": "bfloat16", "betas": (0.99, 0.5)}, "betas must not exceed 0.95"),
        ({"accumulator_dtype": "bfloat16", "betas": (0.5, 0.99)}, "betas must not exceed 0.95"),
        ({"accumulator_dtype": "float16"}, "accumulator_dtype"),
        ({"accumulator_device": "moon"}, "accumulator_device must be parameters, or a device"),
        ({"accumulator_device": "meta"}, "accumulator_device must be parameters, or a device"),
    ],
)
def test_meaningless_accumulators_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImportanceOptions(**options)


def test_accumulators_on_a_named_device_are_the_same_there():
    steps = random_steps()
    beside, named = accumulated(steps), accumulated(steps, accumulator_device="cpu")
    assert (beside.is_as_parameters, named.is_as_parameters) == (True, False)
    for name, value in beside.state_dict().items():
        assert torch.equal(named.state_dict()[name], value)


def test_groups_spread_over_threads_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(grouping, "CPU_GROUP_NUMEL", 8)
    steps = random_steps()
    alone = accumulated(steps)
    together = ImportanceAccumulator(dict(zip(SHAPES, steps[0][0], strict=True)))
    with ThreadPoolExecutor(3) as pool:
        for weights, gradients in steps:
            trained = [weight.requires_grad_() for weight in weights]
            assert together.update(trained, gradients, spread=pool.map)
    for name, value in alone.state_dict().items():
        assert torch.equal(together.state_dict()[name], value)
