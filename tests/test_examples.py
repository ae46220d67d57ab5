"""The example scripts do what they say: the weights of the in-process run, killed or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import synthetic
from test_chain import MODELS, TRAINING, weights

EXAMPLES = Path(__file__).parents[1] / "examples"


def start(name, *arguments, **variables):
    """A script in a process group of its own, with the tested package's command first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [str(EXAMPLES / name), *map(str, arguments)],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_chain_script_survives_a_kill_and_equals_the_run(tmp_path):
    recipe = synthetic.write_recipe(
        tmp_path,
        model=MODELS["Llama, LoRA"],
        training=TRAINING,
        recurrent={"inner_steps": 6, "outer_steps": 2},
        methods=["recurrent-kif"],
    )
    synthetic.run(recipe, tmp_path / "run")
    base = tmp_path / "run/start/seed-0/base"
    tasks = [tmp_path / f"{task}-train.jsonl" for task in ("colours", "sizes")]
    call = (base, recipe, tmp_path / "chain", *tasks)
    settings = {"INNER_STEPS": "6", "MEMORY_FRACTION": "0.2"}

    script = start("recurrent_kif.sh", *call, **settings)
    until = time.monotonic() + 120
    while not (tmp_path / "chain/task-2/round-1/inner").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGKILL)
    script.communicate()
    assert not (tmp_path / "chain/final").exists()

    first = tmp_path / "chain/task-1/adapter_model.safetensors"
    made_at = first.stat().st_mtime_ns
    script = start("recurrent_kif.sh", *call, **settings)
    _, talk = script.communicate(timeout=300)
    assert script.returncode == 0, talk
    assert "task 2 round 2: fused, 0 steps left" in talk
    assert first.stat().st_mtime_ns == made_at
    in_process = tmp_path / "run/recurrent-kif/seed-0/02-sizes/checkpoint"
    assert weights(tmp_path / "chain/final") == weights(in_process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unit", "rule"),
    [
        ("Llama, LoRA", "lora-rank", "kif-adaptive"),
        ("classifier, all parameters", "tensor", "kif"),
    ],
)
def test_kif_script_survives_a_kill_and_equals_the_run(tmp_path, name, unit, rule):
    names = ("colours", "sizes", "sounds")
    recipe = synthetic.write_recipe(
        tmp_path,
        names,
        model=MODELS[name],
        training=TRAINING,
        methods=[rule],
        kif={"unit": unit},
    )
    synthetic.run(recipe, tmp_path / "run")
    base = tmp_path / "run/start/seed-0/base"
    call = (base, recipe, tmp_path / "chain", *(tmp_path / f"{task}-train.jsonl" for task in names))
    labels = [label for task in names for label in sorted(synthetic.TASKS[task])]
    settings = {"UNIT": unit, "RULE": rule, "LABELS": "\n".join(labels)}

    script = start("kif.sh", *call, **settings)
    until = time.monotonic() + 120
    while not (tmp_path / "chain/task-2/new").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGKILL)
    script.communicate()
    assert not (tmp_path / "chain/final").exists()

    (first,) = (tmp_path / "chain/task-1/new").glob("*.safetensors")
    made_at = first.stat().st_mtime_ns
    script = start("kif.sh", *call, **settings)
    _, talk = script.communicate(timeout=300)
    assert script.returncode == 0, talk
    assert "task 3: learnt" in talk
    assert first.stat().st_mtime_ns == made_at
    in_process = tmp_path / f"run/{rule}/seed-0/03-sounds/checkpoint"
    assert weights(tmp_path / "chain/final") == weights(in_process)
