"""The example script does what it says: the weights of the in-process run, killed or not."""

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

SCRIPT = Path(__file__).parents[1] / "examples" / "recurrent_kif.sh"


def start(*arguments, **variables):
    """The script in a process group of its own, with the tested package's command first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [str(SCRIPT), *map(str, arguments)],
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

    script = start(*call, **settings)
    until = time.monotonic() + 120
    while not (tmp_path / "chain/task-2/round-1/inner").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGKILL)
    script.communicate()
    assert not (tmp_path / "chain/final").exists()

    first = tmp_path / "chain/task-1/adapter_model.safetensors"
    made_at = first.stat().st_mtime_ns
    script = start(*call, **settings)
    _, talk = script.communicate(timeout=300)
    assert script.returncode == 0, talk
    assert "task 2 round 2: fused, 0 steps left" in talk
    assert first.stat().st_mtime_ns == made_at
    in_process = tmp_path / "run/recurrent-kif/seed-0/02-sizes/checkpoint"
    assert weights(tmp_path / "chain/final") == weights(in_process)
