import json

import pytest
import safetensors
import safetensors.torch
import torch

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


def test_failure_while_rewriting_leaves_a_folder_that_is_no_snapshot(snapshot_dir, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(RuntimeError, match="boom"):
        write_snapshot(snapshot_dir, TENSORS, {})
    with pytest.raises(CheckpointError, match="no importance snapshot"):
        read_snapshot(snapshot_dir)
    assert [path.name for path in snapshot_dir.iterdir()] == [TENSOR_FILE]


def test_disk_full_while_writing_tensors_is_worth_another_try(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(TryAgainError, match=TENSOR_FILE):
        write_snapshot(tmp_path, TENSORS, {})


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
    assert str(snapshot_dir / TENSOR_FILE) in str(caught.value)


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
