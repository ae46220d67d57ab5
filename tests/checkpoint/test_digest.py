"""Digests: of content alone, the same while it is read as afterwards, changed by any bit."""

import hashlib
import json
import random
from concurrent.futures import ThreadPoolExecutor

import folders
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.checkpoint import digest as digest_module
from kifmerge.checkpoint.digest import TensorDigests, digest, file_sha256, stem_of
from kifmerge.checkpoint.header import bytes_of
from kifmerge.checkpoint.pieces import pieces, read_piece
from kifmerge.checkpoint.source import TensorInfo, open_source
from kifmerge.errors import CheckpointError

TENSORS = {
    **folders.random_tensors(0),
    "half": folders.random_tensors(1, {"w": (9, 11)}, torch.bfloat16)["w"],
    "steps": torch.arange(5),
    "flag": torch.tensor(True),
}


def xxh3(tensor):
    return xxhash.xxh3_128(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def read_all(source, *, most_bytes=64, seed=None, threads=1):
    work = list(pieces(source, source.names(), most_bytes=most_bytes))
    if seed is not None:
        random.Random(seed).shuffle(work)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: read_piece(source.read, piece), work))


class TestFolder:
    def test_is_what_its_definition_says(self, tmp_path):
        folders.save(tmp_path, TENSORS, num_shards=2)
        lines = [
            f"model/{name} {str(tensor.dtype)[6:]} {list(tensor.shape)} {xxh3(tensor)}"
            for name, tensor in TENSORS.items()
        ]
        expected = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
        assert digest(tmp_path) == expected

    @given(order=st.permutations(list(TENSORS)), num_shards=st.integers(0, 4))
    def test_shards_and_order_make_no_difference(self, tmp_path_factory, order, num_shards):
        path = tmp_path_factory.mktemp("shards")
        folders.save(path, {name: TENSORS[name] for name in order}, num_shards=num_shards)
        expected = digest(folders.save(tmp_path_factory.mktemp("plain"), TENSORS))
        assert digest(path) == expected == open_source(path).fingerprint()

    def test_every_bit_counts(self, tmp_path):
        path = folders.save(tmp_path, TENSORS) / "model.safetensors"
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        seen = {digest(tmp_path)}
        places = range(header, len(content), 7)
        for place in places:
            for bit in (0, 6):
                changed = bytearray(content)
                changed[place] ^= 1 << bit
                path.write_bytes(changed)
                seen.add(digest(tmp_path))
        assert len(seen) == 1 + 2 * len(places)

    @pytest.mark.parametrize(
        "change",
        [
            {"d": None}, {"new": torch.zeros(1)}, {"b.weight": TENSORS["b.weight"].reshape(7, 5)},
            {"half": TENSORS["half"].view(torch.float16)}, {"flag": torch.tensor(False)},
            {"c.empty": torch.zeros(2, 0)}, {"a.bias": TENSORS["a.bias"].flip(0)},
        ],
        ids=lambda change: next(iter(change)),
    )  # fmt: skip
    def test_names_dtypes_shapes_and_values_count(self, tmp_path, change):
        other = {k: v for k, v in {**TENSORS, **change}.items() if v is not None}
        before = digest(folders.save(tmp_path / "1", TENSORS))
        assert digest(folders.save(tmp_path / "2", other)) != before

    def test_two_tensors_that_change_names(self, tmp_path):
        first = {"a": torch.zeros(3), "b": torch.ones(3)}
        second = {"a": torch.ones(3), "b": torch.zeros(3)}
        folders.save(tmp_path / "1", first)
        folders.save(tmp_path / "2", second)
        assert digest(tmp_path / "1") != digest(tmp_path / "2")

    def test_configuration_does_not_count_and_another_artifact_does(self, tmp_path):
        folders.save(tmp_path / "model", TENSORS)
        before = digest(tmp_path / "model")
        (tmp_path / "model/config.json").write_text(json.dumps({"other": 1}))
        (tmp_path / "model/README.md").write_text("text")
        assert digest(tmp_path / "model") == before
        adapter = folders.save(tmp_path / "adapter", TENSORS, stem="adapter_model")
        assert digest(adapter) != before

    @pytest.mark.parametrize("name", ["units.json", "memory.jsonl"])
    def test_units_and_rows_count_as_they_are(self, tmp_path, name):
        (tmp_path / name).write_text("{}")
        before = digest(tmp_path)
        assert before is not None
        (tmp_path / name).write_text("{ }")
        assert digest(tmp_path) not in (before, None)

    def test_file_is_its_sha256(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(bytes(range(256)) * 9000)
        assert digest(path) == file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_nothing_there(self, tmp_path):
        assert digest(tmp_path / "org/name") is None
        assert digest(tmp_path) is None

    def test_damaged_file_is_named(self, tmp_path):
        path = folders.save(tmp_path, TENSORS) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=str(path)):
            digest(tmp_path)

    def test_tensor_larger_than_a_block(self, tmp_path, monkeypatch):
        folders.save(tmp_path, TENSORS)
        before = digest(tmp_path)
        monkeypatch.setattr(digest_module, "BLOCK_BYTES", 16)
        assert digest(tmp_path) == before


class TestWhileReading:
    @pytest.mark.parametrize("seed", [None, 0, 1])
    @pytest.mark.parametrize("threads", [1, 4])
    @pytest.mark.parametrize("num_shards", [0, 3])
    def test_is_that_of_the_folder_and_reads_no_more(self, tmp_path, num_shards, threads, seed):
        source = open_source(folders.save(tmp_path, TENSORS, num_shards=num_shards))
        read_all(source, seed=seed, threads=threads)
        expected = {n: xxh3(t) for n, t in TENSORS.items() if t.numel()}
        assert source.digests.finished() == expected
        before = digest(tmp_path)
        self.spoil(tmp_path)
        assert digest(tmp_path) != before
        assert source.fingerprint() == before

    def spoil(self, directory):
        """Another value everywhere: who reads it again finds it out."""
        for path in directory.glob("*.safetensors"):
            content = bytearray(path.read_bytes())
            for place in range(8 + int.from_bytes(content[:8], "little"), len(content)):
                content[place] ^= 1
            path.write_bytes(content)

    def test_read_in_part(self, tmp_path):
        source = open_source(folders.save(tmp_path, TENSORS))
        source.read("b.weight", 0, 8)
        source.read("b.weight", 20, 35)
        source.read("a.bias", 0, 4)
        assert source.digests.finished() == {"a.bias": xxh3(TENSORS["a.bias"])}
        assert source.fingerprint() == digest(tmp_path)

    def test_read_again_and_again(self, tmp_path):
        """As for thresholds, in other pieces each time."""
        source = open_source(folders.save(tmp_path, TENSORS))
        for most_bytes in (32, 100, 4096):
            read_all(source, most_bytes=most_bytes)
        assert source.fingerprint() == digest(tmp_path)

    def test_stale_files_beside_the_weights_are_not_taken_for_them(self, tmp_path):
        """A single file goes before shards that an earlier saving has left."""
        folders.save(tmp_path, folders.random_tensors(7), num_shards=2)
        source = open_source(folders.save(tmp_path, TENSORS))
        read_all(source)
        assert source.fingerprint() == digest(tmp_path)


class TestTensorDigests:
    NUMEL = 40
    VALUES = torch.arange(NUMEL, dtype=torch.float32)
    INFO = TensorInfo(torch.float32, (NUMEL,))

    def feed(self, digests, *spans):
        for start, stop in spans:
            digests.feed("w", self.INFO, 4 * start, bytes_of(self.VALUES[start:stop]))

    @given(cuts=st.sets(st.integers(1, NUMEL - 1), max_size=6), data=st.data())
    def test_any_parts_in_any_order(self, cuts, data):
        spans = list(zip([0, *sorted(cuts)], [*sorted(cuts), self.NUMEL], strict=True))
        digests = TensorDigests()
        self.feed(digests, *data.draw(st.permutations(spans)))
        assert digests.finished() == {"w": xxh3(self.VALUES)}

    def test_missing_and_overlapping_parts_give_none_or_the_right_one(self):
        digests = TensorDigests()
        self.feed(digests, (0, 10), (20, 40))
        assert digests.finished() == {}
        self.feed(digests, (5, 15))
        assert digests.finished() == {}
        self.feed(digests, (10, 20))
        assert digests.finished() == {"w": xxh3(self.VALUES)}

    def test_too_many_parts_beyond_a_gap_are_forgotten(self, monkeypatch):
        monkeypatch.setattr(digest_module, "MOST_PENDING_BYTES", 40)
        digests = TensorDigests()
        self.feed(digests, *[(start, start + 5) for start in range(35, -1, -5)])
        assert digests.finished() == {}
        self.feed(digests, (0, 20), (5, 35), (10, 40), (35, 40))
        assert digests.finished() in ({}, {"w": xxh3(self.VALUES)})
        self.feed(digests, *[(start, start + 5) for start in range(0, 40, 5)])
        assert digests.finished() == {"w": xxh3(self.VALUES)}

    def test_what_is_known_is_taken_over(self):
        digests = TensorDigests()
        digests.know({"w": "0123", "v": "4567"})
        self.feed(digests, (0, 40))
        assert digests.finished() == {"w": "0123", "v": "4567"}
        assert digests.finished(["v", "other"]) == {"v": "4567"}


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("model.safetensors", "model"),
        ("model-00001-of-00003.safetensors", "model"),
        ("adapter_model.safetensors", "adapter_model"),
        ("importance-00010-of-00010.safetensors", "importance"),
        ("my-1-of-2-model.safetensors", "my-1-of-2-model"),
        ("mask.safetensors", "mask"),
    ],
)
def test_stem_is_the_name_without_a_shard_s_number(name, stem):
    assert stem_of(name) == stem
