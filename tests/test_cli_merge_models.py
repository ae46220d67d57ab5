"""The merge command for any number of models, for other files, and for merges made before."""

import hashlib
import json

import folders
import merges
import pytest
import synthetic
import torch
from typer.testing import CliRunner

from kifmerge.checkpoint.provenance import read_provenance
from kifmerge.cli import app
from kifmerge.cli.options import parse_bytes

SHAPES = {"a.weight": (30, 20), "b.weight": (50,)}
ROLES = merges.roles_of(3)


@pytest.fixture
def many(tmp_path):
    merges.Files(tmp_path, merges.roles_of(3)).write(shapes=SHAPES).make_masks().make_units()
    return tmp_path


def of_many(folder, *more, rule="task-arithmetic", evidence=None, base=True, out="out"):
    """A merge of three models, options in the models' order."""
    roles = merges.roles_of(3)
    given = [x for role in roles for x in ("--model", folder / role)]
    if evidence:
        given += [x for role in roles for x in (f"--{evidence}", folder / f"{role}-{evidence}")]
    given += ["--base", folder / "base"] if base else []
    return ["merge", "--rule", rule, *given, "--out", folder / out, *more]


def invoke(*given):
    return CliRunner().invoke(app, [str(argument) for argument in given])


def spoken(result):
    """What it says on stderr, in one line and without frames."""
    return " ".join(result.stderr.replace("\u2502", " ").split())


def weights(*numbers):
    return [word for number in numbers for word in ("--weight", number)]


class TestModels:
    @pytest.mark.parametrize("evidence", ["importance", "mask", "units"])
    def test_importance_in_the_models_order(self, many, evidence):
        result = invoke(
            *of_many(many, "--json", *weights(1, 2, 3), rule="recurrent-kif", evidence=evidence)
        )
        assert (result.exit_code, result.stderr) == (0, "")
        figures = json.loads(result.stdout)
        assert figures["num_tensors"] == 2
        shares = [f"{role}_only" for role in ROLES] + ["all", "several", "none"]
        assert sum(figures[key] for key in shares) == pytest.approx(1.0)
        parents = read_provenance(many / "out")["made_by"]["parents"]
        for role in ROLES:
            reference = parents[f"{role}_{evidence}"]["reference"]
            assert reference == str(many / f"{role}-{evidence}")

    def test_weights_in_the_models_order(self, many):
        assert invoke(*of_many(many, *weights(1, -0.5, 2), "--scale", "0.5")).exit_code == 0
        base, *states = (folders.load(many / role) for role in ("base", *ROLES))
        for name, value in folders.load(many / "out").items():
            vectors = [state[name].double() - base[name].double() for state in states]
            update = 0.5 * (vectors[0] - 0.5 * vectors[1] + 2 * vectors[2])
            expected = base[name].double() + update
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=2e-6)

    def test_linear_takes_no_base(self, many):
        assert invoke(*of_many(many, rule="linear", base=False)).exit_code == 0
        states = [folders.load(many / role) for role in ROLES]
        for name, value in folders.load(many / "out").items():
            expected = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
        assert read_provenance(many / "out")["made_by"]["parents"].keys() == set(ROLES)

    def test_models_without_weights_are_all_alike(self, many):
        for out, more in (("out", []), ("told", weights(1, 1, 1))):
            given = {"rule": "recurrent-kif", "evidence": "mask", "out": out}
            assert invoke(*of_many(many, *more, **given)).exit_code == 0
        assert merges.same_bits(folders.load(many / "out"), folders.load(many / "told"))

    @pytest.mark.parametrize(
        ("more", "rule", "evidence", "match"),
        [
            (["--new", "x"], "ties", None, "--model goes alone"),
            (weights(1, 2), "ties", None, "one weight for each of 3 models, found 2"),
            (weights(1, 2, 0), "recurrent-kif", "mask", "must be positive"),
            (["--shared-weights", "1,1"], "recurrent-kif", "mask", "give --weight"),
            (["--importance", "x"], "ties", None, "give --importance once for each of 3 models"),
            (["--new-mask", "x"], "ties", None, "go with --new and --historical"),
            (["--importance", "x"], "recurrent-kif", "mask", "once for each of 3 models"),
            ([], "recurrent-kif", None, "takes importance snapshots of all models"),
            ([], "kif", "units", "kif takes one new and one historical model"),
            (["--historical-parent", "new"], "ties", None, "goes with --new and --historical"),
            (["--unscored", "new"], "ties", None, "no model is the new one"),
        ],
    )
    def test_mistakes_of_usage_exit_with_2(self, many, more, rule, evidence, match):
        result = invoke(*of_many(many, *more, rule=rule, evidence=evidence))
        assert result.exit_code == 2
        assert match in spoken(result)
        assert not (many / "out").exists()

    def test_base_that_is_not_there_has_no_tensors_to_take(self, many):
        result = invoke(*of_many(many, "--unscored", "base", rule="linear", base=False))
        assert result.exit_code == 2
        assert "there is no base" in spoken(result)

    def test_rule_on_task_vectors_takes_a_base(self, many):
        result = invoke(*of_many(many, base=False))
        assert result.exit_code == 2
        assert "task-arithmetic works on task vectors: it takes a base" in spoken(result)


class TestFiles:
    def test_other_dtype_and_shards(self, many):
        assert invoke(*of_many(many, out="own")).exit_code == 0
        more = ["--dtype", "bfloat16", "--shard-size", "1KB"]
        assert invoke(*of_many(many, *more)).exit_code == 0
        found, own = folders.load(many / "out"), folders.load(many / "own")
        assert merges.same_bits(found, {n: t.bfloat16() for n, t in own.items()})
        assert {path.name for path in (many / "out").glob("*.safetensors")} == {
            "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        }  # fmt: skip

    def test_configuration_from_elsewhere(self, many):
        config = {"model_type": "none", "use_cache": False}
        other = folders.save(many / "other", {"x": torch.zeros(1)}, config=config)
        assert invoke(*of_many(many, "--config-from", other)).exit_code == 0
        assert json.loads((many / "out/config.json").read_text()) == config

    def test_differences_are_allowed_by_name(self, many):
        half = {n: t.half() for n, t in folders.load(many / "model_2").items()}
        folders.save(many / "model_2", half)
        refused = invoke(*of_many(many))
        assert refused.exit_code == 3
        assert "--allow dtype" in refused.stderr
        assert invoke(*of_many(many, "--allow", "dtype", "--allow", "vocab")).exit_code == 0

    def test_infinity_is_refused_or_kept(self, many):
        state = folders.load(many / "model_2")
        state["a.weight"][2, 3] = float("inf")
        folders.save(many / "model_2", state)
        refused = invoke(*of_many(many))
        assert refused.exit_code == 3
        path = many / "model_2/model.safetensors"
        assert f"{path}: a.weight: element 43 is inf" in refused.stderr
        assert not (many / "out").exists()
        assert invoke(*of_many(many, "--nonfinite", "keep")).exit_code == 0
        assert folders.load(many / "out")["a.weight"].isinf().nonzero().tolist() == [[2, 3]]

    def test_adapters_by_insistence(self, tmp_path):
        for number, role in enumerate(ROLES):
            tensors = folders.random_tensors(number, {"q.lora_A.weight": (2, 3)})
            folders.save(tmp_path / role, tensors, stem="adapter_model", config={"r": 2})
        refused = invoke(*of_many(tmp_path, rule="linear", base=False))
        assert refused.exit_code == 3
        assert "--space factor" in refused.stderr
        more = ["--space", "factor"]
        assert invoke(*of_many(tmp_path, *more, rule="linear", base=False)).exit_code == 0
        assert (tmp_path / "out/adapter_model.safetensors").exists()
        assert (tmp_path / "out/adapter_config.json").exists()

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("1000", 1000),
            ("5GB", 5 * 10**9),
            ("1.5kb", 1500),
            ("2 GiB", 2 << 30),
            ("3M", 3 * 10**6),
        ],
    )
    def test_sizes(self, text, expected):
        assert parse_bytes(text) == expected


class TestAgain:
    @pytest.fixture
    def made(self, many):
        more = ["--rule", "ties", "--density", "0.4", "--dtype", "float16", "--shard-size", "1KB"]
        words = [word for word in of_many(many) if word not in ("--rule", "task-arithmetic")]
        assert invoke(*words, *more).exit_code == 0
        return many

    def again(self, made, *more):
        return invoke("merge", made / "out/kifmerge.json", "--out", made / "again", *more)

    def test_same_bytes(self, made):
        result = self.again(made, "--json", "--workers", "3")
        assert (result.exit_code, result.stderr) == (0, "")
        assert json.loads(result.stdout)["rule"] == "ties"
        assert synthetic.files(made / "again") == synthetic.files(made / "out")
        told = read_provenance(made / "again")["files"]
        for name, record in told.items():
            content = (made / "again" / name).read_bytes()
            expected = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            assert record == expected

    def test_dry_run(self, made):
        result = self.again(made, "--dry-run", "--json")
        assert json.loads(result.stdout)["rule"] == "ties"
        assert not (made / "again").exists()

    def test_input_that_has_changed(self, made):
        folders.save(made / "model_2", folders.load(made / "model_1"))
        before = sorted(made.rglob("*"))
        result = self.again(made)
        assert result.exit_code == 3
        assert f"model_2 {made / 'model_2'}" in result.stderr
        assert sorted(made.rglob("*")) == before

    @pytest.mark.parametrize(
        "more",
        [
            ["--rule", "ties"], ["--base", "x"], ["--new", "x"], ["--historical", "x"],
            ["--model", "x"], ["--weight", "1"], ["--scale", "1"], ["--density", "0.4"],
            ["--importance", "x"], ["--new-mask", "x"], ["--units", "x"], ["--unscored", "base"],
            ["--historical-parent", "base"], ["--space", "factor"], ["--allow", "dtype"],
            ["--nonfinite", "keep"], ["--config-from", "x"], ["--shard-size", "1KB"],
            ["--dtype", "float16"], ["--normalise"], ["--scope", "tensor"],
        ],
        ids=lambda more: more[0],
    )  # fmt: skip
    def test_options_beside_the_file_exit_with_2(self, made, more):
        result = self.again(made, *more)
        assert result.exit_code == 2
        assert "the file says what is merged and how" in spoken(result)
        assert not (made / "again").exists()

    def test_file_of_no_merge(self, made):
        path = made / "base/config.json"
        result = invoke("merge", path, "--out", made / "again")
        assert result.exit_code == 3
        assert f"{path}: expected format kifmerge.checkpoint" in result.stderr
