import errno
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time

import pytest

from kifmerge.checkpoint.atomic import (
    remove_unfinished,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)
from kifmerge.errors import RunError, TryAgainError

FAILURES = [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1), OSError(errno.EIO, "broken")]

WRITER = """
import sys, time
from pathlib import Path
from kifmerge.checkpoint import atomic

with getattr(atomic, sys.argv[1])(Path(sys.argv[2])) as temporary:
    part = temporary / "part" if temporary.is_dir() else temporary
    part.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def write_part(temporary):
    part = temporary / "part" if temporary.is_dir() else temporary
    part.write_text("new")


def fail_while_writing(whole, path, failure):
    with whole(path) as temporary:
        write_part(temporary)
        raise failure


def test_file_appears_whole_under_its_name_alone(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent.parent == path.parent
    assert path.read_text() == "new"
    assert names(path.parent) == ["file.txt"]


def test_folder_appears_whole_under_its_name_alone(tmp_path):
    path = tmp_path / "deep" / "folder"
    with whole_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file.txt").write_text("new")
        assert not path.exists()
    assert (path / "inner" / "file.txt").read_text() == "new"
    assert names(path.parent) == ["folder"]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_failure_leaves_nothing_behind_and_is_passed_on(tmp_path, whole, failure):
    with pytest.raises(type(failure)) as caught:
        fail_while_writing(whole, tmp_path / "target", failure)
    assert caught.value is failure
    assert names(tmp_path) == []


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_failure_keeps_the_old_content(tmp_path, failure):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(failure)):
        fail_while_writing(whole_file, path, failure)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_full_disk_is_worth_another_try_and_names_the_path(tmp_path, whole, code):
    path = tmp_path / "target"
    with pytest.raises(TryAgainError) as caught:
        fail_while_writing(whole, path, OSError(code, os.strerror(code)))
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 4
    assert names(tmp_path) == []


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_disk_found_full_at_the_flush_leaves_nothing(tmp_path, monkeypatch, whole):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TryAgainError, match="target"), whole(tmp_path / "target") as temporary:
        write_part(temporary)
    assert names(tmp_path) == []


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_disk_too_full_for_a_temporary_name_is_worth_another_try(tmp_path, monkeypatch, whole):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(TryAgainError, match="target"), whole(tmp_path / "target"):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_content_is_flushed_before_the_name_and_the_folder_after(tmp_path, monkeypatch, whole):
    path, flushed = tmp_path / "target", []

    def recording(descriptor):
        flushed.append((os.fstat(descriptor).st_ino, path.exists()))

    monkeypatch.setattr(os, "fsync", recording)
    with whole(path) as temporary:
        write_part(temporary)
    part = path / "part" if whole is whole_folder else path
    assert (part.stat().st_ino, False) in flushed
    assert flushed[-1] == (tmp_path.stat().st_ino, True)


def test_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    with pytest.raises(RunError, match="folder exists already"), whole_folder(tmp_path / "folder"):
        pytest.fail("the body must not run")
    assert names(tmp_path / "folder") == ["mine"]


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "folder").mkdir()
    with whole_folder(tmp_path / "folder") as temporary:
        (temporary / "new").touch()
    assert names(tmp_path / "folder") == ["new"]
    assert names(tmp_path) == ["folder"]


def test_overwritten_folder_goes_only_on_success(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()

    def fail():
        with whole_folder(tmp_path / "folder", overwrite=True) as temporary:
            (temporary / "new").touch()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert names(tmp_path / "folder") == ["old"]
    with whole_folder(tmp_path / "folder", overwrite=True) as temporary:
        (temporary / "new").touch()
    assert names(tmp_path / "folder") == ["new"]
    assert names(tmp_path) == ["folder"]


def test_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").touch()
    (tmp_path / "plain-folder").mkdir()
    write_text(tmp_path / "file", "")
    with whole_folder(tmp_path / "folder"):
        pass

    def mode(name):
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    assert mode("file") == mode("plain")
    assert mode("folder") == mode("plain-folder")


def test_json_and_text_are_utf8_with_a_last_newline(tmp_path):
    write_json(tmp_path / "file.json", {"name": "naïve", "numbers": [1, 2]})
    written = (tmp_path / "file.json").read_bytes()
    assert written.endswith(b"}\n")
    assert "naïve".encode() in written
    assert json.loads(written) == {"name": "naïve", "numbers": [1, 2]}


def test_json_that_cannot_be_written_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "file.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"new": object()})
    assert json.loads((tmp_path / "file.json").read_text()) == {"old": 1}
    assert names(tmp_path) == ["file.json"]


@pytest.mark.parametrize("whole", ["whole_file", "whole_folder"])
def test_killed_process_leaves_nothing_under_the_final_name(tmp_path, whole):
    path = tmp_path / "target"
    command = [sys.executable, "-c", WRITER, whole, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not path.exists()
    assert len(names(tmp_path)) == 1
    (tmp_path / "keep.txt").touch()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["keep.txt"]


def test_interrupted_process_leaves_nothing_at_all(tmp_path):
    command = [sys.executable, "-c", WRITER, "whole_folder", str(tmp_path / "target")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
    assert names(tmp_path) == []


def test_next_writer_removes_what_the_dead_left_and_nothing_else(tmp_path):
    command = [sys.executable, "-c", WRITER, "whole_folder", str(tmp_path / "target")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        write_text(tmp_path / "file", "")
        assert len(names(tmp_path)) == 2  # the other process is alive
        process.send_signal(signal.SIGKILL)
    (tmp_path / ".unfinished-elsewhere-1-abc").mkdir()  # of another machine
    write_text(tmp_path / "file", "")
    assert sorted(names(tmp_path)) == [".unfinished-elsewhere-1-abc", "file"]
