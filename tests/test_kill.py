"""Merges that are killed: never half a model under its name, and the same bytes after --resume."""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import faults
import pytest
import scenarios
from typer.testing import CliRunner

from kifmerge.cli import app

OLD = {"model.safetensors": b"old", "config.json": b"{}", "inner/more.txt": b"old"}
REPLACED, NEW = "replaced", "new"

# A disk on which writing takes time.
SLOW_DISK = """
import os, time

write = os.pwrite
os.pwrite = lambda *arguments: (time.sleep(0.15), write(*arguments))[1]

from kifmerge.cli import main

main()
"""


class Killed:
    """A merge that is killed again and again, and what it is to become.

    Attributes:
        places: how far the work had come when it was killed -> how often.
    """

    def __init__(self, scenario, *, overwrite=False):
        self.scenario = scenario
        self.overwrite = overwrite
        self.places = collections.Counter()
        scenario.run()
        scenarios.check_whole(scenario.out)
        self.whole = faults.content(scenario.out)
        self.begin()

    @property
    def num(self):
        return self.places.total()

    def begin(self):
        """As before the first merge."""
        for path in (self.scenario.out, self.scenario.hidden):
            shutil.rmtree(path, ignore_errors=True)
        if self.overwrite:
            for name, content in OLD.items():
                (self.scenario.out / name).parent.mkdir(parents=True, exist_ok=True)
                (self.scenario.out / name).write_bytes(content)

    def run(self, **options):
        return self.scenario.run(overwrite=self.overwrite, **options)

    def changes(self):
        """What an uninterrupted merge changes on the disk, in order."""
        seen = []

        def merge(say):
            self.run()
            say(seen)

        ended = faults.fork(merge, lambda what, arguments: seen.append(what)).end()
        assert ended.code == 0
        self.begin()
        return ended.said()

    def seconds(self):
        """What an uninterrupted merge takes."""
        ended = faults.fork(lambda say: self.run()).end()
        assert ended.code == 0
        self.begin()
        return ended.seconds

    def at_change(self, number, *, cut_power=False, resume=False):
        """Kill a merge just before a change of the disk, a write when half of it is done.

        With ``cut_power`` all is lost that has not been flushed.
        """
        unflushed = faults.Unflushed()
        left = [number]

        def merge(say):
            def count(what, arguments):
                left[0] -= 1
                if left[0] == 0:
                    if what == "write":
                        faults.write_half(*arguments)
                    say(unflushed.left())
                    faults.die()
                unflushed.see(what, arguments)

            faults.watch(count)
            self.run(resume=resume)
            say(unflushed.left())

        ended = faults.fork(merge).end()
        if ended.code == 0:
            assert not faults.lose(self.scenario.folder, ended.said())
            return False
        assert ended.code == -signal.SIGKILL, ended.text
        if cut_power:
            faults.lose(self.scenario.folder, ended.said())
        self.places[self.place()] += 1
        return True

    def after(self, seconds, *, resume=False, number=signal.SIGKILL):
        """Kill a merge after some time; returns whether it still ran."""
        child = faults.fork(lambda say: self.run(resume=resume))
        time.sleep(seconds)
        child.kill(number)
        ended = child.end()
        if ended.code == 0:
            return False
        assert ended.code == -number, ended.text
        self.places[self.place()] += 1
        return True

    def place(self):
        """How far the work has come, as the disk tells."""
        out, hidden = self.scenario.out, self.scenario.hidden
        if (hidden / REPLACED).exists() and not out.exists():
            return "between the renames"
        if out.exists() and self.is_new():
            return "after the rename"
        if not (hidden / NEW).exists():
            return "before the first file"
        if (hidden / NEW / "kifmerge.json").exists():
            return "flushing the folder"
        num_noted, num_files = len(self.scenario.journal()), len(scenarios.weight_files(self.whole))
        return "after the last file" if num_noted == num_files else f"after {num_noted} files"

    def is_new(self):
        return faults.content(self.scenario.out) == self.whole

    def check_nothing_half(self):
        """What has its final name is whole; the rest is hidden."""
        scenario = self.scenario
        assert set(scenario.left()) <= {"out", ".out.unfinished"}
        if not self.overwrite:
            assert not scenario.out.exists() or self.is_new()
        elif scenario.out.exists():
            assert self.is_new() or faults.content(scenario.out) == OLD
        else:
            assert faults.content(scenario.hidden / REPLACED) == OLD
            assert faults.content(scenario.hidden / NEW) == self.whole

    def check_resumed(self):
        """The same bytes as without a kill, and nothing else."""
        noted = {record["name"] for record in self.scenario.journal()}
        before = {path.name: path.stat().st_ino for path in self.scenario.hidden.glob("new/*")}
        assert noted <= before.keys() or not (self.scenario.hidden / NEW).exists()
        self.run(resume=True)
        assert self.is_new()
        assert self.scenario.left() == ["out"]
        for name in noted & before.keys():
            assert (self.scenario.out / name).stat().st_ino == before[name], "made twice"


@pytest.fixture
def quick_flush(monkeypatch):
    """Bringing files to the disk takes time; whether it was asked for is noticed all the same."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def killed(tmp_path, rule, **options):
    return Killed(scenarios.SCENARIOS[rule](tmp_path), **options)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_flush")
@pytest.mark.parametrize(("rule", "overwrite"), [("recurrent-kif", True), ("ties", False)])
def test_kills_on_the_way(tmp_path, rule, overwrite):
    merge = killed(tmp_path, rule, overwrite=overwrite)
    changes = merge.changes()
    last_rename = len(changes) - changes[::-1].index("rename")
    for number in (3, *range(20, len(changes), 20), last_rename, last_rename + 1):
        assert merge.at_change(number, cut_power=overwrite)
        merge.check_nothing_half()
        merge.check_resumed()
        merge.begin()
    assert merge.num >= 5
    assert not merge.at_change(len(changes) + 1), "everything is on the disk at the end"


@pytest.mark.slow
class TestEveryMoment:
    """In all more than 300 kills at chosen changes of the disk, and 128 at random times."""

    @pytest.mark.parametrize(
        ("rule", "overwrite", "cut_power"),
        [
            ("recurrent-kif", False, False),
            ("recurrent-kif", True, True),
            ("ties", True, False),
            ("linear", False, True),
        ],
    )
    @pytest.mark.usefixtures("quick_flush")
    def test_before_each_change(self, tmp_path, rule, overwrite, cut_power):
        merge = killed(tmp_path, rule, overwrite=overwrite)
        number = 1
        while merge.at_change(number, cut_power=cut_power):
            merge.check_nothing_half()
            merge.check_resumed()
            merge.begin()
            number += 1
        assert merge.num > 70
        expected = {"before the first file", "after 1 files", "after the last file",
                    "flushing the folder", "after the rename"}  # fmt: skip
        assert expected <= merge.places.keys()
        # A power failure there undoes the first one.
        assert merge.places["between the renames"] == (overwrite and not cut_power)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
    @pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
    @pytest.mark.parametrize("rule", scenarios.SCENARIOS)
    def test_at_random_times(self, tmp_path, rule, overwrite, number):
        merge = killed(tmp_path, rule, overwrite=overwrite)
        chance = random.Random(f"{rule} {overwrite} {number}")
        seconds = merge.seconds()
        for _ in range(40):
            if merge.after(chance.uniform(0, seconds), number=number):
                merge.check_nothing_half()
                merge.check_resumed()
            merge.begin()
            if merge.num == 8:
                break
        assert merge.num == 8

    @pytest.mark.usefixtures("quick_flush")
    def test_again_and_again(self, tmp_path):
        """Each resumed merge is killed too, a little later, until there is nothing left to do."""
        merge = killed(tmp_path, "linear")
        number, restarts = 20, 0
        while merge.at_change(number, resume=True, cut_power=True):
            merge.check_nothing_half()
            number += 2
            restarts += 1
        assert restarts >= 5
        assert merge.is_new()
        assert merge.scenario.left() == ["out"]


def invoke(scenario, *more):
    arguments = ("merge", *scenario.arguments, "--out", scenario.out, "--workers", 2, *more)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def linear(tmp_path):
    return scenarios.linear_in_new_files(tmp_path)


class TestCtrlC:
    @pytest.mark.parametrize("num_writes", [1, 13])
    def test_tells_what_is_kept(self, linear, monkeypatch, num_writes):
        """The signal comes while a worker writes."""
        write, writes = os.pwrite, []

        def interrupted(*arguments):
            writes.append(arguments)
            if len(writes) == num_writes:
                if num_writes > 1:
                    faults.wait_for(linear.journal)
                os.kill(os.getpid(), signal.SIGINT)
            return write(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", interrupted)
            result = invoke(linear)
        assert (result.exit_code, result.stdout) == (130, "")
        check_told(linear, result.stderr)
        assert bool(linear.journal()) == (num_writes > 1)
        check_resumed(linear)

    @pytest.mark.slow
    @pytest.mark.parametrize("any_finished", [False, True])
    def test_of_the_command(self, linear, any_finished):
        process = started(linear)
        begun = linear.hidden / "journal.jsonl" if any_finished else linear.hidden / NEW
        faults.wait_for(begun.exists)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (130, "")
        check_told(linear, stderr)
        assert bool(linear.journal()) == any_finished
        check_resumed(linear)

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_other_signals_end_it_at_once_and_it_goes_on(self, linear, number):
        process = started(linear)
        faults.wait_for((linear.hidden / "journal.jsonl").exists)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == -number
        assert not linear.out.exists()
        check_resumed(linear)


def started(scenario):
    arguments = ("merge", *scenario.arguments, "--out", str(scenario.out))
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_DISK, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def check_told(scenario, stderr):
    """The one line on stderr agrees with what is on the disk."""
    num = len(scenario.journal())
    kept = f"{num} finished files are kept: --resume goes on from them"
    none = "no file was finished, and nothing is kept"
    assert stderr == f"kifmerge: interrupted; {scenario.out}: {kept if num else none}\n"
    assert scenario.left() == ([".out.unfinished"] if num else [])
    files = {path.name for path in scenario.hidden.glob("new/*")}
    assert files == {record["name"] for record in scenario.journal()}


def check_resumed(scenario):
    noted = {record["name"] for record in scenario.journal()}
    before = {path.name: path.stat().st_ino for path in scenario.hidden.glob("new/*")}
    result = invoke(scenario, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert scenario.left() == ["out"]
    assert all((scenario.out / name).stat().st_ino == before[name] for name in noted)
    resumed = faults.content(scenario.out)
    shutil.rmtree(scenario.out)
    assert json.loads(invoke(scenario, "--json").stdout) == json.loads(result.stdout)
    assert resumed == faults.content(scenario.out)


class TestTwoAtOnce:
    def test_the_second_gives_way_and_the_first_ends_well(self, linear):
        def merge(say):
            stop_at(linear, 30)
            linear.run()

        with faults.fork(merge) as first:
            first.wait_for_stop()
            before = faults.content(linear.hidden)
            for more in ((), ("--resume",), ("--overwrite",)):
                second = invoke(linear, *more)
                assert (second.exit_code, second.stdout) == (3, "")
                assert second.stderr == (
                    f"kifmerge: {linear.out} is being made by another process at this moment\n"
                )
            assert faults.content(linear.hidden) == before
            first.kill(signal.SIGCONT)
            assert first.end().code == 0
        scenarios.check_whole(linear.out)
        assert linear.left() == ["out"]

    def test_the_lock_of_a_killed_one_does_not_block(self, linear):
        def merge(say):
            stop_at(linear, 30)
            linear.run()

        with faults.fork(merge) as first:
            first.wait_for_stop()
        assert invoke(linear).exit_code == 0
        scenarios.check_whole(linear.out)

    @pytest.mark.slow
    def test_many_at_the_same_time(self, linear):
        """One makes it; the others give way, or find it made."""
        linear.run()
        whole = faults.content(linear.out)
        for _ in range(10):
            shutil.rmtree(linear.out)
            children = [faults.fork(lambda say: say(invoke(linear).exit_code)) for _ in range(5)]
            codes = sorted(child.end().said() for child in children)
            assert codes[0] == 0
            assert set(codes) <= {0, 3}
            assert faults.content(linear.out) == whole
            assert linear.left() == ["out"]


def stop_at(scenario, number):
    seen = []

    def stop(what, arguments):
        seen.append(what)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGSTOP)

    faults.watch(stop)
