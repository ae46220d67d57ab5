import json

import folders
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.checkpoint.mask import MaskSink, MaskSource, pack_bits, unpack_bits
from kifmerge.checkpoint.pieces import pieces, read_piece, split_piece
from kifmerge.checkpoint.source import MemorySource, TensorInfo
from kifmerge.errors import CheckpointError

MASKS = {name: tensor > 0 for name, tensor in folders.random_tensors(3).items()}
DETAILS = {"threshold": 0.5, "fraction": 0.2, "scope": "global", "snapshot_digest": "abc"}


def write(directory, masks, most_bytes=None):
    directory.mkdir(exist_ok=True)
    source = MemorySource(masks)
    sink = MaskSink(directory, ((n, tuple(m.shape)) for n, m in masks.items()), DETAILS)
    for piece in pieces(source, source.names(), most_bytes=most_bytes):
        for part, values in split_piece(read_piece(source.read, piece), piece):
            sink.add(part.name, part.start, values)
    sink.commit()
    return directory


@pytest.fixture
def mask_dir(tmp_path):
    return write(tmp_path / "mask", MASKS)


@given(st.lists(st.booleans(), max_size=40))
def test_bits_lie_as_the_format_says(bits):
    packed = pack_bits(torch.tensor(bits, dtype=torch.bool))
    expected = [
        sum(bit << place for place, bit in enumerate(bits[start : start + 8]))
        for start in range(0, len(bits), 8)
    ]
    assert packed.tolist() == expected
    unpacked = unpack_bits(packed).tolist()
    assert unpacked[: len(bits)] == bits
    assert not any(unpacked[len(bits) :])


@pytest.mark.parametrize("most_bytes", [1, 64, None])
def test_mask_goes_round_slice_by_slice(tmp_path, most_bytes):
    source = MaskSource(write(tmp_path / "mask", MASKS, most_bytes))
    assert sorted(source.names()) == sorted(MASKS)
    for name, mask in MASKS.items():
        assert source.info(name) == TensorInfo(torch.bool, tuple(mask.shape))
        flat = mask.reshape(-1)
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1):
                assert torch.equal(source.read(name, start, stop), flat[start:stop])


def test_files_are_those_that_other_tools_read(mask_dir):
    kept = safetensors.torch.load_file(mask_dir / "mask.safetensors")
    assert {name: len(tensor) for name, tensor in kept.items()} == {
        "b.weight": 5, "a.weight": 2, "a.bias": 1, "c.empty": 0, "d": 1,
    }  # fmt: skip
    details = json.loads((mask_dir / "mask.json").read_text())
    assert (details["format"], details["version"]) == ("kifmerge.mask", 1)
    assert details["shapes"] == {name: list(shape) for name, shape in folders.SHAPES.items()}
    assert {key: details[key] for key in DETAILS} == DETAILS


def test_slices_outside_and_unknown_names_are_errors(mask_dir):
    source = MaskSource(mask_dir)
    with pytest.raises(IndexError, match=r"a\.bias: elements 0 to 5 of 4"):
        source.read("a.bias", 0, 5)
    with pytest.raises(CheckpointError, match="no mask of other"):
        source.read("other", 0, 1)


def test_parts_that_fill_no_whole_bytes_are_refused(tmp_path):
    sink = MaskSink(tmp_path, [("w", (20,))], DETAILS)
    for start, length in [(4, 16), (0, 12)]:
        with pytest.raises(ValueError, match="do not fill whole bytes"):
            sink.add("w", start, torch.zeros(length, dtype=torch.bool))


def test_unfinished_mask_is_no_mask(tmp_path):
    sink = MaskSink(tmp_path, [("w", (20,))], DETAILS)
    sink.add("w", 0, torch.zeros(8, dtype=torch.bool))
    with pytest.raises(ValueError, match="w: elements 1 to 3 are missing"):
        sink.commit()
    with pytest.raises(CheckpointError, match=r"holds no mask: no mask\.json"):
        MaskSource(tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": 2}, "found kifmerge.mask version 2"),
        ({"format": "kifmerge.importance"}, "found kifmerge.importance"),
        ({"shapes": None}, "expected shapes"),
        ({"shapes": {"d": [-1]}}, "expected shapes"),
        ({"shapes": {**folders.SHAPES, "a.bias": [9]}}, r"a\.bias: expected uint8 \[2\]"),
        ({"shapes": {**folders.SHAPES, "e": [1]}}, "e: expected uint8"),
        ({"shapes": {"a.bias": [4]}}, r"a\.weight: expected no such tensor"),
    ],
)
def test_details_that_do_not_fit_are_refused(mask_dir, changes, match):
    path = mask_dir / "mask.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=match) as caught:
        MaskSource(mask_dir)
    assert str(path) in str(caught.value)


def test_truncated_mask_is_named(mask_dir):
    path = mask_dir / "mask.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        MaskSource(mask_dir)
    assert str(path) in str(caught.value)
