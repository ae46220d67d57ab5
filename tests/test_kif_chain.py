"""KIF as a chain of train, group and merge gives the weights of the in-process run, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import synthetic
from test_chain import LLAMA, MODELS, TRAINING, kifmerge, weights

from kifmerge.checkpoint.units import read_units

TASKS = ("colours", "sizes", "sounds")
# A weight decay moves elements whose gradient is 0: the pass of KIF-M must undo it.
DECAYING = {**TRAINING, "epochs": 1, "weight_decay": 0.1}


class Chain:
    """The shell script, with its files in a folder."""

    def __init__(self, folder: Path, recipe: Path, base: Path, unit: str) -> None:
        self.folder, self.recipe, self.base, self.unit = folder, recipe, base, unit

    def task(self, number: int) -> Path:
        return self.folder / f"task-{number}"

    def train(self, number: int, *more, exit_code: int = 0):
        """The whole task, from the fused weights before it."""
        model = self.base if number == 1 else self.fused(number - 1)
        labels = [x for task in TASKS for x in sorted(synthetic.TASKS[task])]
        return kifmerge(
            "train", "--kif", "--model", model, "--recipe", self.recipe, "--seed", number,
            "--initial-seed", 0, *(x for label in labels for x in ("--label", label)),
            "--data", self.recipe.parent / f"{TASKS[number - 1]}-train.jsonl",
            "--out", self.task(number) / "new", "--json", *more, exit_code=exit_code,
        )  # fmt: skip

    def group(self, number: int) -> None:
        before = ["--historical-units", self.task(number - 1) / "units"] if number > 1 else []
        kifmerge(
            "group", "--importance", self.task(number) / "new/importance", "--unit", self.unit,
            *before, "--out", self.task(number) / "units",
        )  # fmt: skip

    def fuse(self, number: int, rule: str) -> None:
        kifmerge(
            "merge", "--rule", rule, "--new", self.task(number) / "new",
            "--historical", self.fused(number - 1), "--new-units", self.task(number) / "units",
            "--historical-units", self.task(number - 1) / "units",
            "--out", self.task(number) / "fused",
        )  # fmt: skip

    def fused(self, number: int) -> Path:
        """What the next task starts from."""
        return self.task(number) / ("new" if number == 1 else "fused")


def run_both(folder: Path, model, unit: str, method: str) -> tuple[Path, Chain]:
    recipe = synthetic.write_recipe(
        folder, TASKS, model=model, training=DECAYING, methods=[method], kif={"unit": unit}
    )
    synthetic.run(recipe, folder / "run")
    chain = Chain(folder / "chain", recipe, folder / "run/start/seed-0/base", unit)
    for number in range(1, len(TASKS) + 1):
        chain.train(number)
        chain.group(number)
        if number > 1:
            chain.fuse(number, "kif-adaptive" if method == "kif-adaptive" else "kif")
    return folder / f"run/{method}/seed-0", chain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unit", "method"),
    [
        ("Llama, LoRA", "lora-rank", "kif"),
        ("Llama, LoRA", "tensor", "kif-adaptive"),
        ("classifier, LoRA", "lora-rank", "kif-adaptive"),
        ("classifier, all parameters", "layer", "kif"),
        ("T5, all parameters", "tensor", "kif"),
    ],
)
def test_chain_equals_process(tmp_path, name, unit, method):
    run, chain = run_both(tmp_path, MODELS[name], unit, method)
    for number, task in enumerate(TASKS, start=1):
        stage = run / f"{number:02d}-{task}"
        assert weights(chain.fused(number)) == weights(stage / "checkpoint")
        assert read_units(chain.task(number) / "units").units == read_units(stage).units
    assert weights(chain.task(3) / "new") != weights(chain.task(3) / "fused")


@pytest.mark.slow
def test_pass_over_memory_equals_process(tmp_path):
    """KIF-M: the fused model goes over memory, training what matters to earlier tasks."""
    model = {**LLAMA, "dropout": 0.1}
    recipe = synthetic.write_recipe(
        tmp_path, TASKS[:2], model=model, training=DECAYING, methods=["kif-m"],
        kif={"memory_learning_rate": 0.02, "memory_steps": 3},
    )  # fmt: skip
    synthetic.run(recipe, tmp_path / "run")
    run = tmp_path / "run/kif-m/seed-0"
    chain = Chain(tmp_path / "chain", recipe, tmp_path / "run/start/seed-0/base", "tensor")
    for number in (1, 2):
        chain.train(number)
        chain.group(number)
    chain.fuse(2, "kif")
    result = kifmerge(
        "train", "--model", chain.fused(2), "--recipe", recipe, "--seed", 2,
        "--only-units", chain.task(1) / "units", "--total-steps", 3,
        "--set", "training.schedule=constant", "--set", "training.learning_rate=0.02",
        "--data", run / "01-colours/memory.jsonl", "--out", chain.task(2) / "after", "--json",
    )  # fmt: skip
    assert json.loads(result.stdout)["num_steps"] == 3
    assert weights(chain.task(2) / "after") == weights(run / "02-sizes/checkpoint")
    assert weights(chain.task(2) / "after") != weights(chain.task(2) / "fused")


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A chain that nothing has been trained in."""
    folder = tmp_path_factory.mktemp("kif")
    recipe = synthetic.write_recipe(
        folder, TASKS, model=LLAMA, training=TRAINING, methods=["sequential"]
    )
    synthetic.run(recipe, folder / "run")
    return Chain(folder / "chain", recipe, folder / "run/start/seed-0/base", "tensor")


@pytest.mark.slow
class TestTrain:
    def test_in_pieces_is_the_same(self, started):
        started.train(1)
        piece = started.folder / "piece"
        started.train(1, "--steps", 5, "--out", piece)
        result = kifmerge(
            "train", "--model", piece, "--state", piece / "state", "--json",
            "--data", started.recipe.parent / "colours-train.jsonl",
            "--out", started.folder / "whole",
        )  # fmt: skip
        assert json.loads(result.stdout)["step"] == 12
        for folder in ("", "importance"):
            whole, once = (f / folder for f in (started.folder / "whole", started.task(1) / "new"))
            assert weights(whole) == weights(once)
        snapshot = json.loads((started.folder / "whole/importance/importance.json").read_text())
        assert (snapshot["first_step"], snapshot["steps"]) == ("left-out", 11)

    def test_settings_without_kif_are_refused(self, started, tmp_path):
        result = kifmerge(
            "train", "--model", started.base, "--recipe", started.recipe, "--set",
            "kif.unit=layer", "--data", started.recipe.parent / "colours-train.jsonl",
            "--out", tmp_path / "out", exit_code=2,
        )  # fmt: skip
        assert "without --kif" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_scores_a_task_or_goes_over_memory(self, started, tmp_path):
        result = started.train(1, "--only-units", tmp_path, exit_code=2)
        assert "choose one" in result.stderr

    def test_outer_steps_are_refused(self, started, tmp_path):
        started.train(2, "--model", started.base, "--steps", 5, "--out", tmp_path / "new")
        result = kifmerge(
            "replay", "--model", tmp_path / "new", "--state", tmp_path / "new/state",
            "--memory", started.recipe.parent / "colours-train.jsonl",
            "--out", tmp_path / "out", exit_code=3,
        )  # fmt: skip
        assert "KIF makes no outer steps" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_units_of_another_model_are_refused(self, started, tmp_path):
        (tmp_path / "units.json").write_text(
            '{"format": "kifmerge.units", "version": 1, "kind": "tensor", "units": '
            '[{"name": "u", "members": ["other.weight"], "score": 1.0, "cumulative": 1.0}]}'
        )
        result = kifmerge(
            "train", "--model", started.base, "--recipe", started.recipe, "--only-units", tmp_path,
            "--data", started.recipe.parent / "colours-train.jsonl",
            "--out", tmp_path / "out", exit_code=3,
        )  # fmt: skip
        assert "holds units of another model" in result.stderr
        assert "other.weight" in result.stderr
