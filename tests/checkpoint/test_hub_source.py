"""A checkpoint is the same wherever it lies: on this disk, streamed, or downloaded."""

from __future__ import annotations

import json
import random
import threading
import time

import folders
import hub_merges
import pytest
import remote
import torch
from huggingface_hub import constants, snapshot_download
from loopback import Fault

from kifmerge.checkpoint.digest import digest
from kifmerge.checkpoint.source import open_source
from kifmerge.errors import CheckpointError, DamagedTransferError, KifmergeError
from kifmerge.hub import client
from kifmerge.hub.folder import open_hub_folder
from kifmerge.hub.reference import parse_remote

pytestmark = pytest.mark.slow  # hundreds of requests

KINDS = ("resolve", "cdn")
SHAPES = {
    "a.large": (1500, 1000),
    "b.small": (7,),
    "c.empty": (0, 3),
    "d.scalar": (),
    "e.middle": (300, 200),
    "f.last": (11, 5),
    "g.large": (900, 1100),
}


@pytest.fixture(params=["disk", "stream", "download", "cache", "offline"])
def place(request, hub, tmp_path, monkeypatch):
    """A way to open a folder of this disk where the test wants it to be read from."""
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.002)

    def opened(directory):
        if request.param == "disk":
            return directory
        hub.add_repo("org/a", directory)
        if request.param in ("cache", "offline"):
            snapshot_download("org/a")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline")
        fetch = "stream" if request.param == "stream" else "download"
        return open_hub_folder(parse_remote("org/a"), fetch)

    return opened


@pytest.fixture(params=[0, 3], ids=["single", "sharded"])
def saved(request, tmp_path):
    """A checkpoint on this disk."""
    return save(tmp_path / "model", num_shards=request.param)


def save(directory, **options):
    made = folders.random_tensors(1, SHAPES, torch.bfloat16)
    made["h.typed"] = torch.arange(20, dtype=torch.int64)
    return folders.save(directory, made, **options)


def slices(source, most=70_000):
    """All elements of all tensors, cut up."""
    return [
        (name, start, min(start + most, source.info(name).numel))
        for name in source.names()
        for start in range(0, max(source.info(name).numel, 1), most)
    ]


def read_by_threads(source, wanted, num_threads):
    found, left, lock = {}, list(wanted), threading.Lock()

    def work():
        while True:
            with lock:
                if not left:
                    return
                one = left.pop(0)
            found[one] = source.read(*one)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


class TestContract:
    """What holds wherever a checkpoint is read from."""

    def test_names_and_infos(self, place, saved):
        source, expected = open_source(place(saved)), open_source(saved)
        assert source.names() == expected.names()
        assert [source.info(n) for n in source.names()] == [
            expected.info(n) for n in expected.names()
        ]
        assert source.files == expected.files

    @pytest.mark.parametrize("num_threads", [1, 4])
    @pytest.mark.parametrize("order", ["file", "told", "random"])
    def test_every_slice(self, place, saved, num_threads, order):
        source, expected = open_source(place(saved)), folders.load(saved)
        wanted = slices(source)
        if order == "told":
            source.expect(source.names())
        if order == "random":
            random.Random(7).shuffle(wanted)
        found = read_by_threads(source, wanted, num_threads)
        for name, start, stop in wanted:
            values = found[name, start, stop]
            assert values.dtype == expected[name].dtype
            assert torch.equal(values, expected[name].reshape(-1)[start:stop])

    def test_fingerprint(self, place, saved):
        expected = digest(saved)
        for reads_first in (False, True):
            source = open_source(place(saved))
            if reads_first:
                read_by_threads(source, slices(source), 2)
            assert source.fingerprint() == expected

    def test_where(self, place, saved):
        folder = place(saved)
        source = open_source(folder)
        for file, names in source.files.items():
            assert all(source.where(name) == f"{folder}/{file}" for name in names)

    def test_what_is_not_there(self, place, saved):
        source = open_source(place(saved))
        with pytest.raises(CheckpointError, match="holds no tensor z"):
            source.read("z", 0, 1)
        with pytest.raises(IndexError, match=r"elements 0 to 8 of 7"):
            source.read("b.small", 0, 8)


@pytest.mark.parametrize("place", ["stream", "offline"], indirect=True)
class TestSameErrors:
    """A folder that cannot be read is refused in the words that are used of one on this disk."""

    def refusal(self, place, directory):
        here = message(directory)
        folder = place(directory)
        assert message(folder) == here.replace(str(directory), str(folder))
        return here

    def test_an_index_that_names_what_is_not_there(self, place, tmp_path):
        directory = save(tmp_path / "model", num_shards=3)
        (directory / "model-00002-of-00003.safetensors").unlink()
        assert "names shards that are missing" in self.refusal(place, directory)

    @pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b", 3, None])
    def test_an_index_that_leads_out(self, place, tmp_path, shard):
        directory = save(tmp_path / "model", num_shards=3)
        write_index(directory, lambda weight_map: {**weight_map, "a.large": shard})
        assert "is no file name of a shard" in self.refusal(place, directory)

    @pytest.mark.parametrize(
        "change",
        [
            lambda found: {**found, "z": next(iter(found.values()))},
            lambda found: {n: s for n, s in found.items() if n != "a.large"},
            lambda found: {**found, "a.large": found["b.small"]},
        ],
    )
    def test_an_index_that_disagrees_with_its_shards(self, place, tmp_path, change):
        directory = save(tmp_path / "model", num_shards=3)
        write_index(directory, change)
        assert "its shards disagree" in self.refusal(place, directory)

    @pytest.mark.parametrize("content", [b"[]", b"{", b'{"weight_map": {}}', b'{"weight_map": 3}'])
    def test_an_index_that_is_none(self, place, tmp_path, content):
        directory = save(tmp_path / "model", num_shards=3)
        (directory / "model.safetensors.index.json").write_bytes(content)
        assert "model.safetensors.index.json" in message(directory)
        assert "model.safetensors.index.json" in message(place(directory))

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"abc", "truncated"),
            (b"\xff" * 9, "truncated"),
            ((10**9).to_bytes(8, "little") + b"{}", "truncated"),
            ((2).to_bytes(8, "little") + b"[]", "expected a JSON object"),
            ((2).to_bytes(8, "little") + b"{}x", "longer than its header says"),
        ],
    )
    def test_a_file_that_is_no_checkpoint(self, place, tmp_path, content, words):
        directory = folders.save(tmp_path / "model", {})
        (directory / "model.safetensors").write_bytes(content)
        assert words in self.refusal(place, directory)

    def test_a_shard_that_was_cut(self, place, tmp_path):
        directory = save(tmp_path / "model", num_shards=3)
        shard = directory / "model-00001-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-5])
        assert "truncated" in self.refusal(place, directory)

    def test_pickles_only(self, place, tmp_path):
        directory = folders.save(tmp_path / "model", {})
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
        assert "found pickles only" in self.refusal(place, directory)

    def test_a_quantised_one(self, place, tmp_path):
        config = {"quantization_config": {"quant_method": "gptq"}}
        directory = save(tmp_path / "model", config=config)
        assert "is quantised by gptq" in self.refusal(place, directory)

    def test_no_weights(self, place, tmp_path):
        directory = folders.save(tmp_path / "model", {})
        (directory / "model.safetensors").unlink()
        assert "holds no weights" in self.refusal(place, directory)


class TestStream:
    """What reading costs."""

    def test_each_byte_once(self, hub, saved):
        source = open_source(remote.folder(hub, saved))
        source.expect(source.names())
        read_by_threads(source, slices(source), 3)
        source.fingerprint()
        for file in source.files:
            assert hub.pulled_bytes(file) == (saved / file).stat().st_size
        assert source.directory.unchecked == []

    def test_one_tensor_costs_itself_and_the_heads(self, hub, saved):
        source = open_source(remote.folder(hub, saved))
        read_by_threads(source, [s for s in slices(source) if s[0] == "a.large"], 3)
        heads = sum(min(1 << 16, (saved / file).stat().st_size) for file in source.files)
        num_bytes = source.info("a.large").nbytes
        assert num_bytes < hub.pulled_bytes("*.safetensors") <= num_bytes + heads

    def test_order_of_another_checkpoint_costs_nothing(self, hub, saved):
        source = open_source(remote.folder(hub, saved))
        names = list(source.names())
        random.Random(2).shuffle(names)
        source.expect(names)
        wanted = sorted(slices(source), key=lambda one: (names.index(one[0]), one[1]))
        read_by_threads(source, wanted, 2)
        for file in source.files:
            assert hub.pulled_bytes(file) == (saved / file).stat().st_size

    @pytest.mark.parametrize("fetch", ["stream", "download"])
    def test_damage_is_found(self, hub, saved, fetch):
        source = open_source(remote.folder(hub, saved, fetch=fetch))
        source.expect(source.names())
        hub.fail(Fault(kind="cdn", method="GET", corrupt_file_at=100_000, times=None))
        with pytest.raises(DamagedTransferError):
            read_in_turn(source)


class TestHeaders:
    """Those of the shards are read several at a time, after the first."""

    NUM_SHARDS = 17
    AT_ONCE = 8

    @pytest.fixture
    def shards(self, tmp_path):
        state = {f"t{number:02}": torch.arange(5) for number in range(self.NUM_SHARDS)}
        return folders.save(tmp_path / "model", state, num_shards=self.NUM_SHARDS)

    def shard(self, number):
        return f"model-{number:05}-of-{self.NUM_SHARDS:05}.safetensors"

    def asked(self, hub):
        return [(r.kind, r.file) for r in hub.log if (r.file or "").endswith(".safetensors")]

    def test_are_read_several_at_a_time(self, hub, shards):
        folder = remote.folder(hub, shards)
        together, lock, now, most = threading.Barrier(self.AT_ONCE), threading.Lock(), [0], [0]

        def hold(row):
            if row.kind != "resolve" or row.file in (self.shard(1), None):
                return
            if not row.file.endswith(".safetensors"):
                return
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            together.wait(20)
            time.sleep(0.03)
            with lock:
                now[0] -= 1

        with hub_merges.at_each_request(hub, hold):
            source = open_source(folder)
        assert most[0] == self.AT_ONCE
        assert (source.names(), source.files) == (
            open_source(shards).names(), open_source(shards).files,
        )  # fmt: skip
        every = [(kind, self.shard(1 + n)) for n in range(self.NUM_SHARDS) for kind in KINDS]
        assert sorted(self.asked(hub)) == sorted(every)
        assert self.asked(hub)[:2] == every[:2]  # alone

    @pytest.mark.parametrize("status", [401, 403, 404])
    def test_where_access_is_refused_it_is_asked_for_once(self, hub, shards, status):
        folder = remote.folder(hub, shards)
        hub.fail(Fault(kind="resolve", match="*.safetensors", status=status, times=None))
        with pytest.raises(CheckpointError, match=self.shard(1)):
            open_source(folder)
        assert self.asked(hub) == [("resolve", self.shard(1))]

    def test_the_first_problem_in_order_is_told(self, hub, shards):
        (shards / self.shard(3)).write_bytes(b"\xff" * 100)
        folder = remote.folder(hub, shards)
        hub.fail(Fault(match=self.shard(3), kind="cdn", stall_at=0, stall_seconds=0.3))
        hub.fail(Fault(match=self.shard(5), kind="resolve", status=403))
        with pytest.raises(CheckpointError, match=f"{self.shard(3)}: truncated"):
            open_source(folder)
        rows = {row.file: row for row in hub.log if row.fault}
        assert rows[self.shard(5)].status == 403

    def test_a_hub_that_asks_for_patience(self, hub, shards, monkeypatch):
        remote.be_quick(monkeypatch)
        folder = remote.folder(hub, shards)
        for kind in KINDS:
            too_many = {"status": 429, "retry_after": 0.05, "skip": 3, "times": 12}
            hub.fail(Fault(kind=kind, match="*.safetensors", **too_many))
        assert open_source(folder).names() == open_source(shards).names()
        assert sum(row.status == 429 for row in hub.log) == 24

    def test_whole_files_come_one_after_the_other(self, hub, shards, monkeypatch):
        hub_merges.be_small(monkeypatch)
        hub.fail(Fault(kind="cdn", ignore_range=True, times=None))
        source = open_source(remote.folder(hub, shards, fetch="auto"))
        assert source.names() == open_source(shards).names()
        files = [file for _, file in self.asked(hub)]
        assert files == sorted(files)

    def test_ctrl_c_ends_it_at_once(self, hub, shards):
        folder = remote.folder(hub, shards)
        hub.fail(Fault(kind="cdn", stall_at=0, stall_seconds=2, skip=1, times=None))
        timer = threading.Timer(0.5, hub_merges.press_ctrl_c)
        timer.start()
        begun = time.monotonic()
        with hub_merges.nothing_left_running():
            with pytest.raises(KeyboardInterrupt):
                open_source(folder)
            assert time.monotonic() - begun < 1.5
            timer.join()
        # None was begun beside those that were on their way.
        assert len({file for _, file in self.asked(hub)}) == 1 + self.AT_ONCE


def read_in_turn(source):
    for one in slices(source):
        source.read(*one)


def message(folder):
    with pytest.raises(KifmergeError) as caught:
        open_source(folder)
    assert caught.value.exit_code == 3
    return str(caught.value)


def write_index(directory, change):
    path = directory / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": change(weight_map)}))
