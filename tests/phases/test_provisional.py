"""Marks that are found in two passes are those of three."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kifmerge.checkpoint.pieces import pieces, read_piece
from kifmerge.checkpoint.ranks import ALONE
from kifmerge.checkpoint.source import MemorySource
from kifmerge.checkpoint.workers import Workers
from kifmerge.phases.provisional import ProvisionalMarks, is_worth_while
from kifmerge.tensor.selection import importance_bracket, importance_threshold

SIZES = {"a": 1001, "b": 7, "c": 0, "d": 64}


def sources(seed, decimals):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.randn(size, generator=generator).pow(2).round(decimals=decimals)
        for name, size in SIZES.items()
    }
    return scores, MemorySource(scores)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    seed=st.integers(0, 99),
    decimals=st.integers(0, 7),
    fraction=st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]),
    most_bytes=st.sampled_from([32, 256, None]),
    num_workers=st.sampled_from([0, 2]),
)
def test_marks_are_what_exceeds_the_threshold(
    tmp_path_factory, seed, decimals, fraction, most_bytes, num_workers
):
    scores, source = sources(seed, decimals)
    bracket = importance_bracket(list(scores.values()), fraction)
    marks = ProvisionalMarks(source, list(scores), bracket, tmp_path_factory.mktemp("marks"))
    workers = Workers(num_workers)
    threshold = marks.find(workers, ALONE)
    workers.close()
    assert threshold == importance_threshold(list(scores.values()), fraction)
    for piece in pieces(source, source.names(), most_bytes=most_bytes):
        expected = read_piece(source.read, piece) > threshold.value
        assert torch.equal(marks.show(piece), expected)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (torch.linspace(0.001, 100, 100_000), True),
        (torch.full((1000,), 0.5), False),  # all within the bracket
        (torch.linspace(0.001, 100, 100_000).bfloat16(), False),  # one pass finds the threshold
    ],
)
def test_few_scores_are_put_aside_or_none(scores, expected):
    assert is_worth_while(importance_bracket([scores], 0.2)) is expected
