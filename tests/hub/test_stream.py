"""Files read through from the Hub: each byte once, checked, and in bounded memory."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import remote
from loopback import Fault
from remote import MB

from kifmerge.errors import DamagedTransferError, TryAgainError
from kifmerge.hub import background, stream
from kifmerge.hub.content import ContentCheck
from kifmerge.hub.stream import BLOCK_BYTES, HEAD_BYTES, FileStream, Shelf

CONTENT = remote.noise("stream", 13 * MB + 12345)
SIZE = len(CONTENT)
HEAD = 900


@pytest.fixture
def file(hub, monkeypatch):
    remote.be_quick(monkeypatch)
    return remote.one_file(hub, CONTENT)


def opened(file, **options):
    """A stream whose head has been read, as a header is."""
    found = FileStream(file, **options)
    assert found.head(8) == CONTENT[:8]
    assert found.head(HEAD) == CONTENT[:HEAD]
    return found


def read_all(found, num_threads=1, ranges=None):
    ranges = remote.pieces(HEAD, SIZE) if ranges is None else ranges
    read = remote.read_by_threads(found.read_into, ranges, num_threads)
    for start, stop in ranges:
        assert read[start] == CONTENT[start:stop]


def ranges_of(hub):
    return sorted(row.range for row in hub.log if row.kind == "cdn")


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_each_byte_is_pulled_once(hub, file, num_threads):
    found = opened(file)
    found.expect([(HEAD, SIZE)])
    read_all(found, num_threads)
    asked = ranges_of(hub)
    assert asked[0] == (0, HEAD_BYTES)
    assert all(one[1] == two[0] for one, two in itertools.pairwise(asked))
    assert hub.pulled_bytes() == SIZE
    assert max(stop - start for start, stop in asked) == BLOCK_BYTES
    assert not found.is_unchecked


def test_its_address_is_asked_for_once(hub, file):
    found = opened(file)
    found.expect([(HEAD, SIZE)])
    read_all(found)
    assert [row.method for row in hub.log if row.kind == "resolve"] == ["HEAD"]


def test_only_what_is_wanted_is_pulled(hub, file):
    found = opened(file)
    wanted = [(5 * MB, 5 * MB + 700_000), (9 * MB, 9 * MB + 5000), (9 * MB + 5000, 9 * MB + 6000)]
    found.expect(wanted)
    read_all(found, ranges=wanted)
    assert hub.pulled_bytes() == HEAD_BYTES + 700_000 + 6000
    # Those that follow one another come together.
    assert ranges_of(hub)[1:] == [(5 * MB, 5 * MB + 700_000), (9 * MB, 9 * MB + 6000)]


def test_what_was_not_expected_is_read_all_the_same(hub, file):
    # On a busy machine one thread may read many blocks while the others wait for theirs.
    found = opened(file, shelf=Shelf(most_blocks=40))
    read_all(found, num_threads=3)
    assert hub.pulled_bytes() == SIZE
    assert not found.is_unchecked


def test_the_head_is_kept(hub, file):
    found = opened(file)
    read_all(found, ranges=[(0, HEAD_BYTES)])
    found.expect([(0, HEAD_BYTES + 10)])
    read_all(found, ranges=[(10, HEAD_BYTES + 10)])
    assert hub.pulled_bytes() == HEAD_BYTES + 10


def test_a_head_that_grows_is_not_pulled_twice(hub, file):
    found = opened(file)
    assert found.head(HEAD_BYTES + 5000) == CONTENT[: HEAD_BYTES + 5000]
    assert hub.pulled_bytes() == HEAD_BYTES + 5000
    found.expect([(HEAD, SIZE)])
    read_all(found)
    assert hub.pulled_bytes() == SIZE
    assert not found.is_unchecked


def test_a_head_that_grows_after_the_expectation_leaves_the_check_whole(hub, file):
    found = opened(file)
    found.expect([(HEAD, SIZE)])
    found.head(HEAD_BYTES + 5000)
    read_all(found)
    assert not found.is_unchecked


def test_blocks_come_before_they_are_asked_for(hub, file):
    found = opened(file)
    found.expect([(HEAD, SIZE)])
    read_all(found, ranges=[(HEAD_BYTES, HEAD_BYTES + 10)])
    wait_until(lambda: hub.pulled_bytes() == HEAD_BYTES + (1 + stream.NUM_AHEAD) * BLOCK_BYTES)
    time.sleep(0.1)
    assert hub.pulled_bytes() == HEAD_BYTES + (1 + stream.NUM_AHEAD) * BLOCK_BYTES


def test_blocks_come_in_the_order_that_was_told(hub, file):
    found = opened(file)
    in_turn = [(at, at + MB) for at in (9 * MB, 2 * MB, 12 * MB, 5 * MB)]
    found.expect(in_turn)
    read_all(found, ranges=[(9 * MB, 9 * MB + 10)])
    # A request is in the log before its range is.
    wait_until(lambda: [bool(row.range) for row in hub.log if row.kind == "cdn"] == [True] * 4)
    assert ranges_of(hub)[1:] == sorted(in_turn[:3])
    read_all(found, ranges=in_turn)
    assert hub.pulled_bytes() == HEAD_BYTES + 4 * MB
    assert not found.is_unchecked  # it did not come whole


def test_what_is_expected_already_stays_as_it_was_cut(hub, file):
    shelf = Shelf()
    found = opened(file, shelf=shelf)
    shelf.block_bytes = 3 * MB
    found.expect([(HEAD, 5 * MB), (5 * MB, 7 * MB)])
    shelf.block_bytes = 2 * MB
    found.expect([(7 * MB, 10 * MB)])
    read_all(found, ranges=[(HEAD, 10 * MB)])
    cuts = [HEAD_BYTES, HEAD_BYTES + 3 * MB, HEAD_BYTES + 6 * MB, 7 * MB, 9 * MB, 10 * MB]
    assert ranges_of(hub)[1:] == list(itertools.pairwise(cuts))


def test_overlapping_expectations_are_pulled_once(hub, file):
    found = opened(file)
    found.expect([(5 * MB, 6 * MB), (HEAD, SIZE), (3 * MB, 8 * MB)])
    found.expect([(HEAD, SIZE)])
    read_all(found, num_threads=2)
    assert hub.pulled_bytes() == SIZE


@pytest.mark.parametrize("num_threads", [1, 3])
def test_another_pass(hub, file, num_threads):
    found = opened(file)
    found.expect([(HEAD, SIZE)])
    for num_passes in (1, 2, 3):
        read_all(found, num_threads)
        # The head stays, all else is pulled again, and before it is asked for.
        assert hub.pulled_bytes() == SIZE + (num_passes - 1) * (SIZE - HEAD_BYTES)
    read_all(found, ranges=[(HEAD_BYTES, HEAD_BYTES + 10)])
    ahead = (1 + stream.NUM_AHEAD) * BLOCK_BYTES
    wait_until(lambda: hub.pulled_bytes() == SIZE + 2 * (SIZE - HEAD_BYTES) + ahead)


def test_any_order(hub, file):
    ranges = remote.pieces(HEAD, SIZE)
    random.Random(3).shuffle(ranges)
    found = opened(file)
    found.expect([(HEAD, SIZE)])
    read_all(found, num_threads=3, ranges=ranges)


def test_an_order_in_which_it_cannot_be_hashed_is_told(hub, file):
    found = opened(file, shelf=Shelf(most_blocks=1))
    ranges = remote.pieces(HEAD, SIZE, MB)[::-1]
    found.expect(ranges)
    read_all(found, ranges=ranges)
    assert found.is_unchecked


class TestMemory:
    def test_what_is_told_takes_no_more_the_larger_the_file(self, file):
        """A merge tells of thousands of gigabytes before it reads any."""
        large = FileStream(replace(file, size=10**12))
        names = remote.pieces(0, 10**12, 10**8)
        with traced() as taken:
            large.expect(names)
            assert 0 < taken() < 10_000

    def test_what_is_known_of_each_block(self):
        """Of millions, once they have been read."""
        num = 50_000
        with traced() as taken:
            check = ContentCheck("file", num + 1, "0" * 64, None)
            for start in range(num):
                check.feed(start, b"x")
            assert 0 < taken() < stream.stream_bytes(num, 1)
        with pytest.raises(DamagedTransferError, match=f"bytes {num - 2} to {num} came twice"):
            check.feed(num - 2, b"xy")

    def test_blocks_that_are_not_used_up_are_few(self, hub, file):
        shelf = Shelf(most_blocks=4)
        found = opened(file, shelf=shelf)
        found.expect(remote.pieces(HEAD, SIZE, 100_000)[::2])
        for start, _ in remote.pieces(HEAD_BYTES, SIZE - 1, 333_333):
            read_all(found, ranges=[(start, start + 1)])
            assert len(shelf.blocks) <= 4

    def test_nothing_stays_of_what_was_read_through(self, hub, file):
        found = opened(file)
        found.expect([(HEAD, SIZE)])
        read_all(found, num_threads=4)
        assert found._shelf.blocks == {}
        assert not found._check._pending

    def test_files_share_the_shelf(self, hub, monkeypatch):
        contents = {f"{n}.safetensors": remote.noise(str(n), 3 * MB) for n in range(6)}
        folder = remote.folder(hub, contents)
        shelf = Shelf(most_blocks=3)
        for name, file in folder.files.items():
            found = FileStream(file, shelf=shelf)
            found.head(8)
            found.expect([(MB, 2 * MB)])
            content = bytearray(10)
            found.read_into(MB, memoryview(content))
            assert content == contents[name][MB : MB + 10]
        assert len(shelf.blocks) == 3

    def test_of_the_process(self, hub, tmp_path):
        path = tmp_path / "model.safetensors"
        with path.open("wb") as out:
            for _ in range(12):
                out.write(CONTENT)
        file = remote.folder(hub, tmp_path).files[path.name]
        found = FileStream(file)
        found.head(8)
        found.expect([(HEAD_BYTES, file.size)])
        most, before = 0, resident_bytes()
        view = memoryview(bytearray(MB))
        for start, stop in remote.pieces(HEAD_BYTES, file.size, MB):
            found.read_into(start, view[: stop - start])
            most = max(most, resident_bytes() - before)
        assert most < 40 * MB
        assert not found.is_unchecked


class TestDamage:
    def read_whole(self, found, num_threads):
        found.head(HEAD)
        found.expect([(HEAD, SIZE)])
        remote.read_by_threads(found.read_into, remote.pieces(HEAD, SIZE), num_threads)

    def damaged(self, hub, at, **options):
        hub.fail(Fault(kind="cdn", method="GET", corrupt_file_at=at, **options))

    @pytest.mark.parametrize("at", [5, HEAD_BYTES, 6 * MB, SIZE - 1])
    @pytest.mark.parametrize("num_threads", [1, 3])
    def test_is_found(self, hub, file, at, num_threads):
        found = FileStream(file)
        self.damaged(hub, at)
        with pytest.raises(DamagedTransferError, match=r"org/a@\w{40}/model.safetensors: .* hash"):
            self.read_whole(found, num_threads)
        with pytest.raises(DamagedTransferError):
            found.read_into(0, memoryview(bytearray(1)))

    @pytest.mark.parametrize("num_threads", [1, 3])
    @pytest.mark.parametrize("at", [HEAD_BYTES + 1, 6 * MB, SIZE - 1])
    def test_is_found_in_another_pass(self, hub, file, num_threads, at):
        found = opened(file)
        found.expect([(HEAD, SIZE)])
        read_all(found)
        self.damaged(hub, at)
        with pytest.raises(DamagedTransferError, match="came twice, and not alike"):
            read_all(found, num_threads)

    def test_is_found_in_a_file_that_fits_the_head(self, hub):
        content = remote.noise("small", 500)
        found = FileStream(remote.one_file(hub, content))
        self.damaged(hub, 499)
        with pytest.raises(DamagedTransferError):
            found.head(8)

    def test_is_found_in_a_file_that_is_no_large_one(self, hub):
        found = FileStream(remote.one_file(hub, b"{}" * 100, "config.json"))
        hub.fail(Fault(kind="resolve", method="GET", corrupt_file_at=7))
        with pytest.raises(DamagedTransferError):
            found.head(8)
        whole = FileStream(found.file)
        assert whole.head(8) == b"{}{}{}{}"
        assert not whole.is_unchecked

    def test_is_found_in_what_was_let_go_and_came_again(self, hub, file):
        found = opened(file, shelf=Shelf(most_blocks=1))
        found.expect([(HEAD, SIZE)])
        read_all(found, ranges=[(HEAD, BLOCK_BYTES)])
        read_all(found, ranges=[(2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 10)])
        self.damaged(hub, BLOCK_BYTES + 5)
        with pytest.raises(DamagedTransferError):
            read_all(found)


def test_an_empty_file(hub):
    found = FileStream(remote.one_file(hub, b"", "model.safetensors"))
    assert found.head(8) == b""
    found.expect([])
    assert not found.is_unchecked
    assert hub.log == []


def test_reading_beyond_the_end_is_a_bug(hub, file):
    found = opened(file)
    with pytest.raises(IndexError, match="bytes"):
        found.read_into(SIZE - 1, memoryview(bytearray(2)))


def test_what_failed_can_be_read_later(hub, file, monkeypatch):
    remote.be_quick(monkeypatch, tries=2)
    found = opened(file)
    found.expect([(HEAD, SIZE)])
    hub.fail(Fault(kind="cdn", status=503, times=None))
    with pytest.raises(TryAgainError, match=r"model.safetensors: HTTP 503"):
        read_all(found)
    hub.mend()
    read_all(found)
    assert not found.is_unchecked


def test_faults_at_random_do_not_show(hub, file):
    chance = random.Random(5)
    acts = [
        {"status": 503},
        {"reset": True},
        {"expire": True},
        {"truncate_at": 1_234_567},
        {"reset_at": 3_000_000},
        {"wrong_range": True},
        {"ignore_range": True},
    ]
    for act in acts * 2:
        hub.fail(Fault(kind="cdn", skip=chance.randrange(6), **act))
    found = opened(file)
    found.expect([(HEAD, SIZE)])
    read_all(found, num_threads=3)
    assert sum(row.fault is not None for row in hub.log) >= 8
    assert not found.is_unchecked


def test_a_wait_is_abandoned_when_the_work_has_ended(hub, file):
    hub.fail(Fault(kind="cdn", stall_at=0, stall_seconds=5, skip=1, times=None))
    found, ended = opened(file), threading.Event()
    timer = threading.Timer(0.2, ended.set)
    timer.start()
    begun = time.monotonic()
    with background.abandoning(ended), pytest.raises(InterruptedError):
        found.read_into(MB, memoryview(bytearray(10)))
    assert 0.1 < time.monotonic() - begun < 2
    timer.join()


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


@contextlib.contextmanager
def traced():
    """Tells how many bytes Python's objects take more than in the beginning."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield lambda: tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
