"""Inspection: what every kind of folder shows, figures worked by hand, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import synthetic
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kifmerge.checkpoint.mask import MaskSink
from kifmerge.checkpoint.provenance import made_by, write_provenance
from kifmerge.checkpoint.snapshot import write_snapshot
from kifmerge.cli import app
from kifmerge.errors import CheckpointError, RunError
from kifmerge.fusion.layers import layer_of, natural_order
from kifmerge.phases.inspect import inspect_folder
from kifmerge.run import run_status

SCORES = {
    "score/h.2.w": torch.tensor([[1.0, 9.0], [3.0, 4.0]]),
    "score/h.10.w": torch.tensor([8.0, 0.0, 2.0]),
    "score/h.10.b": torch.tensor([5.0]),
    "score/norm.weight": torch.tensor([6.0, 7.0]),
    "score/norm.empty": torch.zeros(0, 3),
}


def inspect(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def layers_of(found):
    return {layer.name: layer for layer in found.layers}


@pytest.fixture(scope="module")
def model():
    return tiny.llama(num_hidden_layers=3)


@pytest.fixture
def checkpoint_dir(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded_dir(model, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    return tmp_path / "sharded"


@pytest.fixture
def adapter_dir(checkpoint_dir, tmp_path):
    made = tiny.lora_llama()
    made.peft_config["default"].base_model_name_or_path = str(checkpoint_dir)
    made.save_pretrained(tmp_path / "adapter")
    parents = {"model": checkpoint_dir, "adapter": None, "data": "hf://datasets/org/name:train"}
    record = made_by("train", {"steps": 8}, parents)
    write_provenance(tmp_path / "adapter", {"labels": ["a", "b"], "made_by": record})
    return tmp_path / "adapter"


@pytest.fixture
def snapshot_dir(tmp_path):
    details = {"role": "new", "steps": 8, "made_by": made_by("importance", {"average": "mean"}, {})}
    write_snapshot(tmp_path / "snapshot", SCORES, details)
    return tmp_path / "snapshot"


@pytest.fixture
def mask_dir(tmp_path):
    bits = {"h.2.w": [[1, 0, 0], [1, 1, 0], [0, 0, 1]], "h.10.w": [1] * 8, "norm.weight": [0, 0]}
    masks = {name: torch.tensor(rows, dtype=torch.bool) for name, rows in bits.items()}
    directory = tmp_path / "mask"
    directory.mkdir()
    shapes = [(name, tuple(mask.shape)) for name, mask in masks.items()]
    sink = MaskSink(directory, shapes, {"fraction": "0.5", "scope": "global", "threshold": 1.5})
    for name, mask in masks.items():
        sink.add(name, 0, mask.reshape(-1))
    sink.commit()
    return directory


@pytest.fixture
def state_dir(tmp_path):
    directory = tmp_path / "state"
    directory.mkdir()
    content = {"format": "kifmerge.state", "version": 1, "step": 3, "total_steps": 9, "rng": [[1]]}
    (directory / "state.json").write_text(json.dumps(content))
    moments = {"w/exp_avg": torch.ones(2, 3), "w/step": torch.tensor(3.0)}
    safetensors.torch.save_file(moments, directory / "optimizer.safetensors")
    rng = {"0/cpu": torch.zeros(16, dtype=torch.uint8)}
    safetensors.torch.save_file(rng, directory / "rng.safetensors")
    return directory


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = synthetic.write_recipe(folder, methods=["sequential", "multitask"])
    synthetic.run(recipe, folder / "run", ["training.max_steps=2"])
    return folder / "run"


@pytest.fixture
def run_dir(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


class TestNames:
    @pytest.mark.parametrize(
        ("name", "layer"),
        [
            ("model.layers.0.self_attn.q_proj.weight", "model.layers.0"),
            ("encoder.block.11.layer.0.SelfAttention.q.weight", "encoder.block.11"),
            (
                "base_model.model.model.layers.3.q_proj.lora_A.weight",
                "base_model.model.model.layers.3",
            ),
            ("base_model.model.classifier.weight", "base_model.model.classifier"),
            ("base_model.model.lm_head.lora_B.weight", "base_model.model.lm_head"),
            ("base_model.model.wte.lora_embedding_A", "base_model.model.wte"),
            ("model.embed_tokens.weight", "model.embed_tokens"),
            ("lm_head.weight", "lm_head"),
            ("h.12.b", "h.12"),
            ("0.weight", "0"),
            ("scale", "scale"),
            ("lora_A", "lora_A"),
        ],
    )
    def test_layer(self, name, layer):
        assert layer_of(name) == layer

    @given(st.lists(st.text("abc019.", min_size=1, max_size=9)))
    def test_order_is_total(self, names):
        backwards = names[::-1]
        assert sorted(names, key=natural_order) == sorted(backwards, key=natural_order)

    def test_order_counts(self):
        names = ["h.10", "h.9", "embed", "h", "h.9.a.2", "h.9.a.11"]
        expected = ["embed", "h", "h.9", "h.9.a.2", "h.9.a.11", "h.10"]
        assert sorted(names, key=natural_order) == expected


class TestCheckpoint:
    def test_tensors_are_those_of_the_model(self, model, checkpoint_dir):
        found = inspect_folder(str(checkpoint_dir))
        assert found.kind == "checkpoint"
        saved = model.state_dict()
        assert {t.name: t.shape for t in found.tensors} == {
            name: tuple(tensor.shape) for name, tensor in saved.items()
        }
        assert {t.dtype for t in found.tensors} == {"float32"}
        assert found.total.num_parameters == sum(tensor.numel() for tensor in saved.values())
        assert found.total.num_bytes == 4 * found.total.num_parameters
        assert found.total.num_tensors == len(saved)

    def test_layers_hold_what_belongs_to_them(self, model, checkpoint_dir):
        found = inspect_folder(str(checkpoint_dir))
        assert [layer.name for layer in found.layers] == [
            "lm_head",
            "model.embed_tokens",
            *(f"model.layers.{number}" for number in range(3)),
            "model.norm",
        ]
        expected = sum(p.numel() for p in model.model.layers[1].parameters())
        assert layers_of(found)["model.layers.1"].num_parameters == expected
        assert found.total.mean_score is None
        assert found.total.important_fraction is None

    def test_config_and_missing_record(self, checkpoint_dir):
        found = inspect_folder(str(checkpoint_dir))
        assert found.facts == {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        assert found.made_by is None

    def test_shards_are_one_checkpoint(self, checkpoint_dir, sharded_dir):
        whole, shards = inspect_folder(str(checkpoint_dir)), inspect_folder(str(sharded_dir))
        assert shards.layers == whole.layers
        assert [t.name for t in shards.tensors] == [t.name for t in whole.tensors]
        assert {t.file for t in shards.tensors} == {
            path.name for path in sharded_dir.glob("*.safetensors")
        }
        assert len({t.file for t in shards.tensors}) > 2

    def test_half_precision_takes_half_the_bytes(self, checkpoint_dir, tmp_path):
        tiny.llama(num_hidden_layers=3).bfloat16().save_pretrained(tmp_path / "half")
        whole, half = inspect_folder(str(checkpoint_dir)), inspect_folder(str(tmp_path / "half"))
        assert half.total.num_bytes * 2 == whole.total.num_bytes
        assert {t.dtype for t in half.tensors} == {"bfloat16"}

    def test_quantised_one_is_shown(self, checkpoint_dir):
        change_json(checkpoint_dir / "config.json", quantization_config={"quant_method": "gptq"})
        found = inspect_folder(str(checkpoint_dir))
        assert found.facts["quantization"] == {"quant_method": "gptq"}
        assert len(found.tensors) > 10

    def test_adapter_names_its_base_and_parents(self, adapter_dir, checkpoint_dir):
        found = inspect_folder(str(adapter_dir))
        assert found.kind == "adapter"
        assert found.facts["base"] == str(checkpoint_dir)
        assert (found.facts["rank"], found.facts["alpha"]) == (2, 4)
        assert set(found.facts["targets"]) == {"q_proj", "v_proj"}
        assert found.facts["labels"] == ["a", "b"]
        assert found.made_by["parents"]["model"]["reference"] == str(checkpoint_dir)
        assert found.total.num_parameters == 4 * 2 * 16

    def test_folders_inside_are_named(self, adapter_dir, snapshot_dir, state_dir):
        shutil.move(snapshot_dir, adapter_dir / "importance")
        shutil.move(state_dir, adapter_dir / "state")
        (adapter_dir / "else").mkdir()
        assert inspect_folder(str(adapter_dir)).facts["inside"] == ["importance/", "state/"]


class TestSnapshot:
    def test_figures_worked_by_hand(self, snapshot_dir):
        # Ten scores 0 to 9; of these ceil(0.2 * 9) = 2 exceed the 8th smallest, 7.
        found = inspect_folder(str(snapshot_dir), 0.2)
        assert found.kind == "importance snapshot"
        layers = layers_of(found)
        assert list(layers) == ["h.2", "h.10", "norm"]
        assert [layer.mean_score for layer in layers.values()] == [17 / 4, 15 / 4, 13 / 2]
        assert [layer.num_important for layer in layers.values()] == [1, 1, 0]
        assert layers["h.2"].important_fraction == 0.25
        assert found.total.mean_score == 4.5
        assert (found.total.num_parameters, found.total.num_important) == (10, 2)
        assert found.facts["important"] == {
            "fraction": "0.2",
            "scope": "global",
            "threshold": 7.0,
            "num_important": 2,
        }

    @pytest.mark.parametrize(("fraction", "num_important"), [(0, 0), (0.5, 5), (1, 9), ("0.3", 3)])
    def test_other_fractions(self, snapshot_dir, fraction, num_important):
        found = inspect_folder(str(snapshot_dir), fraction)
        assert found.total.num_important == num_important

    def test_what_is_known_of_it(self, snapshot_dir):
        found = inspect_folder(str(snapshot_dir))
        assert (found.facts["role"], found.facts["steps"]) == ("new", 8)
        assert found.made_by["command"] == "importance"

    @pytest.mark.parametrize(("kind", "mean"), [("product", 11 / 3), ("sensitivity", 2.0)])
    def test_score_is_the_recorded_kind(self, tmp_path, kind, mean):
        tensors = {
            "sensitivity/a.w": torch.tensor([1.0, 2.0, 3.0]).bfloat16(),
            "uncertainty/a.w": torch.tensor([3.0, 1.0, 2.0]).bfloat16(),
        }
        write_snapshot(tmp_path / "s", tensors, {"options": {"score": kind}})
        found = inspect_folder(str(tmp_path / "s"))
        assert found.total.mean_score == pytest.approx(mean)
        # Both tensors are shown; the parameters are counted once.
        assert (found.total.num_tensors, found.total.num_parameters) == (2, 3)
        assert found.total.num_bytes == 12

    def test_chunks_change_nothing(self, tmp_path, monkeypatch):
        generator = torch.Generator().manual_seed(0)
        tensors = {f"score/h.{n}.w": torch.rand(7, 11, generator=generator) for n in range(3)}
        write_snapshot(tmp_path / "s", tensors, {})
        whole = inspect_folder(str(tmp_path / "s"))
        monkeypatch.setattr("kifmerge.phases.inspect.CHUNK_NUMEL", 5)
        pieces = inspect_folder(str(tmp_path / "s"))
        assert [la.num_important for la in pieces.layers] == [
            la.num_important for la in whole.layers
        ]
        for piece, layer in zip(pieces.layers, whole.layers, strict=True):
            assert piece.mean_score == pytest.approx(layer.mean_score, rel=1e-12)

    def test_constant_scores_make_nothing_important_and_say_so(self, tmp_path):
        write_snapshot(tmp_path / "s", {"score/w": torch.ones(9)}, {})
        result = inspect(tmp_path / "s")
        assert result.exit_code == 0
        assert "0.0%" in result.stdout
        assert result.stderr == "no score exceeds the threshold: nothing is important\n"


class TestMask:
    def test_bits_are_counted_without_the_padding(self, mask_dir):
        found = inspect_folder(str(mask_dir))
        assert found.kind == "mask"
        layers = layers_of(found)
        assert list(layers) == ["h.2", "h.10", "norm"]
        assert [layer.num_important for layer in layers.values()] == [4, 8, 0]
        assert [layer.num_parameters for layer in layers.values()] == [9, 8, 2]
        assert layers["h.2"].important_fraction == pytest.approx(4 / 9)
        assert [layer.num_bytes for layer in layers.values()] == [2, 1, 1]
        assert found.total.mean_score is None
        assert {t.name: (t.shape, t.dtype) for t in found.tensors}["h.2.w"] == ((3, 3), "bit")
        assert found.facts == {"fraction": "0.5", "scope": "global", "threshold": 1.5}


class TestState:
    def test_shows_tensors_by_file(self, state_dir):
        found = inspect_folder(str(state_dir))
        assert found.kind == "trainer state"
        assert found.facts == {"step": 3, "total_steps": 9}
        layers = layers_of(found)
        assert list(layers) == ["optimizer.safetensors", "rng.safetensors"]
        assert layers["optimizer.safetensors"].num_parameters == 7
        assert layers["rng.safetensors"].num_bytes == 16


class TestRun:
    def test_finished(self, finished_run):
        status = run_status(finished_run)
        assert status["name"] == "synthetic"
        assert status["tasks"] == ["colours", "sizes"]
        assert (status["methods"], status["seeds"]) == (["sequential", "multitask"], [0])
        assert status["versions"]["torch"] == torch.__version__
        assert status["trials"] == [
            {
                "method": "start",
                "seed": 0,
                "finished": ["00-before", "01-colours"],
                "missing": [],
            },
            {"method": "sequential", "seed": 0, "finished": ["02-sizes"], "missing": []},
            {"method": "multitask", "seed": 0, "finished": ["02-all-tasks"], "missing": []},
        ]

    def test_missing_stages(self, run_dir):
        shutil.rmtree(run_dir / "sequential/seed-0/02-sizes")
        (run_dir / "start/seed-0/01-colours/stage.json").unlink()
        trials = run_status(run_dir)["trials"]
        assert trials[0]["finished"] == ["00-before"]
        assert trials[0]["missing"] == ["01-colours"]
        assert trials[1]["missing"] == ["02-sizes"]

    def test_command(self, run_dir):
        shutil.rmtree(run_dir / "sequential")
        result = inspect(run_dir)
        assert result.exit_code == 0
        assert "kind: run folder" in result.stdout
        assert "synthetic" in result.stdout
        line = next(
            line for line in result.stdout.splitlines() if "sequential" in line and "of" in line
        )
        assert "0 of 1" in line
        assert "02-sizes" in line
        content = json.loads(inspect(run_dir, "--json").stdout)
        assert content == {"kind": "run folder", "reference": str(run_dir), **run_status(run_dir)}

    @pytest.mark.parametrize(
        ("file", "text"),
        [
            ("manifest.json", '{"format": "kifmerge.run", "version": 2}'),
            ("manifest.json", '{"name": "a web app"}'),
            ("manifest.json", "{"),
            ("recipe.yaml", "tasks: ["),
            ("recipe.yaml", "tasks: 3"),
            ("recipe.yaml", None),
        ],
    )
    def test_damaged(self, run_dir, file, text):
        if text is None:
            (run_dir / file).unlink()
        else:
            (run_dir / file).write_text(text)
        result = inspect(run_dir)
        assert (result.exit_code, result.stdout) == (3, "")
        assert str(run_dir) in result.stderr

    def test_newer_version_is_named(self, run_dir):
        change_json(run_dir / "manifest.json", version=2)
        with pytest.raises(RunError, match=r"expected format kifmerge\.run version 1, found .* 2"):
            run_status(run_dir)


class TestRefused:
    def refused(self, directory):
        with pytest.raises(CheckpointError) as caught:
            inspect_folder(str(directory))
        result = inspect(directory)
        assert (result.exit_code, result.stdout) == (3, "")
        assert result.stderr == f"kifmerge: {caught.value}\n"
        return str(caught.value)

    def test_nothing_there(self, tmp_path):
        message = self.refused(tmp_path / "none")
        assert message == f"{tmp_path}/none: expected a folder, found nothing there"

    def test_a_file(self, checkpoint_dir):
        assert "found a file" in self.refused(checkpoint_dir / "model.safetensors")

    def test_unknown_folder_tells_what_is_in_it(self, tmp_path):
        assert "found nothing" in self.refused(tmp_path)
        (tmp_path / "notes.txt").write_text("")
        message = self.refused(tmp_path)
        assert message.endswith("found notes.txt")
        assert "importance.json" in message

    def test_no_weights(self, checkpoint_dir):
        (checkpoint_dir / "model.safetensors").rename(checkpoint_dir / "pytorch_model.bin")
        assert "pytorch_model.bin" in self.refused(checkpoint_dir)

    @pytest.mark.parametrize("kept_bytes", [0, 4, 100, -1])
    @pytest.mark.parametrize("kind", ["model", "adapter", "snapshot", "mask", "state"])
    def test_truncated_file(self, request, kind, kept_bytes):
        name = "checkpoint_dir" if kind == "model" else f"{kind}_dir"
        directory = request.getfixturevalue(name)
        path = sorted(directory.glob("*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[:kept_bytes])
        assert str(path) in self.refused(directory)

    def test_truncated_and_missing_shards(self, sharded_dir):
        path = sorted(sharded_dir.glob("*.safetensors"))[1]
        path.write_bytes(path.read_bytes()[:-1])
        assert str(path) in self.refused(sharded_dir)
        path.unlink()
        assert path.name in self.refused(sharded_dir)

    @pytest.mark.parametrize(
        ("kind", "file"),
        [
            ("adapter", "kifmerge.json"),
            ("snapshot", "importance.json"),
            ("mask", "mask.json"),
            ("state", "state.json"),
        ],
    )
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"version": 2}, "version 1, found"),
            ({"format": "something.else"}, "found something.else"),
            (None, "cannot be read"),
        ],
    )
    def test_newer_other_and_damaged_json(self, request, kind, file, change, words):
        directory = request.getfixturevalue(f"{kind}_dir")
        if change is None:
            (directory / file).write_text("{")
        else:
            change_json(directory / file, **change)
        message = self.refused(directory)
        assert str(directory / file) in message
        assert words in message

    def test_scores_that_are_none(self, tmp_path):
        tensors = {"score/a.w": torch.ones(4), "score/b.w": torch.tensor([1.0, float("nan")])}
        write_snapshot(tmp_path / "s", tensors, {})
        message = self.refused(tmp_path / "s")
        assert message == f"{tmp_path}/s: no threshold can be found: NaN among the scores in b.w"

    @pytest.mark.parametrize(
        ("tensors", "words"),
        [
            ({}, "expected at least one tensor"),
            ({"score/w": torch.zeros(0)}, "no scores"),
            ({"sensitivity/w": torch.ones(3)}, "uncertainty/w"),
            ({"score/w": torch.ones(3).int()}, "found int32"),
            ({"weight": torch.ones(3)}, "weight: expected"),
        ],
    )
    def test_tensors_that_are_no_scores(self, tmp_path, tensors, words):
        write_snapshot(tmp_path / "s", tensors, {})
        assert words in self.refused(tmp_path / "s")

    def test_mask_that_does_not_fit_its_shapes(self, mask_dir):
        change_json(mask_dir / "mask.json", shapes={"h.2.w": [3, 9]})
        assert "h.2.w" in self.refused(mask_dir)

    def test_fraction_out_of_range_is_a_mistake_of_usage(self, snapshot_dir):
        assert inspect(snapshot_dir, "--important-fraction", "1.5").exit_code == 2
        assert inspect().exit_code == 2


class TestCommand:
    def test_people_see_parents_by_a_short_digest(self, adapter_dir, checkpoint_dir):
        result = inspect(adapter_dir)
        assert (result.exit_code, result.stderr) == (0, "")
        header = yaml.safe_load(result.stdout.partition("\nTensors")[0])
        digest = inspect_folder(str(adapter_dir)).made_by["parents"]["model"]["digest"]
        assert len(digest) == 64
        assert header["kind"] == "adapter"
        assert header["base"] == str(checkpoint_dir)
        assert header["made_by"] == {
            "command": "train",
            "options": {"steps": 8},
            "parents": {
                "model": f"{checkpoint_dir} ({digest[:12]})",
                "data": "hf://datasets/org/name:train (no digest)",
            },
        }

    def test_people_see_tables(self, snapshot_dir):
        lines = inspect(snapshot_dir).stdout.splitlines()
        row = next(line for line in lines if "│ h.2 " in line)
        assert [cell.strip() for cell in row.strip("│").split("│")] == [
            "h.2", "1", "4", "16", "4.25", "25.0%",
        ]  # fmt: skip
        total = next(line for line in lines if "│ total" in line)
        assert [cell.strip() for cell in total.strip("│").split("│")] == [
            "total", "5", "10", "40", "4.5", "20.0%",
        ]  # fmt: skip
        shown = next(line for line in lines if "score/h.2.w" in line)
        assert [cell.strip() for cell in shown.strip("│").split("│")] == [
            "score/h.2.w", "2 x 2", "float32", "16",
        ]  # fmt: skip

    def test_files_are_shown_where_there_are_several(self, checkpoint_dir, sharded_dir):
        assert "model.safetensors" not in inspect(checkpoint_dir).stdout
        assert "model-00001-of-" in inspect(sharded_dir).stdout

    def test_json_is_all_there_is_on_stdout(self, snapshot_dir):
        result = inspect(snapshot_dir, "--json", "--important-fraction", "0.5")
        assert (result.exit_code, result.stderr) == (0, "")
        content = json.loads(result.stdout)
        assert content == json.loads(json.dumps(inspect_folder(str(snapshot_dir), 0.5).as_dict()))
        assert list(content) == [
            "kind", "reference", "made_by", "facts", "total", "layers", "tensors",
        ]  # fmt: skip
        assert content["total"]["num_important"] == 5
        assert content["layers"][0] == {
            "name": "h.2",
            "num_tensors": 1,
            "num_parameters": 4,
            "num_bytes": 16,
            "mean_score": 4.25,
            "num_important": 1,
            "important_fraction": 0.25,
        }
        assert content["tensors"][0] == {
            "name": "score/h.2.w",
            "file": "importance.safetensors",
            "shape": [2, 2],
            "dtype": "float32",
            "num_bytes": 16,
        }

    def test_bracketed_names_are_shown_as_they_are(self, tmp_path):
        write_snapshot(tmp_path / "[red]s", {"score/[bold]h.0.w": torch.ones(2)}, {})
        result = inspect(tmp_path / "[red]s")
        assert "[bold]h.0" in result.stdout
        assert "[red]s" in result.stdout
