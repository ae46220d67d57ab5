import itertools
import json
import os
from pathlib import Path

import faults
import folders
import pytest
import safetensors.torch
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.checkpoint.header import header_of
from kifmerge.checkpoint.pieces import pieces, read_piece, split_piece
from kifmerge.checkpoint.source import MemorySource, TensorInfo, open_source
from kifmerge.checkpoint.workers import peak_bytes
from kifmerge.errors import CheckpointError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]


def tensors():
    made = folders.random_tensors(0)
    for dtype in DTYPES:
        made[f"typed.{str(dtype)[6:]}"] = (torch.arange(11) % 3).to(dtype)
    made["typed.float8"] = torch.arange(5.0).to(torch.float8_e4m3fn)
    return made


def make_single(directory, **changes):
    return open_source(folders.save(directory, {**tensors(), **changes}))


def make_sharded(directory, **changes):
    return open_source(folders.save(directory, {**tensors(), **changes}, num_shards=3))


def make_adapter(directory, **changes):
    return open_source(folders.save(directory, {**tensors(), **changes}, stem="adapter_model"))


def make_memory(directory, **changes):
    return MemorySource({**tensors(), **changes})


@pytest.mark.parametrize("make", [make_single, make_sharded, make_adapter, make_memory])
class TestContract:
    """What every source does."""

    def test_names_and_infos_are_known(self, make, tmp_path):
        source, expected = make(tmp_path), tensors()
        assert sorted(source.names()) == sorted(expected)
        for name, tensor in expected.items():
            assert source.info(name) == TensorInfo(tensor.dtype, tuple(tensor.shape))
            assert source.info(name).nbytes == tensor.nbytes

    def test_every_slice_is_that_of_the_flat_tensor(self, make, tmp_path):
        source = make(tmp_path)
        for name, tensor in tensors().items():
            flat = tensor.reshape(-1)
            for start in range(len(flat) + 1):
                for stop in {start, (start + len(flat) + 1) // 2, len(flat)}:
                    found = source.read(name, start, stop)
                    expected = flat[start:stop]
                    assert found.shape == expected.shape
                    assert found.dtype == expected.dtype
                    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))

    def test_elements_beyond_the_end_are_no_slice(self, make, tmp_path):
        source = make(tmp_path)
        for start, stop in [(0, 36), (-1, 3), (3, 2)]:
            with pytest.raises(IndexError, match=r"b\.weight"):
                source.read("b.weight", start, stop)

    def test_unknown_name_is_an_error(self, make, tmp_path):
        source = make(tmp_path)
        for call in (source.info, lambda name: source.read(name, 0, 1)):
            with pytest.raises(CheckpointError, match=r"holds no tensor b\.wight"):
                call("b.wight")

    def test_where_names_something(self, make, tmp_path):
        where = make(tmp_path).where("a.bias")
        assert where == "memory" or Path(where).is_file()

    def test_fingerprint_tells_weights_apart(self, make, tmp_path):
        first, again = make(tmp_path / "1").fingerprint(), make(tmp_path / "2").fingerprint()
        other = make(tmp_path / "3", d=torch.tensor(2.0)).fingerprint()
        assert first == again != other

    def test_pieces_go_over_every_element_once(self, make, tmp_path):
        source, expected = make(tmp_path), tensors()
        for most_bytes in (1, 64, 100, None):
            seen = {name: [] for name in expected}
            for piece in pieces(source, source.names(), most_bytes=most_bytes):
                values = read_piece(source.read, piece)
                if most_bytes is not None:
                    assert values.numel() <= max(most_bytes // 32 * 8, 8)
                for part, own in split_piece(values, piece):
                    assert part.start % 8 == 0
                    seen[part.name].append(own)
            for name, parts in seen.items():
                flat = expected[name].reshape(-1)
                found = torch.cat(parts) if parts else flat[:0]
                assert torch.equal(found.view(torch.uint8), flat.view(torch.uint8))


@given(st.lists(st.integers(0, 100), max_size=8), st.integers(1, 400))
def test_pieces_are_as_few_as_their_order_allows(sizes, most_bytes):
    source = MemorySource({str(n): torch.zeros(size) for n, size in enumerate(sizes)})
    limit = max(most_bytes // 4 // 8, 1) * 8
    numels = [
        [part.stop - part.start for part in piece]
        for piece in pieces(source, source.names(), most_bytes=most_bytes)
    ]
    assert sum(map(sum, numels)) == sum(sizes)
    assert all(sum(piece) <= limit for piece in numels)
    assert all(sum(a) + b[0] > limit for a, b in itertools.pairwise(numels))


class TestMemory:
    def test_later_changes_are_seen(self):
        live = torch.zeros(2, 2)
        source = MemorySource({"w": live})
        live[1, 0] = 3.0
        assert source.read("w", 2, 4).tolist() == [3.0, 0.0]

    def test_transposed_tensor_is_read_row_by_row(self):
        matrix = torch.arange(6.0).reshape(2, 3).T
        assert MemorySource({"w": matrix}).read("w", 1, 4).tolist() == [3.0, 1.0, 4.0]


class TestFolder:
    def test_real_model_in_shards(self, tmp_path):
        model = tiny.llama()
        model.save_pretrained(tmp_path, max_shard_size="5KB")
        source = open_source(tmp_path)
        assert len(source.files) > 2
        for name, tensor in model.state_dict().items():
            found = source.read(name, 0, tensor.numel()).view(tensor.shape)
            assert torch.equal(found, tensor)

    def test_real_adapter(self, tmp_path):
        model = tiny.lora_llama()
        model.save_pretrained(tmp_path)
        source = open_source(tmp_path)
        assert (source.stem, len(source.names())) == ("adapter_model", 4)
        expected = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
        assert sorted(expected) == sorted(source.names())

    def test_slice_costs_its_own_bytes(self, tmp_path):
        """A tensor of 64 GiB, its file without one block on the disk."""
        info = TensorInfo(torch.float32, (1 << 17, 1 << 17))
        first, placed = header_of([("huge", info)])
        path = tmp_path / "model.safetensors"
        path.write_bytes(first)
        end = placed["huge"].offset + info.nbytes
        os.truncate(path, end)
        with path.open("r+b") as file:
            file.seek(end - 8)
            file.write(torch.tensor([1.5, 2.5]).numpy().tobytes())

        def read(say):
            before = peak_bytes()
            source = open_source(tmp_path)
            values = source.read("huge", info.numel - 3, info.numel).tolist()
            say({"values": values, "bytes": peak_bytes() - before})

        found = faults.fork(read).end().said()  # its peak is not that of the tests before
        assert found["values"] == [0.0, 1.5, 2.5]
        assert found["bytes"] < 50_000_000

    def test_file_that_changes_is_not_read_on(self, tmp_path):
        source = make_single(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while"):
            source.read("a.bias", 0, 2)

    def test_single_file_goes_before_an_index(self, tmp_path):
        folders.save(tmp_path, {"old": torch.zeros(1)}, num_shards=1)
        folders.save(tmp_path, {"new": torch.zeros(1)})
        assert open_source(tmp_path).names() == ("new",)


def refused(directory, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        open_source(directory)
    assert str(directory) in str(caught.value)
    return str(caught.value)


class TestRefusals:
    def test_no_such_folder(self, tmp_path):
        refused(tmp_path / "none", "no such folder")

    def test_no_weights(self, tmp_path):
        refused(tmp_path, r"holds no weights: expected model\.safetensors or")

    def test_adapter_without_weights(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        refused(tmp_path, r"expected adapter_model\.safetensors")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_pickles_only(self, tmp_path, name):
        torch.save({"w": torch.zeros(1)}, tmp_path / name)
        assert name in refused(tmp_path, "pickles only .* save_pretrained")

    @pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
    def test_quantised(self, tmp_path, method):
        config = {"quantization_config": {"quant_method": method}}
        folders.save(tmp_path, tensors(), config=config)
        refused(tmp_path, f"is quantised by {method}")

    def test_quantised_by_nobody_knows_what(self, tmp_path):
        folders.save(tmp_path, tensors(), config={"quantization_config": {"bits": 4}})
        refused(tmp_path, "is quantised by an unnamed method")

    @pytest.mark.parametrize("num_kept", [0, 7, 8, 100, -1])
    def test_truncated_file(self, tmp_path, num_kept):
        path = folders.save(tmp_path, tensors()) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:num_kept])
        assert str(path) in refused(tmp_path, "truncated")

    def test_truncated_shard(self, tmp_path):
        folders.save(tmp_path, tensors(), num_shards=2)
        path = tmp_path / "model-00002-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert str(path) in refused(tmp_path, "truncated: expected .* bytes")

    def test_file_with_more_than_its_header_says(self, tmp_path):
        path = folders.save(tmp_path, tensors()) / "model.safetensors"
        path.write_bytes(path.read_bytes() + b"\0")
        refused(tmp_path, "longer than its header says")

    def test_missing_shard(self, tmp_path):
        folders.save(tmp_path, tensors(), num_shards=3)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        refused(tmp_path, r"(?s)shards that are missing.*model-00002-of-00003\.safetensors")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                {"b.weight": "model-00002-of-00002.safetensors"},
                r"b\.weight: expected in model-00002",
            ),
            ({"new": "model-00001-of-00002.safetensors"}, "new: .* found in no shard"),
            ({"b.weight": None}, "is no file name"),
            ({"b.weight": "../model-00001-of-00002.safetensors"}, "is no file name"),
            ({"b.weight": ["x"]}, "is no file name"),
        ],
    )
    def test_index_that_does_not_fit(self, tmp_path, change, match):
        folders.save(tmp_path, folders.random_tensors(0), num_shards=2)
        path = tmp_path / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"].update(change)
        path.write_text(json.dumps(index))
        refused(tmp_path, match)

    def test_tensor_that_the_index_leaves_out(self, tmp_path):
        folders.save(tmp_path, folders.random_tensors(0), num_shards=2)
        path = tmp_path / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        del index["weight_map"]["b.weight"]
        path.write_text(json.dumps(index))
        refused(tmp_path, r"b\.weight: expected in no shard, found in model-00001")

    def test_tensor_in_two_shards(self, tmp_path):
        folders.save(tmp_path, folders.random_tensors(0), num_shards=2)
        twice = {"a.weight": torch.zeros(1), "b.weight": torch.zeros(1), "c.empty": torch.zeros(1)}
        safetensors.torch.save_file(twice, tmp_path / "model-00001-of-00002.safetensors")
        refused(tmp_path, r"model-00002-of-00002\.safetensors: a\.weight is in another shard too")

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
    def test_damaged_index(self, tmp_path, text):
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(text)
        assert str(path) in refused(tmp_path, "index")

    @pytest.mark.parametrize(
        ("header", "match"),
        [
            (b"{", "not a safetensors header"),
            (b"[" * 200_000, "not a safetensors header"),
            (b"\xff\xfe", "not a safetensors header"),
            ([], "expected a JSON object"),
            ({"w": 3}, "w: expected dtype, shape and data_offsets"),
            ({"w": {"dtype": "F32", "shape": [2]}}, "w: expected dtype"),
            ({"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, "'F99' is not known"),
            ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "whole numbers"),
            ({"w": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, "whole numbers"),
            ({"w": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, "w: expected dtype"),
            ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, "takes 4 bytes"),
            ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "begins at byte 4"),
            (
                {"w": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}},
                "truncated",
            ),
            (
                b'{"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "w": {}}',
                "twice",
            ),
            (
                {
                    "v": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
                    "w": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]},
                },
                "begins at byte 4",
            ),
        ],
        ids=lambda value: str(value)[:40] if not isinstance(value, str) else None,
    )
    def test_hostile_header(self, tmp_path, header, match):
        path = folders.raw_file(tmp_path / "model.safetensors", header, bytes(8))
        assert str(path) in refused(tmp_path, match)

    @pytest.mark.parametrize("length", [200_000_000, 1 << 63])
    def test_header_length_that_cannot_be(self, tmp_path, length):
        path = folders.raw_file(tmp_path / "model.safetensors", {}, bytes(8), length)
        os.truncate(path, 300_000_000)
        refused(tmp_path, "truncated|no safetensors file")
