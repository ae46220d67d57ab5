"""Times of planned work: what overlaps counts once, what waits is added."""

from __future__ import annotations

import folders
import pytest
from merges import Files

from kifmerge.checkpoint.source import MemorySource
from kifmerge.fusion.compiled import is_compiled
from kifmerge.fusion.estimate import (
    COMPILED_MODEL_NS,
    MODEL_NS,
    WRITE_NS,
    Load,
    Rates,
    estimate,
)
from kifmerge.fusion.rules import RULES, FusionOptions
from kifmerge.fusion.weights import Weights
from kifmerge.phases.prune import Prune, PruneInputs, PruneOptions
from kifmerge.tensor import native

IDLE = {
    "disk_bytes": 0, "streamed_bytes": 0, "downloaded_bytes": 0, "sent_bytes": 0,
    "processor_seconds": 0.0, "num_workers": 2,
}  # fmt: skip
RATES = Rates(disk=100, network=10)


def estimated(rates=RATES, **load):
    return estimate(Load(**{**IDLE, **load}), rates)


@pytest.mark.parametrize(
    ("load", "seconds", "bound_by"),
    [
        ({"disk_bytes": 5000}, 50, "disk"),
        ({"disk_bytes": 5000, "processor_seconds": 90.0}, 50, "disk"),
        ({"disk_bytes": 5000, "processor_seconds": 120.0}, 60, "processors"),
        ({"disk_bytes": 5000, "streamed_bytes": 700}, 70, "network"),
        ({"disk_bytes": 5000, "downloaded_bytes": 700}, 120, "network"),
        ({"disk_bytes": 5000, "downloaded_bytes": 100}, 60, "disk"),
        ({"streamed_bytes": 700, "sent_bytes": 300}, 100, "network"),
        ({"processor_seconds": 120.0, "num_workers": 1}, 120, "processors"),
    ],
)
def test_slowest_counts_and_what_waits_is_added(load, seconds, bound_by):
    found = estimated(**load)
    assert (found.seconds, found.bound_by) == (seconds, bound_by)


def test_parts_are_told():
    found = estimated(disk_bytes=5000, streamed_bytes=700, sent_bytes=300, processor_seconds=30.0)
    assert (found.disk_seconds, found.network_seconds, found.processor_seconds) == (50, 100, 15)
    assert found.assumes[0] == "disk: 5 KB read and written at 100 bytes a second, nothing cached"
    assert found.assumes[1] == "network: 700 bytes pulled and 300 bytes sent at 10 bytes a second"
    assert found.assumes[2].startswith("processors: 2 workers, ")


def test_what_has_no_rate_is_not_counted_and_says_so():
    found = estimated(Rates(disk=100), disk_bytes=5000, streamed_bytes=7_000_000, num_workers=1)
    assert (found.seconds, found.network_seconds) == (50, None)
    assert found.assumes[1] == "not counted, since no --network-rate is given: 7 MB pulled"
    found = estimated(Rates(network=10), disk_bytes=5000, streamed_bytes=700)
    assert (found.seconds, found.disk_seconds) == (70, None)
    assert found.assumes[0] == "a disk that keeps up: no --disk-rate is given"


def test_nothing_takes_no_time_and_little_takes_a_second():
    assert estimated().seconds == 0
    assert estimated(disk_bytes=1).seconds == 1


@pytest.mark.parametrize("rates", [{"disk": 0}, {"network": -1}])
def test_rates_at_which_nothing_ends(rates):
    with pytest.raises(ValueError, match="must be at least 1, found"):
        Rates(**rates)


def test_every_rule_has_been_measured():
    assert MODEL_NS.keys() == RULES.keys()
    source = MemorySource({})
    weights = Weights(base=source, models=[source] * 2)
    compiled = {name for name in RULES if is_compiled(weights, FusionOptions(rule=name))}
    assert compiled == (COMPILED_MODEL_NS.keys() if native.is_built() else set())


def test_the_compiled_part_is_told_and_counted(tmp_path, monkeypatch):
    files = Files(tmp_path).write(shapes={"a.weight": (500, 400)}).make_masks()

    def opened():
        return files.open(FusionOptions(), evidence="masks", num_workers=1)

    monkeypatch.setattr(native, "is_built", lambda: False)
    by_torch = opened()
    assert by_torch.plan().computed_by == "torch"
    slow = by_torch.load().processor_seconds
    monkeypatch.setattr(native, "is_built", lambda: True)
    compiled = opened()
    assert compiled.plan().computed_by == "compiled loops"
    assert compiled.load().processor_seconds < slow


def test_of_a_merge(tmp_path):
    """Bytes are those of the plan; scores cost as often as they are read."""
    files = Files(tmp_path).write(shapes={"a.weight": (500, 400)}).make_masks()
    numel = 500 * 400
    rates = Rates(disk=1000)
    with_masks, with_scores = (
        files.open(FusionOptions(), evidence=evidence, num_workers=1)
        for evidence in ("masks", "importance")
    )
    plan = with_masks.plan()
    moved = plan.read_bytes + plan.write_bytes
    assert with_masks.estimate(rates).disk_seconds == round(moved / 1000)
    model_ns = (COMPILED_MODEL_NS if native.is_built() else MODEL_NS)["recurrent-kif"]
    slow = with_masks.load().processor_seconds
    assert slow == pytest.approx((4 * numel * WRITE_NS + 2 * numel * model_ns) / 1e9)
    assert with_scores.load().processor_seconds > slow


def test_of_a_pruning(tmp_path):
    tensors = folders.random_tensors(0, {"a.weight": (500, 400)})
    folders.snapshot(tmp_path / "importance", 0, tensors)
    pruning = Prune(PruneInputs(importance=tmp_path / "importance"), PruneOptions())
    plan, found = pruning.plan(), pruning.estimate(Rates(disk=1000))
    assert found.disk_seconds == round((plan.read_bytes + plan.write_bytes) / 1000)
    assert plan.disk_bytes == plan.write_bytes == 500 * 400 // 8
