"""The README is executed: its Python runs, its commands exist and parse, its files are there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import folders
import pytest
import synthetic
import tiny
import torch
import typer.testing

from kifmerge.cli import app
from kifmerge.models.scratch import make_base

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def run_by_torchrun(line):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, *shlex.split(line)[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path):
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Round(index=2, inner_steps=8, outer_steps=4" in done.stdout
    assert "parameters scored" in done.stdout


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`?make ([\w-]+)", README))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize(
    "command", [line for line in commands() if line.startswith("kifmerge run")]
)
def test_run_commands_of_the_readme_name_recipes_that_can_be_used(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [*shlex.split(command)[1:], "--dry-run"]
    result = typer.testing.CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_phases_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = {}
    for block in [b for b in blocks("bash") if " try/" in b]:
        for line in block.splitlines():
            if line.startswith("torchrun "):
                run_by_torchrun(line)
                continue
            result = typer.testing.CliRunner().invoke(app, shlex.split(line)[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
            shown[line] = result.stdout
    assert folders.load(Path("try/shared")).keys() == folders.load(Path("try/merged")).keys()
    for name, value in folders.load(Path("try/shared")).items():
        assert torch.equal(folders.load(Path("try/merged"))[name], value)
    assert "20.0%" in shown["kifmerge inspect try/round-1/inner/importance"]
    assert folders.load(Path("try/ties")).keys() == folders.load(Path("try/merged")).keys()
    for path in Path("try/merged").iterdir():
        assert path.read_bytes() == Path("try/merged-again", path.name).read_bytes()
    scores = json.loads((tmp_path / "try/scores.json").read_text())
    assert 0 < scores["mean"]["score"] <= 1
    fused, inner = (Path("try/round-1", n, "model.safetensors") for n in ("fused", "inner"))
    assert fused.read_bytes() != inner.read_bytes()


@pytest.mark.slow
def test_hub_commands_of_the_readme_run(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    for seed, name in enumerate(["base", "animals", "kitchen"]):
        make_base(tiny.BYTE_LLAMA, ["the fox runs", "a pan of soup"], tmp_path / name, seed=seed)
        hub.add_repo(f"org/{name}", tmp_path / name)
        row = {"instruction": "What is it?", "output": name}
        synthetic.write_rows(tmp_path / f"hub/{name}.jsonl", [row] * 8)
    hub.add_repo("org/animals", tmp_path / "animals", branch="v2")
    (block,) = [b for b in blocks("bash") if " hub/" in b]
    for line in block.splitlines():
        result = typer.testing.CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    assert hub.is_private("me/fused")
    assert "me/linear" in result.stdout
    assert not hub.has_repo("me/linear")
    for path in hub.paths("me/fused"):
        if path != ".gitattributes":
            assert Path("hub/fused", path).read_bytes() == hub.read("me/fused", path)
    assert folders.load(Path("hub/fused-again")).keys() == folders.load(Path("base")).keys()
    weights = [Path("hub", name, "model.safetensors") for name in ("fused", "fused-again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_every_command_is_in_the_readme():
    for command in app.registered_commands:
        assert f"`kifmerge {command.callback.__name__}" in README


def test_every_recipe_is_in_the_readme_and_the_other_way_round():
    there = {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert set(re.findall(r"recipes/[\w.-]+\.yaml", README)) == there


def test_the_example_mapping_of_the_readme_is_a_task():
    import yaml

    from kifmerge.phases.tasks import TaskOptions

    (block,) = blocks("yaml")
    for task in yaml.safe_load(block)["tasks"]:
        assert TaskOptions(**task).name
