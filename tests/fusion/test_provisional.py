"""Marks that are found in two passes are those of three."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kifmerge.checkpoint.pieces import Range, pieces, read_piece
from kifmerge.checkpoint.source import MemorySource
from kifmerge.checkpoint.workers import Workers
from kifmerge.fusion.provisional import ProvisionalMarks, is_worth_while
from kifmerge.fusion.selection import ScoreStream, mark_important
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
    marks = ProvisionalMarks(source, bracket, tmp_path_factory.mktemp("marks"))
    workers = Workers(num_workers)
    marks.find(workers)
    workers.close()
    threshold = marks.threshold
    assert threshold == importance_threshold(list(scores.values()), fraction)
    for piece in pieces(source, source.names(), most_bytes=most_bytes):
        expected = read_piece(source.read, piece) > threshold.value
        assert torch.equal(marks.show(piece), expected)


class Watched(MemorySource):
    """How many elements have been read."""

    num_read = 0

    def read(self, name, start, stop):
        self.num_read += stop - start
        return super().read(name, start, stop)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_read_twice(tmp_path, dtype):
    scores = Watched({"a": torch.linspace(0.001, 100, 100_001, dtype=dtype)})
    bracket = importance_bracket(ScoreStream(scores), 0.2)
    assert is_worth_while(bracket)
    marks = ProvisionalMarks(scores, bracket, tmp_path)
    marks.find(Workers(0))
    assert scores.num_read == 2 * 100_001
    assert marks.show([Range("a", 0, 100_001)]).sum() == marks.threshold.num_above


def test_many_scores_near_the_threshold_are_not_put_aside():
    scores = Watched({"a": torch.full((1000,), 0.5)})
    bracket = importance_bracket(ScoreStream(scores), 0.2)
    assert not is_worth_while(bracket)
    with pytest.warns(UserWarning, match="all equal"):
        mark_important(scores, 0.2, "global", "new", bracket=bracket)
    assert scores.num_read == 2 * 1000
