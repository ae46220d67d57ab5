"""Synthetic tasks and recipes small enough that a whole run takes about a second."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faults
import torch
import yaml

from kifmerge.phases.report import Report
from kifmerge.recipe import load_recipe
from kifmerge.run import run_recipe

# These models are too small to gain by threads, and one thread adds up in one order.
torch.set_num_threads(1)

# task -> label -> words that give the label away
TASKS: Mapping[str, Mapping[str, str]] = {
    "colours": {"warm": "red orange amber", "cold": "blue cyan indigo"},
    "sizes": {"large": "huge giant vast", "little": "tiny minute wee"},
    "sounds": {"loud": "roar bang crash", "soft": "hum rustle whisper"},
    "tastes": {"sweet": "honey sugar syrup", "sour": "lemon vinegar lime"},
}
MODEL = {
    "kind": "classifier",
    "pooling": "mean",
    "config": {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
    },
    "tokenizer": {"kind": "words", "vocabulary_size": 64},
    "max_tokens": 12,
    "dropout": 0.0,
}


def rows(task: str, num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of one task, its labels taking turns."""
    generator = random.Random(f"{task} {seed}")
    labels = list(TASKS[task])
    made = []
    for number in range(num_rows):
        label = labels[number % len(labels)]
        words = [*generator.choices(TASKS[task][label].split(), k=2), "the", "a"]
        generator.shuffle(words)
        made.append({"text": " ".join(words), "label": label})
    return made


def write_rows(path: Path, content: Sequence[Any]) -> Path:
    """Write JSONL; a string is written as it is, for lines that are no JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in content]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_recipe(
    directory: Path, tasks: Sequence[str] = ("colours", "sizes"), **changes: Any
) -> Path:
    """Write tasks and a recipe that learns them; ``changes`` replace its sections."""
    for task in tasks:
        write_rows(directory / f"{task}-train.jsonl", rows(task, 24))
        write_rows(directory / f"{task}-test.jsonl", rows(task, 8, seed=1))
    content = {
        "name": "synthetic",
        "model": MODEL,
        "tasks": [
            {"name": task, "train": f"{task}-train.jsonl", "test": f"{task}-test.jsonl"}
            for task in tasks
        ],
        "methods": ["sequential", "recurrent-kif"],
        "training": {"epochs": 1, "batch_size": 4, "learning_rate": 0.01, "device": "cpu"},
        "recurrent": {"inner_steps": 2, "outer_steps": 1},
        "memory": {"fraction": 0.2},
        **changes,
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def run(recipe_path: Path, out: Path, settings: Sequence[str] = (), **options: Any) -> Report:
    """Run a recipe file."""
    return run_recipe(load_recipe(recipe_path, settings), out, **options)


def kill_run(recipe_path: Path, out: Path, owner: Any, name: str, call: int) -> bool:
    """Begin or resume a run that dies when ``owner.name`` is called for the given time.

    Returns:
        Whether it died; False if the run ended before.
    """
    return faults.dies_at(owner, name, call, lambda: run(recipe_path, out, resume=out.exists()))


def files(directory: Path) -> dict[str, bytes]:
    """Every file of a folder with its content, by its path within."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def weights(directory: Path) -> dict[str, bytes]:
    """Every file of weights of a run folder."""
    return {name: data for name, data in files(directory).items() if name.endswith(".safetensors")}
