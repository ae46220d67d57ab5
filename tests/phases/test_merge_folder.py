"""The folder that a merge makes: whole or not at all, and what it says of itself."""

import hashlib
import itertools
import json
from dataclasses import replace

import folders
import merges
import pytest
import tiny
import torch
import yaml
from merges import Files
from transformers import AutoModelForCausalLM

from kifmerge.checkpoint.digest import digest
from kifmerge.checkpoint.provenance import read_provenance
from kifmerge.errors import RunError
from kifmerge.fusion.rules import RULES, FusionOptions
from kifmerge.phases.merge import Merge

KIF = FusionOptions()
AVERAGE = FusionOptions(rule="average")


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_model_loads_and_says_where_it_comes_from(tmp_path):
    models = [tiny.llama(seed) for seed in range(3)]
    for role, model in zip(("base", "new", "historical"), models, strict=True):
        model.save_pretrained(tmp_path / role)
    (tmp_path / "base/tokenizer.json").write_text("{}")
    (tmp_path / "base/README.md").write_text("another model's card")
    files = Files(tmp_path)
    for seed, side in enumerate(merges.TWO):
        folders.snapshot(tmp_path / f"{side}-importance", seed, tiny.trained(models[0]))
    files.merge(KIF)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tiny.same(tiny.trained(loaded), {n: files.merged()[n] for n in tiny.trained(loaded)})
    assert not tiny.same(tiny.trained(loaded), tiny.trained(models[0]))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "kifmerge.json",
                     "model.safetensors", "tokenizer.json"}  # fmt: skip
    made = read_provenance(tmp_path / "out")["made_by"]
    assert made["command"] == "merge"
    assert made["options"] == {
        "rule": "recurrent-kif", "important_fraction": 0.2, "scope": "global",
        "shared_weights": [0.4, 0.6], "redundant": "average", "weights": None,
        "historical_parent": "base", "unscored": None, "space": None, "allowed": [],
        "nonfinite": "refuse", "shard_bytes": None, "dtype": None,
    }  # fmt: skip
    assert list(made["parents"]) == [
        "base", "new", "historical", "new_importance", "historical_importance",
    ]  # fmt: skip
    assert made["parents"]["new"]["digest"] == digest(tmp_path / "new")
    card = (tmp_path / "out/README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in front  # on the Hub there are no such paths
    assert all(f"`{tmp_path / role}`" in card for role in ("base", "new", "historical"))
    assert (front["library_name"], front["tags"]) == ("transformers", ["merge", "kifmerge"])
    assert "recurrent-kif" in card
    assert digest(tmp_path / "new")[:12] in card


class TestProvenance:
    @merges.every_rule
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_digests_taken_on_the_way_are_those_of_the_folders(
        self, tmp_path, monkeypatch, variant, num_workers
    ):
        files = variant.write(tmp_path, shards=[2] * (len(variant.roles) + 1), snapshot_shards=2)
        merges.cut_small(monkeypatch, 100)
        files.merge(**variant.options(), num_workers=num_workers)
        parents = read_provenance(tmp_path / "out")["made_by"]["parents"]
        ends = ("importance", "mask", "units")
        expected = {role: digest(tmp_path / role.replace("_" + e, "-" + e))
                    for role in parents for e in ends if role.endswith(e)}  # fmt: skip
        expected |= {role: digest(tmp_path / role) for role in parents if role not in expected}
        assert {role: parent["digest"] for role, parent in parents.items()} == expected
        assert None not in expected.values()
        assert len(set(expected.values())) == len(expected)
        assert len(parents) == len(variant.roles) * (1 + bool(variant.evidence)) + variant.base

    @pytest.mark.parametrize("num_shards", [0, 3])
    def test_files_are_told_by_size_and_sha256(self, files, num_shards):
        files.write(shards=(num_shards, 0, 0))
        files.merge(KIF, num_workers=3)
        told = read_provenance(files.folder / "out")["files"]
        assert told == {
            path.name: {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": path.stat().st_size,
            }
            for path in (files.folder / "out").glob("*.safetensors")
        }
        assert len(told) == max(num_shards, 1)

    def test_what_the_base_says_of_itself_is_kept(self, files):
        own = {"labels": ["a"], "model": {"kind": "classifier"}, "strange": {"x": 1}}
        own |= folders.made_by("train")
        files.write(provenance=own)
        files.merge(KIF)
        found = read_provenance(files.folder / "out")
        assert {key: found[key] for key in ("labels", "model", "strange")} == {
            key: own[key] for key in ("labels", "model", "strange")
        }
        assert found["made_by"]["command"] == "merge"

    def test_base_of_a_merge_may_be_a_merge(self, files):
        """What the earlier one says of its files is not said of the new ones."""
        files.write(shards=(2, 0, 0))
        files.merge(KIF, out="first")
        inputs = replace(files.inputs(), base=files.folder / "first")
        Merge(inputs, KIF, num_workers=1).run(files.folder / "second")
        first, second = (read_provenance(files.folder / d) for d in ("first", "second"))
        assert first["files"].keys() == second["files"].keys()
        assert first["files"] != second["files"]
        assert second["made_by"]["parents"]["base"]["digest"] == digest(files.folder / "first")


class TestAgain:
    def test_made_again_does_nothing(self, files):
        files.write()
        figures, _ = files.merge(KIF)
        before = folders.state(files.folder / "out")
        assert files.merge(KIF) == (figures, False)
        assert folders.state(files.folder / "out") == before

    def test_input_that_has_changed_makes_another_merge(self, files):
        files.write()
        files.merge(KIF)
        folders.save(files.folder / "new", files.states[0])
        files.refused("made by another merge command", rule=KIF, error=RunError)

    def test_other_options_need_another_folder_or_overwrite(self, files):
        files.write()
        files.merge(KIF)
        rule = replace(KIF, redundant="drop")
        files.refused("made by another merge command", error=RunError, rule=rule)
        before = files.merged()
        files.merge(rule, overwrite=True)
        assert not tiny.same(files.merged(), before)

    @pytest.mark.parametrize("option", [{"dtype": "float16"}, {"shard_bytes": 300}], ids=str)
    def test_other_files_are_another_merge(self, files, option):
        files.write()
        files.merge(KIF)
        files.refused("made by another merge command", error=RunError, **option)

    def test_folder_of_somebody_else_is_left_alone(self, files):
        files.write()
        (files.folder / "out").mkdir()
        (files.folder / "out/thesis.txt").write_text("mine")
        files.refused("not of ours", error=RunError)

    def test_file_in_the_way_is_left_alone(self, files):
        files.write()
        (files.folder / "out").write_text("mine")
        files.refused("out exists already", error=RunError)

    def test_empty_folder_is_filled(self, files):
        files.write()
        (files.folder / "out").mkdir()
        files.merge(KIF)
        assert len(files.merged()) == len(merges.SHAPES)

    def test_inputs_are_not_overwritten_with_their_folder(self, files):
        files.write()
        for out in (files.folder, files.folder / "new", files.folder / "new-importance"):
            with pytest.raises(RunError, match="holds an input"):
                files.open(KIF).run(out, overwrite=True)
        assert len(folders.load(files.folder / "new")) == len(merges.SHAPES)

    @pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("boom")])
    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("num_workers", [0, 3])
    def test_interrupted_merge_leaves_what_was_there(
        self, files, monkeypatch, failure, overwrite, num_workers
    ):
        files.write()
        if overwrite:
            files.merge(AVERAGE)
        before = sorted(files.folder.rglob("*"))
        merges.cut_small(monkeypatch, 64)
        calls = itertools.count()

        def fail_in_the_middle(num_fused):
            if next(calls) == 4:
                raise failure

        merging = files.open(KIF, num_workers=num_workers)
        with pytest.raises(type(failure)):
            merging.run(files.folder / "out", overwrite=overwrite, on_progress=fail_in_the_middle)
        assert next(calls) == 5
        assert sorted(files.folder.rglob("*")) == before

    def test_progress_adds_up_to_what_is_judged(self, files):
        files.write(shapes=merges.VARIED)
        told = []
        files.open(KIF).run(files.folder / "out", on_progress=told.append)
        assert sum(told) == sum(value.numel() for value in files.states[0].values())


class TestNonfinite:
    @merges.every_rule
    @pytest.mark.parametrize("value", [float("nan"), -float("inf")])
    def test_refused_by_name(self, tmp_path, monkeypatch, variant, value):
        """Wherever it is, with the number of the element, though pieces are small."""
        merges.cut_small(monkeypatch, 64)
        files = variant.write(tmp_path, dtype=torch.bfloat16)
        for number, role in enumerate(("base", *variant.roles)):
            if role == "base" and not RULES[variant.rule.rule].needs_base:
                continue  # a rule on weights does not look at it
            state = {n: t.clone() for n, t in files.states[number].items()}
            state["z.weight"][3, 2] = value
            state["z.weight"][9, 9] = value
            folders.save(tmp_path / role, state)
            path = tmp_path / role / "model.safetensors"
            files.refused(
                rf"z\.weight: element 41 is {value}", path, "--nonfinite keep",
                num_workers=number % 3, **variant.options(),
            )  # fmt: skip
            folders.save(tmp_path / role, files.states[number])
        files.merge(**variant.options())

    def test_refused_in_tensors_that_are_copied(self, files):
        states = [folders.random_tensors(n, merges.SHAPES) for n in range(3)]
        for state in states:
            state["mask"] = torch.tensor([0.0, -float("inf")])
        files.write(states=states)
        scored = {name: states[0][name] for name in merges.SHAPES}
        for seed, role in enumerate(merges.TWO):
            folders.snapshot(files.folder / f"{role}-importance", seed, scored)
        files.refused("mask: element 1 is -inf", files.folder / "base/model.safetensors")
        files.merge(KIF, nonfinite="keep")
        assert files.merged()["mask"].tolist() == [0.0, -float("inf")]

    def test_large_numbers_are_finite(self, files):
        """Their sum is not."""
        files.write(states=[{"w": torch.full((64,), 3e38)} for _ in range(3)])
        files.merge(KIF)
        assert files.merged()["w"].tolist() == [pytest.approx(3e38)] * 64

    @merges.every_rule
    def test_kept_where_it_is_and_nowhere_else(self, tmp_path, variant):
        files = variant.write(tmp_path)
        clean = variant.write(tmp_path / "clean")
        files.states[1]["z.weight"][3, 2] = float("nan")
        folders.save(tmp_path / variant.roles[0], files.states[1])
        files.merge(**variant.options(), nonfinite="keep")
        clean.merge(**variant.options())
        found, expected = files.merged(), clean.merged()
        nan = places({name: value.isnan() for name, value in found.items()})
        assert nan in ([("z.weight", 41)], [])
        if variant.rule.needs in ("nothing", "largest"):
            assert nan
        if variant.rule.needs != "largest":  # where it takes the place of another
            assert places({name: value != expected[name] for name, value in found.items()}) == nan


def places(masks):
    return [(name, k) for name, m in masks.items() for k in m.flatten().nonzero()[:, 0].tolist()]


def test_config_is_the_base_s_unless_told_otherwise(files):
    files.write(config={"model_type": "none", "use_cache": True})
    other = folders.save(
        files.folder / "other",
        {"x": torch.zeros(1)},
        config={"model_type": "none", "use_cache": False},
    )
    (other / "tokenizer.json").write_text('{"of": "other"}')
    (files.folder / "base/vocab.txt").write_text("of the base")
    files.merge(KIF)
    files.merge(KIF, out="told", config_from=other)
    texts = [json.loads((files.folder / d / "config.json").read_text()) for d in ("out", "told")]
    assert texts == [
        {"model_type": "none", "use_cache": True},
        {"model_type": "none", "use_cache": False},
    ]
    present = [
        [(files.folder / d / name).exists() for name in ("tokenizer.json", "vocab.txt")]
        for d in ("out", "told")
    ]
    assert present == [[False, True], [True, False]]
    assert merges.same_bits(files.merged(), files.merged("told"))
    parents = read_provenance(files.folder / "told")["made_by"]["parents"]
    assert parents["config_from"]["reference"] == str(other)
    (other / "config.json").unlink()
    for missing, text in (("none", "no such folder"), ("other", "holds no config.json")):
        config_from = files.folder / missing
        files.refused(f"{config_from}.* {text}", out="third", config_from=config_from)


def test_config_of_another_model_is_refused_or_allowed(files):
    files.write(config={"model_type": "none", "rope_theta": 1})
    other = folders.save(
        files.folder / "other",
        {"x": torch.zeros(1)},
        config={"model_type": "none", "rope_theta": 2},
    )
    files.refused("rope_theta: 1, 2", other, "--allow config", config_from=other)
    files.merge(KIF, config_from=other, allowed=("config",))
