"""Merges on disks that are full, fail or answer in bits; inputs that change; resuming with care."""

from __future__ import annotations

import errno
import importlib.metadata
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import faults
import pytest
import scenarios
from typer.testing import CliRunner

from kifmerge.cli import app

KEPT = "finished files are kept: --resume goes on from them"
# Weights come first in an output, then the rest.
LAST_FILE = "kifmerge.json"


class Merging:
    """A merge by its command, what it should make, and what it is asked."""

    def __init__(self, folder, rule):
        self.scenario = scenarios.SCENARIOS[rule](folder)
        assert self.invoke().exit_code == 0
        scenarios.check_whole(self.scenario.out)
        self.whole = faults.content(self.scenario.out)
        self.clear()

    def clear(self):
        """As before the first merge."""
        for path in (self.scenario.out, self.scenario.hidden):
            shutil.rmtree(path, ignore_errors=True)

    def invoke(self, *more):
        arguments = ("merge", *self.scenario.arguments, "--workers", 2)
        arguments = (*arguments, "--out", self.scenario.out, *more)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def noted(self):
        return [record["name"] for record in self.scenario.journal()]

    def fails(self, exit_code, *told, kept=None, more=()):
        """It ends with a message, and with nothing under the final name."""
        result = self.invoke(*more)
        assert (result.exit_code, result.stdout) == (exit_code, ""), result.exception
        for text in told:
            assert str(text) in result.stderr
        assert result.stderr.startswith("kifmerge: ")
        left = self.scenario.left()
        assert left in ([], [".out.unfinished"])
        found = {path.name for path in self.scenario.hidden.glob("new/*")}
        assert found == set(self.noted())
        assert (f"{len(found)} {KEPT}" in result.stderr) == bool(left)
        if kept is not None:
            assert bool(left) == kept
        return result.stderr

    def refuses_to_resume(self, *told, more=()):
        """It ends with a message, and leaves everything as it was."""
        before = faults.content(self.scenario.hidden)
        result = self.invoke("--resume", *more)
        assert (result.exit_code, result.stdout) == (3, "")
        for text in (*told, "without --resume to begin anew"):
            assert str(text) in result.stderr
        assert faults.content(self.scenario.hidden) == before
        assert self.scenario.left() == [".out.unfinished"]

    def resumes(self):
        """To the same bytes, taking over what is finished."""
        noted, new_dir = self.noted(), self.scenario.hidden / "new"
        before = {path.name: path.stat().st_ino for path in new_dir.glob("*.safetensors")}
        result = self.invoke("--resume")
        assert result.exit_code == 0, result.stderr
        assert faults.content(self.scenario.out) == self.whole
        assert self.scenario.left() == ["out"]
        after = {path.name: path.stat().st_ino for path in self.scenario.out.glob("*.safetensors")}
        assert {name: after[name] for name in noted} == {name: before[name] for name in noted}


@pytest.fixture(autouse=True)
def quick_flush(monkeypatch):
    """Bringing files to the disk takes time, and changes nothing that can be seen here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs of each rule, which tests may share that leave them as they are."""
    return {}


@pytest.fixture(params=["linear", "recurrent-kif"])
def merging(request, made, tmp_path_factory):
    rule = request.param
    if rule not in made:
        made[rule] = Merging(tmp_path_factory.mktemp(rule), rule)
    yield made[rule]
    made[rule].clear()


every_rule = pytest.mark.parametrize("merging", scenarios.SCENARIOS, indirect=True)
linear = pytest.mark.parametrize("merging", ["linear"], indirect=True)
recurrent = pytest.mark.parametrize("merging", ["recurrent-kif"], indirect=True)


def stopped(merging, monkeypatch, num_files=2):
    """An interrupted merge, of which some files are finished."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_write(merging, num_files, KeyboardInterrupt))
        result = merging.invoke()
    assert result.exit_code == 130
    assert len(merging.noted()) >= num_files
    return merging.noted()


def failing_write(merging, num_files, error):
    """Writing fails as soon as so many files are finished, or at the last chance."""
    write, calls = os.pwrite, itertools.count(1)
    num_writes = len(scenarios.SHAPES) + 1

    def fail(*arguments):
        if next(calls) == num_writes:
            faults.wait_for(lambda: len(merging.noted()) >= num_files)
            raise error
        return write(*arguments)

    return fail


class TestFullDisk:
    @pytest.mark.parametrize("room_bytes", [0, 19_000])
    def test_while_weights_are_written(self, merging, monkeypatch, room_bytes):
        """The last write that fits is a part of what was to be written, as on a real disk."""
        write, left = os.pwrite, [room_bytes]

        def write_while_there_is_room(descriptor, values, offset):
            part = values[: left[0]]
            if len(values) and not len(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= len(part)
            return write(descriptor, part, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", write_while_there_is_room)
            merging.fails(4, f"disk full while writing {merging.scenario.out}")
        merging.resumes()

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    @linear
    def test_where_the_disk_notices_late(self, merging, monkeypatch, number):
        """Some file systems find room only when they are flushed."""
        flush, calls = os.fsync, itertools.count(1)

        def fail(descriptor):
            # The description of the work, its folder, and four for each file: the second one.
            if next(calls) == 2 + 4 + 1:
                raise OSError(number, os.strerror(number))
            flush(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            merging.fails(4, "disk full", kept=True)
        merging.resumes()

    @pytest.mark.parametrize("name", ["config.json", "README.md", LAST_FILE, "journal.jsonl"])
    @recurrent
    def test_beside_the_weights(self, merging, name):
        exit_code, stderr, _ = full_disk(
            merging, lambda what, arguments: what == "open" and Path(arguments[0]).name == name
        )
        assert (exit_code, "disk full while writing" in stderr) == (4, True), stderr
        assert (KEPT in stderr) == (name != "journal.jsonl")
        assert {p.name for p in merging.scenario.hidden.glob("new/*")} == set(merging.noted())
        merging.resumes()

    @pytest.mark.slow
    @pytest.mark.parametrize("overwrite", [False, True])
    @linear
    def test_at_each_change_of_the_disk(self, merging, overwrite):
        out = merging.scenario.out
        more = ("--overwrite",) if overwrite else ()
        num_failed = 0
        for number in itertools.count(1):
            if overwrite:
                out.mkdir()
                (out / "old").write_bytes(b"old")
            left = [number]

            def is_next(what, arguments, left=left):
                left[0] -= what != "remove"
                return what != "remove" and left[0] == 0

            exit_code, stderr, was_full = full_disk(merging, is_next, more)
            if not was_full:
                break
            # A folder that could not be made, but is there, is no problem.
            assert exit_code == 4 or (exit_code == 0 and faults.content(out) == merging.whole)
            assert ("disk full while writing" in stderr) == (exit_code == 4)
            num_failed += exit_code == 4
            if out.exists():
                assert faults.content(out) in (merging.whole, {"old": b"old"})
            assert out.exists() or not overwrite
            assert (KEPT in stderr) == (merging.scenario.hidden / "journal.jsonl").exists()
            assert merging.invoke("--resume", *more).exit_code == 0
            assert faults.content(out) == merging.whole
            assert merging.scenario.left() == ["out"]
            shutil.rmtree(out)
        assert num_failed > 50


def full_disk(merging, is_full, more=()):
    """A merge that finds the disk full at some change of it: exit code, stderr, whether it did."""

    def merge(say):
        found = []

        def fail(what, arguments):
            if is_full(what, arguments):
                found.append(what)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        faults.watch(fail)
        result = merging.invoke(*more)
        say([result.exit_code, result.stderr, bool(found)])

    return faults.fork(merge).end().said()


class TestFreeSpace:
    @linear
    def test_is_compared_with_the_plan(self, merging, monkeypatch):
        needed = sum(len(c) for n, c in merging.whole.items() if n.endswith(".safetensors"))
        set_free(monkeypatch, needed)
        error = merging.fails(4, "are needed", "are free there", kept=False)
        assert "make room" in error
        assert str(merging.scenario.out.name) in error

    @linear
    def test_finished_files_need_no_more_room(self, merging, monkeypatch):
        plan = json.loads(merging.invoke("--dry-run", "--json").stdout)
        noted = stopped(merging, monkeypatch)
        records = merging.scenario.journal()
        rest = plan["write_bytes"] - sum(tensor_bytes(merging, r["name"]) for r in records)
        assert rest < plan["write_bytes"]
        with monkeypatch.context() as patch:
            set_free(patch, rest + (1 << 24) - 1)
            merging.fails(4, "are needed", f"{len(noted)} {KEPT}", more=("--resume",))
            set_free(patch, rest + (1 << 24))
            merging.resumes()


def set_free(patch, num_bytes):
    usage = shutil.disk_usage(".")
    patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=num_bytes))


def tensor_bytes(merging, name):
    """Of a finished file, without its header."""
    content = (merging.scenario.hidden / "new" / name).read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


class TestInputs:
    """A fault of an input names its file, and nothing has the final name."""

    @every_rule
    def test_read_error(self, merging, monkeypatch):
        self.check_read_error(merging, monkeypatch, merging.scenario.inputs.models, num_reads=8)

    @recurrent
    def test_read_error_of_scores(self, merging, monkeypatch):
        scores = merging.scenario.inputs.importance
        self.check_read_error(merging, monkeypatch, scores, num_reads=3)

    def check_read_error(self, merging, monkeypatch, folders, num_reads):
        read, calls, failed = os.preadv, itertools.count(1), []

        def fail(descriptor, buffers, offset):
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if path.parent in folders.values() and next(calls) == num_reads:
                failed.append(path)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(descriptor, buffers, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            error = merging.fails(3)
        assert f"{failed[0]}: cannot be read (Input/output error)" in error
        merging.resumes()

    @linear
    def test_read_error_keeps_what_is_finished(self, merging, monkeypatch):
        read, calls = os.preadv, itertools.count(1)
        file = merging.scenario.inputs.models["model_2"] / "model.safetensors"

        def fail(*arguments):
            # Each tensor is read once of each model: the last one.
            if next(calls) == 2 * (len(scenarios.SHAPES) + 1):
                faults.wait_for(merging.noted)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            merging.fails(3, f"{file.name}: cannot be read (Input/output error)", kept=True)
        merging.resumes()

    @pytest.mark.parametrize(
        ("folder", "spoil", "told"),
        [
            ("model_2", lambda file: os.truncate(file, file.stat().st_size - 8), "changed while"),
            ("model_2", lambda file: os.utime(file, ns=(0, 0)), "changed while"),
            ("model_2", lambda file: file.write_bytes(file.read_bytes() + b" "), "changed while"),
            ("model_2", lambda file: file.unlink(), "cannot be read (No such file or directory)"),
            ("base", lambda file: os.utime(file, ns=(0, 0)), "changed while"),
            ("new_importance", lambda file: os.utime(file, ns=(0, 0)), "changed while"),
        ],
        ids=["truncated", "touched", "longer", "removed", "base", "importance"],
    )
    def test_file_that_changes_midway(self, tmp_path, monkeypatch, folder, spoil, told):
        rule = "recurrent-kif" if folder == "new_importance" else "ties"
        merging = Merging(tmp_path, rule)
        file = sorted(merging.scenario.inputs.parents[folder].glob("*.safetensors"))[-1]
        write, calls = os.pwrite, itertools.count(1)

        def spoil_midway(*arguments):
            if next(calls) == 2:
                spoil(file)
            return write(*arguments)

        monkeypatch.setattr(os, "pwrite", spoil_midway)
        # Two workers have read a few small tensors ahead.
        monkeypatch.setattr("kifmerge.phases.merge_plan.LEAST_PIECE_BYTES", 512)
        monkeypatch.setattr("kifmerge.phases.merge_plan.MOST_BUFFER_BYTES", 1)
        error = merging.fails(3, f"{file}: ", told)
        assert len(error.splitlines()) == 1

    @linear
    def test_truncated_behind_our_back(self, merging, monkeypatch):
        """The file has the size and the time that it had, and yet it ends."""
        read = os.preadv
        monkeypatch.setattr(os, "preadv", lambda *arguments: read(*arguments) and 0)
        merging.fails(3, "model.safetensors: truncated while it was being read", kept=False)


class TestBitByBit:
    """The system may do less than it was asked for."""

    def test_short_writes(self, merging, monkeypatch):
        write = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, values, at: write(fd, values[:7], at))
        assert merging.invoke().exit_code == 0
        assert faults.content(merging.scenario.out) == merging.whole

    def test_short_reads(self, merging, monkeypatch):
        read = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][:7]], at))
        assert merging.invoke().exit_code == 0
        assert faults.content(merging.scenario.out) == merging.whole

    def test_signals_that_interrupt_system_calls(self, merging):
        caught = []
        before = signal.signal(signal.SIGALRM, lambda number, frame: caught.append(number))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            result = merging.invoke()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert result.exit_code == 0, result.stderr
        assert len(caught) > 10
        assert faults.content(merging.scenario.out) == merging.whole


class TestResuming:
    @every_rule
    def test_goes_on_to_the_same_bytes(self, merging, monkeypatch):
        stopped(merging, monkeypatch)
        merging.resumes()

    @pytest.mark.parametrize("merging", ["recurrent-kif", "kif"], indirect=True)
    def test_changed_input(self, merging, monkeypatch):
        stopped(merging, monkeypatch)
        role, folder = list(merging.scenario.inputs.parents.items())[-1]
        file = next(path for path in sorted(folder.iterdir()) if path.suffix != ".jinja")
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        merging.refuses_to_resume(f"inputs, {role}, files", file.name)
        assert merging.invoke().exit_code == 0
        assert faults.content(merging.scenario.out) == merging.whole

    @linear
    def test_changed_option(self, merging, monkeypatch):
        stopped(merging, monkeypatch)
        model = merging.scenario.inputs.models["model_1"]
        for more, told in [
            (("--weight", 1, "--weight", 2), "options, weights: null then, [1.0, 2.0] now"),
            (("--shard-size", "6KB"), "options, shard_bytes: 5000 then, 6000 now"),
            (("--dtype", "float16"), 'options, dtype: "bfloat16" then, "float16" now'),
            (("--nonfinite", "keep"), 'options, nonfinite: "refuse" then, "keep" now'),
            (("--rule", "average", "--base", model), 'options, rule: "linear" then, "average"'),
        ]:
            merging.refuses_to_resume(told, more=more)
        merging.resumes()

    @linear
    def test_what_changes_nothing_may_change(self, merging, monkeypatch):
        stopped(merging, monkeypatch)
        assert merging.invoke("--resume", "--workers", "1", "--quiet").exit_code == 0
        assert faults.content(merging.scenario.out) == merging.whole

    @linear
    def test_other_version(self, merging, monkeypatch):
        stopped(merging, monkeypatch)
        version = importlib.metadata.version
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", lambda name: "9.9")
            merging.refuses_to_resume(f'kifmerge: "{version("kifmerge")}" then, "9.9" now')
        merging.resumes()

    @linear
    def test_flipped_bit_in_a_finished_file(self, merging, monkeypatch):
        noted = stopped(merging, monkeypatch)
        file = merging.scenario.hidden / "new" / noted[0]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        state = file.stat()
        file.write_bytes(content)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert merging.invoke("--resume").exit_code == 0
        assert faults.content(merging.scenario.out) == merging.whole

    @linear
    def test_without_it_the_leftovers_go(self, merging, monkeypatch):
        noted = stopped(merging, monkeypatch)
        inodes = {path.stat().st_ino for path in merging.scenario.hidden.glob("new/*")}
        (merging.scenario.hidden / "new" / "stranger").touch()
        assert merging.invoke().exit_code == 0
        assert faults.content(merging.scenario.out) == merging.whole
        assert len(inodes) == len(noted)
        assert merging.scenario.left() == ["out"]

    @linear
    def test_nothing_to_resume(self, merging):
        assert merging.invoke("--resume").exit_code == 0
        assert faults.content(merging.scenario.out) == merging.whole

    @linear
    def test_finished_already(self, merging):
        merging.invoke()
        before = {path: path.stat().st_mtime_ns for path in merging.scenario.out.iterdir()}
        merging.scenario.hidden.mkdir()
        (merging.scenario.hidden / "work.json").write_text("{}")
        result = merging.invoke("--resume")
        assert result.exit_code == 0
        assert result.stderr == f"{merging.scenario.out} is already made: nothing to do\n"
        assert {path: path.stat().st_mtime_ns for path in merging.scenario.out.iterdir()} == before
        assert merging.scenario.left() == ["out"], "what a kill at the very end had left"

    @linear
    def test_another_interrupted_merge_is_left_alone(self, merging, monkeypatch):
        """The merge that is there is asked for, while one that is to replace it is unfinished."""
        merging.invoke()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing_write(merging, 1, KeyboardInterrupt))
            assert merging.invoke("--overwrite", "--weight", 1, "--weight", 3).exit_code == 130
        noted = merging.noted()
        assert "already made" in merging.invoke("--resume").stderr
        assert noted == merging.noted() != []

    @linear
    def test_rebuilds_too(self, merging, monkeypatch):
        merging.invoke()
        record = merging.scenario.folder / "wanted.json"
        (merging.scenario.out / LAST_FILE).rename(record)
        shutil.rmtree(merging.scenario.out)
        arguments = ["merge", str(record), "--out", str(merging.scenario.out), "--workers", "2"]
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing_write(merging, 1, KeyboardInterrupt))
            assert CliRunner().invoke(app, arguments).exit_code == 130
        assert merging.noted()
        assert CliRunner().invoke(app, [*arguments, "--resume"]).exit_code == 0
        assert faults.content(merging.scenario.out) == merging.whole
