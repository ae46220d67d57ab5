"""Files of parts, on one process; test_fsdp.py has several."""

import pytest
import safetensors.torch
import torch

from kifmerge.checkpoint.gathering import KeptTensors, Part, write_parts
from kifmerge.checkpoint.header import TensorInfo
from kifmerge.checkpoint.ranks import ALONE
from kifmerge.errors import CheckpointError


def part(dtype=torch.float32, **tensors):
    return Part(
        infos={key: TensorInfo(dtype, tuple(value.shape)) for key, value in tensors.items()},
        gather=lambda: tensors,
    )


def test_file_holds_all_parts_in_their_dtypes(tmp_path):
    matrix, empty = torch.randn(3, 2), torch.ones(0, 4)
    write_parts(
        tmp_path / "new", "some", [part(a=matrix, b=empty), part(torch.bfloat16, c=matrix)], ALONE
    )
    found = safetensors.torch.load_file(tmp_path / "new" / "some.safetensors")
    assert found.keys() == {"a", "b", "c"}
    assert torch.equal(found["a"], matrix)
    assert found["b"].shape == (0, 4)
    assert torch.equal(found["c"], matrix.bfloat16())


def test_earlier_shards_go(tmp_path):
    for name in ("some-00001-of-00002.safetensors", "some.safetensors.index.json", "other"):
        (tmp_path / name).write_text("{}")
    write_parts(tmp_path, "some", [part(a=torch.ones(2))], ALONE)
    assert {path.name for path in tmp_path.iterdir()} == {"some.safetensors", "other"}


def test_what_cannot_be_written_is_told_once_all_have_gathered(tmp_path):
    gathered = []
    incomplete = Part(infos={"a": TensorInfo(torch.float32, (2,))}, gather=dict)
    last = Part(
        infos={"b": TensorInfo(torch.float32, (2,))},
        gather=lambda: gathered.append("b") or {"b": torch.ones(2)},
    )
    with pytest.raises(CheckpointError, match=r"(?s)could not be written.*KeyError: 'a'"):
        write_parts(tmp_path, "some", [incomplete, last], ALONE)
    assert gathered == ["b"]
    assert not list(tmp_path.iterdir())


def test_kept_tensors_are_read_when_asked_for(tmp_path):
    write_parts(tmp_path, "some", [part(a=torch.ones(2), b=torch.zeros(1, 3))], ALONE)
    kept = KeptTensors(tmp_path, "some")
    assert list(kept) == ["a", "b"]
    assert torch.equal(kept["b"], torch.zeros(1, 3))
    others = kept.without({"a"})
    assert (list(others), len(others), len(kept)) == (["b"], 1, 2)
    with pytest.raises(KeyError, match="a"):
        others["a"]
    with pytest.raises(CheckpointError):
        KeptTensors(tmp_path, "none")
