"""Folders made file by file: gone on with after a kill, from what is whole, or begun anew."""

import errno
import hashlib
import json
import os
import shutil
import signal

import faults
import filelock
import pytest

from kifmerge.checkpoint.atomic import flush
from kifmerge.checkpoint.journal import (
    Journal,
    refuse_full_disk,
    remove_finished,
    resumable_folder,
    unfinished_folder,
)
from kifmerge.errors import CheckpointError, DataError, RunError, TryAgainError

CONTENT = {f"part-{number}": bytes(range(number, 100)) for number in range(4)}
WORK = {"command": "merge", "options": {"density": 0.5, "weights": [1.0, 2.0]}, "kifmerge": "1"}
KEPT = "2 finished files are kept: --resume goes on from them"


class Folder:
    """A folder that is made of CONTENT, and who wrote what."""

    def __init__(self, tmp_path):
        self.path = tmp_path / "out"
        self.hidden = tmp_path / ".out.unfinished"
        self.journal = self.hidden / "journal.jsonl"
        self.written = []

    def make(self, *, work=WORK, fail=None, before_end=lambda: None, **options):
        """Write what is not finished; with ``fail`` the third file is begun, and no more."""
        self.written = []
        with resumable_folder(self.path, work, **options) as journal:
            for number, (name, content) in enumerate(CONTENT.items()):
                if name in journal.finished:
                    continue
                self.written.append(name)
                file = journal.directory / name
                file.write_bytes(content)
                if number == 2 and fail is not None:
                    raise fail
                flush(file)
                journal.note(record(name, content))
            (journal.directory / "index").write_text("last")
            before_end()

    def interrupt(self, fail=None, error=None, **options):
        """Begin, and stop in the third file."""
        failure = RuntimeError("boom") if fail is None else fail
        with pytest.raises(error or type(failure)) as caught:
            self.make(fail=failure, **options)
        return caught.value

    def names(self):
        return sorted(path.name for path in self.path.parent.iterdir())

    def is_whole(self):
        whole = faults.content(self.path) == {**CONTENT, "index": b"last"}
        return whole and self.names() == ["out"]


def record(name, content, **more):
    sha256 = hashlib.sha256(content).hexdigest()
    return {"name": name, "num_bytes": len(content), "sha256": sha256, **more}


@pytest.fixture(autouse=True)
def quick_flush(monkeypatch):
    """Bringing files to the disk takes time, and changes nothing that can be seen here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


class TestGoingOn:
    def test_uninterrupted(self, folder):
        def seen_only_when_it_is_whole():
            assert folder.names() == [".out.unfinished"]

        folder.make(before_end=seen_only_when_it_is_whole)
        assert folder.is_whole()

    @pytest.mark.parametrize("occupied", [False, True])
    def test_after_an_interruption_only_the_rest_is_written(self, folder, occupied):
        if occupied:
            folder.path.mkdir()
            (folder.path / "old").touch()
        folder.interrupt(overwrite=occupied)
        assert faults.content(folder.hidden / "new") == dict(list(CONTENT.items())[:2])
        assert folder.path.exists() == occupied
        folder.make(resume=True, overwrite=occupied)
        assert folder.written == ["part-2", "part-3"]
        assert folder.is_whole()

    def test_what_was_noted_comes_back(self, tmp_path):
        journal = Journal(tmp_path)
        (journal.directory / "a").write_bytes(b"abc")
        noted = record("a", b"abc", digests={"base": {"w": "1"}}, counts=[1, 2])
        journal.note(noted)
        assert Journal(tmp_path).finished == {"a": noted}

    def test_nothing_to_go_on_from(self, folder):
        folder.make(resume=True)
        assert folder.written == list(CONTENT)
        assert folder.is_whole()

    def test_without_resume_it_begins_anew(self, folder):
        folder.interrupt()
        folder.make()
        assert folder.written == list(CONTENT)
        assert folder.is_whole()

    def test_several_interruptions(self, folder):
        for number in range(3):
            folder.interrupt(resume=True)
            assert folder.written == ["part-0", "part-1", "part-2"][2 if number else 0 :]
        folder.make(resume=True)
        assert folder.is_whole()

    @pytest.mark.parametrize("out", [".", "../out", "link"])
    def test_other_ways_to_say_which_folder(self, folder, monkeypatch, out):
        folder.path.mkdir()
        if out == "link":
            (folder.path.parent / "elsewhere").mkdir()
            (folder.path.parent / "elsewhere/link").symlink_to(folder.path)
        monkeypatch.chdir(folder.path if out != "link" else folder.path.parent / "elsewhere")
        wanted, folder.path = folder.path, type(folder.path)(out)
        folder.interrupt()
        assert folder.journal.exists()
        folder.make(resume=True)
        assert faults.content(wanted) == {**CONTENT, "index": b"last"}
        assert not folder.hidden.exists()


class TestVerifying:
    @pytest.mark.parametrize(
        "spoil",
        [
            lambda file: file.unlink(),
            lambda file: file.write_bytes(CONTENT["part-1"][:-1] + b"\0"),
            lambda file: file.write_bytes(CONTENT["part-1"][:-1]),
            lambda file: file.write_bytes(CONTENT["part-1"] + b"\0"),
            lambda file: (file.unlink(), file.mkdir(), (file / "inner").touch()),
        ],
        ids=["deleted", "one byte", "cut", "longer", "folder"],
    )
    def test_finished_file_that_has_changed_is_made_again(self, folder, spoil):
        folder.interrupt()
        spoil(folder.hidden / "new/part-1")
        folder.make(resume=True)
        assert folder.written == ["part-1", "part-2", "part-3"]
        assert folder.is_whole()

    def test_its_second_record_counts(self, folder):
        folder.interrupt()
        (folder.hidden / "new/part-1").unlink()
        folder.interrupt(resume=True)
        assert folder.written == ["part-1", "part-2"]
        assert len(folder.journal.read_text().splitlines()) == 3
        folder.make(resume=True)
        assert folder.written == ["part-2", "part-3"]

    def test_journal_cut_anywhere_still_tells_of_the_lines_before(self, folder):
        folder.interrupt()
        whole = folder.journal.read_bytes()
        first = whole.index(b"\n") + 1
        kept = folder.path.parent / "kept"
        shutil.copytree(folder.hidden, kept)
        ends = [end + near for end in (0, first, len(whole)) for near in (-2, -1, 0, 1)]
        for length in sorted({*range(0, len(whole), 20), *ends} & {*range(len(whole) + 1)}):
            shutil.rmtree(folder.hidden, ignore_errors=True)
            shutil.copytree(kept, folder.hidden)
            folder.journal.write_bytes(whole[:length])
            # The last character of a line is its end: what is noted is there without it.
            num_kept = (length >= first - 1) + (length >= len(whole) - 1)
            found = Journal(folder.hidden)
            assert list(found.finished) == list(CONTENT)[:num_kept]
            found.note(record("part-0", CONTENT["part-0"]))
            assert found.finished.keys() == Journal(folder.hidden).finished.keys() | {"part-0"}

    @pytest.mark.parametrize(
        "line",
        [
            b"\xff\xfe\0\0", b"[]", b"17", b"null", b"{}", b"[" * 10**5,
            json.dumps(record("part-2", CONTENT["part-2"]) | {"name": 7}).encode(),
            json.dumps(record("part-2", CONTENT["part-2"]) | {"num_bytes": "98"}).encode(),
            json.dumps(record("part-2", CONTENT["part-2"]) | {"sha256": None}).encode(),
        ],
        ids=lambda line: line[:40].decode(errors="replace"),
    )  # fmt: skip
    def test_lines_that_are_none(self, folder, line):
        folder.interrupt()
        (folder.hidden / "new/part-2").write_bytes(CONTENT["part-2"])
        with folder.journal.open("ab") as stream:
            stream.write(line + b"\n" + json.dumps(record("part-3", b"")).encode())
        folder.make(resume=True)
        assert folder.written == ["part-2", "part-3"]
        assert folder.is_whole()

    @pytest.mark.parametrize("name", ["../../victim", "..", "", ".", "inner/part-2", "VICTIM"])
    def test_names_that_lead_elsewhere(self, folder, name):
        victim = folder.path.parent / "victim"
        victim.write_bytes(b"mine")
        folder.interrupt()
        (folder.hidden / "new/inner").mkdir()
        (folder.hidden / "new/inner/part-2").write_bytes(b"mine")
        named = str(victim) if name == "VICTIM" else name
        with folder.journal.open("a") as stream:
            stream.write(json.dumps(record(named, b"mine")) + "\n")
        assert list(Journal(folder.hidden).finished) == ["part-0", "part-1"]
        folder.make(resume=True)
        assert (folder.written, victim.read_bytes()) == (["part-2", "part-3"], b"mine")
        assert faults.content(folder.path) == {**CONTENT, "index": b"last"}

    def test_a_kill_while_the_journal_is_mended_loses_no_more(self, folder):
        folder.interrupt()
        broken = folder.journal.read_bytes() + b'{"name": "par'
        for number in range(1, 40):
            folder.journal.write_bytes(broken)
            seen = []

            def kill(what, arguments, seen=seen, number=number):
                seen.append(what)
                if len(seen) == number:
                    faults.die()

            child = faults.fork(lambda say: say(len(Journal(folder.hidden).finished)), kill)
            ended = child.end()
            assert list(Journal(folder.hidden).finished) == ["part-0", "part-1"]
            if ended.code == 0:
                break
        assert (number > 3, ended.said()) == (True, 2)


class TestOtherWork:
    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"kifmerge": "2"}, 'kifmerge: "1" then, "2" now'),
            ({"options": {**WORK["options"], "density": 0.25}}, "options, density: 0.5 then, 0.25"),
            ({"options": {"density": 0.5}}, "options, weights: [1.0, 2.0] then, null now"),
            (
                {"options": {**WORK["options"], "weights": [2.0, 1.0]}},
                "options, weights: [1.0, 2.0] then, [2.0, 1.0] now",
            ),
        ],
    )
    def test_is_refused_and_told(self, folder, changes, told):
        folder.interrupt()
        before = faults.content(folder.hidden)
        with pytest.raises(RunError) as caught:
            folder.make(work={**WORK, **changes}, resume=True)
        assert told in str(caught.value)
        assert "without --resume to begin anew" in str(caught.value)
        assert faults.content(folder.hidden) == before
        folder.make(work={**WORK, **changes})
        assert folder.written == list(CONTENT)

    def test_files_that_have_changed_are_named_alone(self, folder):
        def work(time):
            files = [[f"other-{number}", 1, 1] for number in range(50)] + [["changed", 4, time]]
            return {"inputs": {"base": {"files": files}}}

        folder.interrupt(work=work(17))
        with pytest.raises(RunError) as caught:
            folder.make(work=work(18), resume=True)
        assert 'inputs, base, files: [["changed", 4, 17]] then, [["changed", 4, 18]] now' in str(
            caught.value
        )

    def test_without_finished_files_there_is_nothing_to_refuse(self, folder):
        def killed_early(say):
            with resumable_folder(folder.path, WORK) as journal:
                (journal.directory / "part-0").touch()
                faults.die()

        assert faults.fork(killed_early).end().code == -signal.SIGKILL
        assert json.loads((folder.hidden / "work.json").read_text()) == WORK
        folder.make(work={"command": "other"}, resume=True)
        assert folder.is_whole()

    def test_missing_description_is_no_work(self, folder):
        folder.interrupt()
        (folder.hidden / "work.json").unlink()
        folder.make(resume=True)
        assert folder.written == list(CONTENT)
        assert folder.is_whole()

    @pytest.mark.parametrize("content", [b"", b'{"comm', b"[]", b"\xff"])
    def test_damaged_description_is_refused(self, folder, content):
        folder.interrupt()
        (folder.hidden / "work.json").write_bytes(content)
        with pytest.raises(RunError, match=r"work\.json: .*without --resume to begin anew"):
            folder.make(resume=True)
        assert len(folder.journal.read_text().splitlines()) == 2
        folder.make()
        assert folder.is_whole()


class TestErrors:
    @pytest.mark.parametrize(
        "failure",
        [KeyboardInterrupt(), RuntimeError("boom"), OSError(errno.EIO, "broken"), SystemExit(1)],
        ids=repr,
    )
    def test_finished_files_are_kept_and_the_unfinished_one_is_not(self, folder, failure):
        folder.interrupt(failure)
        assert faults.content(folder.hidden / "new").keys() == {"part-0", "part-1"}
        folder.make(resume=True)
        assert folder.is_whole()

    def test_ctrl_c_tells_what_is_kept(self, folder):
        assert str(folder.interrupt(KeyboardInterrupt())) == f"{folder.path}: {KEPT}"

    def test_ctrl_c_while_finished_files_are_verified(self, folder, monkeypatch):
        folder.interrupt()
        before = faults.content(folder.hidden)
        with monkeypatch.context() as patch:
            patch.setattr("kifmerge.checkpoint.records.file_sha256", interrupted)
            with pytest.raises(KeyboardInterrupt, match="finished files are kept"):
                folder.make(resume=True)
        assert faults.content(folder.hidden) == before
        folder.make(resume=True)
        assert folder.written == ["part-2", "part-3"]

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_full_disk(self, folder, number):
        error = folder.interrupt(OSError(number, "full"), TryAgainError)
        assert str(error) == f"disk full while writing {folder.path}: {KEPT}"
        folder.make(resume=True)
        assert folder.written == ["part-2", "part-3"]

    @pytest.mark.parametrize("kind", [TryAgainError, RunError, DataError])
    def test_error_of_ours_tells_what_is_kept(self, folder, kind):
        assert str(folder.interrupt(kind("no luck"))) == f"no luck; {KEPT}"
        folder.make(resume=True)
        assert folder.written == ["part-2", "part-3"]

    def test_inputs_that_could_not_be_read_may_be_readable_later(self, folder):
        error = CheckpointError("base: cannot be read")
        error.__cause__ = OSError(errno.EIO, "broken")
        assert str(folder.interrupt(error)) == f"base: cannot be read; {KEPT}"
        folder.make(resume=True)
        assert folder.written == ["part-2", "part-3"]

    def test_wrong_inputs_stay_wrong(self, folder):
        assert str(folder.interrupt(CheckpointError("NaN"))) == "NaN"
        assert folder.names() == []

    @pytest.mark.parametrize(
        ("failure", "kind", "told"),
        [
            (KeyboardInterrupt(), KeyboardInterrupt, "nothing is kept"),
            (OSError(errno.ENOSPC, "full"), TryAgainError, "disk full.*nothing is kept"),
            (TryAgainError("no luck"), TryAgainError, "^no luck$"),
            (RuntimeError("boom"), RuntimeError, "^boom$"),
        ],
    )
    def test_without_a_finished_file_nothing_stays(self, folder, failure, kind, told):
        def begin():
            with resumable_folder(folder.path, WORK) as journal:
                (journal.directory / "begun").touch()
                raise failure

        with pytest.raises(kind, match=told):
            begin()
        assert folder.names() == []

    def test_room_for_the_rest_is_asked_of_the_disk(self, folder, monkeypatch):
        free = 3_000_000_000 + (1 << 24)
        usage = shutil.disk_usage(folder.path.parent)
        asked = []

        def disk_usage(path):
            asked.append(path)
            return usage._replace(free=free)

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)
        refuse_full_disk(folder.path / "deep/er", 3_000_000_000)
        with pytest.raises(TryAgainError, match=r"3\.02 GB are needed, 3\.02 GB are free"):
            refuse_full_disk(folder.path / "deep/er", 3_000_000_001)
        assert asked == [folder.path.parent] * 2


class TestInThePlaceOfAnother:
    """What OUT held before is there until the new folder is whole."""

    @pytest.fixture
    def old(self, folder):
        folder.path.mkdir()
        (folder.path / "old").write_text("old")
        return folder

    def test_refused_unless_told(self, old):
        with pytest.raises(RunError, match="exists already"):
            old.make()
        assert faults.content(old.path) == {"old": b"old"}
        assert old.names() == ["out"]

    def test_until_the_end(self, old):
        def still_there():
            assert faults.content(old.path) == {"old": b"old"}

        old.make(overwrite=True, before_end=still_there)
        assert old.is_whole()

    def test_a_file(self, folder):
        folder.path.write_text("old")
        folder.make(overwrite=True)
        assert folder.is_whole()

    @pytest.mark.parametrize("failure", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
    @pytest.mark.parametrize("number", [1, 2])
    def test_failing_renames(self, old, monkeypatch, failure, number):
        rename, calls = type(old.path).rename, []

        def fail(self, target):
            calls.append(target)
            if len(calls) == number:
                raise failure
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(type(old.path), "rename", fail)
            with pytest.raises(type(failure)):
                old.make(overwrite=True)
        assert faults.content(old.path) == {"old": b"old"}
        old.make(overwrite=True, resume=True)
        assert old.written == []
        assert old.is_whole()

    def test_ctrl_c_when_all_is_done(self, folder, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr("kifmerge.checkpoint.journal._remove", interrupted_once())
            with pytest.raises(KeyboardInterrupt, match="it is whole"):
                folder.make()
        assert folder.is_whole()

    @pytest.mark.parametrize("resume", [False, True])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_killed_between_the_renames(self, old, resume, overwrite):
        def killed_there(say):
            def kill(what, arguments):
                if what == "rename" and arguments[1] == str(old.path):
                    faults.die()

            faults.watch(kill)
            old.make(overwrite=True)

        assert faults.fork(killed_there).end().code == -signal.SIGKILL
        assert not old.path.exists()
        assert faults.content(old.hidden / "replaced") == {"old": b"old"}
        if overwrite:
            old.make(resume=resume, overwrite=True)
            assert old.written == ([] if resume else list(CONTENT))
            assert old.is_whole()
            return
        with pytest.raises(RunError, match="exists already"):
            old.make(resume=resume)
        assert faults.content(old.path) == {"old": b"old"}
        assert old.journal.exists()

    def test_killed_just_after(self, old):
        def killed_there(say):
            def kill(what, arguments):
                if what == "flush" and faults.content(old.path).keys() == {*CONTENT, "index"}:
                    faults.die()

            faults.watch(kill)
            old.make(overwrite=True)

        assert faults.fork(killed_there).end().code == -signal.SIGKILL
        assert old.names() == [".out.unfinished", "out"]
        remove_finished(old.path)
        assert old.is_whole()

    def test_work_that_is_not_finished_is_not_removed_as_such(self, folder):
        folder.interrupt()
        remove_finished(folder.path)
        assert folder.journal.exists()

    def test_nothing_can_be_lost_at_the_end(self, old):
        def make(say):
            unflushed = faults.Unflushed()
            faults.watch(unflushed.see)
            with resumable_folder(old.path, WORK, overwrite=True) as journal:
                (journal.directory / "inner").mkdir()
                (journal.directory / "inner/index").write_text("last")
                (journal.directory / "index").write_text("last")
            say(unflushed.left())

        left = faults.fork(make).end().said()
        assert faults.content(old.path) == {"inner/index": b"last", "index": b"last"}
        assert faults.lose(old.path.parent, left) == []

    @pytest.mark.parametrize("resume", [False, True])
    def test_left_by_a_kill_and_then_deleted_by_its_owner(self, old, resume):
        """What had been replaced does not come back."""
        old.make(overwrite=True)
        shutil.rmtree(old.path)
        (old.hidden / "replaced").mkdir(parents=True)
        (old.hidden / "replaced/old").touch()
        (old.hidden / "work.json").write_text(json.dumps({"command": "other"}))
        (old.hidden / "journal.jsonl").write_text(json.dumps(record("a", b"a")) + "\n")
        old.make(resume=resume)
        assert old.is_whole()

    def test_what_somebody_put_there_meanwhile(self, folder):
        def put():
            folder.path.mkdir()
            (folder.path / "mine").touch()

        with pytest.raises(RunError, match=r"exists already.*4 finished files are kept"):
            folder.make(before_end=put)
        assert faults.content(folder.path) == {"mine": b""}
        shutil.rmtree(folder.path)
        folder.make(resume=True)
        assert folder.written == []
        assert folder.is_whole()


class TestLock:
    def test_of_another_process(self, folder):
        def stop_midway(say):
            folder.make(before_end=lambda: os.kill(os.getpid(), signal.SIGSTOP))

        with faults.fork(stop_midway) as child:
            child.wait_for_stop()
            before = faults.content(folder.hidden)
            for resume in (False, True):
                with pytest.raises(RunError, match=r"out is being made by another process"):
                    folder.make(resume=resume)
            remove_finished(folder.path)
            assert faults.content(folder.hidden) == before
            child.kill(signal.SIGCONT)
            assert child.end().code == 0
        assert folder.is_whole()

    @pytest.mark.parametrize("gone", [FileNotFoundError, FileExistsError])
    def test_of_a_process_that_ends_and_removes_the_folder(self, folder, monkeypatch, gone):
        def acquire(self, timeout):
            shutil.rmtree(folder.hidden)
            raise gone

        folder.hidden.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(filelock.FileLock, "acquire", acquire)
            with pytest.raises(RunError, match=r"out is being made by another process"):
                folder.make()
            folder.hidden.mkdir()
            remove_finished(folder.path)
        assert not folder.hidden.exists()
        folder.make()
        assert folder.is_whole()

    def test_something_else_in_the_place_of_the_folder(self, folder):
        folder.hidden.write_bytes(b"mine")
        with pytest.raises(FileExistsError):
            folder.make()
        assert folder.hidden.read_bytes() == b"mine"

    def test_of_a_killed_process(self, folder):
        def stop_midway(say):
            folder.make(before_end=lambda: os.kill(os.getpid(), signal.SIGSTOP))

        with faults.fork(stop_midway) as child:
            child.wait_for_stop()
        folder.make(resume=True)
        assert folder.written == []
        assert folder.is_whole()

    def test_another_was_faster(self, folder, monkeypatch):
        """Between the first look and the lock: it is not made twice, and not overwritten."""
        mkdir = type(folder.path).mkdir

        def made_meanwhile(self, *arguments, **options):
            if self == folder.hidden and not folder.path.exists():
                mkdir(folder.path)
                (folder.path / "theirs").touch()
            return mkdir(self, *arguments, **options)

        monkeypatch.setattr(type(folder.path), "mkdir", made_meanwhile)
        with pytest.raises(RunError, match="exists already"):
            folder.make()
        assert folder.names() == ["out"]
        assert faults.content(folder.path) == {"theirs": b""}

    def test_removing_the_hidden_folder_leaves_the_next_one_s_alone(self, folder, monkeypatch):
        """As soon as the lock is gone another process may begin, in the same place."""
        unlink = type(folder.path).unlink

        def begun_by_another(self, *arguments, **options):
            unlink(self, *arguments, **options)
            if self.name == "lock":
                (folder.hidden / "work.json").write_text("theirs")
                (folder.hidden / "lock").touch()

        monkeypatch.setattr(type(folder.path), "unlink", begun_by_another)
        folder.make()
        assert faults.content(folder.hidden) == {"work.json": b"theirs", "lock": b""}


def interrupted(path):
    raise KeyboardInterrupt


def interrupted_once():
    from kifmerge.checkpoint.journal import _remove

    calls = []

    def remove(work_dir):
        calls.append(work_dir)
        if len(calls) == 1:
            raise KeyboardInterrupt
        _remove(work_dir)

    return remove


def test_hidden_folder_lies_beside(tmp_path):
    assert unfinished_folder(tmp_path / "a" / "b") == tmp_path / "a" / ".b.unfinished"
