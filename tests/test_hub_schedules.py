"""Faults at random, in commands that talk to the Hub: the right result, or an error and nothing."""

from __future__ import annotations

import collections
import sys
import tempfile
import time
from pathlib import Path

import hub_ground
import hub_merges
import hub_schedules
import pytest
from loopback import LoopbackHub

# Ctrl-C in a callback of a weak reference goes no further: Python tells of it, and goes on.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function WeakSet:pytest.PytestUnraisableExceptionWarning"
)

CHUNK = 20
NUM_SCHEDULES = 100


@pytest.fixture
def ground(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hub_ground.Ground:
    hub_merges.be_small(monkeypatch)
    # The client's own waits, and ours.
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.005)))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return hub_ground.Ground(tmp_path / "files", hub)


def run(ground: hub_ground.Ground, seeds: range) -> collections.Counter[tuple[str, int]]:
    """Run some schedules; (scenario, exit code) -> how often it came to that."""
    ends: collections.Counter[tuple[str, int]] = collections.Counter()
    for seed in seeds:
        schedule = hub_schedules.schedule(seed)
        started = time.monotonic()
        try:
            outcome = ground.run(schedule)
        except AssertionError as error:
            raise AssertionError(f"{schedule}\n{error}") from error
        took = f"{time.monotonic() - started:.2f} s"
        sys.stdout.write(f"{took} {hub_ground.told(schedule, outcome)}\n")
        ends[schedule.scenario, outcome.code] += 1
    return ends


def test_a_schedule_follows_from_its_seed() -> None:
    assert hub_schedules.schedule(7) == hub_schedules.schedule(7) != hub_schedules.schedule(12)


@pytest.mark.slow
def test_some(ground: hub_ground.Ground) -> None:
    ends = run(ground, range(1000, 1012))
    assert {scenario for scenario, _ in ends} == set(hub_schedules.SCENARIOS)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, NUM_SCHEDULES, CHUNK))
def test_many(ground: hub_ground.Ground, start: int) -> None:
    ends = run(ground, range(start, start + CHUNK))
    codes = collections.Counter(code for _, code in ends)
    assert codes[0] >= 1
    assert codes[3] + codes[4] >= 1
