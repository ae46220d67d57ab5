"""Importance snapshots: in one file and in shards, whole or not there."""

from __future__ import annotations

import errno
import json
import weakref
from collections.abc import Mapping

import pytest
import safetensors.torch
import torch

from kifmerge.checkpoint.scores import open_scores
from kifmerge.checkpoint.snapshot import (
    DETAIL_FILE,
    TENSOR_FILE,
    read_snapshot,
    write_snapshot,
)
from kifmerge.errors import CheckpointError, TryAgainError

TENSORS = {
    "sensitivity/b.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "uncertainty/b.weight": torch.tensor([[0.5, 0.25], [1.0, 2.0]]),
    "sensitivity/a.bias": torch.tensor([3.0]),
    "uncertainty/a.bias": torch.tensor([2.0]),
}


@pytest.fixture
def snapshot_dir(tmp_path):
    write_snapshot(tmp_path / "snapshot", TENSORS, {"role": "new", "steps": 8})
    return tmp_path / "snapshot"


def change_details(directory, **changes):
    path = directory / DETAIL_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_snapshot_goes_round(snapshot_dir):
    snapshot = read_snapshot(snapshot_dir)
    assert snapshot.names == ("a.bias", "b.weight")
    assert (snapshot.details["role"], snapshot.details["steps"]) == ("new", 8)
    scores = dict(snapshot.scores())
    assert list(scores) == ["a.bias", "b.weight"]
    assert torch.equal(scores["a.bias"], torch.tensor([6.0]))
    assert torch.equal(scores["b.weight"], torch.tensor([[0.5, 0.5], [3.0, 8.0]]))


def test_files_are_those_that_other_tools_read(snapshot_dir):
    assert sorted(path.name for path in snapshot_dir.iterdir()) == [DETAIL_FILE, TENSOR_FILE]
    kept = safetensors.torch.load_file(snapshot_dir / "importance.safetensors")
    assert kept.keys() == TENSORS.keys()
    assert all(torch.equal(kept[key], value) for key, value in TENSORS.items())
    details = json.loads((snapshot_dir / "importance.json").read_text())
    assert (details["format"], details["version"]) == ("kifmerge.importance", 1)


def test_score_kind_is_the_one_recorded(snapshot_dir):
    change_details(snapshot_dir, options={"score": "sensitivity"})
    scores = dict(read_snapshot(snapshot_dir).scores())
    assert torch.equal(scores["b.weight"], TENSORS["sensitivity/b.weight"])


def test_scores_alone_are_a_snapshot_too(tmp_path):
    write_snapshot(tmp_path, {"score/layer/0.weight": torch.ones(2).bfloat16()}, {})
    snapshot = read_snapshot(tmp_path)
    assert snapshot.names == ("layer/0.weight",)
    found = dict(snapshot.scores())["layer/0.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.ones(2).bfloat16())


def test_transposed_and_empty_tensors_are_kept(tmp_path):
    matrix = torch.arange(6.0).reshape(2, 3).T
    write_snapshot(tmp_path, {"score/m": matrix, "score/none": torch.ones(0, 4)}, {})
    scores = dict(read_snapshot(tmp_path).scores())
    assert torch.equal(scores["m"], matrix)
    assert scores["none"].shape == (0, 4)


def test_writing_again_replaces_the_snapshot(snapshot_dir):
    write_snapshot(snapshot_dir, {"score/c": torch.ones(1)}, {"role": "historical"})
    snapshot = read_snapshot(snapshot_dir)
    assert snapshot.names == ("c",)
    assert snapshot.details["role"] == "historical"


class Made(Mapping):
    """Tensors that are made when asked for, or fail to be."""

    def __init__(self, make, keys):
        self.make = make
        self.keys_ = keys
        self.alive = weakref.WeakValueDictionary()
        self.most_alive = 0

    def __getitem__(self, key):
        made = self.make(key)
        self.alive[len(self.alive), key] = made
        self.most_alive = max(self.most_alive, len(self.alive))
        return made

    def __iter__(self):
        return iter(self.keys_)

    def __len__(self):
        return len(self.keys_)


def failing(error):
    def make(key):
        if key == "score/b":
            raise error
        return torch.ones(3)

    return Made(make, ["score/a", "score/b"])


def test_failure_while_rewriting_leaves_a_folder_that_is_no_snapshot(snapshot_dir):
    before = (snapshot_dir / TENSOR_FILE).read_bytes()
    with pytest.raises(RuntimeError, match="boom"):
        write_snapshot(snapshot_dir, failing(RuntimeError("boom")), {})
    with pytest.raises(CheckpointError, match="no importance snapshot"):
        read_snapshot(snapshot_dir)
    assert [path.name for path in snapshot_dir.iterdir()] == [TENSOR_FILE]
    assert (snapshot_dir / TENSOR_FILE).read_bytes() == before


def test_disk_full_while_writing_tensors_is_worth_another_try(tmp_path):
    def make(key):
        if next(asked) > 2:  # in the middle of the file
            raise OSError(errno.ENOSPC, "No space left on device")
        return torch.ones(3)

    asked = iter(range(9))
    with pytest.raises(TryAgainError, match=TENSOR_FILE):
        write_snapshot(tmp_path, Made(make, ["score/a", "score/b"]), {})
    assert list(tmp_path.iterdir()) == []


class TestShards:
    KEYS = ("sensitivity/b.weight", "uncertainty/b.weight")

    @pytest.fixture
    def sharded_dir(self, tmp_path):
        shards = [self.KEYS, ["sensitivity/a.bias", "uncertainty/a.bias"]]
        write_snapshot(tmp_path / "sharded", TENSORS, {"steps": 3}, shards=shards)
        return tmp_path / "sharded"

    def test_hold_what_one_file_would(self, sharded_dir, snapshot_dir):
        found, expected = read_snapshot(sharded_dir), read_snapshot(snapshot_dir)
        assert found.names == expected.names
        assert found.details["steps"] == 3
        one, other = dict(found.scores()), dict(expected.scores())
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert found.tensors().keys() == TENSORS.keys()
        assert all(torch.equal(found.tensors()[key], TENSORS[key]) for key in TENSORS)
        streamed = open_scores(sharded_dir)
        assert torch.equal(streamed.read("b.weight", 0, 4), other["b.weight"].reshape(-1))

    def test_are_files_that_other_tools_read(self, sharded_dir):
        names = [f"importance-0000{k}-of-00002.safetensors" for k in (1, 2)]
        index = "importance.safetensors.index.json"
        assert sorted(p.name for p in sharded_dir.iterdir()) == [*names, DETAIL_FILE, index]
        kept = safetensors.torch.load_file(sharded_dir / names[0])
        assert kept.keys() == set(self.KEYS)
        content = json.loads((sharded_dir / index).read_text())
        assert content["metadata"] == {"total_size": 10 * 4}
        assert content["weight_map"] == {key: names[key not in self.KEYS] for key in TENSORS}

    def test_missing_one_is_named(self, sharded_dir):
        (sharded_dir / "importance-00002-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match="importance-00002-of-00002"):
            read_snapshot(sharded_dir)

    def test_replace_one_file_and_the_other_way_round(self, sharded_dir):
        before = sorted(path.name for path in sharded_dir.iterdir())
        write_snapshot(sharded_dir, TENSORS, {})
        assert sorted(p.name for p in sharded_dir.iterdir()) == [DETAIL_FILE, TENSOR_FILE]
        assert len(read_snapshot(sharded_dir).names) == 2
        write_snapshot(sharded_dir, TENSORS, {}, shards=[self.KEYS, list(TENSORS)[2:]])
        assert sorted(path.name for path in sharded_dir.iterdir()) == before
        foreign = sharded_dir / "importance-of-mine.safetensors"
        foreign.write_text("precious")
        write_snapshot(sharded_dir, TENSORS, {})
        assert foreign.read_text() == "precious"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_the_one_asked_for(tmp_path, dtype):
    values = torch.tensor([1.0, 1.001, 3e38, 1e-30])
    write_snapshot(tmp_path, {"score/w": values}, {}, dtype=dtype)
    found = safetensors.torch.load_file(tmp_path / TENSOR_FILE)["score/w"]
    assert found.dtype == dtype
    assert torch.equal(found, values.to(dtype))


def test_large_tensors_are_written_whole(tmp_path):
    values = torch.arange((1 << 23) + 5, dtype=torch.float32)
    write_snapshot(tmp_path, {"score/w": values, "score/x": values[:3]}, {})
    found = read_snapshot(tmp_path).tensors()
    assert torch.equal(found["score/w"], values)
    assert torch.equal(found["score/x"], values[:3])


def test_same_tensor_may_have_two_names(tmp_path):
    values = torch.ones(4)
    write_snapshot(tmp_path, {"score/w": values, "score/tied": values}, {})
    assert read_snapshot(tmp_path).names == ("tied", "w")


def test_tensors_that_are_made_when_asked_for_are_not_kept(tmp_path):
    keys = [f"score/{letter}" for letter in "abcdefgh"]
    made = Made(lambda key: torch.full((3,), float(ord(key[-1]))), keys)
    write_snapshot(tmp_path, made, {}, shards=[keys[:4], keys[4:]])
    assert made.most_alive <= 2
    assert torch.equal(read_snapshot(tmp_path).tensors()["score/h"], torch.full((3,), 104.0))


def test_newer_version_is_refused(snapshot_dir):
    change_details(snapshot_dir, version=2)
    with pytest.raises(CheckpointError, match=r"importance\.json.*version 1.*found.*version 2"):
        read_snapshot(snapshot_dir)


def test_another_format_is_refused(snapshot_dir):
    change_details(snapshot_dir, format="something.else")
    with pytest.raises(CheckpointError, match=r"found something\.else"):
        read_snapshot(snapshot_dir)


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -1])
def test_truncated_tensor_file_is_named(snapshot_dir, kept_bytes):
    path = snapshot_dir / TENSOR_FILE
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError) as caught:
        read_snapshot(snapshot_dir)
    assert str(path) in str(caught.value)


def test_missing_tensor_file_is_named(snapshot_dir):
    (snapshot_dir / TENSOR_FILE).unlink()
    with pytest.raises(CheckpointError) as caught:
        read_snapshot(snapshot_dir)
    assert f"{snapshot_dir}: expected {TENSOR_FILE}" in str(caught.value)


def test_missing_details_are_named(snapshot_dir):
    (snapshot_dir / DETAIL_FILE).unlink()
    with pytest.raises(CheckpointError) as caught:
        read_snapshot(snapshot_dir)
    assert str(snapshot_dir) in str(caught.value)
    assert DETAIL_FILE in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b"[]",
        b"3",
        b'"\xff"',
    ],
)
def test_damaged_details_are_named(snapshot_dir, content):
    (snapshot_dir / DETAIL_FILE).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_snapshot(snapshot_dir)
    assert str(snapshot_dir / DETAIL_FILE) in str(caught.value)
