import hashlib
import itertools
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import folders
import pytest
import safetensors
import tiny
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import AutoModelForCausalLM

from kifmerge.checkpoint import sink as sink_module
from kifmerge.checkpoint.atomic import whole_folder
from kifmerge.checkpoint.companions import copy_companions
from kifmerge.checkpoint.pieces import pieces, read_piece, split_piece
from kifmerge.checkpoint.sink import (
    FileRecord,
    FolderSink,
    MemorySink,
    layout_of,
    new_layout,
    with_dtype,
)
from kifmerge.checkpoint.source import TensorInfo, open_source
from kifmerge.errors import CheckpointError

CONTENT = {
    **folders.random_tensors(0),
    "half": folders.random_tensors(1, {"w": (9,)}, torch.bfloat16)["w"],
    "whole": torch.arange(10),
}
INFOS = [(n, TensorInfo(t.dtype, tuple(t.shape))) for n, t in CONTENT.items()]
FILES = {
    "single": {"model.safetensors": list(CONTENT)},
    "sharded": {
        "model-1.safetensors": list(CONTENT)[::2],
        "model-2.safetensors": list(CONTENT)[1::2],
    },
}


class Target:
    """A sink, and what it has written."""

    def __init__(self, kind, directory):
        infos = {n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in CONTENT.items()}
        self.directory = directory
        self.live = {name: torch.zeros_like(tensor) for name, tensor in CONTENT.items()}
        if kind == "strided":
            self.live["b.weight"] = torch.zeros(7, 5).T
        if kind in FILES:
            self.layout = {f: [(n, infos[n]) for n in names] for f, names in FILES[kind].items()}
            self.sink = FolderSink(directory, "model", self.layout)
        else:
            self.sink = MemorySink(self.live)

    def written(self):
        on_disk = folders.load(self.directory)
        return on_disk or self.live


@pytest.fixture(params=["single", "sharded", "memory", "strided"])
def target(request, tmp_path):
    return Target(request.param, tmp_path)


@pytest.fixture
def quick_to_switch():
    """Threads take turns so often that what is not guarded goes wrong."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def parts_of(tensors, step):
    return [
        (name, start, tensor.reshape(-1)[start : start + step])
        for name, tensor in tensors.items()
        for start in range(0, tensor.numel(), step)
    ]


def add_all(sink, step, *, backwards=False, but=()):
    parts = parts_of(CONTENT, step)
    for part in reversed(parts) if backwards else parts:
        if part[:2] not in but:
            sink.add(*part)


class TestContract:
    """What every sink does."""

    @pytest.mark.parametrize("backwards", [False, True])
    @pytest.mark.parametrize("step", [1, 3, 8, 100])
    def test_parts_in_any_order_become_the_tensors(self, target, step, backwards):
        add_all(target.sink, step, backwards=backwards)
        target.sink.commit()
        found = target.written()
        assert found.keys() == CONTENT.keys()
        for name, tensor in CONTENT.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)

    @pytest.mark.parametrize("hole", [("b.weight", 0), ("b.weight", 9), ("whole", 9), ("d", 0)])
    def test_a_missing_part_is_noticed(self, target, hole):
        add_all(target.sink, 3, but=[hole])
        with pytest.raises(ValueError, match=f"{hole[0]}: elements {hole[1]} to .* missing"):
            target.sink.commit()

    @pytest.mark.parametrize(
        ("start", "stop"), [(3, 6), (0, 3), (4, 5), (2, 8), (33, 35), (0, 35), (1, 4)]
    )
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_elements_that_come_twice_are_noticed(self, target, start, stop, when):
        """When they come, or when all is said to be there."""
        twice = ("b.weight", start, torch.zeros(stop - start))

        def add_and_commit():
            if when == "before":
                target.sink.add(*twice)
            add_all(target.sink, 3)
            if when == "after":
                target.sink.add(*twice)
            target.sink.commit()

        with pytest.raises(ValueError, match=r"b\.weight: .* came twice"):
            add_and_commit()

    @pytest.mark.parametrize(
        ("name", "start", "values", "match"),
        [
            ("other", 0, torch.zeros(1), "other is none of"),
            ("b.weight", 34, torch.zeros(2), "found elements 34 to 36"),
            ("b.weight", -1, torch.zeros(1), "found elements -1 to 0"),
            ("b.weight", 0, torch.zeros(5, 7), r"\[5, 7\]"),
            ("b.weight", 0, torch.zeros(1).half(), "float16"),
            ("half", 0, torch.zeros(1), "expected a flat part of bfloat16"),
        ],
    )
    def test_what_does_not_belong_is_refused(self, target, name, start, values, match):
        with pytest.raises(ValueError, match=match):
            target.sink.add(name, start, values)


class TestFolder:
    def test_file_is_the_one_that_safetensors_writes(self, tmp_path):
        """The same tensors in the same layout are the same bytes, header and all."""
        model = tiny.llama()
        model.save_pretrained(tmp_path / "from", max_shard_size="5KB")
        copy(tmp_path / "from", tmp_path / "to")
        copy_companions(tmp_path / "from", tmp_path / "to")
        for path in (tmp_path / "from").glob("*.safetensors"):
            assert (tmp_path / "to" / path.name).read_bytes() == path.read_bytes()
        index = "model.safetensors.index.json"
        first, second = (json.loads((tmp_path / d / index).read_text()) for d in ("from", "to"))
        assert first == second
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "to")
        assert tiny.same(tiny.trained(again), tiny.trained(model))

    def test_metadata_says_pt(self, tmp_path):
        folders.save(tmp_path / "from", CONTENT)
        copy(tmp_path / "from", tmp_path / "to")
        with safetensors.safe_open(tmp_path / "to/model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_index_comes_last(self, tmp_path):
        target = Target("sharded", tmp_path)
        add_all(target.sink, 8)
        assert not (tmp_path / "model.safetensors.index.json").exists()
        target.sink.commit()
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in CONTENT.values())
        assert index["metadata"]["total_parameters"] == sum(t.numel() for t in CONTENT.values())
        assert len(open_source(tmp_path).names()) == len(CONTENT)

    def test_single_file_has_no_index(self, tmp_path):
        target = Target("single", tmp_path)
        add_all(target.sink, 8)
        target.sink.commit()
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]

    @pytest.mark.parametrize("order", ["as they lie", "backwards", "at random"])
    @pytest.mark.parametrize("most_pending", [0, 40, 1 << 26])
    @pytest.mark.parametrize("kind", FILES)
    def test_records_are_those_of_the_files(self, tmp_path, monkeypatch, order, most_pending, kind):
        """Hashed while they are written, or read again where parts come in no order."""
        monkeypatch.setattr(sink_module, "MOST_PENDING_BYTES", most_pending)
        target, parts = Target(kind, tmp_path), parts_of(CONTENT, 3)
        if order == "at random":
            random.Random(1).shuffle(parts)
        for part in parts if order != "backwards" else reversed(parts):
            target.sink.add(*part)
        target.sink.commit()
        assert sorted(target.sink.records) == sorted(FILES[kind])
        for name, record in target.sink.records.items():
            content = (tmp_path / name).read_bytes()
            expected = FileRecord(name, len(content), hashlib.sha256(content).hexdigest())
            assert record == expected
            assert FileRecord(**record.as_dict()) == expected

    def test_parts_may_come_from_many_threads(self, tmp_path, quick_to_switch):
        content = torch.arange(60_000, dtype=torch.int16)
        layout = {"model.safetensors": [("w", TensorInfo(content.dtype, (len(content),)))]}
        sink, parts = FolderSink(tmp_path, "model", layout), parts_of({"w": content}, 8)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda part: sink.add(*part), parts))
        sink.commit()
        written = (tmp_path / "model.safetensors").read_bytes()
        assert torch.equal(folders.load(tmp_path)["w"], content)
        sha256 = hashlib.sha256(written).hexdigest()
        assert sink.records["model.safetensors"].sha256 == sha256

    def test_files_written_in_order_are_not_read_again(self, tmp_path, monkeypatch):
        def never(path):
            pytest.fail(f"{path} is read again")

        monkeypatch.setattr(sink_module, "file_sha256", never)
        for kind, files in FILES.items():
            (tmp_path / kind).mkdir()
            target = Target(kind, tmp_path / kind)
            for names in files.values():
                parts = parts_of({name: CONTENT[name] for name in names}, 3)
                for start in range(0, len(parts), 2):
                    for part in reversed(parts[start : start + 2]):  # as two workers may
                        target.sink.add(*part)
            target.sink.commit()

    def test_file_is_finished_as_soon_as_it_is_whole(self, tmp_path):
        target = Target("sharded", tmp_path)
        first = FILES["sharded"]["model-1.safetensors"]
        for part in parts_of({name: CONTENT[name] for name in first}, 8):
            target.sink.add(*part)
        record = target.sink.finish("model-1.safetensors")
        assert target.sink.records == {"model-1.safetensors": record}
        with pytest.raises(ValueError, match=r"model-2\.safetensors: .* missing"):
            target.sink.finish("model-2.safetensors")

    def test_finished_files_are_left_as_they_are(self, tmp_path):
        """As when a merge goes on: the index speaks of them too."""
        target = Target("sharded", tmp_path)
        add_all(target.sink, 8)
        record = target.sink.finish("model-1.safetensors")
        again = FolderSink(tmp_path, "model", target.layout, finished=[record])
        with pytest.raises(ValueError, match=r"b\.weight is none of the tensors to be written"):
            again.add("b.weight", 0, CONTENT["b.weight"].reshape(-1))
        for part in parts_of({n: CONTENT[n] for n in FILES["sharded"]["model-2.safetensors"]}, 8):
            again.add(*part)
        again.commit()
        assert sorted(again.records) == sorted(FILES["sharded"])
        assert sorted(open_source(tmp_path).names()) == sorted(CONTENT)
        found = folders.load(tmp_path)
        assert all(torch.equal(found[name], tensor) for name, tensor in CONTENT.items())

    def test_interrupted_writing_leaves_nothing(self, tmp_path):
        def interrupted():
            with whole_folder(tmp_path / "out") as temporary:
                Target("sharded", temporary).sink.add("d", 0, torch.zeros(1))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert list(tmp_path.iterdir()) == []

    def test_dtype_that_files_do_not_hold_is_refused(self, tmp_path):
        layout = {"model.safetensors": [("w", TensorInfo(torch.complex128, (2,)))]}
        with pytest.raises(CheckpointError, match=r"w: .* torch\.complex128"):
            FolderSink(tmp_path, "model", layout)


def copy(source_dir, directory):
    source = open_source(source_dir)
    directory.mkdir()
    sink = FolderSink(directory, source.stem, layout_of(source))
    for piece in pieces(source, source.names(), most_bytes=256):
        for part, values in split_piece(read_piece(source.read, piece), piece):
            sink.add(part.name, part.start, values)
    sink.commit()


def test_companions_are_what_loading_needs(tmp_path):
    kept = ["config.json", "generation_config.json", "tokenizer.json", "vocab.txt", "merges.txt",
            "modeling_own.py", "chat_template.jinja", "spiece.model"]  # fmt: skip
    left = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md",
            "optimizer.pt", "trainer_state.json", "training_args.bin", "kifmerge.json",
            ".gitattributes", "model.gguf", "rng_state.pth"]  # fmt: skip
    source_dir, directory = tmp_path / "from", tmp_path / "to"
    for folder in (source_dir / "additional_chat_templates", source_dir / "state", directory):
        folder.mkdir(parents=True)
    for name in [*kept, *left, "additional_chat_templates/tools.jinja", "state/state.json"]:
        (source_dir / name).write_text(name)
    (source_dir / "special_tokens_map.json").symlink_to(source_dir / "vocab.txt")
    copy_companions(source_dir, directory)
    found = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    expected = [*kept, "special_tokens_map.json", "additional_chat_templates/tools.jinja"]
    assert found == sorted(expected)
    assert not (directory / "special_tokens_map.json").is_symlink()
    assert (directory / "spiece.model").read_text() == "spiece.model"


class TestLayout:
    @pytest.mark.parametrize("most_bytes", [1, 48, 100, 140, 188, 189, 10**9])
    def test_files_are_full_and_no_fuller(self, most_bytes):
        layout = new_layout(INFOS, "model", most_bytes)
        files = list(layout.values())
        assert [tensor for infos in files for tensor in infos] == INFOS
        sizes = [[info.nbytes for _, info in infos] for infos in files]
        assert all(sum(of_file) <= most_bytes or len(of_file) == 1 for of_file in sizes)
        for before, after in itertools.pairwise(sizes):
            assert sum(before) + after[0] > most_bytes

    @pytest.mark.parametrize(("most_bytes", "num_files"), [(10**9, 1), (100, 3)])
    def test_names_are_those_of_hugging_face(self, tmp_path, most_bytes, num_files):
        layout = new_layout(INFOS, "model", most_bytes)
        theirs = split_torch_state_dict_into_shards(CONTENT, max_shard_size=most_bytes)
        assert list(layout) == list(theirs.filename_to_tensors)
        assert len(layout) == num_files
        sink = FolderSink(tmp_path, "model", layout)
        add_all(sink, 8)
        sink.commit()
        assert open_source(tmp_path).files == {f: tuple(n for n, _ in i) for f, i in layout.items()}

    def test_other_dtype_is_that_of_floating_point_tensors(self, tmp_path):
        layout = {"model.safetensors": INFOS}
        assert with_dtype(layout, None) == layout
        changed = dict(with_dtype(layout, torch.float16)["model.safetensors"])
        for name, info in INFOS:
            dtype = info.dtype if name == "whole" else torch.float16
            assert changed[name] == TensorInfo(dtype, info.shape)

    def test_of_a_checkpoint(self, tmp_path):
        source = open_source(folders.save(tmp_path, CONTENT, num_shards=3))
        layout = layout_of(source)
        assert {f: tuple(n for n, _ in infos) for f, infos in layout.items()} == source.files
        assert dict(t for infos in layout.values() for t in infos) == dict(INFOS)
