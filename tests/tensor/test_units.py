import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kifmerge.tensor import units
from kifmerge.tensor.units import (
    LoraFactor,
    cumulative_scores,
    important_units,
    lora_factor,
    normalise_scores,
    slice_layout,
    slice_sums,
)

SCORES = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)
# Of few values: ties, with each other and with the threshold.
TIED = st.lists(st.integers(0, 4).map(float), min_size=1, max_size=60)


def min_max(scores):
    scores = np.asarray(scores, dtype=np.float64)
    extent = scores.max() - scores.min()
    return (scores - scores.min()) / extent if extent > 0 else np.zeros_like(scores)


class TestScores:
    @given(SCORES)
    def test_normalised_between_smallest_and_largest(self, scores):
        assert normalise_scores(scores) == min_max(scores).tolist()

    @pytest.mark.parametrize("scores", [[2.0], [2.0, 2.0, 2.0], [0.0, -0.0]])
    def test_constant_scores_become_zero_and_unimportant(self, scores):
        assert normalise_scores(scores) == [0.0] * len(scores)
        assert important_units(scores) == [False] * len(scores)

    def test_none(self):
        assert (normalise_scores([]), important_units([]), cumulative_scores([], [])) == ([],) * 3

    @pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
    def test_scores_that_are_not_finite(self, strange):
        for function in (normalise_scores, important_units):
            with pytest.raises(ValueError, match="score is"):
                function([1.0, strange, 2.0])

    def test_scores_too_far_apart(self):
        with pytest.raises(ValueError, match="too far apart"):
            normalise_scores([-1.7e308, 1.7e308])

    @given(st.one_of(SCORES, TIED), st.integers(0, 100))
    @example([float(n) for n in range(96)], 20)
    @example([float(n) for n in range(11)], 30)
    @example([0.0, 1.0], 50)
    def test_important_ones_are_above_numpy_s_percentile(self, scores, percent):
        normalised = min_max(scores)
        expected = normalised > np.percentile(normalised, 100 - percent)
        assert important_units(scores, str(percent / 100)) == expected.tolist()

    def test_a_score_at_the_percentile_is_unimportant(self):
        scores = [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]
        assert important_units(scores, 0.2) == [False] * 6
        assert important_units(scores, 0.4) == [False] * 4 + [True] * 2

    def test_rounding_is_numpy_s_where_it_decides(self):
        # The percentile lies an ulp or two below the second of these, if it is reached from above.
        around = [0.01550067929289738, 0.015991729523571974]
        scores = [0.0] * 28 + around + [1.0] * 21
        expected = (np.array(scores) > np.percentile(scores, 58)).tolist()
        assert important_units(scores, "0.42") == expected
        assert sum(expected) == 22

    @pytest.mark.parametrize("fraction", [-0.1, 1.01])
    def test_fractions_that_are_none(self, fraction):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            important_units([1.0], fraction)

    @given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1)), min_size=1, max_size=40))
    def test_cumulative_scores_add_up(self, pairs):
        new, before = map(list, zip(*pairs, strict=True))
        expected = min_max(0.3 * min_max(new) + 0.7 * min_max(before))
        assert cumulative_scores(new, before) == expected.tolist()
        other = min_max(0.9 * min_max(new) + 0.1 * min_max(before))
        found = cumulative_scores(new, before, new_weight=0.9, cumulative_weight=0.1)
        assert found == other.tolist()

    def test_of_the_first_task_they_are_its_own(self):
        assert cumulative_scores([3e-9, 7.0], None) == [3e-9, 7.0]

    def test_as_many_before_as_now(self):
        with pytest.raises(ValueError, match="as new ones, 2, found 1"):
            cumulative_scores([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("b.m.q.lora_A.weight", ("b.m.q", "A")),
        ("b.m.q.lora_B.weight", ("b.m.q", "B")),
        ("b.m.q.lora_A.default.weight", ("b.m.q.default", "A")),
        ("b.m.q.base_layer.lora_B.weight", ("b.m.q.base_layer", "B")),
        ("b.wte.lora_embedding_A", ("b.wte", "A")),
        ("b.wte.lora_embedding_B.other", ("b.wte.other", "B")),
        ("b.m.q.lora_B.bias", None),
        ("b.m.q.lora_B.default.bias", None),
        ("b.m.q.lora_magnitude_vector", None),
        ("b.m.q.lora_A.weight.scale", None),
        ("b.m.q.weight", None),
        ("lora_A.weight", None),
        ("b.m.q.xlora_A.weight", None),
    ],
)
def test_factors_by_name(name, factor):
    assert lora_factor(name) == (None if factor is None else LoraFactor(*factor))


SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=4)


@st.composite
def layouts(draw):
    shape = draw(SHAPES)
    return shape, draw(st.sampled_from([None, *range(min(len(shape), 2))]))


class TestSlices:
    @given(layouts(), st.sampled_from([1, 2, 7, 16, 1 << 17]))
    def test_sums_are_those_of_each_slice(self, layout, block_numel):
        shape, axis = layout
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(units, "BLOCK_NUMEL", block_numel)
            found = slice_sums(lambda a, b: values.reshape(-1)[a:b], shape, axis)
        slices = [values] if axis is None else values.unbind(axis)
        expected = [math.fsum(part.flatten().tolist()) for part in slices]
        assert found == pytest.approx(expected, rel=1e-14, abs=1e-14)

    @given(layouts())
    def test_layout_tells_the_slice_of_each_element(self, layout):
        shape, axis = layout
        outer, num_slices, inner = slice_layout(shape, axis)
        assert outer * num_slices * inner == math.prod(shape)
        positions = (
            torch.zeros(shape, dtype=torch.int64) if axis is None else index_along(shape, axis)
        )
        for element, position in enumerate(positions.reshape(-1).tolist()):
            assert element // inner % num_slices == position

    @pytest.mark.parametrize(
        ("shape", "axis"),
        [((40,), None), ((3, 40), 0), ((20, 3), 0), ((40, 3), 1), ((2, 3, 40), 1)],
    )
    def test_each_element_is_read_once_in_blocks_of_bounded_size(self, monkeypatch, shape, axis):
        monkeypatch.setattr(units, "BLOCK_NUMEL", 16)
        ranges = []

        def read(start, stop):
            ranges.append((start, stop))
            return torch.ones(stop - start)

        assert slice_sums(read, shape, axis)[0] == math.prod(shape) / slice_layout(shape, axis)[1]
        assert all(stop - start <= 16 for start, stop in ranges)
        assert len(ranges) <= 2 * math.ceil(math.prod(shape) / 16)
        elements = [element for start, stop in ranges for element in range(start, stop)]
        assert sorted(elements) == list(range(math.prod(shape)))

    @pytest.mark.parametrize(("shape", "axis"), [((600_001,), None), ((300_000, 2), 1)])
    def test_sums_do_not_depend_on_threads_or_on_how_memory_lies(self, shape, axis):
        values = torch.rand(math.prod(shape), generator=torch.Generator().manual_seed(0))
        shifted = torch.cat([torch.zeros(3), values])[3:]
        found, num_threads = [], torch.get_num_threads()
        for source, threads in ((values, 1), (shifted, 1), (values, 4)):
            torch.set_num_threads(threads)
            found.append(slice_sums(lambda a, b, s=source: s[a:b], shape, axis))
        torch.set_num_threads(num_threads)
        assert found[0] == found[1] == found[2]

    def test_order_of_additions_is_fixed(self):
        # In halves: ((1 + 1e16) + (1 - 1e16)), each of which loses its 1.
        values = torch.tensor([1.0, 1.0, 1e16, -1e16], dtype=torch.float64)
        assert slice_sums(lambda a, b: values[a:b], (4,), None) == [0.0]
        assert slice_sums(lambda a, b: values[[0, 2, 1, 3]][a:b], (4,), None) == [2.0]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_values_are_left_as_they_are(self, dtype):
        values = torch.ones(64, dtype=dtype)
        assert slice_sums(lambda a, b: values[a:b], (8, 8), 0) == [8.0] * 8
        assert torch.equal(values, torch.ones(64, dtype=dtype))


def index_along(shape, axis):
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    return torch.arange(shape[axis]).view(sizes).expand(shape)
