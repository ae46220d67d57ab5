import ctypes
import errno
import mmap
import os
import random
import sys

import pytest
import torch

from kifmerge.checkpoint import write_behind
from kifmerge.checkpoint.sink import FolderSink
from kifmerge.checkpoint.source import TensorInfo, open_source
from kifmerge.checkpoint.write_behind import WriteBehind

WINDOW_BYTES = 1 << 16
LARGE_FILE_BYTES = 4 * WINDOW_BYTES
NUMEL = 12 * WINDOW_BYTES // 4 + 5

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the call")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(write_behind, "WINDOW_BYTES", WINDOW_BYTES)
    monkeypatch.setattr(write_behind, "LARGE_FILE_BYTES", LARGE_FILE_BYTES)


def cached_bytes(path):
    """How much of a file the system keeps in its cache."""
    size = path.stat().st_size
    num_pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * num_pages)()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as pages:
        address = ctypes.addressof(place := ctypes.c_char.from_buffer(pages))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) == 0
        del place
    return sum(page & 1 for page in found) * mmap.PAGESIZE


def keeps_everything_in_memory(directory):
    """Whether a file system, such as tmpfs, has no other place than the cache."""
    path = directory / "probe"
    path.write_bytes(bytes(4 * mmap.PAGESIZE))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_bytes(path) > 0


def written(directory, values, *, part_numel, seed):
    """A file written in parts of random order."""
    layout = {"model.safetensors": [("w", TensorInfo(values.dtype, tuple(values.shape)))]}
    sink = FolderSink(directory, "model", layout)
    starts = list(range(0, values.numel(), part_numel))
    random.Random(seed).shuffle(starts)
    for start in starts:
        sink.add("w", start, values[start : start + part_numel])
    sink.commit()
    return directory / "model.safetensors"


@pytest.mark.parametrize("part_numel", [1000, WINDOW_BYTES // 4, 3 * WINDOW_BYTES])
def test_what_is_written_is_there(tmp_path, part_numel):
    values = torch.randn(NUMEL)
    written(tmp_path, values, part_numel=part_numel, seed=part_numel)
    assert torch.equal(open_source(tmp_path).read("w", 0, NUMEL), values)


@linux
def test_little_of_it_stays_in_the_cache(tmp_path, monkeypatch):
    large = 64 * WINDOW_BYTES  # the system may keep, and drop, a few MB at a time
    monkeypatch.setattr(write_behind, "WINDOW_BYTES", large)
    if keeps_everything_in_memory(tmp_path):
        pytest.skip("the file system keeps everything in memory")
    path = written(tmp_path, torch.randn(12 * large // 4), part_numel=large // 16, seed=0)
    # The last window that was sent, what is behind it, and pages that lie in two windows.
    assert cached_bytes(path) <= 4 * large < path.stat().st_size / 2


@linux
def test_small_files_stay_in_the_cache(tmp_path):
    numel = LARGE_FILE_BYTES // 4 - 100  # the header makes up for less
    path = written(tmp_path, torch.randn(numel), part_numel=1000, seed=0)
    assert 3 * WINDOW_BYTES < path.stat().st_size < LARGE_FILE_BYTES
    assert cached_bytes(path) >= path.stat().st_size


@linux
def test_windows_go_when_they_are_whole(tmp_path, monkeypatch):
    sent = []
    real = write_behind._sync
    monkeypatch.setattr(
        write_behind,
        "_sync",
        lambda d, window, flags: sent.append((window, flags)) or real(d, window, flags),
    )
    behind = WriteBehind(LARGE_FILE_BYTES)
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(3 * WINDOW_BYTES))
        file.flush()
        number = file.fileno()
        behind.note(number, WINDOW_BYTES // 2, 2 * WINDOW_BYTES)
        assert sent == [(1, 2)]
        behind.note(number, 0, WINDOW_BYTES // 2)
        assert sent[1:] == [(0, 2), (1, 7)]
        behind.note(number, 2 * WINDOW_BYTES, 3 * WINDOW_BYTES - 1)
        assert len(sent) == 3


@linux
def test_an_error_of_the_disk_is_told():
    # Once told it is told no more: to pass it over would be to lose it.
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        WriteBehind(LARGE_FILE_BYTES).note(-1, 0, WINDOW_BYTES)


@linux
def test_what_is_no_file_on_a_disk_is_left_alone():
    reading, writing = os.pipe()
    try:
        WriteBehind(LARGE_FILE_BYTES).note(writing, 0, 4 * WINDOW_BYTES)
    finally:
        os.close(reading)
        os.close(writing)


def test_other_systems_do_without(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "other")
    write_behind._sync_file_range.cache_clear()
    try:
        values = torch.randn(NUMEL)
        written(tmp_path, values, part_numel=1000, seed=1)
        assert torch.equal(open_source(tmp_path).read("w", 0, NUMEL), values)
    finally:
        write_behind._sync_file_range.cache_clear()
