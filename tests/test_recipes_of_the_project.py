"""The recipes that come with the project: all can be used, and the small ones run on real data."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import synthetic
import torch
import typer.testing
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
)

from kifmerge.cli import app
from kifmerge.models.tokenizer import TokenizerOptions, train_tokenizer
from kifmerge.recipe import load_recipe, read_content
from kifmerge.training.presets import PRESETS

RECIPES = Path(__file__).parents[1] / "recipes"
COMMAND = Path(sys.executable).with_name("kifmerge")

# Of the Long Sequence benchmark, but not among the shared data.
TASKS_ELSEWHERE = {"boolqa", "imdb", "multirc", "rte", "yelp"}
STANDARD_ORDERS = {
    "1": ["dbpedia", "amazon", "yahoo", "agnews"],
    "2": ["dbpedia", "amazon", "agnews", "yahoo"],
    "3": ["yahoo", "amazon", "agnews", "dbpedia"],
}


@dataclasses.dataclass(frozen=True)
class PaperRecipe:
    """What sets one of the paper's recipes apart from the others."""

    reference: str
    batch_size: int

    @property
    def is_llama(self) -> bool:
        return "llama" in self.reference.lower()


PAPERS = {
    "t5-large-standard": PaperRecipe("google-t5/t5-large", 8),
    "t5-large-long": PaperRecipe("google-t5/t5-large", 8),
    "flan-t5-xl-standard": PaperRecipe("google/flan-t5-xl", 8),
    "llama-2-7b-standard": PaperRecipe("meta-llama/Llama-2-7b-chat-hf", 64),
    "llama-2-13b-standard": PaperRecipe("meta-llama/Llama-2-13b-chat-hf", 64),
}


def test_there_are_some():
    assert {"minilm-4-tasks", "tiny-cpu", "tiny-t5", "tiny-llama", *PAPERS} <= {
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
    sources = [s for task in recipe.tasks for s in (task.train, task.test)]
    missing = {Path(s).parent.name for s in sources if not s.startswith("hf://")} - {
        path.name for path in data_dir.iterdir()
    }
    assert missing <= TASKS_ELSEWHERE
    assert all(
        Path(s).is_file()
        for s in sources
        if not s.startswith("hf://") and Path(s).parent.name not in missing
    )


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_can_be_used_in_every_order(path):
    content = read_content(path)
    orders = content.get("orders", {})
    assert bool(orders) == (path.stem in PAPERS)
    for name, listed in orders.items():
        tasks = load_recipe(path, [f"order={name}"]).tasks
        assert [task.name for task in tasks] == listed
        assert all(Path(t.train).parent.name == Path(t.test).parent.name == t.name for t in tasks)
    if orders:
        chosen = [task.name for task in load_recipe(path).tasks]
        assert chosen == orders[content["order"]] == orders[min(orders)]


@pytest.mark.parametrize("name", PAPERS)
def test_orders_of_the_papers(name):
    orders = read_content(RECIPES / f"{name}.yaml")["orders"]
    if name.endswith("-standard"):
        assert orders == STANDARD_ORDERS
        return
    assert set(orders) == {"4", "5", "6"}
    assert len({tuple(listed) for listed in orders.values()}) == 3
    assert all(len(listed) == 15 for listed in orders.values())
    assert all(set(STANDARD_ORDERS["1"]) | TASKS_ELSEWHERE < set(o) for o in orders.values())


@pytest.mark.parametrize("name", PAPERS)
def test_settings_of_the_papers(name):
    paper, recipe = PAPERS[name], load_recipe(RECIPES / f"{name}.yaml")
    training = recipe.training
    assert recipe.model.reference == paper.reference
    assert recipe.model.template == ("alpaca" if paper.is_llama else "plain")
    assert training.batch_size * training.accumulation == paper.batch_size
    # The released outer loss is divided by the accumulation count: it is part of the method.
    assert training.accumulation == 4
    assert recipe.recurrent == dataclasses.replace(
        PRESETS["released"], outer_batch_size=paper.batch_size
    )
    assert (training.epochs, training.learning_rate, training.warmup_steps) == (10, 3e-4, 50)
    assert (training.schedule, training.max_grad_norm, training.max_steps) == ("linear", 1.0, None)
    assert recipe.memory.fraction == 0.02


@pytest.mark.parametrize("name", PAPERS)
def test_dry_run_prints_what_is_resolved(name, tmp_path):
    path = RECIPES / f"{name}.yaml"
    last = max(read_content(path)["orders"])
    settings = ["--set", f"order={last}", "--set", f"data_dir={tmp_path}"]
    arguments = ["run", str(path), "--out", str(tmp_path / "run"), "--dry-run", *settings]
    result = typer.testing.CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    expected = load_recipe(path, settings[1::2]).as_dict()
    assert yaml.safe_load(result.stdout) == expected
    assert [t["name"] for t in expected["tasks"]] == read_content(path)["orders"][last]
    assert not (tmp_path / "run").exists()


def tiny_checkpoint(name: str, directory: Path, texts: list[str]) -> Path:
    """A random model of the recipe's family, built as its big relatives are, and a tokenizer."""
    tokenizer = train_tokenizer(
        texts, TokenizerOptions(kind="bytes", vocabulary_size=400), max_tokens=1024
    )
    sizes = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model: PreTrainedModel
    if PAPERS[name].is_llama:
        tokenizer.pad_token = None  # as in Llama 2
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            **{**sizes, "pad_token_id": None},
        )
        model = AutoModelForCausalLM.from_config(config)
    else:
        is_flan = "flan" in name  # built like T5 v1.1
        config = T5Config(
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu" if is_flan else "relu",
            tie_word_embeddings=not is_flan,
            decoder_start_token_id=tokenizer.pad_token_id,
            **sizes,
        )
        model = AutoModelForSeq2SeqLM.from_config(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_task(directory: Path, words: dict[str, str]) -> list[str]:
    """Rows in the form the authors released; returns their texts."""
    options = ", ".join(words)
    rows = [
        {
            "id": f"{directory.name}_{number}",
            "instruction": f"What is it? Choose one from the option. Option: {options}.\n",
            "input": f"Text: {words[label].split()[number % 3]} the a\nAnswer:",
            "output": label,
        }
        for number in range(6)
        for label in words
    ]
    synthetic.write_rows(directory / "train.jsonl", rows)
    synthetic.write_rows(directory / "test.jsonl", rows[:2])
    return [row["instruction"] + row["input"] for row in rows]


def made_small(name: str, first: str, second: str, tmp_path: Path) -> list[str]:
    """What makes a recipe run in seconds: a tiny model, two tasks, 16 steps on each, on the CPU."""
    content = zip((second, first), synthetic.TASKS.values(), strict=False)
    texts = [text for task, words in content for text in write_task(tmp_path / task, dict(words))]
    tasks = [
        {"name": task, "train": f"{task}/train.jsonl", "test": f"{task}/test.jsonl"}
        for task in (second, first)
    ]
    return [
        f"model.reference={tiny_checkpoint(name, tmp_path / 'base', texts)}",
        "model.dtype=float32",
        "model.max_output_tokens=4",
        f"data_dir={tmp_path}",
        f"tasks={json.dumps(tasks)}",
        f"orders={json.dumps({'ours': [first, second]})}",
        "order=ours",
        "training.max_steps=16",
        "training.precision=float32",
        "training.device=cpu",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_of_the_papers_fuse_two_rounds_of_a_tiny_model(name, tmp_path):
    path = RECIPES / f"{name}.yaml"
    first, second = [task.name for task in load_recipe(path).tasks[:2]]
    changes = made_small(name, first, second, tmp_path)
    out = tmp_path / "run"
    arguments = ["run", str(path), "--out", str(out), "--quiet", "--json"]
    arguments += [part for change in changes for part in ("--set", change)]
    result = typer.testing.CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr) == (0, "")

    matrix = json.loads(result.stdout)["matrices"]["score"]["recurrent-kif"]["42"]
    assert [len(row) for row in matrix] == [2, 2, 2]
    plain = out / f"start/seed-42/01-{first}"
    fused = out / f"recurrent-kif/seed-42/02-{second}"
    records = [json.loads((s / "stage.json").read_text())["training"] for s in (plain, fused)]
    assert [record["num_steps"] for record in records] == [16, 16]
    assert [record["num_nonfinite_steps"] for record in records] == [0, 0]
    assert records[0]["rounds"] == []
    assert [(r["inner_steps"], r["outer_steps"]) for r in records[1]["rounds"]] == [(8, 4)] * 2

    kept = yaml.safe_load((out / "recipe.yaml").read_text())
    released = dataclasses.asdict(PRESETS["released"])
    assert {k: v for k, v in kept["recurrent"].items() if k != "outer_batch_size"} == {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in released.items()
        if key != "outer_batch_size"
    }
    num_trained = check_adapters(
        plain / "checkpoint", fused / "checkpoint", is_llama=PAPERS[name].is_llama
    )
    for done in records[1]["rounds"]:
        for side in ("new_only", "historical_only"):
            important = round((done["both"] + done[side]) * num_trained)
            assert important == math.ceil(0.2 * (num_trained - 1))


def check_adapters(before: Path, after: Path, *, is_llama: bool) -> int:
    """Rank 8 on q and v of every attention, nothing else, every tensor moved; returns its size."""
    config = json.loads((after / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 32, 0.05)
    adapters = [
        safetensors.torch.load_file(folder / "adapter_model.safetensors")
        for folder in (before, after)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    if is_llama:
        attentions, targets = ["layers.0.self_attn"], ["q_proj", "v_proj"]
    else:
        stacks = ("encoder.block.0.layer.0.Self", "decoder.block.0.layer.0.Self")
        attentions = [f"{s}Attention" for s in (*stacks, "decoder.block.0.layer.1.EncDec")]
        targets = ["q", "v"]
    expected = {
        f"{attention}.{target}.lora_{side}.weight"
        for attention in attentions
        for target in targets
        for side in "AB"
    }
    found = {n.removeprefix("base_model.model.").removeprefix("model.") for n in adapters[1]}
    assert found == expected
    for key, value in adapters[1].items():
        assert 8 in value.shape
        assert value.abs().max() > 0
        assert not torch.equal(value, adapters[0][key])
    return sum(value.numel() for value in adapters[1].values())


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
