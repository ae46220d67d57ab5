"""Sizes of the memory worked by hand, balance, and what stays the same."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.models.data import Example
from kifmerge.phases.memory import select_memory


def examples(outputs) -> list[Example]:
    return [Example(str(number), "", "text", str(o)) for number, o in enumerate(outputs)]


def in_turn(num_labels: int, num_rows: int) -> list[Example]:
    return examples(number % num_labels for number in range(num_rows))


def kept(rows: list[Example], fraction: float | str, seed: int = 0) -> Counter[str]:
    return Counter(e.output for e in select_memory(rows, fraction, seed=seed))


class TestSize:
    def test_every_label_is_kept_even_beyond_the_share(self):
        # 2 % of 300 rows is 6; 14 labels keep one row each.
        assert kept(in_turn(14, 300), 0.02) == Counter({str(n): 1 for n in range(14)})

    def test_rest_is_drawn_at_random(self):
        # 2 % of 300 rows is 6; 5 labels: one each and one more.
        counts = kept(in_turn(5, 300), 0.02)
        assert sorted(counts.values()) == [1, 1, 1, 1, 2]

    def test_share_is_divided_evenly(self):
        assert set(kept(in_turn(4, 1000), 0.02).values()) == {5}

    def test_free_text_is_drawn_uniformly(self):
        # 101 outputs are no labels: 2 % of 202 rows is 4.
        assert sum(kept(in_turn(101, 202), 0.02).values()) == 4
        # 100 are: one row of each.
        assert sum(kept(in_turn(100, 202), 0.02).values()) == 100

    def test_short_label_gives_all_it_has_and_others_fill_up(self):
        # n = 10 of 100, two labels, 5 each, but "rare" has 2 rows only.
        counts = kept(examples(["rare"] * 2 + ["common"] * 98), 0.1)
        assert counts == {"rare": 2, "common": 8}

    def test_share_is_floored_as_a_decimal(self):
        # 0.29 * 100 is 28.999... in binary floating point.
        assert sum(kept(examples(range(200)), 0.29).values()) == 58
        assert sum(kept(examples(range(150)), 0.019).values()) == 2
        assert sum(kept(examples(range(150)), "0.02").values()) == 3

    def test_none_and_all(self):
        rows = in_turn(3, 20)
        assert select_memory(rows, 0, seed=0) == []
        assert select_memory(rows, 0.0, seed=0) == []
        assert select_memory(rows, 1, seed=0) == rows
        assert select_memory(examples(range(150)), 0.001, seed=0) == []

    @pytest.mark.parametrize("fraction", [-0.1, 1.01, "2"])
    def test_share_out_of_range(self, fraction):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], found"):
            select_memory(in_turn(2, 4), fraction, seed=0)


class TestDraw:
    @given(
        st.lists(st.integers(0, 5), min_size=1, max_size=60),
        st.decimals(0, 1, places=3),
        st.integers(0, 2**32),
    )
    def test_laws(self, outputs, fraction, seed):
        rows = examples(outputs)
        found = select_memory(rows, str(fraction), seed=seed)
        numbers = [int(example.id) for example in found]
        assert numbers == sorted(set(numbers))
        assert all(rows[number] == example for number, example in zip(numbers, found, strict=True))
        assert found == select_memory(rows, str(fraction), seed=seed)
        if fraction:
            share = int(fraction * len(rows))
            labels = set(outputs)
            assert len(found) == max(share, len(labels))
            counts = Counter(example.output for example in found)
            for label in labels:
                even = max(1, share // len(labels))
                assert counts[str(label)] >= min(even, outputs.count(label))

    def test_seeds_differ(self):
        rows = in_turn(2, 200)
        draws = {tuple(e.id for e in select_memory(rows, 0.05, seed=seed)) for seed in range(5)}
        assert len(draws) == 5

    def test_global_generator_is_left_alone(self):
        import random

        random.seed(1)
        before = random.getstate()
        select_memory(in_turn(2, 50), 0.2, seed=3)
        assert random.getstate() == before
