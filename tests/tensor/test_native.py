"""The compiled part beside torch: the same bits, whatever the numbers, types and sizes."""

import ctypes
import shutil
import subprocess
import sysconfig
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.tensor import native
from kifmerge.tensor.baselines import linear, task_arithmetic, ties
from kifmerge.tensor.fusion import average_models, recurrent_kif_models
from kifmerge.tensor.mask_weights import by_code, importance_weights
from kifmerge.tensor.sums import WeightedSum, mean_of_models, sum_of_vectors

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Around whole blocks of 2048 and lanes of 64.
SIZES = [0, 1, 63, 64, 65, 2047, 2048, 2049, 5000]

needs_library = pytest.mark.skipif(not native.is_built(), reason="there was no C compiler")


def test_it_is_built_where_there_is_a_compiler():
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    assert native.is_built() or shutil.which(compiler) is None


def same_bits(found, expected):
    kind = BITS[expected.itemsize]
    return found.dtype == expected.dtype and torch.equal(found.view(kind), expected.view(kind))


def draw(generator, numel, dtype):
    """Numbers of many sizes, and some of each awkward kind."""
    exponents = torch.randint(-40, 10, (numel,), generator=generator)
    values = torch.randn(numel, generator=generator) * 2.0**exponents
    awkward = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.0, 1.00390625, 1.01171875, -2.5])
    chosen = torch.randint(0, 40, (numel,), generator=generator)
    is_awkward = chosen < len(awkward)
    values[is_awkward] = awkward[chosen[is_awkward]]
    return values.to(dtype)


@needs_library
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("num_models", [1, 2, 3, 5, 8])
@given(
    seed=st.integers(0, 2**31),
    base_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from(DTYPES),
)
def test_sums_have_the_bits_of_the_rules(numel, num_models, seed, base_dtype, dtype, out_dtype):
    generator = torch.Generator().manual_seed(seed)
    base = draw(generator, numel, base_dtype)
    models = [draw(generator, numel, dtype) for _ in range(num_models)]
    masks = [torch.rand(numel, generator=generator) < 1 / 3 for _ in models]
    weights = (torch.rand(num_models, generator=generator, dtype=torch.float64) + 0.1).tolist()
    starts = [0] * num_models
    start = base.float()
    vectors = [model.float() - start for model in models]
    weights_of = partial(importance_weights, shares=weights)
    cases = [
        (
            sum_of_vectors(by_code(weights_of, num_models), starts),
            masks,
            recurrent_kif_models(start, vectors, masks, weights),
        ),
        (sum_of_vectors([1 / num_models] * num_models, starts), [], average_models(start, vectors)),
        (
            sum_of_vectors(weights, starts, origin_last=True),
            [],
            task_arithmetic(start, vectors, weights),
        ),
    ]
    for wanted, shown, expected in cases:
        found = native.Summation(wanted).add_up([base, *models], shown, out_dtype)
        assert found is not None
        assert same_bits(found[0], expected.to(out_dtype))
    found = native.Summation(mean_of_models(weights)).add_up(models, [], out_dtype)
    expected = linear([model.float() for model in models], weights)
    assert same_bits(found[0], expected.to(out_dtype))


@needs_library
@given(
    seed=st.integers(0, 2**31),
    numel=st.sampled_from(SIZES),
    num_models=st.integers(1, 8),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    scale=st.sampled_from([1.0, 0.0, -0.7]),
)
def test_ties_has_the_bits_of_the_rule(seed, numel, num_models, dtypes, scale):
    generator = torch.Generator().manual_seed(seed)
    base = draw(generator, numel, dtypes[0])
    models = [draw(generator, numel, dtypes[1]) for _ in range(num_models)]
    starts = [0, *range(1, num_models)]
    weights = torch.randint(-2, 5, (num_models,), generator=generator).mul(0.3).tolist()
    smallest_kept = torch.rand(num_models, generator=generator).mul(2.0).tolist()
    smallest_kept[0] = 0.0
    floats = [tensor.float() for tensor in (base, *models)]
    vectors = [floats[i + 1] - floats[start] for i, start in enumerate(starts)]
    kept = [v.abs() >= smallest for v, smallest in zip(vectors, smallest_kept, strict=True)]
    expected = ties(floats[0], vectors, kept, weights, scale=scale)
    found = native.ties(starts, weights, scale, dtypes[2], smallest_kept, [base, *models])
    assert found is not None
    assert same_bits(found, expected.to(dtypes[2]))


@needs_library
@given(seed=st.integers(0, 2**31), numel=st.sampled_from(SIZES), num_masks=st.integers(1, 8))
def test_masks_are_counted(seed, numel, num_masks):
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(numel, generator=generator) < 0.6 for _ in range(num_masks)]
    wanted = sum_of_vectors(torch.ones(num_masks, 2**num_masks), [0] * num_masks)
    _, counts = native.Summation(wanted).add_up(
        [torch.zeros(numel)] * (1 + num_masks), masks, torch.float32
    )
    votes = sum(mask.long() for mask in masks)
    alone = [int((mask & (votes == 1)).sum()) for mask in masks]
    assert counts.tolist() == [int((votes == num_masks).sum()), int((votes == 0).sum()), *alone]


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 2047, 2048, 2500])
@pytest.mark.parametrize("source", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_told(value, place, source, dtype):
    tensors = [torch.ones(2501, dtype=dtype) for _ in range(3)]
    made_by = [
        partial(native.Summation(sum_of_vectors([0.5, 0.0], [0, 0])).add_up, tensors, [], dtype),
        partial(native.ties, [0, 0], [0.5, 0.0], 1.0, dtype, [9.0, 9.0], tensors),
    ]
    assert all(make() is not None for make in made_by)
    tensors[source][place] = value
    assert all(make() is None for make in made_by)


@needs_library
def test_a_sum_beyond_float32_is_told_and_one_that_only_rounds_to_infinity_is_not():
    largest = torch.full((3,), torch.finfo(torch.float32).max)
    wanted = sum_of_vectors([1.0], [0])
    assert native.Summation(wanted).add_up([-largest, largest], [], torch.float32) is None
    values, _ = native.Summation(wanted).add_up([torch.zeros(3), largest], [], torch.bfloat16)
    assert torch.equal(values, largest.bfloat16())
    assert values.isinf().all()


@needs_library
@given(seed=st.integers(0, 2**31))
def test_tensors_of_any_layout(seed):
    generator = torch.Generator().manual_seed(seed)
    base, model = (torch.randn(100, 2, generator=generator) for _ in range(2))
    mask = torch.rand(100, 2, generator=generator) < 0.5
    wanted = sum_of_vectors(torch.tensor([[0.25, 0.75]]), [0])
    expected = base + (model - base) * torch.where(mask, 0.75, 0.25)
    for column in (0, 1):
        found, _ = native.Summation(wanted).add_up(
            [base[:, column], model[:, column]], [mask[:, column]], torch.float32
        )
        assert same_bits(found, expected[:, column].contiguous())


@needs_library
@pytest.mark.parametrize(
    ("wanted", "tensor_sizes", "mask_sizes"),
    [
        (sum_of_vectors([1.0, 1.0], [0]), [3, 3], []),
        (sum_of_vectors([1.0], [0]), [3, 3], [3]),
        (sum_of_vectors([1.0], [0]), [3, 4], []),
        (sum_of_vectors(torch.ones(1, 2), [0]), [3, 3], [2]),
        (sum_of_vectors(torch.ones(1, 512), [0]), [3, 3], [3] * 9),
    ],
)
def test_what_does_not_belong_together_is_refused(wanted, tensor_sizes, mask_sizes):
    tensors = [torch.ones(size) for size in tensor_sizes]
    masks = [torch.ones(size, dtype=torch.bool) for size in mask_sizes]
    with pytest.raises(ValueError, match=r"weights of|of one size"):
        native.Summation(wanted).add_up(tensors, masks, torch.float32)


@needs_library
@pytest.mark.parametrize(
    ("starts", "weights", "smallest_kept", "tensor_sizes"),
    [
        ([0], [1.0], [0.0], [3]),
        ([0], [1.0], [0.0, 0.0], [3, 3]),
        ([0, 0], [1.0], [0.0], [3, 3]),
        ([0], [1.0], [0.0], [3, 2]),
        ([0] * 9, [1.0] * 9, [0.0] * 9, [3] * 10),
    ],
)
def test_ties_of_what_does_not_belong_together_is_refused(
    starts, weights, smallest_kept, tensor_sizes
):
    tensors = [torch.ones(size) for size in tensor_sizes]
    with pytest.raises(ValueError, match=r"bounds of|of one size"):
        native.ties(starts, weights, 1.0, torch.float32, smallest_kept, tensors)


@pytest.mark.usefixtures("built_or_not")
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_are_those_of_torch_and_leave_their_ends_alone(numel, dtype):
    generator = torch.Generator().manual_seed(numel)
    model, parent = draw(generator, numel, dtype), draw(generator, numel, torch.float32)
    before = model.clone(), parent.clone()
    found, is_finite = native.sizes_of(model, parent)
    assert is_finite
    assert same_bits(found, (before[0].float() - before[1]).abs())
    assert same_bits(model, before[0])
    assert same_bits(parent, before[1])


@pytest.mark.usefixtures("built_or_not")
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -3e38])
def test_sizes_keep_the_shape_and_what_is_not_finite(odd):
    model, parent = torch.tensor([[1.0, odd], [2.0, -4.0]]), torch.full((2, 2), 3e38)
    found, is_finite = native.sizes_of(model.T, parent)
    assert not is_finite
    torch.testing.assert_close(found, (model.T - parent).abs(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.usefixtures("built_or_not")
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize(("first", "width"), [(0, 1), (500, 40), (500, 1 << 18), (2**31, 2**30)])
def test_what_lies_in_a_window_is_found(numel, first, width):
    rng = np.random.default_rng(numel)
    bits = rng.integers(0, 1000, numel).astype(np.uint32)
    bits[::7] = rng.integers(0, 2**32, len(bits[::7]), dtype=np.uint32)
    places, num_above, largest = native.find_within(bits, first, width, np.empty(numel, np.uint32))
    numbers = bits.tolist()
    assert places.tolist() == [n - first for n in numbers if first <= n < first + width]
    assert num_above == sum(n >= first + width for n in numbers)
    assert largest == max(numbers, default=0)


@needs_library
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_upper_bits_are_counted_in_the_order_of_values(numel, dtype):
    values = draw(torch.Generator().manual_seed(numel), numel, dtype)
    values[5::97], values[7::97], values[9::97] = float("inf"), float("-inf"), float("nan")
    counts = torch.zeros(native.NUM_BUCKETS, dtype=torch.int64)
    num_nan = native.count_upper_bits(values, counts)
    assert num_nan == len(values[9::97])
    bits = (values.float().numpy() + np.float32(0)).view(np.uint32)
    ordered = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31)) >> 16
    assert counts.tolist() == np.bincount(ordered, minlength=native.NUM_BUCKETS).tolist()
    # Added to what was there, the same in every layout.
    assert native.count_upper_bits(values.repeat(2, 1).T, counts) == 2 * num_nan
    assert counts.tolist() == (3 * np.bincount(ordered, minlength=native.NUM_BUCKETS)).tolist()
    counts.zero_()
    native.count_upper_bits(torch.zeros(numel, dtype=dtype), counts)
    assert counts[native.NUM_BUCKETS // 2] == counts.sum() == numel


@pytest.mark.usefixtures("built_or_not")
@pytest.mark.parametrize("numel", SIZES)
def test_places_are_counted(numel):
    places = np.random.default_rng(numel).integers(0, 7, numel).astype(np.uint32)
    counts = torch.arange(9)
    native.tally(places, counts)
    assert counts.tolist() == [k + np.count_nonzero(places == k) for k in range(9)]


@needs_library
def test_a_library_that_rounds_otherwise_is_found_out():
    class Flushing:
        """Sums as they are, but for the last bit of one of them."""

        def kifmerge_weighted_sum(self, *arguments):
            is_finite = native._library().kifmerge_weighted_sum(*arguments)
            out_address, out_kind = arguments[-2:]
            number = (ctypes.c_uint16 if out_kind else ctypes.c_uint32).from_address(out_address)
            number.value ^= 1
            return is_finite

    assert native._rounds_like_torch(native._library())
    assert not native._rounds_like_torch(Flushing())


@needs_library
def test_the_check_does_not_depend_on_torch_s_defaults():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert native._rounds_like_torch(native._library())
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "not used.*"),
        ("long kifmerge_native_version(void) { return 0; }", "another version"),
        ("long kifmerge_native_version(void) { return VERSION; }", "kifmerge_weighted_sum"),
        ("int other;", "kifmerge_native_version"),
    ],
)
def test_a_library_that_cannot_be_used_is_named_and_left(tmp_path, source, message):
    path = tmp_path / "library.so"
    path.write_text("not a library")
    if source is not None:
        compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
        if shutil.which(compiler) is None:
            pytest.skip("there is no C compiler")
        (tmp_path / "library.c").write_text(source.replace("VERSION;", f"{native._VERSION};"))
        command = [compiler, "-shared", "-fPIC", tmp_path / "library.c", "-o", path]
        subprocess.run(command, check=True)
    with pytest.warns(UserWarning, match=message) as warned:
        assert native._opened(path) is None
    assert str(path) in str(warned[0].message)


def test_sources_that_do_not_exist_cannot_be_described():
    with pytest.raises(ValueError, match="add up to 0"):
        mean_of_models([1.0, -1.0])
    assert WeightedSum(pairs=[(1, 0)], weights=[1.0]) == sum_of_vectors([1.0], [0])
