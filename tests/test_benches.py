"""The benchmarks run, at sizes that measure nothing, and hold what they print."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import faults
import pytest

BENCH = Path(__file__).parent / "bench"
SIZE = 0.004  # GB
LONG = ("training_cost.py", "chain_cost.py", "importance_memory.py", "plan_error.py")

pytestmark = pytest.mark.slow


def run(script, *words, fails=False):
    done = subprocess.run(
        [sys.executable, BENCH / script, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=BENCH.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert bool(done.returncode) == fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Inputs of all benchmarks, which use each other's."""
    return tmp_path_factory.mktemp("work")


def results(path):
    """What a benchmark has written, with date and machine."""
    content = json.loads(path.read_text())
    assert content["date"][:2] == "20"
    assert content["machine"]["cores"] >= 1
    assert content["versions"]["kifmerge"]
    return content


def test_merge_cost(work):
    shape = ("--size", SIZE, "--largest-tensor", "1MB", "--shard-size", "2MB")
    shown = run("merge_cost.py", "--work", work, *shape, "--rules", "linear", "--repeats", 1)
    assert "\n| linear " in shown
    assert "The limit of this machine" in shown
    found = results(work / "merge-cost.json")
    (limits,) = found["limits"].values()
    assert limits["written_bytes"] == pytest.approx(SIZE * 1e9, rel=0.1)
    assert limits["read_bytes"] > 2 * limits["written_bytes"]
    assert set(found["runs"]) == {"cp", "import torch", "linear"}
    (linear,), (start,) = (found["runs"][name] for name in ("linear", "import torch"))
    assert 0 < limits["least_cpu"] < linear["cpu"]
    assert limits["cpu"] == linear["cpu"] - start["cpu"]  # of such a small merge: of any sign

    # Nobody is compared with a tool that does nothing.
    (folder,) = work.glob("llama*")
    words = ("--base", folder / "base", "--model", folder / "model-1", "--model")
    copied = ("linear", folder / "model-2", *words, folder / "model-2")
    assert "model-2, unchanged" in run("merge_check.py", *copied, fails=True)


def test_growth_cost(work):
    words = ("--sizes", 0.02, "--counts", 1, "--count-size", 0.02, "--rules", "recurrent-kif")
    shown = run("growth_cost.py", "--work", work, *words, "--repeats", 1, "--most-runs", 1)
    assert "recurrent-kif, sizes: wall per GB within 0% of its median" in shown
    found = results(work / "growth-cost.json")["growth"]["recurrent-kif"]
    (two,), (one,) = found["sizes"], found["models"]
    # A base, the models with a mask of a sixteenth each, and what was written.
    assert two["moved_bytes"] / two["size_bytes"] == pytest.approx(4.1, rel=0.15)
    assert one["moved_bytes"] / one["size_bytes"] == pytest.approx(3.1, rel=0.15)


def test_busy_cost(work):
    shape = ("--size", SIZE, "--largest-tensor", "1MB", "--shard-size", "2MB")
    shown = run("busy_cost.py", "--work", work, *shape, "--rules", "linear", "--repeats", 1)
    assert "\n| linear " in shown
    found = results(work / "busy-cost.json")
    (alone,), (busy,) = (found["runs"]["linear"][name] for name in ("alone", "busy"))
    for what, ratio in found["ratios"]["linear"].items():
        assert ratio == busy[what] / alone[what]


def test_selection_and_prune_cost(work):
    words = ("--work", work, "--repeats", 1)
    shown = run("selection_cost.py", *words, "--scores", 2_000_000)
    assert "float32: numpy.partition" in shown
    assert len(results(work / "selection-cost.json")["selection"]) == 8
    shown = run("prune_cost.py", *words, "--size", SIZE, "--json", work / "prune-cost.json")
    assert "bfloat16: threshold" in shown
    assert results(work / "prune-cost.json")["scores"] > 1e6


def test_start_cost(work):
    shown = run("start_cost.py", "--work", work, "--repeats", 1, "--rules", "ties")
    assert "no merge has imported transformers" in shown
    found = results(work / "start-cost.json")
    took = {name: runs[0]["cpu"] for name, runs in found["runs"].items()}
    # A merge imports torch too; which of two runs took longer a busy machine decides.
    assert min(took["ties"], took["import torch"]) > took["python"] > 0
    assert found["over_torch"]["ties"] == took["ties"] - took["import torch"]


def test_rule_errors(work):
    words = ("--work", work, "--size", SIZE, "--largest-tensor", "1MB", "--rules", "linear")
    run("rule_errors.py", *words, "--models", 2, "--json", work / "errors.json")
    found = results(work / "errors.json")["errors"]["linear: kifmerge"]
    assert 0.4 < found["largest"] <= 0.5


def test_hub_cost(work):
    shape = ("--size", SIZE, "--largest-tensor", "1MB", "--shard-size", "2MB")
    words = ("--work", work, "--only", "one tensor", "--json", work / "hub.json")
    run("hub_cost.py", *shape, *words)
    found = results(work / "hub.json")["jobs"]["one tensor"]
    assert found["needed_bytes"] < found["pulled_bytes"]


@pytest.mark.parametrize("script", ["limits.py", "growth_cost.py"])
def test_examples(script):
    subprocess.run([sys.executable, "-m", "doctest", script], check=True, cwd=BENCH)


@pytest.mark.parametrize("script", LONG)
def test_the_long_ones_find_what_they_import(script):
    def show_help(say):
        sys.path.insert(0, str(BENCH))
        sys.argv = [script, "--help"]
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as end:
            runpy.run_path(str(BENCH / script), run_name="__main__")
        say({"code": end.value.code, "shown": shown.getvalue()})

    ended = faults.fork(show_help).end()  # most of it is loaded here already
    assert ended.code == 0
    assert ended.said()["code"] == 0
    assert script in ended.said()["shown"]
