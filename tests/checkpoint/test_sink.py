import json

import folders
import pytest
import safetensors
import tiny
import torch
from transformers import AutoModelForCausalLM

from kifmerge.checkpoint.atomic import whole_folder
from kifmerge.checkpoint.pieces import pieces, read_piece, split_piece
from kifmerge.checkpoint.sink import FolderSink, MemorySink, copy_companions, layout_of
from kifmerge.checkpoint.source import TensorInfo, open_source
from kifmerge.errors import CheckpointError

CONTENT = {
    **folders.random_tensors(0),
    "half": folders.random_tensors(1, {"w": (9,)}, torch.bfloat16)["w"],
    "whole": torch.arange(10),
}
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
            layout = {file: [(n, infos[n]) for n in names] for file, names in FILES[kind].items()}
            self.sink = FolderSink(directory, "model", layout)
        else:
            self.sink = MemorySink(self.live)

    def written(self):
        on_disk = folders.load(self.directory)
        return on_disk or self.live


@pytest.fixture(params=["single", "sharded", "memory", "strided"])
def target(request, tmp_path):
    return Target(request.param, tmp_path)


def add_all(sink, step, *, backwards=False, but=()):
    parts = [
        (name, start, tensor.reshape(-1)[start : start + step])
        for name, tensor in CONTENT.items()
        for start in range(0, tensor.numel(), step)
    ]
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

    def test_a_part_that_comes_twice_is_noticed(self, target):
        add_all(target.sink, 3)
        target.sink.add("b.weight", 3, torch.zeros(3))
        with pytest.raises(ValueError, match=r"b\.weight: .* came twice"):
            target.sink.commit()

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
