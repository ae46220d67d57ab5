"""The command group, and inspect of what it makes: exit codes, streams, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import folders
import pytest
import torch
import yaml
from typer.testing import CliRunner

from kifmerge.checkpoint.snapshot import write_snapshot
from kifmerge.checkpoint.units import read_units
from kifmerge.cli import app
from kifmerge.phases.group import unit_figures
from kifmerge.tensor.units import cumulative_scores

SHAPES = {f"m.h.{n}.q.lora_{side}.weight": (3, 3) for n in range(3) for side in "AB"}


@pytest.fixture
def folder(tmp_path):
    for seed, task in enumerate(("first", "second")):
        tensors = folders.random_tensors(0, SHAPES)
        folders.snapshot(tmp_path / f"{task}-importance", seed, tensors, role="new", task=task)
    return tmp_path


def invoke(*given):
    return CliRunner().invoke(app, [str(argument) for argument in given])


def group(folder, task, *more, unit="lora-rank"):
    return invoke(
        "group", "--importance", folder / f"{task}-importance",
        "--unit", unit, "--out", folder / f"{task}-units", *more,
    )  # fmt: skip


def test_result_on_stdout_and_nothing_on_stderr(folder):
    result = group(folder, "first", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    expected = unit_figures(read_units(folder / "first-units"))
    assert json.loads(result.stdout) == {"out": str(folder / "first-units"), **expected}
    assert (expected["num_units"], len(expected["top_units"])) == (9, 5)


@pytest.mark.parametrize(("unit", "num_units"), [("tensor", 6), ("lora-rank", 9), ("layer", 3)])
def test_people_see_the_same(folder, unit, num_units):
    shown = yaml.safe_load(group(folder, "first", unit=unit).stdout)
    assert (shown["unit"], shown["num_units"]) == (unit, num_units)
    again = group(folder, "first", "--json", unit=unit)
    assert json.loads(again.stdout) == shown


def test_tasks_add_up(folder):
    group(folder, "first")
    more = ("--historical-units", folder / "first-units", "--new-weight", 0.6)
    result = group(folder, "second", *more, "--cumulative-weight", "0.1", "--json")
    assert result.exit_code == 0
    first, second = read_units(folder / "first-units"), read_units(folder / "second-units")
    expected = cumulative_scores(
        [unit.score for unit in second.units],
        [unit.cumulative for unit in first.units],
        new_weight=0.6,
        cumulative_weight=0.1,
    )
    assert [unit.cumulative for unit in second.units] == expected
    top = json.loads(result.stdout)["top_units"][0]
    assert top["cumulative"] in expected
    assert top["score"] == max(unit.score for unit in second.units)


def test_made_again_does_nothing(folder):
    made = group(folder, "first").stdout
    before = (folder / "first-units" / "units.json").stat().st_mtime_ns
    result = group(folder, "first")
    assert (result.exit_code, result.stdout) == (0, made)
    assert "first-units is already made: nothing to do" in result.stderr
    assert group(folder, "first", "--quiet").stderr == ""
    assert (folder / "first-units" / "units.json").stat().st_mtime_ns == before


def test_other_options_need_overwrite(folder):
    group(folder, "first")
    result = group(folder, "first", unit="layer")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "made by another group command" in result.stderr
    assert group(folder, "first", "--overwrite", unit="layer").exit_code == 0
    assert read_units(folder / "first-units").kind == "layer"


def test_dry_run_makes_nothing(folder):
    result = group(folder, "first", "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert (result.exit_code, plan["num_units"], plan["num_parameters"]) == (0, 9, 54)
    assert not (folder / "first-units").exists()


def test_dry_run_checks_the_historical_units(folder):
    group(folder, "first", unit="layer")
    result = group(folder, "second", "--dry-run", "--historical-units", folder / "first-units")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "first-units: expected units of kind lora-rank, found layer" in result.stderr


@pytest.mark.parametrize("flag", ["--new-weight", "--cumulative-weight"])
def test_weights_without_historical_units_are_a_mistake_of_usage(folder, flag):
    result = group(folder, "first", flag, "0.5")
    assert result.exit_code == 2
    assert f"{flag} means nothing without" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "more", [["--new-weight", "1.5"], ["--new-weight", "0", "--cumulative-weight", "0"]]
)
def test_weights_that_are_none_are_a_mistake_of_usage(folder, more):
    group(folder, "first")
    result = group(folder, "second", "--historical-units", folder / "first-units", *more)
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize("argument", ["--importance", "--unit"])
def test_missing_and_unknown_arguments(folder, argument):
    given = {"--importance": folder / "nowhere", "--unit": "neuron"}
    result = group(folder, "first", argument, given[argument])
    assert result.exit_code == {"--importance": 3, "--unit": 2}[argument]
    assert str(given[argument]) in result.stderr


def test_scores_that_are_not_finite(folder):
    kept = {"score/m.a": torch.tensor([1.0, float("nan")])}
    write_snapshot(folder / "first-importance", kept, {})
    result = group(folder, "first", unit="tensor")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "importance.safetensors: m.a: element 1 is nan" in result.stderr
    assert not (folder / "first-units").exists()


def test_equal_scores_warn_on_stderr(folder):
    write_snapshot(folder / "first-importance", {"score/m.a": torch.ones(3)}, {})
    result = group(folder, "first", "--json", unit="tensor")
    assert result.exit_code == 0
    assert "warning: the scores of all units are equal: no unit is important" in result.stderr
    assert json.loads(result.stdout)["important"]["score"] == 0


def test_inspect_shows_units(folder):
    group(folder, "first")
    shown = yaml.safe_load(invoke("inspect", folder / "first-units").stdout)
    assert (shown["kind"], shown["unit"]) == ("skill units", "lora-rank")
    assert (shown["num_units"], shown["num_members"], shown["task"]) == (9, 18, "first")
    assert len(shown["top_units"]) == 5
    given = ("--important-fraction", "0.5", "--json")
    content = json.loads(invoke("inspect", folder / "first-units", *given).stdout)
    assert content["facts"]["important"] == {"fraction": 0.5, "score": 4, "cumulative": 4}
    assert "tensors" not in content


@pytest.mark.slow
def test_command_needs_no_training_libraries(folder):
    script = (
        "import sys; from kifmerge.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end\n"
        "assert not {'transformers', 'peft', 'accelerate'} & set(sys.modules)"
    )
    given = ["group", "--importance", folder / "first-importance", "--unit", "layer"]
    command = [sys.executable, "-c", script, *given, "--out", folder / "units"]
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert read_units(folder / "units").kind == "layer"
