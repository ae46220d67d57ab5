"""What a shell chain of train, replay and merge costs over the same rounds in one process.

    python tests/bench/chain_cost.py [--rounds 3] [--json FILE]

An encoder of MiniLM's shape (22M parameters, random) with LoRA r 8 on the top two layers learns a
second task: in one process, and as commands of their own. Printed per round: wall and CPU seconds
of each command, those of the same round in one process, and the bytes of every artifact.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from processes import write_results

from kifmerge.demo import write_tasks

INNER_STEPS, OUTER_STEPS, BATCH_SIZE = 8, 4, 8


def recipe(folder: Path, num_rounds: int) -> Path:
    write_tasks(folder / "tasks", seed=0)
    content = {
        "name": "chain-cost",
        "model": {
            "kind": "classifier",
            "pooling": "mean",
            "max_tokens": 48,
            "dropout": 0.0,
            "config": {
                "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6,
                "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 30522,
            },
            "lora": {
                "rank": 8, "alpha": 32, "dropout": 0.0,
                "targets": r".*layer\.[45]\.attention\.self\.(query|value)",
            },
        },
        "data_dir": "tasks",
        "tasks": [
            {"name": name, "train": f"{name}-train.jsonl", "test": f"{name}-test.jsonl"}
            for name in ("animals", "kitchen")
        ],
        "methods": ["recurrent-kif"],
        "training": {
            "max_steps": num_rounds * INNER_STEPS, "batch_size": BATCH_SIZE, "device": "cpu",
            "learning_rate": 2e-3,
        },
        "recurrent": {"inner_steps": INNER_STEPS, "outer_steps": OUTER_STEPS},
        "memory": {"fraction": 0.1},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def timed(*arguments: Any) -> dict[str, float]:
    """Run a command; its wall and CPU seconds."""
    command = [sys.executable, "-m", "kifmerge", *map(str, arguments), "--quiet"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.perf_counter() - started, "cpu": cpu}


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = recipe(folder, arguments.rounds)
        timed("run", path, "--out", folder / "run")
        stages = folder / "run/recurrent-kif/seed-0"
        stage = json.loads((stages / "02-kitchen/stage.json").read_text())["training"]
        in_process = stage["train_seconds"] / len(stage["rounds"])

        first = folder / "run/start/seed-0/01-animals"
        base, current = folder / "run/start/seed-0/base", first / "checkpoint"
        costs: dict[str, list[dict[str, float]]] = {"train": [], "replay": [], "merge": []}
        state: list[Any] = ["--seed", 2]
        for number in range(arguments.rounds):
            inner, outer, fused = (folder / f"{number}" / n for n in ("inner", "outer", "fused"))
            model = ("--model", base, "--adapter")
            costs["train"].append(timed(
                "train", *model, current, "--recipe", path, *state, "--out", inner,
                "--data", folder / "tasks/kitchen-train.jsonl", "--steps", INNER_STEPS,
            ))  # fmt: skip
            costs["replay"].append(timed(
                "replay", *model, inner, "--memory", first / "memory.jsonl",
                "--state", inner / "state", "--out", outer,
            ))  # fmt: skip
            costs["merge"].append(timed(
                "merge", "--rule", "recurrent-kif", "--base", current, "--new", inner,
                "--historical", outer, "--new-importance", inner / "importance",
                "--historical-importance", outer / "importance", "--out", fused,
            ))  # fmt: skip
            current, state = fused, ["--state", outer / "state"]
        sizes = {
            "adapter and head": size_of(fused),
            "importance snapshot": size_of(inner / "importance"),
            "state": size_of(inner / "state"),
        }
        same = (fused / "adapter_model.safetensors").read_bytes() == (
            stages / "02-kitchen/checkpoint/adapter_model.safetensors"
        ).read_bytes()
    medians = {
        name: {key: statistics.median(c[key] for c in found) for key in ("wall", "cpu")}
        for name, found in costs.items()
    }
    print(f"one round in one process: {in_process:.2f} s wall")
    for name, cost in medians.items():
        print(f"{name:>8}: {cost['wall']:.2f} s wall, {cost['cpu']:.2f} s CPU")
    print(f"the weights at the end are {'the same' if same else 'NOT THE SAME'}")
    for name, size in sizes.items():
        print(f"{name}: {size:,} bytes")
    if arguments.json:
        content = {"in_process": in_process, "chain": medians, "bytes": sizes, "same": same}
        write_results(arguments.json, content)


if __name__ == "__main__":
    main()
