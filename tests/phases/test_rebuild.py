"""A merge made again from its kifmerge.json: the same bytes in every file, or nothing."""

import json
import shutil

import folders
import merges
import pytest
import synthetic
from merges import Files

from kifmerge.errors import CheckpointError
from kifmerge.fusion.rules import FusionOptions
from kifmerge.phases.merge import Merge
from kifmerge.phases.rebuild import recorded_merge

KIF = FusionOptions()


@pytest.fixture
def files(tmp_path):
    made = Files(tmp_path).write()
    made.merge(KIF)
    return made


def rebuild(path, out, *, num_workers=1):
    recorded = recorded_merge(path)
    merging = Merge(recorded.inputs, recorded.rule, recorded.options, num_workers=num_workers)
    return merging.run(out, expected=recorded.content)


def refused(files, match, *more):
    """It fails with all of this in its message, and leaves nothing."""
    before = sorted(files.folder.rglob("*"))
    with pytest.raises(CheckpointError, match=match) as caught:
        rebuild(files.folder / "out/kifmerge.json", files.folder / "again")
    assert sorted(files.folder.rglob("*")) == before
    for text in more:
        assert str(text) in str(caught.value)


def change(path, **content):
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))


class TestSameBytes:
    @merges.every_rule
    def test_of_every_file(self, tmp_path, monkeypatch, variant):
        files = variant.write(tmp_path, shards=[2] * (1 + len(variant.roles)))
        (tmp_path / ("base" if variant.base else variant.roles[0]) / "vocab.txt").write_text("a")
        figures, _ = files.merge(**variant.options())
        merges.cut_small(monkeypatch, 100)
        again = rebuild(tmp_path / "out/kifmerge.json", tmp_path / "again", num_workers=3)
        assert again == (figures, True)
        assert synthetic.files(tmp_path / "again") == synthetic.files(tmp_path / "out")
        assert {"README.md", "config.json", "kifmerge.json", "vocab.txt"} <= {
            path.name for path in (tmp_path / "again").iterdir()
        }

    def test_of_a_merge_with_every_option(self, tmp_path):
        files = Files(tmp_path)
        states = [{**folders.random_tensors(n, merges.SHAPES)} for n in range(3)]
        for number, state in enumerate(states):
            state["frozen"] = state["a.bias"] + number
        states[2] = {n: t.half() for n, t in states[2].items()}
        files.write(states=states)
        scored = {name: states[0][name] for name in merges.SHAPES}
        for seed, role in enumerate(merges.TWO):
            folders.snapshot(tmp_path / f"{role}-importance", seed, scored)
        other = folders.save(
            tmp_path / "other", scored, config={"model_type": "none", "use_cache": True}
        )
        rule = FusionOptions(
            important_fraction=0.3, scope="tensor", shared_weights=(0.1, 0.8), redundant="drop"
        )
        files.merge(
            rule, config_from=other, historical_parent="new", unscored="average",
            allowed=("dtype",), nonfinite="keep", shard_bytes=300, dtype="bfloat16",
        )  # fmt: skip
        recorded = recorded_merge(tmp_path / "out/kifmerge.json")
        assert recorded.rule == rule
        assert recorded.options.unscored == "average"
        rebuild(tmp_path / "out/kifmerge.json", tmp_path / "again")
        assert synthetic.files(tmp_path / "again") == synthetic.files(tmp_path / "out")

    def test_when_nothing_but_the_file_is_left(self, files):
        before = synthetic.files(files.folder / "out")
        (files.folder / "out/kifmerge.json").rename(files.folder / "kept.json")
        shutil.rmtree(files.folder / "out")
        rebuild(files.folder / "kept.json", files.folder / "out")
        assert synthetic.files(files.folder / "out") == before

    def test_inputs_in_other_shards_are_the_same_inputs(self, files):
        """A digest is of content; the output's files are like the base's, which stays."""
        before = synthetic.weights(files.folder / "out")
        shutil.rmtree(files.folder / "new")
        folders.save(files.folder / "new", files.states[1], num_shards=3)
        rebuild(files.folder / "out/kifmerge.json", files.folder / "again")
        assert synthetic.weights(files.folder / "again") == before

    def test_made_already_is_left_as_it_is(self, files):
        before = folders.state(files.folder / "out")
        _, is_new = rebuild(files.folder / "out/kifmerge.json", files.folder / "out")
        assert not is_new
        assert folders.state(files.folder / "out") == before


class TestRefusals:
    @pytest.mark.parametrize("role", ["base", "new", "historical"])
    def test_weights_that_have_changed(self, files, role):
        path = files.folder / role / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
        recorded = recorded_merge(files.folder / "out/kifmerge.json").content
        refused(
            files, "inputs are not what they were", f"{role} {files.folder / role}: ",
            f"expected {recorded['made_by']['parents'][role]['digest']}",
        )  # fmt: skip

    @pytest.mark.parametrize("role", merges.TWO)
    @pytest.mark.parametrize("evidence", ["importance", "masks", "units"])
    def test_evidence_that_has_changed(self, tmp_path, evidence, role):
        files = Files(tmp_path).write().make_masks().make_units()
        files.merge(KIF, evidence=evidence)
        kind = merges.ENDS[evidence]
        path = tmp_path / f"{role}-{kind}"
        if evidence == "units":
            units = json.loads((path / "units.json").read_text())
            units["units"][0]["score"] *= 1.01
            (path / "units.json").write_text(json.dumps(units))
        else:
            file = path / f"{kind}.safetensors"
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        refused(files, "inputs are not what they were", f"{role}_{kind} {path}")

    def test_all_that_have_changed_are_told(self, files):
        for number, role in enumerate(("base", "historical")):
            folders.save(files.folder / role, files.states[1 + number])
        folders.save(files.folder / "historical", files.states[0])
        refused(files, "inputs are not what they were", "\n  - base ", "\n  - historical ")

    def test_input_that_is_gone(self, files):
        (files.folder / "new").rename(files.folder / "elsewhere")
        refused(files, "no such folder", files.folder / "new")

    def test_result_of_another_version(self, files):
        """The inputs are the same; who made other bytes of them is told."""
        path = files.folder / "out/kifmerge.json"
        told = json.loads(path.read_text())["files"]
        told["model.safetensors"]["sha256"] = "0" * 64
        change(path, files=told, kifmerge="0.0.0")
        refused(files, "made by kifmerge 0.0.0, this is", f"expected SHA-256 {'0' * 64}")

    def test_result_in_other_files(self, files):
        path = files.folder / "out/kifmerge.json"
        change(path, files={"other.safetensors": {"sha256": "0" * 64, "bytes": 1}})
        refused(
            files, "not what came of them", "expected no such file",
            "other.safetensors: no such file, expected SHA-256 00",
        )  # fmt: skip

    def test_base_in_other_files(self, files):
        """The inputs are the same, but the output would have other files."""
        (files.folder / "base/model.safetensors").unlink()
        folders.save(files.folder / "base", files.states[0], num_shards=2)
        refused(files, "not what came of them", "model-00002-of-00002.safetensors: SHA-256")

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (None, "no such file: expected the kifmerge.json of a merge"),
            ({"format": "other", "version": 1}, "expected format kifmerge.checkpoint"),
            ({"version": 2}, "version 2"),
            ({"made_by": None}, "not made by a merge"),
            ({"made_by": {"command": "train"}}, "not made by a merge"),
            ({"made_by": {"command": "merge"}}, "cannot be made again by this version"),
            ({"made_by": {"command": "merge", "parents": [], "options": {}}}, "cannot be made"),
            ({"made_by": {"command": "merge", "parents": {"base": None}, "options": {}}},
             "cannot be made"),
            ({"made_by": {"command": "merge", "parents": {}, "options": {"rule": "slerp"}}},
             "'slerp' is none of"),
            ({"made_by": {"command": "merge", "parents": {}, "options": {"tempo": 1}}},
             "tempo is not known here"),
            ({"made_by": {"command": "merge", "parents": {},
                          "options": {"rule": "average", "density": "x"}}}, "cannot be made"),
        ],
    )  # fmt: skip
    def test_records_that_tell_of_no_merge(self, files, content, match):
        path = files.folder / "out/kifmerge.json"
        if content is None:
            path.unlink()
        else:
            change(path, **content)
        refused(files, match, path)


def test_record_is_read_as_it_was_given(tmp_path):
    files = Files(tmp_path, merges.roles_of(3)).write().make_units()
    rule = FusionOptions(weights=(1.0, 2.0, 0.5), important_fraction=0.3)
    files.merge(rule, evidence="units", unscored="base", shard_bytes=1000)
    recorded = recorded_merge(tmp_path / "out/kifmerge.json")
    assert recorded.inputs == files.inputs("units")
    assert recorded.rule == rule
    assert (recorded.options.unscored, recorded.options.shard_bytes) == ("base", 1000)
