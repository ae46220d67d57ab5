"""The commands that share their work under PyTorch's own launcher, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import faults
import folders
import importance_script
import merges
import pytest
import ranked
import synthetic
import tiny
import torch
from merges import Files
from transformers import LlamaForCausalLM

from kifmerge.checkpoint.snapshot import read_snapshot
from kifmerge.models.scratch import make_base


def merge(new):
    given = ["--base", "base", "--new", new, "--historical", "historical"]
    scores = [p for role in merges.TWO for p in (f"--{role}-importance", f"{role}-importance")]
    return ["-m", "kifmerge", "merge", "--rule", "recurrent-kif", *given, *scores]


@pytest.mark.slow
def test_merge(tmp_path):
    Files(tmp_path).write(torch.bfloat16, shards=(3, 2, 1), shapes=merges.VARIED)
    command = [*merge("new"), "--json", "--out"]
    alone = subprocess.run(
        [sys.executable, *command, "alone"], cwd=tmp_path, capture_output=True, check=True
    )
    done = ranked.torchrun(tmp_path, *command, "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {**json.loads(alone.stdout), "out": "out"}
    assert faults.content(tmp_path / "out") == faults.content(tmp_path / "alone")
    assert "kifmerge: " not in done.stderr


@pytest.mark.slow
def test_error_is_told_once(tmp_path):
    files = Files(tmp_path).write(torch.bfloat16, shards=(3, 2, 1), shapes=merges.VARIED)
    state = {**files.states[1], "e.weight": torch.full((33,), float("inf"), dtype=torch.bfloat16)}
    folders.save(tmp_path / "bad", state)
    done = ranked.torchrun(tmp_path, *merge("bad"), "--out", "out")
    assert done.returncode == 1  # torchrun's own
    assert done.stdout == ""
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("kifmerge: ")]
    assert "bad/model.safetensors: e.weight: element 0 is inf" in told
    # The last thing before torchrun's own report, which tells how each rank ended.
    # The launcher may end one rank before that has ended by itself.
    assert "exitcode  : 3" in done.stderr
    assert "kifmerge/" not in done.stderr.split("torch/distributed")[0]
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
def test_importance(tmp_path, monkeypatch):
    make_base(tiny.BYTE_LLAMA, ["the fox runs"], tmp_path / "model", seed=0)
    rows = ["the fox runs", "a pan of soup", "bread", "a red ~ fox", "milk", "two geese", "salt"]
    data = [{"instruction": f"What is {row}?", "output": row} for row in rows]
    synthetic.write_rows(tmp_path / "rows.jsonl", data)
    command = ["importance", "--model", "model", "--data", "rows.jsonl", "--batch-size", 2]
    script = Path(importance_script.__file__)
    done = ranked.torchrun(tmp_path, script, *command, "--out", "shared", "--json")
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(
        LlamaForCausalLM,
        "forward",
        importance_script.with_spoilt_losses(LlamaForCausalLM.forward),
    )
    monkeypatch.chdir(tmp_path)
    code, out, err = ranked.in_process([*command, "--out", "alone", "--json"])
    assert code == 0, err
    assert json.loads(done.stdout) == {**json.loads(out), "out": "shared"}
    assert json.loads(out)["skipped_batches"] == 1
    assert done.stderr.count("1 batches left out") == 1
    shared, alone = (read_snapshot(tmp_path / name) for name in ("shared", "alone"))
    assert shared.details == alone.details
    assert shared.names == alone.names
    ours, theirs = dict(shared.scores()), dict(alone.scores())
    for name, scores in theirs.items():
        torch.testing.assert_close(ours[name], scores, rtol=1e-5, atol=1e-9)
    assert sum(float(scores.sum()) for scores in theirs.values()) > 0


def test_smoothing_is_left_to_one_process(tmp_path):
    synthetic.write_rows(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}])
    make_base(tiny.BYTE_LLAMA, ["the fox runs"], tmp_path / "model", seed=0)
    told = ranked.command(
        2,
        ["importance", "--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl",
         "--average", "ema", "--out", tmp_path / "out"],
    )  # fmt: skip
    assert [said.code for said in told] == [2, 2]
    assert "several take --average mean" in " ".join(ranked.told_once(told).split())
