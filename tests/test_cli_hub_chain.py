"""Commands that load models from the Hub: the same bytes as from folders, pinned and recorded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic
import yaml
from huggingface_hub import constants
from loopback import Fault
from synthetic import files
from typer.testing import CliRunner

from kifmerge.cli import app
from kifmerge.hub import client
from kifmerge.models import origin
from kifmerge.models.model import ModelOptions, load_model
from kifmerge.models.scratch import make_base
from kifmerge.models.tokenizer import TokenizerOptions

pytestmark = pytest.mark.slow  # hundreds of requests

COMMAND = Path(sys.executable).with_name("kifmerge")
LLAMA = ModelOptions(
    kind="causal-lm",
    config={
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    tokenizer=TokenizerOptions(kind="bytes", vocabulary_size=300),
)
OPTIONS = [
    *("--set", "training.device=cpu"),
    *("--set", "training.batch_size=4"),
    *("--set", "training.learning_rate=0.01"),
    *("--set", "model.max_tokens=32"),
    *("--set", "model.max_output_tokens=4"),
    "--quiet",
]
LORA = [
    *("--set", "model.kind=causal-lm"),
    *("--set", "model.lora={targets: [q_proj, v_proj], rank: 2, alpha: 4, dropout: 0.1}"),
]
FULL = ["--set", "model.kind=classifier", "--set", "model.pooling=mean"]


@pytest.fixture
def kifmerge(monkeypatch):
    """Call a command as if in a process of its own; its result, which must have the exit code."""

    def call(*arguments, exit_code=0):
        monkeypatch.setattr(origin, "_opened", {})
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == exit_code, result.output + repr(result.exception)
        return result

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows for both kinds of models."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"say {n}", "completion": "yes" if n % 3 else "no"} for n in range(16)]
    synthetic.write_rows(folder / "say.jsonl", rows)
    synthetic.write_rows(folder / "sizes.jsonl", synthetic.rows("sizes", 16))
    return folder


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "base"
    make_base(LLAMA, ["some text to say yes or no"], folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert") / "base"
    options = ModelOptions(**{**synthetic.MODEL, "tokenizer": TokenizerOptions()})
    make_base(options, [row["text"] for row in synthetic.rows("sizes", 16)], folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def classifier_dir(bert_dir, tmp_path_factory):
    """A classifier of ours."""
    options = ModelOptions(kind="classifier", reference=str(bert_dir), pooling="mean")
    folder = tmp_path_factory.mktemp("classifier") / "made"
    load_model(options, ["large", "little"], seed=1).save(folder)
    return folder


def tensors(folder: Path) -> dict[str, bytes]:
    """Every file of tensors in a folder, importance and state included."""
    found = {name: data for name, data in files(folder).items() if name.endswith(".safetensors")}
    assert found
    return found


def parents(path: Path) -> dict[str, str]:
    """Role -> reference of what something was made of."""
    made_by = json.loads(path.read_text())["made_by"]
    return {role: parent["reference"] for role, parent in made_by["parents"].items()}


def lookups(hub) -> list[str]:
    """Requests for what a branch or tag is at; those for a commit are none."""
    infos = [row.path for row in hub.log if row.kind == "info"]
    return [path for path in infos if len(path.rpartition("/revision/")[2]) != 40]


def refused(result) -> str:
    """The one line that a command has said before it gave up."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    (line,) = result.stderr.splitlines()
    return line


class TestAdapter:
    """Train, replay, importance and evaluate with LoRA, its base and itself on the Hub."""

    def chain(self, kifmerge, data, out, base, publish):
        """The commands one after the other; ``publish`` says by what name a result is taken on."""
        rows = data / "say.jsonl"
        train = ["train", "--model", base, "--data", rows, *LORA, "--steps", 3]
        kifmerge(*train, "--out", out / "new", *OPTIONS)
        kifmerge(
            "replay", "--model", publish(out / "new"), "--memory", rows, "--steps", 2,
            "--state", out / "new/state", "--out", out / "historical", "--quiet",
        )  # fmt: skip
        named = publish(out / "historical")
        options = ["--data", rows, *OPTIONS]
        kifmerge("importance", "--model", named, "--out", out / "importance", *options)
        kifmerge("evaluate", "--model", named, "--out", out / "scores.json", *options)
        kifmerge(
            "evaluate", "--model", base, "--adapter", named, "--out", out / "again.json", *options
        )

    def test_is_that_of_folders(self, hub, kifmerge, data, llama_dir, tmp_path):
        commit = hub.add_repo("org/base", llama_dir, branch="v1")
        hub.add_repo("org/base", {"config.json": b"{}"})

        def publish(folder: Path) -> str:
            hub.add_repo(f"org/{folder.name}", folder)
            return f"org/{folder.name}"

        self.chain(kifmerge, data, tmp_path / "hub", "org/base@v1", publish)
        self.chain(kifmerge, data, tmp_path / "folder", llama_dir, str)
        assert tensors(tmp_path / "hub") == tensors(tmp_path / "folder")
        for name in ("scores", "again"):
            predictions = (files(tmp_path / place / f"{name}.predictions") for place in (
                "hub", "folder"
            ))  # fmt: skip
            assert next(predictions) == next(predictions)

        pinned = {name: f"org/{name}@{hub.head(f'org/{name}')}" for name in ("new", "historical")}
        base = f"org/base@{commit}"
        for place, expected in {
            "new/kifmerge.json": {"model": base},
            "historical/kifmerge.json": {"model": base, "adapter": pinned["new"]},
            "importance/importance.json": {"model": base, "adapter": pinned["historical"]},
            "scores.json": {"model": base, "adapter": pinned["historical"]},
            "again.json": {"model": base, "adapter": pinned["historical"]},
        }.items():
            found = parents(tmp_path / "hub" / place)
            assert {role: found[role] for role in expected} == expected
        kept = json.loads((tmp_path / "hub/historical/kifmerge.json").read_text())
        assert kept["model"]["reference"] == base
        details = json.loads((tmp_path / "hub/importance/importance.json").read_text())
        assert (details["model"], details["adapter"]) == (base, pinned["historical"])
        config = json.loads((tmp_path / "hub/historical/adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
        for name, content in files(tmp_path / "hub").items():
            assert str(hub.store_dir).encode() not in content, name
            assert hub.env["HF_TOKEN"].encode() not in content, name

    def test_fuses_with_its_like(self, hub, kifmerge, data, llama_dir, tmp_path):
        """Two adapters of one base on the Hub: what they record of it agrees."""
        hub.add_repo("org/base", llama_dir)
        rows = data / "say.jsonl"
        train = ["train", "--model", "org/base", "--data", rows, *LORA, "--initial-seed", 0]
        kifmerge(*train, "--steps", 1, "--out", tmp_path / "start", *OPTIONS)
        for seed in (1, 2):
            kifmerge(
                "train", "--model", tmp_path / "start", "--data", rows, "--seed", seed,
                "--steps", 2, "--out", tmp_path / f"{seed}", *OPTIONS,
            )  # fmt: skip
        kifmerge(
            "merge", "--rule", "linear", "--base", tmp_path / "start", "--model", tmp_path / "1",
            "--model", tmp_path / "2", "--weight", 0.5, "--weight", 0.5,
            "--out", tmp_path / "fused",
        )  # fmt: skip
        evaluate = ["evaluate", "--data", rows, *OPTIONS]
        kifmerge(*evaluate, "--model", tmp_path / "fused", "--out", tmp_path / "scores.json")


class TestWholeModel:
    def test_trained_from_a_folder_of_a_repository(self, hub, kifmerge, data, bert_dir, tmp_path):
        content = {f"sub/bert/{name}": data for name, data in files(bert_dir).items()}
        commit = hub.add_repo("org/many", content)
        for name, base in (("hub", "hf://org/many@main/sub/bert"), ("folder", bert_dir)):
            kifmerge(
                "train", "--model", base, "--data", data / "sizes.jsonl", *FULL, "--steps", 3,
                "--out", tmp_path / name, *OPTIONS,
            )  # fmt: skip
        assert tensors(tmp_path / "hub") == tensors(tmp_path / "folder")
        assert (
            parents(tmp_path / "hub/kifmerge.json")["model"] == f"hf://org/many@{commit}/sub/bert"
        )

    def test_tokenizer_is_pinned_too(self, hub, kifmerge, data, llama_dir, tmp_path):
        commit = hub.add_repo("org/words", llama_dir)
        more = ["--data", data / "say.jsonl", "--set", "model.tokenizer=org/words", *OPTIONS]
        kifmerge(
            "train", "--model", llama_dir, *LORA, "--steps", 1, "--out", tmp_path / "new", *more
        )
        kifmerge("importance", "--model", llama_dir, "--out", tmp_path / "scores", *more)
        for name in ("new/kifmerge.json", "scores/importance.json"):
            made_by = json.loads((tmp_path / name).read_text())["made_by"]
            assert made_by["options"]["model"]["tokenizer"] == f"org/words@{commit}"
        assert hub.pulled_bytes("*.safetensors") == 0

    def test_goes_on_as_a_product(self, hub, kifmerge, data, classifier_dir, tmp_path):
        commit = hub.add_repo("org/sizes", classifier_dir)
        for name, model in (("hub", "org/sizes"), ("folder", classifier_dir)):
            more = ["--data", data / "sizes.jsonl", *OPTIONS]
            out = tmp_path / name
            kifmerge("train", "--model", model, "--steps", 2, "--out", out / "trained", *more)
            kifmerge("importance", "--model", model, "--out", out / "importance", *more)
            kifmerge("evaluate", "--model", model, "--out", out / "scores.json", *more)
        assert tensors(tmp_path / "hub") == tensors(tmp_path / "folder")
        both = [files(tmp_path / name / "scores.predictions") for name in ("hub", "folder")]
        assert both[0] == both[1]
        assert parents(tmp_path / "hub/scores.json")["model"] == f"org/sizes@{commit}"

    def test_importance_takes_the_names_in_the_files(
        self, hub, kifmerge, data, llama_dir, tmp_path
    ):
        """As published encoders have them: without the prefix that the whole model gives them."""
        import safetensors.torch

        folder = tmp_path / "bare"
        shutil.copytree(llama_dir, folder)
        kept = safetensors.torch.load_file(folder / "model.safetensors")
        bare = {name.removeprefix("model."): value for name, value in kept.items()}
        safetensors.torch.save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
        hub.add_repo("org/bare", folder)
        kifmerge(
            "importance", "--model", "org/bare", "--data", data / "say.jsonl",
            "--out", tmp_path / "out", *OPTIONS,
        )  # fmt: skip
        names = safetensors.torch.load_file(tmp_path / "out/importance.safetensors")
        assert {f"score/{name}" for name in bare} == set(names)


class TestUnits:
    def test_only_units_from_the_hub(self, hub, kifmerge, data, llama_dir, tmp_path):
        rows = data / "say.jsonl"
        kifmerge(
            "train", "--kif", "--model", llama_dir, "--data", rows, *LORA, "--total-steps", 4,
            "--out", tmp_path / "new", *OPTIONS,
        )  # fmt: skip
        kifmerge(
            "group", "--importance", tmp_path / "new/importance", "--unit", "tensor",
            "--out", tmp_path / "units",
        )  # fmt: skip
        commit = hub.add_repo("org/units", tmp_path / "units")
        for name, units in (("hub", "org/units"), ("folder", tmp_path / "units")):
            kifmerge(
                "train", "--model", tmp_path / "new", "--only-units", units, "--data", rows,
                "--total-steps", 2, "--out", tmp_path / name, *OPTIONS,
            )  # fmt: skip
        assert tensors(tmp_path / "hub") == tensors(tmp_path / "folder")
        assert parents(tmp_path / "hub/kifmerge.json")["units"] == f"org/units@{commit}"


class TestNetwork:
    """What is asked for and pulled, and what is not."""

    def evaluate(self, kifmerge, data, out, *more, **expected):
        return kifmerge(
            "evaluate", "--data", data / "sizes.jsonl", "--out", out, "--set",
            "training.device=cpu", *more, **expected,
        )  # fmt: skip

    def test_every_byte_comes_once(self, hub, kifmerge, data, classifier_dir, tmp_path):
        hub.add_repo("org/sizes", classifier_dir)
        result = self.evaluate(kifmerge, data, tmp_path / "1.json", "--model", "org/sizes")
        assert "fetching org/sizes@" in result.stderr
        assert hub.pulled_bytes() == sum(map(len, files(classifier_dir).values()))
        hub.clear_log()
        self.evaluate(kifmerge, data, tmp_path / "2.json", "--model", "org/sizes")
        assert hub.pulled_bytes() == 0
        assert len(lookups(hub)) == 1
        result = self.evaluate(kifmerge, data, tmp_path / "2.json", "--model", "org/sizes")
        assert "holds the scores of this very evaluation" in result.stderr

    def test_quiet_says_nothing(self, hub, kifmerge, data, classifier_dir, tmp_path):
        hub.add_repo("org/sizes", classifier_dir)
        out = tmp_path / "1.json"
        result = self.evaluate(kifmerge, data, out, "--model", "org/sizes", "--quiet")
        assert result.stderr == ""

    def test_dry_run_pulls_no_weights(self, hub, kifmerge, data, classifier_dir, tmp_path):
        commit = hub.add_repo("org/sizes", classifier_dir)
        more = ["--model", "org/sizes", "--dry-run", "--json"]
        result = self.evaluate(kifmerge, data, tmp_path / "1.json", *more)
        reference = json.loads(result.stdout)["parents"]["model"]["reference"]
        assert reference == f"org/sizes@{commit}"
        assert hub.pulled_bytes("*.safetensors") == 0

    def test_offline_afterwards(self, hub, kifmerge, data, classifier_dir, tmp_path, monkeypatch):
        hub.add_repo("org/sizes", classifier_dir)
        self.evaluate(kifmerge, data, tmp_path / "1.json", "--model", "org/sizes")
        hub.clear_log()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        self.evaluate(kifmerge, data, tmp_path / "2.json", "--model", "org/sizes")
        assert hub.log == []
        contents = [json.loads((tmp_path / name).read_text()) for name in ("1.json", "2.json")]
        assert contents[0]["made_by"] == contents[1]["made_by"]
        result = self.evaluate(
            kifmerge, data, tmp_path / "3.json", "--model", "org/other", exit_code=3
        )
        assert "HF_HUB_OFFLINE is set" in refused(result)

    def test_model_that_moves_is_another(self, hub, kifmerge, data, classifier_dir, tmp_path):
        hub.add_repo("org/sizes", classifier_dir)
        out = tmp_path / "1.json"
        self.evaluate(kifmerge, data, out, "--model", "org/sizes")
        hub.add_repo("org/sizes", {**files(classifier_dir), "more.txt": b"more"})
        result = self.evaluate(kifmerge, data, out, "--model", "org/sizes", exit_code=3)
        assert "holds something else" in refused(result)

    @pytest.mark.parametrize("token", [None, "loopback-token-of-someone-else", "hf_wrong"])
    def test_private(self, hub, kifmerge, data, classifier_dir, tmp_path, monkeypatch, token):
        hub.add_repo("org/sizes", classifier_dir, private=True)
        right = hub.env["HF_TOKEN"]
        if token is None:
            monkeypatch.delenv("HF_TOKEN")
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        options = ["--model", "org/sizes"]
        result = self.evaluate(kifmerge, data, tmp_path / "1.json", *options, exit_code=3)
        line = refused(result)
        assert "org/sizes" in line
        assert "hf auth login" in line
        assert token is None or token not in result.output
        monkeypatch.setenv("HF_TOKEN", right)
        result = self.evaluate(kifmerge, data, tmp_path / "1.json", *options)
        assert right not in result.output
        assert all(right.encode() not in content for content in files(tmp_path).values())

    def test_what_cannot_be_loaded(self, hub, kifmerge, data, llama_dir, tmp_path):
        config = (llama_dir / "config.json").read_bytes()
        hub.add_repo("org/old", {"config.json": config, "pytorch_model.bin": b"pickle"})
        hub.add_repo("org/gated", llama_dir, gated=True)
        for model, words in {
            "org/old": "found pickles only (pytorch_model.bin)",
            "org/none": "no such repository",
            "org/gated": "gated",
            "org/old@v9": "no such branch, tag or commit",
            "hf://org/old/sub": "no such",
            "hf://org": "expected",
        }.items():
            out = tmp_path / "1.json"
            result = self.evaluate(kifmerge, data, out, "--model", model, exit_code=3)
            assert words in refused(result)
            assert not out.exists()
        assert hub.pulled_bytes("*.bin") == 0

    def test_hub_that_fails(self, hub, kifmerge, data, tmp_path, monkeypatch):
        monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.001)
        hub.fail(Fault(status=503, times=None))
        out = tmp_path / "1.json"
        result = self.evaluate(kifmerge, data, out, "--model", "org/sizes", exit_code=4)
        assert "HTTP 503" in refused(result)


class TestRun:
    @pytest.fixture
    def recipe(self, tmp_path, hub, bert_dir):
        """A recipe whose base and tokenizer are on the Hub."""
        hub.add_repo("org/base", bert_dir)
        words = {n: c for n, c in files(bert_dir).items() if n.startswith("tokenizer")}
        hub.add_repo("org/words", {**words, "config.json": (bert_dir / "config.json").read_bytes()})
        model = {
            "kind": "classifier",
            "pooling": "mean",
            "reference": "org/base",
            "tokenizer": "org/words@main",
            "max_tokens": 12,
        }
        return synthetic.write_recipe(tmp_path / "recipe", model=model, methods=["sequential"])

    def change(self, recipe, **changes) -> None:
        content = yaml.safe_load(recipe.read_text())
        recipe.write_text(yaml.safe_dump({**content, **changes}))

    def test_is_pinned_when_it_begins(self, hub, kifmerge, recipe, bert_dir, tmp_path):
        commits = {name: hub.head(f"org/{name}") for name in ("base", "words")}
        result = kifmerge("run", recipe, "--out", tmp_path / "run")
        assert f"fetching org/base@{commits['base']}" in result.stderr
        assert hub.pulled_bytes("*.safetensors") == (bert_dir / "model.safetensors").stat().st_size
        kept = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["model"]
        assert kept["reference"] == f"org/base@{commits['base']}"
        assert kept["tokenizer"] == f"org/words@{commits['words']}"
        local = yaml.safe_load(recipe.read_text())
        local["model"] |= {"reference": str(bert_dir), "tokenizer": None}
        self.change(recipe, model=local["model"])
        kifmerge("run", recipe, "--out", tmp_path / "local", "--quiet")
        assert synthetic.weights(tmp_path / "run") == synthetic.weights(tmp_path / "local")
        for name, content in files(tmp_path / "run").items():
            assert str(hub.store_dir).encode() not in content, name

    def test_stays_where_it_was(self, hub, kifmerge, recipe, classifier_dir, tmp_path):
        out = tmp_path / "run"
        kifmerge("run", recipe, "--out", out, "--quiet")
        before = synthetic.weights(out)
        kept = (out / "recipe.yaml").read_bytes()
        # What main is at from now on could not even be loaded.
        for name in ("org/base", "org/words"):
            hub.add_repo(name, {"config.json": b"{}"})
        shutil.rmtree(out / "sequential/seed-0/02-sizes")
        hub.clear_log()
        kifmerge("run", recipe, "--out", out, "--resume", "--quiet")
        assert lookups(hub) == []
        assert synthetic.weights(out) == before
        assert (out / "recipe.yaml").read_bytes() == kept

        self.change(recipe, methods=["sequential", "recurrent-kif"])
        kifmerge("run", recipe, "--out", out, "--resume", "--quiet")
        kifmerge("run", out / "recipe.yaml", "--out", out, "--resume", "--quiet")
        assert lookups(hub) == []
        assert hub.pulled_bytes() == 0
        assert (out / "recurrent-kif/seed-0/02-sizes/stage.json").exists()

    def test_of_another_revision_is_another(self, hub, kifmerge, recipe, tmp_path):
        out = tmp_path / "run"
        kifmerge("run", recipe, "--out", out, "--quiet")
        hub.add_repo("org/base", {"config.json": b"{}"})
        result = kifmerge(
            "run", recipe, "--out", out, "--resume", "--set", "model.reference=org/base@main",
            exit_code=3,
        )  # fmt: skip
        assert "holds a run of another recipe" in result.stderr

    def test_begins_anew_where_main_is_now(self, hub, kifmerge, recipe, bert_dir, tmp_path):
        out = tmp_path / "run"
        kifmerge("run", recipe, "--out", out, "--quiet")
        commit = hub.add_repo("org/base", {**files(bert_dir), "more.txt": b"more"})
        kifmerge("run", recipe, "--out", out, "--overwrite", "--quiet")
        kept = yaml.safe_load((out / "recipe.yaml").read_text())["model"]
        assert kept["reference"] == f"org/base@{commit}"

    def test_leaves_nothing_of_what_cannot_begin(self, hub, kifmerge, recipe, tmp_path):
        hub.add_repo("org/base", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
        out = tmp_path / "run"
        result = kifmerge("run", recipe, "--out", out, "--quiet", exit_code=3)
        assert "found pickles only" in refused(result)
        result = kifmerge(
            "run", recipe, "--out", out, "--quiet", "--set", "model.tokenizer=org/none", exit_code=3
        )
        assert "no such repository" in refused(result)
        assert [path.name for path in out.iterdir() if path.name != ".lock"] == []


@pytest.mark.slow
class TestRows:
    """In processes of their own: the datasets library reads its environment when it is imported."""

    @pytest.fixture
    def call(self, hub, tmp_path):
        def call(*arguments, exit_code=0, **env):
            done = subprocess.run(
                [COMMAND, *map(str, arguments)],
                env={**os.environ, **hub.env, "HF_DATASETS_CACHE": str(tmp_path / "rows"), **env},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == exit_code, done.stderr
            return done

        return call

    def rows(self, task, seed=0) -> bytes:
        return "".join(json.dumps(r) + "\n" for r in synthetic.rows(task, 16, seed)).encode()

    def test_are_pinned(self, hub, call, classifier_dir, tmp_path):
        content = {"data/train.jsonl": self.rows("sizes"), "data/test.jsonl": self.rows("sizes", 1)}
        commit = hub.add_repo("org/rows", content, kind="dataset")
        given, pinned = "hf://datasets/org/rows:train", f"hf://datasets/org/rows@{commit}:train"
        model = ["--model", classifier_dir, "--set", "training.device=cpu"]
        call("train", *model, "--data", given, "--steps", 2, "--out", tmp_path / "new")
        assert parents(tmp_path / "new/kifmerge.json")["data"] == pinned
        state = json.loads((tmp_path / "new/state/state.json").read_text())
        assert state["identity"]["data"] == pinned

        content["data/train.jsonl"] = self.rows("sizes", 2)
        moved = hub.add_repo("org/rows", content, kind="dataset")
        state = ["--state", tmp_path / "new/state"]
        go_on = ["train", "--model", tmp_path / "new", *state, "--steps", 2]
        refusal = call(*go_on, "--data", given, "--out", tmp_path / "more", exit_code=3)
        assert moved in refusal.stderr
        call(*go_on, "--data", pinned, "--out", tmp_path / "more")

        call("evaluate", *model, "--data", given.replace("train", "test"), "--out", tmp_path / "s")
        assert parents(tmp_path / "s")["data/test"] == f"hf://datasets/org/rows@{moved}:test"

    def test_offline(self, hub, call, classifier_dir, tmp_path):
        before = hub.add_repo("org/rows", {"test.jsonl": self.rows("sizes")}, kind="dataset")
        evaluate = ["evaluate", "--model", classifier_dir, "--set", "training.device=cpu", "--data"]
        given = "hf://datasets/org/rows:test"
        call(*evaluate, given, "--out", tmp_path / "1.json")
        hub.clear_log()
        call(*evaluate, given, "--out", tmp_path / "2.json", HF_HUB_OFFLINE="1")
        assert hub.log == []
        contents = [json.loads((tmp_path / name).read_text()) for name in ("1.json", "2.json")]
        assert contents[0]["made_by"] == contents[1]["made_by"]
        assert f"org/rows@{before}:test" in json.dumps(contents[0])

        after = hub.add_repo("org/rows", {"test.jsonl": self.rows("sizes", 1)}, kind="dataset")
        call(*evaluate, given, "--out", tmp_path / "3.json")
        old = f"hf://datasets/org/rows@{before}:test"
        more = ["--out", tmp_path / "4.json"]
        refusal = call(*evaluate, old, *more, exit_code=4, HF_HUB_OFFLINE="1")
        assert f"of another commit, {after}" in refusal.stderr

    def test_of_a_run(self, hub, call, bert_dir, tmp_path):
        hub.add_repo("org/base", bert_dir)
        content = {f"{part}.jsonl": self.rows("sizes") for part in ("train", "test")}
        commit = hub.add_repo("org/rows", content, kind="dataset")
        source = "hf://datasets/org/rows"
        recipe = synthetic.write_recipe(
            tmp_path / "recipe",
            methods=["sequential"],
            model={"kind": "classifier", "pooling": "mean", "reference": "org/base"},
        )
        tasks = [{"name": "sizes", "train": f"{source}:train", "test": f"{source}:test"}]
        recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "tasks": tasks}))
        out = tmp_path / "run"
        call("run", recipe, "--out", out, "--jobs", 1)
        (task,) = yaml.safe_load((out / "recipe.yaml").read_text())["tasks"]
        assert (task["train"], task["test"]) == tuple(
            f"{source}@{commit}:{part}" for part in ("train", "test")
        )
        for name in ("org/base", "org/rows"):
            kind = "dataset" if name == "org/rows" else "model"
            hub.add_repo(name, {"README.md": b"nothing"}, kind=kind)
        before = synthetic.weights(out)
        shutil.rmtree(out / "start/seed-0/01-sizes")
        hub.clear_log()
        call("run", recipe, "--out", out, "--resume")
        assert lookups(hub) == []
        assert synthetic.weights(out) == before

    def test_that_are_not_there(self, hub, call, classifier_dir, tmp_path):
        evaluate = ["evaluate", "--model", classifier_dir, "--out", tmp_path / "1.json", "--data"]
        refusal = call(*evaluate, "hf://datasets/org/none:test", exit_code=3)
        assert "looking up hf://datasets/org/none: no such repository" in refusal.stderr
