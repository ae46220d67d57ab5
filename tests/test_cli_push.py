"""The push command: exit codes, streams, and no token anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import folders
import pytest
import yaml
from loopback import READ_TOKEN, WRITE_TOKEN, Fault, LoopbackHub
from typer.testing import CliRunner

from kifmerge.cli import app
from kifmerge.hub import client

COMMAND = Path(sys.executable).with_name("kifmerge")
REPO = "org/made"
CARD = b"---\nlicense: mit\n---\n# Base\n"


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return folders.save(tmp_path / "made", folders.random_tensors(1), num_shards=2)


def invoke(*given: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in given])


def error_line(result: Any, exit_code: int = 3) -> str:
    """The one line that tells what is wrong."""
    assert (result.exit_code, result.stdout) == (exit_code, "")
    *_, last = result.stderr.splitlines()
    assert last.startswith("kifmerge: ")
    return last


def test_prints_where_it_is(hub: LoopbackHub, directory: Path) -> None:
    result = invoke("push", directory, REPO, "--private", "--json")
    assert result.exit_code == 0
    figures = json.loads(result.stdout)
    assert figures == {
        "repository": REPO,
        "branch": "main",
        "commit": hub.head(REPO),
        "url": f"{hub.endpoint}/{REPO}/commit/{hub.head(REPO)}",
        "num_files": 5,
        "num_bytes": figures["num_bytes"],
    }
    assert hub.is_private(REPO)
    assert result.stderr.splitlines() == [
        f"kifmerge: created {REPO}, private",
        "kifmerge: no tokenizer: who loads it takes another's",
        f"kifmerge: uploading 5 files, {figures['num_bytes']:,} bytes, to {REPO}",
    ]


def test_a_second_time_there_is_nothing_to_do(hub: LoopbackHub, directory: Path) -> None:
    first = yaml.safe_load(invoke("push", directory, REPO).stdout)
    again = invoke("push", directory, REPO)
    assert again.exit_code == 0
    assert again.stderr.endswith(f"{REPO} holds all of it already: nothing to do\n")
    assert yaml.safe_load(again.stdout) == {**first, "num_files": 0, "num_bytes": 0}
    assert len(hub.commits(REPO)) == 2


def test_quiet(hub: LoopbackHub, directory: Path) -> None:
    for _ in range(2):
        assert invoke("push", directory, REPO, "--quiet").stderr == ""


def test_dry_run(hub: LoopbackHub, directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"x")
    result = invoke("push", directory, f"{REPO}@v1", "--public", "--dry-run", "--json")
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert (plan["repository"], plan["branch"], plan["private"]) == (REPO, "v1", False)
    assert plan["send"].keys() == {
        "README.md", "config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    }  # fmt: skip
    assert list(plan["left_out"]) == ["pytorch_model.bin"]
    assert not hub.has_repo(REPO)


def test_branch_message_and_pull_request(hub: LoopbackHub, directory: Path) -> None:
    head = hub.add_repo(REPO, {"kept.txt": b"1"})
    for given in (("--branch", "v1"), ("--pr", "--message", "Better\n\nmuch")):
        assert invoke("push", directory, REPO, *given).exit_code == 0
    assert hub.head(REPO) == head
    assert "model.safetensors.index.json" in hub.paths(REPO, "v1")
    commit = hub.commits(REPO, "refs/pr/1")[0]
    assert (commit.title, commit.message) == ("Better", "much")


def test_a_merge_of_the_hubs_models(hub: LoopbackHub, tmp_path: Path) -> None:
    heads = {}
    for seed, name in enumerate(("a", "b")):
        made = folders.save(tmp_path / name, folders.random_tensors(seed))
        (made / "README.md").write_bytes(CARD)
        heads[name] = hub.add_repo(f"org/{name}", made)
    out = tmp_path / "out"
    models = ("--model", "org/a", "--model", "org/b")
    assert invoke("merge", "--rule", "linear", *models, "--out", out).exit_code == 0
    result = invoke("push", out, REPO)
    assert (result.exit_code, "warning" in result.stderr) == (0, False)
    text = hub.read(REPO, "README.md").decode()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == ["org/a", "org/b"]
    assert (front["base_model_relation"], front["license"]) == ("merge", "mit")
    assert all(f"`{head}`" in text for head in heads.values())
    assert hub.read(REPO, "kifmerge.json") == (out / "kifmerge.json").read_bytes()
    weights = "model.safetensors"
    assert hub.read(REPO, weights) == (out / weights).read_bytes()


def test_card_options(hub: LoopbackHub, directory: Path, tmp_path: Path) -> None:
    given = ("--base-model", "org/a", "--base-model", "org/b", "--license", "apache-2.0")
    assert invoke("push", directory, REPO, *given).exit_code == 0
    front = yaml.safe_load(hub.read(REPO, "README.md").decode().split("---\n")[1])
    assert (front["base_model"], front["license"]) == (["org/a", "org/b"], "apache-2.0")
    result = invoke("push", directory, REPO, "--report", tmp_path)
    assert "no report there" in error_line(result)


@pytest.mark.parametrize(
    "given",
    [
        ("--base-model", "name"),
        ("--base-model", "org/name@v1"),
        ("--message", ""),
        ("--branch", "v2"),
    ],
)
def test_usage(hub: LoopbackHub, directory: Path, given: tuple[str, str]) -> None:
    result = invoke("push", directory, f"{REPO}@v1", *given)
    assert (result.exit_code, result.stdout) == (2, "")
    assert hub.log == []


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("name", "expected ORG/NAME"),
        (f"{REPO}@{'a' * 40}", "found a commit"),
        (f"hf://{REPO}/sub", "without a folder"),
    ],
)
def test_no_repository(hub: LoopbackHub, directory: Path, target: str, says: str) -> None:
    assert says in error_line(invoke("push", directory, target))


def test_no_folder(hub: LoopbackHub, tmp_path: Path) -> None:
    assert "expected a folder" in error_line(invoke("push", tmp_path / "none", REPO))
    assert "expected a folder" in error_line(invoke("push", "org/elsewhere", REPO))


@pytest.mark.parametrize(
    ("token", "says"),
    [("hf_unheard_of", "your token is not accepted"), (READ_TOKEN, "does not allow it")],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_tokens(
    hub: LoopbackHub,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    token: str,
    says: str,
    is_there: bool,
) -> None:
    if is_there:
        hub.add_repo(REPO, {"kept.txt": b"1"})
    monkeypatch.setenv("HF_TOKEN", token)
    result = invoke("push", directory, REPO)
    assert says in error_line(result)
    shown = result.output + caplog.text
    assert token not in shown
    assert WRITE_TOKEN not in shown
    assert "signature" not in shown


def test_what_may_pass_is_worth_another_try(hub: LoopbackHub, directory: Path) -> None:
    hub.fail(Fault(kind="info", times=None, status=503))
    assert "HTTP 503" in error_line(invoke("push", directory, REPO), exit_code=4)


def test_a_server_without_xet(
    hub: LoopbackHub, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert "set HF_HUB_DISABLE_XET=1" in error_line(invoke("push", directory, REPO))


def test_offline(hub: LoopbackHub, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it" in error_line(invoke("push", directory, REPO))
    assert hub.log == []


@pytest.mark.slow
def test_the_installed_command(hub: LoopbackHub, directory: Path) -> None:
    hub.fail(Fault(kind="put", status=503))
    hub.fail(Fault(kind="commit", after_act=True, reset=True))
    env = {**os.environ, **hub.env}
    del env["HF_HUB_DISABLE_PROGRESS_BARS"]
    command = [COMMAND, "push", directory, REPO, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0
    assert json.loads(done.stdout)["commit"] == hub.head(REPO)
    assert len(hub.commits(REPO)) == 2
    assert "Traceback" not in done.stderr
    assert "%|" not in done.stderr  # no bars where nobody looks
    for secret in (WRITE_TOKEN, "signature"):
        assert secret not in done.stdout + done.stderr
