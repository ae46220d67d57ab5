"""A sample leads to exact thresholds in one pass, and changes nothing else."""

import math

import pytest
import ranked
import torch
from safetensors.torch import save_file

from kifmerge.checkpoint.ranks import ALONE
from kifmerge.checkpoint.scores import Scores
from kifmerge.checkpoint.source import MemorySource, open_source
from kifmerge.checkpoint.workers import Workers
from kifmerge.fusion import sampling
from kifmerge.fusion.checked import FiniteSource
from kifmerge.fusion.sampling import guess_of_rank
from kifmerge.fusion.selection import mark_important, mark_largest
from kifmerge.fusion.weights import VectorSizes, Weights
from kifmerge.tensor.selection import importance_threshold, kth_smallest, threshold_rank

NUMEL = 1 << 18


def layers(seed=0, numel=NUMEL):
    """Tensors of very different scales, small ones that matter most among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, scale in enumerate([1e-6, 1e-4, 3e-5, 1e-5]):
        tensors[f"{layer}.weight"] = torch.randn(numel, generator=generator).pow(2) * scale
        tensors[f"{layer}.norm"] = torch.rand(512, generator=generator)
    return tensors


class Watched(MemorySource):
    """How many elements have been read, and how many looked at."""

    num_read = num_peeked = 0

    def read(self, name, start, stop):
        self.num_read += stop - start
        return super().read(name, start, stop)

    def peek(self, name, start, stop):
        self.num_peeked += stop - start
        return super().read(name, start, stop)


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch):
    monkeypatch.setattr(sampling, "LEAST_NUMEL", 1000)
    monkeypatch.setattr(sampling, "_LEAST_STRIDE", 1 << 12)


def guess(source, fraction):
    numel = sum(source.info(name).numel for name in source.names())
    rank = threshold_rank(numel, fraction)
    return guess_of_rank(source, source.names(), rank, numel, ALONE)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_a_guess_has_about_the_wanted_rank(fraction):
    tensors = layers()
    scores = torch.cat([*tensors.values()])
    beyond = (scores > guess(MemorySource(tensors), fraction)).float().mean().item()
    assert beyond == pytest.approx(fraction, abs=0.01)


def test_a_sample_is_small():
    source = Watched(layers())
    guess(source, 0.2)
    assert source.num_read == 0
    assert source.num_peeked == pytest.approx(4 * (NUMEL + 512) / 32, rel=0.01)


def test_few_scores_are_not_sampled():
    source = Watched({"w": torch.rand(999)})
    assert guess(source, 0.2) is None
    assert source.num_peeked == 0


def test_scores_of_16_bits_take_one_pass_without_a_sample():
    source = Watched({name: values.bfloat16() for name, values in layers().items()})
    assert guess(source, 0.2) is None
    mark_important(source, 0.2, "global", "new")
    assert source.num_read == 4 * (NUMEL + 512)


def test_scores_that_cannot_be_peeked_at_are_not_sampled():
    class Blind(MemorySource):
        peek = None

    class Streamed(MemorySource):
        def peek(self, name, start, stop):
            return None

    assert guess(MemorySource(layers()), 0.2) is not None
    assert guess(Streamed(layers()), 0.2) is None
    assert guess(Blind(layers()), 0.2) is None
    expected = mark_important(MemorySource(layers()), 0.2, "global", "new").threshold
    assert mark_important(Streamed(layers()), 0.2, "global", "new").threshold == expected


@pytest.mark.parametrize("fraction", [0.2, 0.5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_marks_take_one_pass(fraction, num_workers):
    tensors = layers()
    source, workers = Watched(tensors), Workers(num_workers)
    marks = mark_important(source, fraction, "global", "new", workers=workers)
    workers.close()
    assert marks.thresholds["0.norm"] == importance_threshold([*tensors.values()], fraction)
    assert source.num_read == sum(tensor.numel() for tensor in tensors.values())


def test_the_largest_changes_take_one_pass():
    base, noise = layers(), torch.Generator().manual_seed(1)
    model = {n: v + 0.01 * torch.randn(v.shape, generator=noise) for n, v in base.items()}
    weights = Weights(base=Watched(base), models=[Watched(model)])
    workers = Workers(0)
    marks = mark_largest(VectorSizes(weights, 0), list(base), 0.2, "global", workers)
    sizes = torch.cat([(model[name] - base[name]).abs() for name in base])
    expected = kth_smallest([sizes], sizes.numel() - math.ceil(0.2 * sizes.numel()) + 1)
    assert set(marks.smallest_kept.values()) == {expected}
    assert weights.models[0].num_read == weights.base.num_read == sizes.numel()


def test_a_sample_that_misleads_costs_passes_alone(monkeypatch):
    tensors = layers()
    expected = importance_threshold([*tensors.values()], 0.2)
    monkeypatch.setattr("kifmerge.fusion.selection.guess_of_rank", lambda *arguments: 0.9)
    source = Watched(tensors)
    assert mark_important(source, 0.2, "global", "new").thresholds["0.norm"] == expected
    assert source.num_read == 3 * sum(tensor.numel() for tensor in tensors.values())


def test_nan_is_told_as_without_a_sample():
    tensors = layers()
    tensors["1.weight"][:] = math.nan
    assert guess(MemorySource(tensors), 0.2) is None
    with pytest.raises(ValueError, match="NaN among the scores"):
        mark_important(MemorySource(tensors), 0.2, "global", "new")


def test_a_look_at_a_file_takes_no_digest(tmp_path):
    tensors = {
        f"{kind}/{n}": t for kind in ("sensitivity", "uncertainty") for n, t in layers().items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    folder = open_source(tmp_path)
    scores = FiniteSource(Scores(folder, "product"))
    marks = mark_important(scores, 0.2, "global", "new")
    products = [tensors[f"sensitivity/{n}"] * tensors[f"uncertainty/{n}"] for n in layers()]
    assert marks.thresholds["0.norm"] == importance_threshold(products, 0.2)
    # What was read in the one pass has its digest: a look before it has not spoilt any.
    assert set(folder.digests.finished()) == set(tensors)


@pytest.mark.slow
def test_ranks_find_the_same():
    tensors = layers(numel=1 << 16)
    expected = importance_threshold([*tensors.values()], 0.2)

    def find(ranks, say):
        torch.set_num_threads(1)  # its other threads have not come along with the fork
        source = Watched(tensors)
        marks = mark_important(source, 0.2, "global", "new", ranks=ranks)
        say([marks.threshold, source.num_read])

    told = [end.said() for end in ranked.together(3, find)]
    assert [threshold for threshold, _ in told] == [expected.value] * 3
    # One pass, or two, shared: not one by each.
    assert sum(num_read for _, num_read in told) <= 2 * sum(t.numel() for t in tensors.values())


@pytest.mark.slow
def test_ranks_sample_all_or_none():
    tensors = layers(numel=1 << 16)

    def find(ranks, say):
        torch.set_num_threads(1)  # its other threads have not come along with the fork
        source = MemorySource(tensors)
        if ranks.rank == 1:
            source.peek = lambda name, start, stop: None
        say(mark_important(source, 0.2, "global", "new", ranks=ranks).threshold)

    expected = importance_threshold([*tensors.values()], 0.2).value
    assert [end.said() for end in ranked.together(2, find)] == [expected] * 2
