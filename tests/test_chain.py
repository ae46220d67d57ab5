"""A chain of train, replay and merge gives the weights of the in-process run, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import faults
import pytest
import synthetic
from typer.testing import CliRunner

from kifmerge.cli import app
from kifmerge.errors import RunError
from kifmerge.training.guard import GradientGuard

LORA = {"targets": ["query", "value"], "rank": 2, "alpha": 4, "dropout": 0.1}
LLAMA = {
    "kind": "causal-lm",
    "config": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "tokenizer": {"kind": "bytes", "vocabulary_size": 300},
    "max_tokens": 48,
    "max_output_tokens": 12,
    "lora": {**LORA, "targets": ["q_proj", "v_proj"]},
}
T5 = {
    "kind": "seq2seq-lm",
    "config": {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
    },
    "tokenizer": {"kind": "bytes", "vocabulary_size": 300},
    "max_tokens": 48,
    "max_output_tokens": 12,
    "dropout": 0.1,
}
MODELS = {
    "classifier, all parameters": {**synthetic.MODEL, "dropout": 0.1},
    "classifier, LoRA": {**synthetic.MODEL, "lora": LORA},
    "Llama, LoRA": LLAMA,
    "T5, all parameters": T5,
}
TRAINING = {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "device": "cpu", "warmup_steps": 3}
PRESETS = {
    "kifmerge": {"inner_steps": 5, "outer_steps": 2},
    "released": {"preset": "released", "inner_steps": 5, "outer_steps": 2},
    "paper": {"preset": "paper", "inner_steps": 5, "outer_steps": 2},
}


def kifmerge(*arguments, exit_code=0):
    """Call the command line; its standard output as JSON."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output + repr(result.exception)
    return result


class Chain:
    """The shell script, with its files in a folder."""

    def __init__(self, folder: Path, recipe: Path, base: Path, is_adapter: bool) -> None:
        self.folder = folder
        self.base = base
        self.is_adapter = is_adapter
        self.recipe = ["--recipe", recipe]
        self.data = recipe.parent

    def model(self, folder: Path | None) -> list:
        """Options that name the model to go on with."""
        if folder is None:
            return ["--model", self.base]
        return (
            ["--model", self.base, "--adapter", folder] if self.is_adapter else ["--model", folder]
        )

    def first_task(self) -> None:
        labels = [label for task in ("colours", "sizes") for label in sorted(synthetic.TASKS[task])]
        kifmerge(
            "train", *self.model(None), *self.recipe, "--data", self.data / "colours-train.jsonl",
            "--seed", 1, "--initial-seed", 0, *(x for label in labels for x in ("--label", label)),
            "--out", self.folder / "first",
        )  # fmt: skip
        kifmerge(
            "memory", "--data", self.data / "colours-train.jsonl", "--fraction", 0.2,
            "--seed", 1, "--out", self.folder / "memory.jsonl",
        )  # fmt: skip

    def inner(self, number: int, *more, exit_code: int = 0):
        """Inner steps of a round."""
        go_on = ["--state", self.round(number - 1) / "outer/state"] if number > 1 else []
        return kifmerge(
            "train", *self.model(self.start(number)), *self.recipe, "--seed", 2, "--steps", 5,
            "--data", self.data / "sizes-train.jsonl", *go_on, "--json",
            "--out", self.round(number) / "inner", *more, exit_code=exit_code,
        )  # fmt: skip

    def outer(self, number: int, *more, exit_code: int = 0):
        """Outer steps of a round."""
        return kifmerge(
            "replay", *self.model(self.round(number) / "inner"), *self.recipe, "--json",
            "--memory", self.folder / "memory.jsonl", "--state",
            self.round(number) / "inner/state", "--out", self.round(number) / "outer",
            *more, exit_code=exit_code,
        )  # fmt: skip

    def fuse(self, number: int, *more, exit_code: int = 0):
        folder = self.round(number)
        return kifmerge(
            "merge", "--rule", "recurrent-kif", "--base", self.start(number),
            "--new", folder / "inner", "--historical", folder / "outer",
            "--new-importance", folder / "inner/importance",
            "--historical-importance", folder / "outer/importance",
            "--out", folder / "fused", *more, exit_code=exit_code,
        )  # fmt: skip

    def start(self, number: int) -> Path:
        return self.folder / "first" if number == 1 else self.round(number - 1) / "fused"

    def round(self, number: int) -> Path:
        return self.folder / f"round-{number}"


def weights(folder: Path) -> bytes:
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def set_up(folder: Path, model, preset) -> tuple[Path, Chain]:
    """Run a recipe in one process, and prepare the chain from the same base."""
    recipe = synthetic.write_recipe(
        folder,
        model=model,
        training=TRAINING,
        recurrent=PRESETS[preset],
        methods=["recurrent-kif"],
    )
    synthetic.run(recipe, folder / "run")
    base = folder / "run/start/seed-0/base"
    return folder / "run", Chain(folder / "chain", recipe, base, "lora" in model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset"),
    [*((name, "kifmerge") for name in MODELS), ("Llama, LoRA", "released")],
)
def test_chain_equals_process(tmp_path, name, preset):
    run, chain = set_up(tmp_path, MODELS[name], preset)
    chain.first_task()
    stage = run / "start/seed-0/01-colours"
    assert weights(chain.folder / "first") == weights(stage / "checkpoint")
    assert (chain.folder / "memory.jsonl").read_bytes() == (stage / "memory.jsonl").read_bytes()
    step, number = 0, 0
    while step < 12:
        number += 1
        figures = json.loads(chain.inner(number).stdout)
        step = figures["step"]
        assert figures["total_steps"] == 12
        if figures["num_steps"] == 5 or preset == "kifmerge":
            chain.outer(number)
            chain.fuse(number)
    assert number == 3
    last = chain.round(3) / ("fused" if preset == "kifmerge" else "inner")
    in_process = run / "recurrent-kif/seed-0/02-sizes"
    assert weights(last) == weights(in_process / "checkpoint")
    assert weights(last) != weights(chain.folder / "first")


@pytest.fixture(scope="module")
def one_round(tmp_path_factory):
    """A chain after its first round."""
    folder = tmp_path_factory.mktemp("chain")
    _, chain = set_up(folder, MODELS["Llama, LoRA"], "kifmerge")
    chain.first_task()
    chain.inner(1)
    chain.outer(1)
    chain.fuse(1)
    return chain


@pytest.mark.slow
class TestSteps:
    def test_done_step_does_nothing(self, one_round):
        before = synthetic.files(one_round.folder)
        for step in (one_round.inner, one_round.outer, one_round.fuse):
            result = step(1)
            assert "already made" in result.stderr
        assert synthetic.files(one_round.folder) == before

    def test_other_options_are_refused_then_overwrite(self, one_round, tmp_path):
        folder = one_round.round(1)
        shutil.copytree(folder, tmp_path / "round")
        options = ["--set", "training.learning_rate=0.02"]
        result = one_round.inner(1, *options, exit_code=3)
        assert "is not empty (made by another train command)" in result.stderr
        assert synthetic.files(folder) == synthetic.files(tmp_path / "round")

    def test_state_of_another_run_is_refused(self, one_round):
        result = one_round.inner(2, "--set", "training.learning_rate=0.02", exit_code=3)
        assert "is the state of another run" in result.stderr
        assert "'learning_rate': 0.02" in result.stderr
        assert not (one_round.round(2) / "inner").exists()

    def test_state_of_other_rows_is_refused(self, one_round):
        other = synthetic.write_rows(one_round.folder / "o.jsonl", synthetic.rows("sounds", 24))
        result = one_round.inner(2, "--data", other, exit_code=3)
        assert "data was" in result.stderr

    def test_options_come_from_the_state(self, one_round):
        result = kifmerge(
            "train", *one_round.model(one_round.start(2)), "--state",
            one_round.round(1) / "outer/state", "--data", one_round.data / "sizes-train.jsonl",
            "--out", one_round.folder / "nowhere", "--dry-run", "--json",
        )  # fmt: skip
        options = json.loads(result.stdout)["options"]
        assert (options["training"]["warmup_steps"], options["seed"]) == (3, 2)
        assert options["model"]["max_tokens"] == 48
        assert not (one_round.folder / "nowhere").exists()

    def test_replay_needs_no_state(self, one_round, tmp_path):
        result = kifmerge(
            "replay", *one_round.model(one_round.start(1)), "--memory",
            one_round.folder / "memory.jsonl", "--steps", 3, "--out", tmp_path / "out", "--json",
        )  # fmt: skip
        assert json.loads(result.stdout)["num_steps"] == 3
        assert weights(tmp_path / "out") != weights(one_round.start(1))

    def test_nothing_left_to_train(self, one_round, tmp_path):
        arguments = [
            "train", *one_round.model(one_round.start(1)), *one_round.recipe, "--data",
            one_round.data / "sizes-train.jsonl", "--quiet",
        ]  # fmt: skip
        kifmerge(*arguments, "--out", tmp_path / "whole")
        result = kifmerge(
            *arguments, "--state", tmp_path / "whole/state", "--out", tmp_path / "more",
            exit_code=3,
        )  # fmt: skip
        assert "no step is left: the state stands at step 12 of 12" in result.stderr
        assert not (tmp_path / "more").exists()

    @pytest.mark.slow
    def test_killed_train_goes_on_from_its_latest_checkpoint(self, one_round, tmp_path):
        arguments = [
            "train", *one_round.model(None), *one_round.recipe, "--set", "training.save_steps=3",
            "--data", one_round.data / "sizes-train.jsonl", "--quiet", "--json", "--out",
        ]  # fmt: skip
        kifmerge(*arguments, tmp_path / "whole")
        assert faults.dies_at(
            GradientGuard, "admits", 8, lambda: kifmerge(*arguments, tmp_path / "killed")
        )
        assert not (tmp_path / "killed").exists()
        (step,) = tmp_path.glob("killed.*.training/step-*")
        assert step.name == "step-00000006"
        assert json.loads(kifmerge(*arguments, tmp_path / "killed").stdout)["num_steps"] == 12
        assert synthetic.weights(tmp_path / "killed") == synthetic.weights(tmp_path / "whole")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]

    def test_several_processes_are_refused(self, one_round, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert "found 2 processes" in one_round.inner(2, exit_code=3).stderr
        assert "found 2 processes" in one_round.outer(1, exit_code=3).stderr
        with pytest.raises(RunError, match="found 2 processes"):
            synthetic.run(one_round.data / "recipe.yaml", one_round.folder / "other-run")
