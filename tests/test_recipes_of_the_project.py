"""The recipes that come with the project: all can be used, and the small ones run on real data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic

from kifmerge.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
COMMAND = Path(sys.executable).with_name("kifmerge")


def test_there_are_some():
    assert {"minilm-4-tasks", "tiny-cpu", "tiny-t5", "tiny-llama"} <= {
        path.stem for path in RECIPES.glob("*.yaml")
    }


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_can_be_used(path, tmp_path):
    recipe = load_recipe(path, [f"data_dir={tmp_path}"])
    assert recipe.name == path.stem
    for task in recipe.tasks:
        for source in (task.train, task.test):
            assert source.startswith(("hf://datasets/", f"{tmp_path}/"))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_says_how_to_run_it(path):
    head = path.read_text(encoding="utf-8").partition("\nname:")[0]
    assert f"kifmerge run recipes/{path.name}" in head


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_source_exists(path, data_dir):
    recipe = load_recipe(path, [f"data_dir={data_dir}"])
    sources = [source for task in recipe.tasks for source in (task.train, task.test)]
    assert all(Path(s).is_file() for s in sources if not s.startswith("hf://"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-t5", "tiny-llama"])
def test_generation_end_to_end(name, data_dir, tmp_path):
    changes = ["training.epochs=1", "training.batch_size=4", f"data_dir={data_dir}"]
    for task in (0, 1):
        changes += [f"tasks.{task}.train_rows=60", f"tasks.{task}.test_rows=10"]
    out = tmp_path / "run"
    done = subprocess.run(
        [COMMAND, "run", RECIPES / f"{name}.yaml", "--out", out, "--json", "--quiet"]
        + [part for change in changes for part in ("--set", change)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    # Generation knows no labels: one score.
    assert set(result["matrices"]) == {"score"}
    for method in ("sequential", "recurrent-kif"):
        matrix = result["matrices"]["score"][method]["0"]
        assert [len(row) for row in matrix] == [2, 2, 2]
        assert all(0.0 <= cell <= 1.0 for row in matrix for cell in row)
    # 15 steps a task; one round of 8 and 4, and a tail of 7 fused like a round.
    assert result["num_steps"]["sequential"] == 30
    assert result["num_steps"]["recurrent-kif"] > 30
    for stage in ("start/seed-0/01-sst-2", "recurrent-kif/seed-0/02-agnews"):
        lines = (out / stage / "predictions/agnews.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 10
        assert all(isinstance(row["prediction"], str) for row in rows)
        assert {row["reference"] for row in rows} <= {
            "World",
            "Sports",
            "Business",
            "Science or Technology",
        }


@pytest.mark.slow
def test_behaviour_on_real_data(data_dir, tmp_path):
    """A small form of tiny-cpu: fusion must keep far more than plain training does."""
    settings = [
        f"data_dir={data_dir}",
        "methods=[sequential, recurrent-kif]",
        "seeds=[0]",
        "training.epochs=5",
        "training.learning_rate=3e-3",
        "model.config.hidden_size=32",
        "model.config.intermediate_size=64",
        "model.tokenizer.vocabulary_size=4096",
    ]
    for task in range(4):
        settings += [f"tasks.{task}.train_rows=300", f"tasks.{task}.test_rows=200"]
    report = synthetic.run(RECIPES / "tiny-cpu.yaml", tmp_path / "run", settings)
    op = {m: report.summary("score", m)["op"]["mean"] for m in report.matrices["score"]}
    assert op["recurrent-kif"] - op["sequential"] >= 0.05, op
