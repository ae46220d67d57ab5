import threading

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.tensor import selection
from kifmerge.tensor.buckets import count_low_bits, low_bits
from kifmerge.tensor.selection import (
    Threshold,
    importance_bracket,
    importance_threshold,
    kth_smallest,
    threshold_rank,
)

pytestmark = pytest.mark.usefixtures("all_built_or_not")

FRACTIONS = ["0", "0.01", "0.05", "0.1", "0.2", "0.25", "0.5", "0.9", "1"]
FLOATS = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60)
# Where brackets begin and end.
AT_EDGES = st.lists(
    st.sampled_from([v * s for v in (1e-45, 0.0, 1.0, 1.0 - 2**-24, 1e-40) for s in (1, -1)]),
    min_size=1,
    max_size=20,
)
BITS16 = st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=60)


def half_precision(bits: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Values of every kind that the dtype has, but NaN."""
    return torch.tensor(bits, dtype=torch.int16).view(dtype).nan_to_num(nan=1.0, posinf=torch.inf)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("num_scores", [2, 11, 100, 1001, 4096])
@pytest.mark.parametrize("decimals", [2, 7])
def test_mask_equals_that_of_torch_quantile(fraction, num_scores, decimals):
    generator = torch.Generator().manual_seed(num_scores)
    scores = torch.rand(num_scores, generator=generator).round(decimals=decimals)
    chosen = importance_threshold([scores], fraction)
    assert torch.equal(scores > chosen.value, scores > torch.quantile(scores, 1 - fraction))


@given(values=FLOATS, fraction=st.sampled_from(FRACTIONS))
def test_threshold_is_the_order_statistic_of_all_values(values, fraction):
    chosen = importance_threshold([torch.tensor(values)], fraction)
    expected = oracles.threshold(values, fraction)
    num_above = sum(value > expected for value in values)
    assert chosen == Threshold(expected, len(values), num_above)


@given(values=FLOATS | AT_EDGES, fraction=st.sampled_from(FRACTIONS))
def test_a_bracket_holds_the_threshold_and_leaves_the_rest_decided(values, fraction):
    scores = torch.tensor(values)
    bracket = importance_bracket([scores], fraction)
    places, low = low_bits(scores, bracket.bucket)
    above = bracket.above(scores)
    chosen = bracket.threshold(count_low_bits(low))
    assert chosen == importance_threshold([scores], fraction)
    assert (len(places), int(above.sum())) == (bracket.num_within, bracket.num_above)
    assert not above[places].any()
    above[places] = scores[places] > chosen.value
    assert torch.equal(above, scores > chosen.value)


@given(values=FLOATS, data=st.data())
def test_kth_smallest_equals_torch_kthvalue(values, data):
    rank = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values)
    assert kth_smallest([scores], rank) == scores.kthvalue(rank).values.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(bits=BITS16, fraction=st.sampled_from(FRACTIONS))
def test_half_precision_scores_are_selected_exactly(dtype, bits, fraction):
    scores = half_precision(bits, dtype)
    chosen = importance_threshold([scores], fraction)
    assert chosen.value == oracles.threshold(scores.tolist(), fraction)


@given(values=FLOATS, bits=BITS16, fraction=st.sampled_from(FRACTIONS))
def test_tensors_of_different_dtypes_share_one_threshold(values, bits, fraction):
    mixed = [
        torch.tensor(values),
        half_precision(bits, torch.bfloat16),
        half_precision(bits, torch.float16),
    ]
    together = [value for tensor in mixed for value in tensor.tolist()]
    assert importance_threshold(mixed, fraction).value == oracles.threshold(together, fraction)


def test_denormals_infinities_and_signed_zeros_are_ordered():
    tiny = 1e-45
    values = [torch.inf, -torch.inf, 0.0, -0.0, tiny, -tiny, 2 * tiny, 3.0, -3.0]
    found = [kth_smallest([torch.tensor(values)], rank) for rank in range(1, 10)]
    assert found == torch.tensor(sorted(values)).tolist()


def test_negative_zero_does_not_exceed_zero():
    chosen = importance_threshold([torch.tensor([-0.0, 0.0, -0.0, 0.0])], 0.5)
    assert (chosen.value, chosen.num_above) == (0.0, 0)


@given(
    cuts=st.lists(st.integers(0, 500), max_size=6),
    chunk=st.sampled_from([17, 64, 250, 1000]),
    fraction=st.sampled_from(FRACTIONS),
)
def test_neither_tensors_nor_chunks_change_the_threshold(cuts, chunk, fraction):
    scores = torch.randn(500, generator=torch.Generator().manual_seed(3)).round(decimals=2)
    whole = importance_threshold([scores], fraction)
    pieces = list(torch.tensor_split(scores, sorted(cuts)))[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CHUNK_NUMEL", chunk)
        assert importance_threshold(pieces, fraction) == whole


def test_shape_and_memory_layout_do_not_change_the_threshold():
    scores = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(4))
    flat = importance_threshold([scores.flatten()], 0.2)
    assert importance_threshold([scores.permute(2, 0, 1)], 0.2) == flat


def test_more_scores_than_torch_quantile_takes_are_selected_exactly():
    num_scores = 2**24 + 5
    scores = torch.rand(num_scores, generator=torch.Generator().manual_seed(5))
    chosen = importance_threshold([scores], 0.2)
    rank = num_scores - -(-(num_scores - 1) // 5)
    assert chosen.value == scores.kthvalue(rank).values.item()
    assert chosen.num_above == int((scores > chosen.value).sum())


@pytest.mark.parametrize("value", [0.0, 0.75, -2.0, torch.inf])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 1])
def test_constant_scores_make_nothing_important(value, fraction):
    chosen = importance_threshold([torch.full((37,), value)], fraction)
    assert chosen.is_degenerate
    assert (chosen.value, chosen.num_scores) == (value, 37)


def test_varied_scores_are_not_degenerate():
    assert not importance_threshold([torch.arange(10.0)], 0.2).is_degenerate


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0, []), (1, [2.0, 3.0, 4.0]), (0.5, [3.0, 4.0])]
)
def test_fraction_decides_how_many_are_above(fraction, expected):
    scores = torch.tensor([4.0, 1.0, 3.0, 2.0])
    chosen = importance_threshold([scores], fraction)
    assert sorted(scores[scores > chosen.value].tolist()) == expected
    assert chosen.num_above == len(expected)


def test_nan_anywhere_is_refused():
    scores = [torch.ones(3), torch.tensor([0.0, float("nan")])]
    with pytest.raises(ValueError, match="NaN among the scores"):
        importance_threshold(scores, 0.2)
    with pytest.raises(ValueError, match="NaN among the scores"):
        kth_smallest(scores, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_a_dtype_that_would_be_rounded_is_refused(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        importance_threshold([torch.ones(3, dtype=dtype)], 0.2)


def test_a_generator_is_refused_since_scores_are_read_twice():
    with pytest.raises(TypeError, match="read twice"):
        importance_threshold((scores for scores in [torch.ones(3)]), 0.2)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, "2", float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match=str(fraction)):
        importance_threshold([torch.ones(3)], fraction)


@pytest.mark.parametrize("scores", [[], [torch.ones(0)]])
def test_no_scores_at_all_are_refused(scores):
    with pytest.raises(ValueError, match="no scores"):
        importance_threshold(scores, 0.2)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_that_does_not_exist_is_refused(rank):
    with pytest.raises(ValueError, match=r"1\.\.3"):
        kth_smallest([torch.ones(3)], rank)


def test_rank_is_that_of_exact_decimals_for_every_percentage():
    for percent in range(101):
        for num_scores in range(1, 302):
            expected = num_scores - -(-percent * (num_scores - 1) // 100)
            assert threshold_rank(num_scores, percent / 100) == expected


@pytest.mark.parametrize(
    ("num_scores", "fraction", "rank"),
    # The product in floating point is 0.07*100 = 7.000000000000001, 0.55*100 = 55.00000000000001.
    [(11, 0.2, 9), (11, "0.2", 9), (101, 0.07, 94), (101, 0.55, 46), (31, 0.1, 28), (1, 0.2, 1)],
)
def test_rank_does_not_suffer_from_float_arithmetic(num_scores, fraction, rank):
    assert threshold_rank(num_scores, fraction) == rank


def test_counts_of_two_processes_add_up_to_the_whole():
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(6)).round(decimals=3)
    lock, barrier = threading.Lock(), threading.Barrier(2, timeout=20)
    calls: list[dict[int, torch.Tensor]] = [{}, {}]
    found: dict[int, Threshold] = {}

    def process(number: int, half: torch.Tensor) -> None:
        turn = iter(calls)

        def add_up(counts: torch.Tensor) -> torch.Tensor:
            shared = next(turn)
            with lock:
                shared[number] = counts
            barrier.wait()
            return shared[0] + shared[1]

        found[number] = importance_threshold([half], 0.2, reduce_counts=add_up)

    other = threading.Thread(target=process, args=(1, scores[300:]))
    other.start()
    process(0, scores[:300])
    other.join(20)
    assert found[0] == found[1] == importance_threshold([scores], 0.2)
