"""Verification: sound folders of every kind pass; each fault is found, named, and fails."""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import folders
import pytest
import safetensors.torch
import synthetic
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kifmerge.checkpoint.mask import MaskSink
from kifmerge.checkpoint.provenance import made_by, write_provenance
from kifmerge.cli import app
from kifmerge.errors import CheckpointError
from kifmerge.phases import verify as verify_module
from kifmerge.phases.verify import verify_folder, weight_bytes

SHAPES = {"h.0.w": (7, 9), "h.1.w": (300,), "h.1.b": (2,), "n": ()}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def sound(folder):
    """What is found in a folder without any problem; the command agrees."""
    found = verify_folder(str(folder))
    assert found.problems == []
    result = invoke("verify", folder, "--json", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    assert content["is_sound"] is True
    assert content == json.loads(json.dumps(found.as_dict()))
    return found


def unsound(folder, *texts, number=1):
    """So many problems, one for each text; the command prints them and fails."""
    found = verify_folder(str(folder))
    assert len(found.problems) == number, found.problems
    for text in texts:
        assert any(text in problem for problem in found.problems), found.problems
    result = invoke("verify", folder, "--json")
    assert result.exit_code == 3
    content = json.loads(result.stdout)
    assert (content["is_sound"], content["problems"]) == (False, found.problems)
    assert f"kifmerge: {folder} is not sound:\n  - " in result.stderr
    assert "Traceback" not in result.stderr
    return found


def records(folder):
    """What kifmerge.json says of the files of a checkpoint."""
    return {
        path.name: {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in folder.glob("model*.safetensors")
    }


def made(folder, *, num_shards=3, seed=0, **provenance):
    """A checkpoint as merges make it, its files recorded."""
    folders.save(folder, folders.random_tensors(seed, SHAPES), num_shards=num_shards)
    write_provenance(folder, {"files": records(folder), **provenance})
    return folder


def spoil(path, **values):
    """Change elements of tensors in a file: name -> index and value."""
    tensors = safetensors.torch.load_file(path)
    for name, (index, value) in values.items():
        tensors[name.replace("__", ".")].view(-1)[index] = value
    safetensors.torch.save_file(tensors, path)


class TestSound:
    def test_model_of_transformers(self, tmp_path):
        tiny.llama().save_pretrained(tmp_path / "m")
        found = sound(tmp_path / "m")
        assert not found.is_ours
        assert "no command of kifmerge made this folder" in found.notes[0]
        (file,) = found.files
        assert (file.file, file.num_nonfinite, file.sha256) == (
            "model.safetensors",
            0,
            "not recorded",
        )
        assert file.num_bytes == (tmp_path / "m/model.safetensors").stat().st_size
        assert weight_bytes(str(tmp_path / "m")) == file.num_bytes

    def test_shards(self, tmp_path):
        tiny.t5().save_pretrained(tmp_path / "m", max_shard_size="8KB")
        found = sound(tmp_path / "m")
        names = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
        assert [file.file for file in found.files] == names
        assert len(names) > 1

    def test_adapter(self, tmp_path):
        tiny.lora_llama().save_pretrained(tmp_path / "a")
        assert [file.num_tensors for file in sound(tmp_path / "a").files] == [4]

    def test_recorded_files_are_the_same(self, tmp_path):
        found = sound(made(tmp_path / "m"))
        assert found.is_ours
        assert found.notes == []
        assert [file.sha256 for file in found.files] == ["same"] * 3

    def test_all_dtypes_and_empty_tensors(self, tmp_path):
        dtypes = [
            torch.bool, torch.uint8, torch.int64, torch.uint16, torch.float16, torch.bfloat16,
            torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
        ]  # fmt: skip
        tensors = {str(dtype): torch.ones(5).to(dtype) for dtype in dtypes}
        folders.save(tmp_path / "m", {**tensors, "empty": torch.zeros(0, 3)})
        assert sound(tmp_path / "m").files[0].num_tensors == 11

    def test_sums_that_overflow_are_no_infinity(self, tmp_path):
        tensors = {
            "half": torch.full((9,), 6e4).half(),
            "float": torch.full((9,), 3e38),
            "brain": torch.full((9,), 3e38).bfloat16(),
            "double": torch.full((9,), 1e308, dtype=torch.float64),
        }
        folders.save(tmp_path / "m", tensors)
        sound(tmp_path / "m")

    def test_snapshot_mask_and_units(self, tmp_path):
        tensors = folders.random_tensors(0, {"h.0.w": (3, 3)})
        folders.snapshot(tmp_path / "s", 0, tensors, role="new")
        assert (
            invoke("prune", "--importance", tmp_path / "s", "--out", tmp_path / "k").exit_code == 0
        )
        result = invoke(
            "group", "--importance", tmp_path / "s", "--unit", "tensor", "--out", tmp_path / "u"
        )
        assert result.exit_code == 0, result.output
        assert sound(tmp_path / "s").files[0].file == "importance.safetensors"
        assert [p.state for p in sound(tmp_path / "k").parents] == ["unchanged"]
        assert sound(tmp_path / "u").files == []

    @pytest.mark.slow
    def test_run_folder_with_all_that_is_in_it(self, tmp_path):
        recipe = synthetic.write_recipe(tmp_path, methods=["sequential"])
        synthetic.run(recipe, tmp_path / "run", ["training.max_steps=2"])
        found = sound(tmp_path / "run")
        files = {
            str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*.safetensors")
        }
        assert {file.file for file in found.files} == files
        assert len(files) > 2

    @pytest.mark.slow
    def test_trained_checkpoint_with_importance_and_state(self, tmp_path):
        recipe = synthetic.write_recipe(tmp_path)
        synthetic.run(recipe, tmp_path / "run", ["training.max_steps=2"])
        result = invoke(
            "train", "--model", tmp_path / "run/start/seed-0/01-colours/checkpoint",
            "--recipe", recipe, "--data", tmp_path / "sizes-train.jsonl",
            "--steps", 2, "--out", tmp_path / "inner",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        found = sound(tmp_path / "inner")
        assert {file.file.rpartition("/")[0] for file in found.files} == {"", "importance", "state"}
        assert {p.role: p.state for p in found.parents} == {
            "model": "unchanged",
            "data": "unchanged",
        }

    def test_merged_checkpoint(self, tmp_path):
        for number, role in enumerate(("base", "a", "b")):
            folders.save(tmp_path / role, folders.random_tensors(number, SHAPES), num_shards=2)
        result = invoke(
            "merge", "--rule", "task-arithmetic", "--base", tmp_path / "base", "--model",
            tmp_path / "a", "--model", tmp_path / "b", "--out", tmp_path / "out",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        found = sound(tmp_path / "out")
        assert [file.sha256 for file in found.files] == ["same"] * 2
        assert [parent.state for parent in found.parents] == ["unchanged"] * 3
        path = tmp_path / "out" / found.files[1].file
        path.write_bytes(path.read_bytes()[:-1] + b"\x3f")
        unsound(tmp_path / "out", "kifmerge.json says")


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_nan_and_infinity_are_counted(self, tmp_path, dtype):
        values = torch.ones(1000, dtype=dtype)
        values[[17, 400, 999]] = math.nan
        values[500] = math.inf
        folders.save(tmp_path / "m", {"w": values, "v": torch.ones(3)})
        path = tmp_path / "m/model.safetensors"
        text = f"{path}: w: 3 NaN and 1 infinite from element 17 on, of 1000"
        found = unsound(tmp_path / "m", text)
        assert [file.num_nonfinite for file in found.files] == [4]

    @pytest.mark.parametrize(
        ("values", "text"),
        [
            ([1.0, math.inf, -math.inf], "2 infinite from element 1 on, of 3"),
            ([math.nan, 1.0, 2.0], "1 NaN from element 0 on, of 3"),
        ],
    )
    def test_one_kind_alone(self, tmp_path, values, text):
        folders.save(tmp_path / "m", {"w": torch.tensor(values)})
        unsound(tmp_path / "m", f"w: {text}")

    def test_8_bit_and_complex(self, tmp_path):
        strange = torch.tensor([1.0, math.nan])
        tensors = {
            "f8": strange.to(torch.float8_e4m3fn),
            "c": torch.complex(torch.ones(2), strange),
        }
        folders.save(tmp_path / "m", tensors)
        unsound(tmp_path / "m", "f8: 1 NaN from element 1", "c: 1 NaN from element 1", number=2)

    @given(
        range_bytes=st.integers(1, 200),
        num_workers=st.integers(0, 3),
        positions=st.sets(st.integers(0, 49), min_size=1),
    )
    @settings(max_examples=25)
    def test_pieces_and_workers_do_not_matter(
        self, tmp_path_factory, range_bytes, num_workers, positions
    ):
        folder = tmp_path_factory.mktemp("pieces")
        values = torch.ones(50)
        values[sorted(positions)] = math.nan
        folders.save(folder, {"w": values, "v": torch.ones(50)})
        write_provenance(folder, {"files": records(folder)})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify_module, "_RANGE_BYTES", range_bytes)
            found = verify_folder(str(folder), num_workers=num_workers)
        path = folder / "model.safetensors"
        first = min(positions)
        assert found.problems == [f"{path}: w: {len(positions)} NaN from element {first} on, of 50"]
        assert found.files[0].sha256 == "same"

    def test_scores_are_numbers_too(self, tmp_path):
        folders.snapshot(tmp_path, 0, folders.random_tensors(0, SHAPES))
        path = tmp_path / "importance.safetensors"
        spoil(path, **{"sensitivity/h__1__w": (3, math.nan)})
        unsound(tmp_path, f"{path}: sensitivity/h.1.w: 1 NaN from element 3 on")

    def test_progress_counts_the_bytes_of_all_tensors(self, tmp_path):
        told = []
        verify_folder(str(made(tmp_path / "m")), on_progress=told.append)
        assert sum(told) == sum(4 * t.numel() for t in folders.random_tensors(0, SHAPES).values())


class TestRecords:
    def test_one_flipped_bit(self, tmp_path):
        path = made(tmp_path / "m") / "model-00002-of-00003.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        found = unsound(
            tmp_path / "m", f"{path}: kifmerge.json says {len(content)} bytes with SHA-256"
        )
        assert [file.sha256 for file in found.files] == ["same", "other", "same"]

    def test_header_counts_too(self, tmp_path):
        """Two tensors that trade names leave all values as they were."""
        tensors = {"a": torch.zeros(3), "b": torch.ones(3)}
        folders.save(tmp_path / "m", tensors)
        write_provenance(tmp_path / "m", {"files": records(tmp_path / "m")})
        path = tmp_path / "m/model.safetensors"
        content = (
            path.read_bytes()
            .replace(b'"a"', b'"x"')
            .replace(b'"b"', b'"a"')
            .replace(b'"x"', b'"b"')
        )
        assert content != path.read_bytes()
        path.write_bytes(content)
        unsound(tmp_path / "m", "kifmerge.json says")

    def test_another_size(self, tmp_path):
        made(tmp_path / "m", num_shards=0)
        folders.save(tmp_path / "m", folders.random_tensors(0, {"other": (4,)}))
        unsound(tmp_path / "m", "found ", "bytes with SHA-256")

    def test_missing_file(self, tmp_path):
        made(tmp_path / "m", num_shards=0)
        folder = tmp_path / "m"
        write_provenance(
            folder,
            {"files": {**records(folder), "model-x.safetensors": {"sha256": "0", "bytes": 1}}},
        )
        unsound(folder, f"{folder / 'model-x.safetensors'}: missing, though kifmerge.json lists it")

    def test_file_too_many(self, tmp_path):
        folder = made(tmp_path / "m")
        shutil.copy(
            folder / "model-00001-of-00003.safetensors", folder / "model-00009-of-00009.safetensors"
        )
        text = f"{folder / 'model-00009-of-00009.safetensors'}: kifmerge.json lists no such file"
        unsound(folder, text)

    @pytest.mark.parametrize(
        "files", [[], 3, {"model.safetensors": {}}, {"m": {"sha256": "", "bytes": "x"}}]
    )
    def test_damaged_record(self, tmp_path, files):
        folders.save(tmp_path / "m", folders.random_tensors(0, SHAPES))
        write_provenance(tmp_path / "m", {"files": files})
        unsound(tmp_path / "m", "files: expected sha256 and bytes of each file")

    def test_checkpoint_inside_a_mask_folder_has_its_own(self, tmp_path):
        """As prune writes it."""
        tensors = folders.random_tensors(0, SHAPES)
        folders.snapshot(tmp_path / "s", 0, tensors)
        invoke("prune", "--importance", tmp_path / "s", "--out", tmp_path / "k")
        made(tmp_path / "k/checkpoint", num_shards=0)
        sound(tmp_path / "k")
        spoil(tmp_path / "k/checkpoint/model.safetensors", h__1__w=(0, 99.0))
        unsound(tmp_path / "k", "k/checkpoint/model.safetensors: kifmerge.json says")


class TestStructure:
    def test_truncated_shard(self, tmp_path):
        folders.save(tmp_path / "m", folders.random_tensors(0, SHAPES), num_shards=2)
        path = tmp_path / "m/model-00002-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        unsound(tmp_path / "m", f"{path}: truncated")

    def test_missing_shard(self, tmp_path):
        folders.save(tmp_path / "m", folders.random_tensors(0, SHAPES), num_shards=2)
        (tmp_path / "m/model-00002-of-00002.safetensors").unlink()
        unsound(tmp_path / "m", "names shards that are missing")

    def test_index_without_any_shard(self, tmp_path):
        folders.save(tmp_path / "m", folders.random_tensors(0, SHAPES), num_shards=2)
        for path in (tmp_path / "m").glob("*.safetensors"):
            path.unlink()
        unsound(tmp_path / "m", "names shards that are missing")

    def test_shards_without_an_index(self, tmp_path):
        folders.save(tmp_path / "m", folders.random_tensors(0, SHAPES), num_shards=2)
        (tmp_path / "m/model.safetensors.index.json").unlink()
        unsound(tmp_path / "m", "expected model.safetensors or model.safetensors.index.json")

    def test_index_that_disagrees(self, tmp_path):
        folders.save(tmp_path / "m", folders.random_tensors(0, SHAPES), num_shards=2)
        path = tmp_path / "m/model.safetensors.index.json"
        index = json.loads(path.read_text())
        del index["weight_map"]["n"]
        path.write_text(json.dumps(index))
        unsound(tmp_path / "m", "n: expected in no shard")

    def test_shard_that_no_index_names_is_noted(self, tmp_path):
        folders.save(tmp_path / "m", folders.random_tensors(0, SHAPES), num_shards=2)
        extra = tmp_path / "m/model-00003-of-00003.safetensors"
        safetensors.torch.save_file({"x": torch.tensor([math.nan])}, extra)
        found = sound(tmp_path / "m")
        assert f"{extra}: not read, since no index names it" in found.notes

    @pytest.mark.parametrize(
        ("name", "content", "text"),
        [
            ("config.json", "{", "config.json: cannot be read"),
            ("config.json", "[]", "config.json: expected a JSON object"),
            ("tokenizer.json", '{"a": ', "tokenizer.json: cannot be read"),
            ("tokenizer_config.json", "3", "tokenizer_config.json: expected a JSON object"),
            ("vocab.json", "x", "vocab.json: cannot be read"),
            ("kifmerge.json", '{"format": "other"}', "expected format kifmerge.checkpoint"),
            ("units.json", '{"format": "kifmerge.units", "version": 1}', "units.json: kind"),
        ],
    )  # fmt: skip
    def test_json(self, tmp_path, name, content, text):
        folders.save(tmp_path / "m", folders.random_tensors(0, SHAPES))
        (tmp_path / "m" / name).write_text(content)
        unsound(tmp_path / "m", text)

    def test_json_of_no_object_where_none_is_needed(self, tmp_path):
        folders.save(tmp_path / "m", folders.random_tensors(0, SHAPES))
        (tmp_path / "m/labels.json").write_text('["a"]')
        sound(tmp_path / "m")

    def test_mask_that_does_not_fit_its_shapes(self, tmp_path):
        (tmp_path / "k").mkdir()
        sink = MaskSink(tmp_path / "k", [("w", (9,))], {})
        sink.add("w", 0, torch.ones(9, dtype=torch.bool))
        sink.commit()
        path = tmp_path / "k/mask.json"
        path.write_text(path.read_text().replace("9", "99"))
        unsound(tmp_path / "k", "mask.json and its tensors disagree")

    def test_snapshot_without_half_of_it(self, tmp_path):
        folders.snapshot(tmp_path / "s", 0, folders.random_tensors(0, SHAPES))
        tensors = folders.load(tmp_path / "s")
        del tensors["uncertainty/n"]
        safetensors.torch.save_file(tensors, tmp_path / "s/importance.safetensors")
        unsound(tmp_path / "s", "uncertainty/n: expected [], found none")

    def test_damaged_state(self, tmp_path):
        (tmp_path / "state").mkdir()
        (tmp_path / "state/state.json").write_text('{"format": "kifmerge.state", "version": 99}')
        unsound(tmp_path / "state", "expected format kifmerge.state version 1")

    def test_one_fault_is_told_once(self, tmp_path):
        """A snapshot's file is opened as a file and as a snapshot."""
        folders.snapshot(tmp_path / "s", 0, folders.random_tensors(0, SHAPES))
        path = tmp_path / "s/importance.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        unsound(tmp_path / "s", "truncated")

    def test_all_faults_are_found(self, tmp_path):
        folder = made(tmp_path / "m", num_shards=0)
        spoil(folder / "model.safetensors", h__0__w=(0, math.nan), h__1__w=(5, math.inf))
        (folder / "config.json").write_text("{")
        unsound(
            folder, "h.0.w: 1 NaN", "h.1.w: 1 infinite", "kifmerge.json says", "config", number=4
        )

    def test_hidden_folders_are_left_alone(self, tmp_path):
        folders.save(tmp_path / "m", folders.random_tensors(0, SHAPES))
        (tmp_path / "m/.cache/x").mkdir(parents=True)
        (tmp_path / "m/.cache/x/half.safetensors").write_bytes(b"")
        assert len(sound(tmp_path / "m").files) == 1
        assert (
            weight_bytes(str(tmp_path / "m")) == (tmp_path / "m/model.safetensors").stat().st_size
        )

    def test_hidden_folder_itself(self, tmp_path):
        folders.save(tmp_path / ".m/n", folders.random_tensors(0, SHAPES))
        assert len(sound(tmp_path / ".m").files) == 1

    @pytest.mark.parametrize("names", [[], ["thesis.txt"]])
    def test_nothing_to_verify(self, tmp_path, names):
        for name in names:
            (tmp_path / name).write_text("mine")
        with pytest.raises(
            CheckpointError, match=f"nothing to verify: found {''.join(names) or 'nothing'}"
        ):
            verify_folder(str(tmp_path))

    def test_no_folder(self, tmp_path):
        result = invoke("verify", tmp_path / "x")
        assert (result.exit_code, result.stdout) == (3, "")
        assert "no such folder" in result.stderr


class TestParents:
    def child(self, tmp_path, **parents):
        return made(tmp_path / "child", made_by=made_by("merge", {}, parents))

    def states(self, folder):
        return {parent.role: parent.state for parent in sound(folder).parents}

    def test_unchanged_changed_damaged_and_gone(self, tmp_path):
        roles = ("same", "changed", "damaged", "gone", "empty")
        parents = {
            role: made(tmp_path / role, num_shards=0, seed=n) for n, role in enumerate(roles)
        }
        data = synthetic.write_rows(tmp_path / "rows.jsonl", synthetic.rows("colours", 3))
        child = self.child(tmp_path, **parents, hub="org/name", data=data)
        spoil(parents["changed"] / "model.safetensors", h__0__w=(1, 5.0))
        path = parents["damaged"] / "model.safetensors"
        path.write_bytes(path.read_bytes()[:9])
        shutil.rmtree(parents["gone"])
        (parents["empty"] / "model.safetensors").unlink()
        assert self.states(child) == {
            "same": "unchanged", "changed": "changed", "damaged": "damaged", "gone": "not here",
            "empty": "changed", "hub": "not here", "data": "unchanged",
        }  # fmt: skip

    def test_other_shards_are_no_change(self, tmp_path):
        parent = made(tmp_path / "parent", num_shards=0)
        child = self.child(tmp_path, base=parent)
        shutil.rmtree(parent)
        made(parent, num_shards=3)
        assert self.states(child) == {"base": "unchanged"}

    def test_parent_without_a_digest(self, tmp_path):
        (tmp_path / "parent").mkdir()
        child = self.child(tmp_path, base=tmp_path / "parent")
        assert self.states(child) == {"base": "not recorded"}

    @pytest.mark.parametrize("made", [3, {"parents": 3}, {"parents": {"base": 3}}, None])
    def test_damaged_record_names_none(self, tmp_path, made):
        folders.save(
            tmp_path / "m", folders.random_tensors(0, SHAPES), provenance={"made_by": made}
        )
        assert self.states(tmp_path / "m") == {}


class TestCommand:
    def test_text_for_people(self, tmp_path):
        parent = made(tmp_path / "parent", num_shards=0)
        child = made(
            tmp_path / "child", num_shards=0, made_by=made_by("merge", {}, {"base": parent})
        )
        result = invoke("verify", child)
        assert result.exit_code == 0
        assert result.stderr == f"comparing {parent}\n"
        assert "is_sound: true" in result.stdout
        assert f"base: unchanged ({parent})" in result.stdout
        line = next(line for line in result.stdout.splitlines() if "│ model.safetensors" in line)
        size = (child / "model.safetensors").stat().st_size
        assert [cell.strip() for cell in line.strip("│").split("│")] == [
            "model.safetensors", "4", f"{size:,}", "0", "same",
        ]  # fmt: skip

    def test_faults_for_people(self, tmp_path):
        folder = made(tmp_path / "m", num_shards=0)
        spoil(folder / "model.safetensors", h__0__w=(0, math.nan))
        result = invoke("verify", folder)
        assert result.exit_code == 3
        assert "is_sound: false" in result.stdout
        assert "h.0.w: 1 NaN from element 0 on, of 63" in result.stderr

    def test_hundreds_of_faults_are_cut_on_stderr_alone(self, tmp_path):
        folders.save(tmp_path / "m", {f"w{n}": torch.tensor([math.nan]) for n in range(50)})
        result = invoke("verify", tmp_path / "m", "--json")
        assert "and 40 more" in result.stderr
        assert len(json.loads(result.stdout)["problems"]) == 50
