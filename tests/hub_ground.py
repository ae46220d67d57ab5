"""Where schedules of faults are run.

Whatever goes wrong, the command ends with the right result, or with an error that says so and
nothing, or what was there before, under the result's name; and when all is well again the same
command ends with the right result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import faults
import hub_merges
import pytest
from hub_merges import Published, Result
from hub_schedules import SCENARIOS, TIMEOUT_SECONDS, Schedule, passes
from huggingface_hub import constants
from loopback import LoopbackHub, Row

# Failures, even all in a row, that a command endures, and some left for a slow machine.
NUM_ENDURED = 3
OUT = "org/out"
OLD = {
    "model-00001-of-00002.safetensors": b"old 1",
    "model-00002-of-00002.safetensors": b"old 2",
    "model.safetensors.index.json": b"{}",
    "config.json": b'{"old": 1}',
    "notes.txt": b"old",
}


@dataclass(frozen=True)
class Outcome:
    """How it went.

    Attributes:
        code: exit code of the first run; minus a signal that ended it.
        told: what it told.
        num_met: requests in which something went wrong.
    """

    code: int
    told: str
    num_met: int = 0


class Ground:
    """Where schedules are run, one after the other.

    Args:
        folder: for all files.
        hub: the server.
    """

    def __init__(self, folder: Path, hub: LoopbackHub) -> None:
        self._folder = folder
        self._hub = hub
        self._merge = hub_merges.two_sided(folder, hub)
        self._several = hub_merges.several(folder / "several", hub, "task-arithmetic")
        self._made, several = folder / "made", folder / "several/made"
        assert self._merge.run(self._made, place=f"{folder}/").code == 0
        assert self._several.run(several, place=f"{folder}/several/").code == 0
        # Scenario -> a folder with the weights that it comes to, made without the Hub.
        self._right = dict.fromkeys(SCENARIOS, self._made)
        self._right |= {"pull": folder / "base", "merge, downloaded": several}
        self._clean: dict[tuple[str, bool], dict[str, bytes]] = {}
        # Work branches with finished files, at the interruption.
        self._kept: set[str] = set()

    def run(self, schedule: Schedule) -> Outcome:
        """Run a schedule, and the same command again when all is well.

        Raises:
            AssertionError: anything came otherwise than it may.
        """
        expected = self._expected(schedule)
        self._prepare(schedule)
        before = self._found(schedule)
        self._hub.part_bytes = schedule.part_bytes
        for fault in schedule.faults:
            self._hub.fail(fault)
        with short_timeouts(), self._interrupted(schedule) as call:
            outcome = call()
        outcome = replace(outcome, num_met=sum(row.fault is not None for row in self._hub.log))
        self._hub.mend()
        self._check(schedule, outcome, before, expected)
        if outcome.code < 0:
            age(Path(tempfile.gettempdir()))
        else:
            assert hub_merges.temporary_names() == []
        again = self._command(schedule, is_again=True)
        if "came otherwise than to the interrupted merge" in again.err:
            # What was made of damaged bytes is gone now.
            again = self._command(schedule, is_again=True)
        assert again.code == 0, again.err
        assert self._found(schedule) == expected
        self._check_nothing_left(schedule)
        self._tidy()
        return outcome

    def _expected(self, schedule: Schedule) -> dict[str, bytes]:
        """What comes when nothing goes wrong."""
        key = (schedule.scenario, schedule.is_replaced)
        if key not in self._clean:
            self._prepare(schedule)
            result = self._command(schedule)
            assert result.code == 0, result.err
            found = self._found(schedule)
            weights = _weights(faults.content(self._right[schedule.scenario]))
            assert weights.items() <= _weights(found).items()
            self._clean[key] = found
            self._check_nothing_left(schedule)
            self._tidy()
        return self._clean[key]

    @property
    def _out(self) -> Path:
        return self._folder / "out"

    def _is_remote(self, schedule: Schedule) -> bool:
        return schedule.scenario in ("push", "hub to hub")

    def _prepare(self, schedule: Schedule) -> None:
        if not schedule.is_replaced:
            return
        if self._is_remote(schedule):
            self._hub.add_repo(OUT, OLD)
        else:
            for name, content in OLD.items():
                self._out.mkdir(exist_ok=True)
                (self._out / name).write_bytes(content)

    def _arguments(self, schedule: Schedule, *, is_again: bool) -> list[object]:
        more: list[object] = ["--workers", "2"]
        if not self._is_remote(schedule):
            more += ["--overwrite"] * schedule.is_replaced + ["--resume"] * is_again
        if is_again and schedule.fetch_again and "push" != schedule.scenario != "pull":
            more += ["--fetch", schedule.fetch_again]
        match schedule.scenario:
            case "pull":
                return ["pull", "org/base", "--out", self._out, *more[2:]]
            case "push":
                return ["push", self._made, OUT]
            case "hub to hub":
                return [*self._merge.arguments(), "--out", f"hf://{OUT}", *more]
            case "merge, streamed":
                merge: Published = self._merge
            case _:
                merge = self._several
        fetch = schedule.scenario.removeprefix("merge, ").removesuffix("ed")
        return [*merge.arguments(), "--out", self._out, "--fetch", fetch, *more]

    def _command(self, schedule: Schedule, *, is_again: bool = False) -> Result:
        result = hub_merges.kifmerge(*self._arguments(schedule, is_again=is_again))
        assert "signature" not in result.out + result.err
        return result

    @contextlib.contextmanager
    def _interrupted(self, schedule: Schedule) -> Iterator[Callable[[], Outcome]]:
        """What calls the command, and interrupts it when its time has come."""
        children: list[faults.Child] = []
        kind, number = schedule.interruption or ("", 0)
        count = [0]
        watched = hub_merges.Watched(self._hub, OUT)

        def see(row: Row) -> None:
            watched.see()
            count[0] += 1
            if count[0] != number:
                return
            self._kept = self._work_branches()
            if children:
                children[0].kill()
            else:
                os.kill(os.getpid(), signal.SIGINT)

        def here() -> Outcome:
            result = self._command(schedule)
            return Outcome(result.code, result.err)

        def elsewhere() -> Outcome:
            def work(say: Callable[[object], None]) -> None:
                result = self._command(schedule)
                say([result.code, result.err])

            children.append(faults.fork(work))
            ended = children[0].end()
            if ended.code == 0:
                return Outcome(*ended.said())
            assert ended.code == -signal.SIGKILL, ended.text
            return Outcome(ended.code, "")

        self._kept = set()
        with hub_merges.nothing_left_running(), hub_merges.at_each_request(self._hub, see):
            yield elsewhere if kind == "kill" else here
        watched.see()
        # What was there, or an empty repository, and the result: nothing in between.
        assert len(watched.heads) <= 2

    def _work_branches(self) -> set[str]:
        if not self._hub.has_repo(OUT):
            return set()
        branches = self._hub.branches(OUT)
        return {b for b in branches if any("/" in path for path in self._hub.paths(OUT, b))}

    def _found(self, schedule: Schedule) -> dict[str, bytes]:
        """What has the name of the result."""
        if not self._is_remote(schedule):
            return faults.content(self._out)
        return hub_merges.content_of(self._hub, OUT) if self._hub.has_repo(OUT) else {}

    def _check(
        self,
        schedule: Schedule,
        outcome: Outcome,
        before: dict[str, bytes],
        expected: dict[str, bytes],
    ) -> None:
        found = self._found(schedule)
        only_passing = all(map(passes, schedule.faults))
        if only_passing and schedule.interruption is None and outcome.num_met <= NUM_ENDURED:
            assert outcome.code == 0, outcome
        if outcome.code == 0:
            assert found == expected
            return
        allowed = {4} if only_passing else {3, 4}
        if schedule.interruption is not None:
            allowed |= {130} if schedule.interruption[0] == "ctrl-c" else {-signal.SIGKILL}
        assert outcome.code in allowed, outcome
        # A reader of a branch sees the old model or the new one; whose answer was lost is not told.
        if self._is_remote(schedule) or outcome.code < 0:
            assert found in (before, expected)
        else:
            assert found == before
        if only_passing and outcome.code in (130, -signal.SIGKILL) and found != expected:
            assert self._kept <= self._work_branches()
        if outcome.code > 0:
            assert outcome.told.splitlines()[-1].startswith("kifmerge: "), outcome.told

    def _check_nothing_left(self, schedule: Schedule) -> None:
        assert hub_merges.temporary_names() == []
        assert sorted(path.name for path in self._folder.glob(".*")) == []
        if self._is_remote(schedule):
            assert self._hub.branches(OUT) == ["main"]
        for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*"):
            if len(path.name) == 64:
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name

    def _tidy(self) -> None:
        """As before."""
        shutil.rmtree(self._out, ignore_errors=True)
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
        store = self._hub._store
        if self._hub.has_repo(OUT):
            store.delete(store.repo(OUT, "model"))
        self._hub.clear_log()


def _weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if ".safetensors" in name}


@contextlib.contextmanager
def short_timeouts() -> Iterator[None]:
    """What stands still is given up soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", TIMEOUT_SECONDS)
        patch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", TIMEOUT_SECONDS)
        yield


def age(folder: Path) -> None:
    """Have all that lies there lie there for an hour."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)


def told(schedule: Schedule, outcome: Outcome) -> str:
    """A line for people: what went wrong, and how it ended."""
    faults_of = ", ".join(
        f"{fault.name} of {fault.kind or 'any'} after {fault.skip} x {fault.times}"
        for fault in schedule.faults
    )
    last = outcome.told.splitlines()[-1:] or [""]
    ended = [schedule.seed, schedule.scenario, outcome.code, outcome.num_met]
    return json.dumps([*ended, faults_of, last[0]])
