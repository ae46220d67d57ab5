"""The prune command: exit codes, streams, and what is refused."""

import json

import folders
import merges
import pytest
from typer.testing import CliRunner

from kifmerge.cli import app

SHAPES = {"a.weight": (30, 20), "b.weight": (50,)}


@pytest.fixture
def folder(tmp_path):
    merges.Files(tmp_path).write(shapes=SHAPES)
    return tmp_path


def invoke(*given):
    return CliRunner().invoke(app, [str(argument) for argument in given])


def prune(folder, *more, evidence="importance", out="new-mask"):
    return invoke(
        "prune", f"--{evidence}", folder / f"new-{evidence}", "--out", folder / out, *more
    )


def with_model(folder):
    return "--model", folder / "new", "--base", folder / "base"


def test_mask_and_figures(folder):
    result = prune(folder, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    figures = json.loads(result.stdout)
    assert (figures["num_parameters"], figures["fraction"]) == (650, 0.2)
    assert figures["num_important"] == 130
    assert {path.name for path in (folder / "new-mask").iterdir()} == {
        "mask.json", "mask.safetensors",
    }  # fmt: skip


def test_pruned_checkpoint(folder):
    result = prune(folder, *with_model(folder))
    assert result.exit_code == 0
    found = folders.load(folder / "new-mask/checkpoint")
    base, new = (folders.load(folder / role) for role in ("base", "new"))
    kept = sum(int((found[name] != base[name]).sum()) for name in found)
    assert kept == 130
    assert all(((found[n] == base[n]) | (found[n] == new[n])).all() for n in found)


def test_units_instead_of_a_snapshot(folder):
    merges.Files(folder).write(shapes=SHAPES).make_units()
    result = prune(
        folder, *with_model(folder), "--important-fraction", "0.5", "--json", evidence="units"
    )
    assert result.exit_code == 0
    assert json.loads(result.stdout)["num_important"] in (50, 600)


@pytest.mark.parametrize(
    ("more", "changes"),
    [
        (["--important-fraction", "0.5"], True),
        (["--scope", "tensor"], True),
        (["--workers", "3"], False),
        (["--nonfinite", "keep"], False),
        (["--allow", "dtype", "--allow", "vocab"], False),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_every_option_matters_or_does_not(folder, more, changes):
    for out, options in (("one", []), ("two", more)):
        assert prune(folder, *with_model(folder), *options, out=out).exit_code == 0
    one, two = (folders.load(folder / out / "checkpoint") for out in ("one", "two"))
    assert merges.same_bits(one, two) != changes


def test_done_says_so(folder):
    first, again = prune(folder), prune(folder)
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert "is already made" in again.stderr
    assert prune(folder, "--quiet").stderr == ""


def test_dry_run(folder):
    result = prune(folder, "--dry-run", "--json")
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert plan["num_parameters"] == 650
    assert plan["peak_memory_bytes"] > 1_000_000
    assert "estimate" not in plan
    plan = json.loads(prune(folder, "--dry-run", "--json", "--disk-rate", "1KB/s").stdout)
    moved = plan["read_bytes"] + plan["write_bytes"]
    assert plan["estimate"]["seconds"] == round(moved / 1000) > 1
    assert prune(folder, "--disk-rate", "1KB/s").exit_code == 2
    assert not (folder / "new-mask").exists()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--model", "x"], "--model and --base go together"),
        (["--base", "x"], "--model and --base go together"),
        (["--unscored", "base"], "--unscored goes with --model"),
        (["--important-fraction", "2"], "less than or equal to 1"),
        (["--units", "x"], "from an importance snapshot or from skill units"),
        (["--scope", "layer"], "--scope"),
        (["--allow", "shapes"], "--allow shapes: expected one of config"),
        (["--nonfinite", "drop"], "--nonfinite"),
        (["--workers", "0"], "--workers"),
    ],
    ids=str,
)
def test_mistakes_of_usage_exit_with_2(folder, more, match):
    result = prune(folder, *more)
    assert result.exit_code == 2
    assert match in " ".join(result.stderr.replace("\u2502", " ").split())
    assert result.stdout == ""
    assert not (folder / "new-mask").exists()


def test_nothing_to_prune_by_exits_with_2(tmp_path):
    assert invoke("prune", "--out", tmp_path / "out").exit_code == 2


def test_units_without_a_model_exit_with_2(folder):
    result = prune(folder, evidence="units")
    assert result.exit_code == 2
    assert "units tell no shapes" in " ".join(result.stderr.replace("\u2502", " ").split())


def test_missing_snapshot_exits_with_3(tmp_path):
    result = prune(tmp_path)
    assert result.exit_code == 3
    assert "holds no importance snapshot" in result.stderr


def test_overwrite(folder):
    (folder / "new-mask").mkdir()
    (folder / "new-mask/x").touch()
    assert prune(folder).exit_code == 3
    assert prune(folder, "--overwrite").exit_code == 0
    assert not (folder / "new-mask/x").exists()
