"""The pull command: exit codes, streams, and an end at once when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import remote
import yaml
from huggingface_hub import constants
from loopback import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, Fault
from typer.testing import CliRunner

from kifmerge.cli import app

COMMAND = Path(sys.executable).with_name("kifmerge")
FILES = {
    "config.json": b"{}",
    "model.safetensors": remote.noise("cli", 5_000_000),
    "pytorch_model.bin": b"pickle",
    ".gitattributes": b"x",
}
WANTED = {name: FILES[name] for name in ("config.json", "model.safetensors")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    remote.be_quick(monkeypatch)


@pytest.fixture
def commit(hub):
    return hub.add_repo("org/a", FILES)


def invoke(*given):
    return CliRunner().invoke(app, [str(argument) for argument in given])


def one_line(result, exit_code=3):
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.exception
    (line,) = result.stderr.splitlines()
    assert line.startswith("kifmerge: ")
    for token in (WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN):
        assert token not in line
    return line


def test_into_the_cache_prints_the_folder(hub, commit):
    result = invoke("pull", "org/a")
    assert result.exit_code == 0
    found = yaml.safe_load(result.stdout)
    assert faults.content(Path(found["out"])) == WANTED
    assert Path(found["out"]).is_relative_to(constants.HF_HUB_CACHE)
    assert found["reference"] == f"org/a@{commit}"
    assert (found["commit"], found["num_files"], found["num_bytes"]) == (commit, 2, 5_000_002)
    assert result.stderr == "kifmerge: left out, for --file to ask for: pytorch_model.bin\n"


def test_into_a_folder_as_json(hub, commit, tmp_path):
    result = invoke("pull", "org/a", "--out", tmp_path / "out", "--json", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {
        "out": str(tmp_path / "out"),
        "reference": f"org/a@{commit}",
        "commit": commit,
        "num_files": 2,
        "num_bytes": 5_000_002,
        "left_out": {
            ".gitattributes": "hidden",
            "pytorch_model.bin": "a pickle, which may run code when it is loaded",
        },
    }
    assert faults.content(tmp_path / "out") == WANTED


@pytest.mark.parametrize("more", [[], ["--out", "out"]])
def test_nothing_to_do(hub, commit, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    first = invoke("pull", "org/a", *more)
    again = invoke("pull", "org/a", *more)
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert again.stderr.splitlines()[1].endswith("is already made: nothing to do")
    assert "nothing to do" not in first.stderr


def test_dry_run(hub, commit, tmp_path):
    hub.clear_log()
    result = invoke("pull", "org/a", "--out", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert plan["files"] == {"config.json": 2, "model.safetensors": 5_000_000}
    assert plan["pulled_bytes"] == 5_000_002
    assert hub.pulled_bytes() == 0
    assert not (tmp_path / "out").exists()


def test_chosen_files_and_a_pickle(hub, commit, tmp_path):
    files = ("--file", "*.bin", "--file", "config.json")
    result = invoke("pull", "org/a", "--out", tmp_path / "out", *files)
    assert result.exit_code == 0
    assert set(faults.content(tmp_path / "out")) == {"config.json", "pytorch_model.bin"}
    assert result.stderr == (
        "kifmerge: warning: pickles, which may run code when they are loaded: load them only where "
        "you trust them: pytorch_model.bin\n"
    )


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_what_goes_with_a_folder_alone(hub, commit, flag):
    result = invoke("pull", "org/a", flag)
    assert result.exit_code == 2
    assert "go with --out" in result.stderr


class TestErrors:
    @pytest.mark.parametrize(
        ("reference", "words"),
        [
            ("org/none", "reading org/none: no such repository, or a private one"),
            ("org/a@none", "reading org/a@none: no such branch, tag or commit"),
            ("hf://org/a/none", "reading hf://org/a/none: no such folder"),
            ("./here", "./here: expected ORG/NAME"),
        ],
    )
    def test_what_does_not_exist(self, hub, commit, reference, words):
        assert one_line(invoke("pull", reference)).startswith(f"kifmerge: {words}")

    @pytest.mark.parametrize("token", [None, OTHER_TOKEN, "a-token-of-nobody"])
    def test_private(self, hub, token, monkeypatch):
        hub.add_repo("org/p", FILES, private=True)
        if token is None:
            monkeypatch.delenv("HF_TOKEN")
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        line = one_line(invoke("pull", "org/p"))
        assert "hf auth login" in line
        assert "nobody" not in line

    def test_a_token_that_only_reads_is_enough(self, hub, commit, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
        assert invoke("pull", "org/a").exit_code == 0

    def test_gated(self, hub):
        hub.add_repo("org/g", {"config.json": b"{}"}, gated=True)
        assert "ask for access on its page" in one_line(invoke("pull", "org/g"))

    def test_pickles_only(self, hub):
        hub.add_repo("org/p", {"pytorch_model.bin": b"x"})
        assert "found pickles only" in one_line(invoke("pull", "org/p"))

    def test_server_in_trouble(self, hub, commit, tmp_path):
        hub.fail(Fault(kind="cdn", status=503, times=None))
        for more in ([], ["--out", tmp_path / "out"]):
            line = one_line(invoke("pull", "org/a", "--quiet", *more), 4)
            assert "model.safetensors" in line
            assert "503" in line

    def test_nobody_there(self, hub):
        with remote.closed(hub):
            assert "the connection failed" in one_line(invoke("pull", "org/a"), 4)

    def test_offline(self, hub, commit, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.clear_log()
        assert "HF_HUB_OFFLINE is set" in one_line(invoke("pull", "org/a"))
        assert hub.log == []

    def test_a_folder_in_the_way(self, hub, commit, tmp_path):
        (tmp_path / "a.txt").write_text("mine")
        line = one_line(invoke("pull", "org/a", "--out", tmp_path, "--quiet"))
        assert line.endswith("exists already: it will not be overwritten")


class TestProcess:
    """The installed command, as a process that the environment alone tells where the Hub is."""

    def begun(self, hub, *arguments):
        return subprocess.Popen(
            [COMMAND, "pull", *map(str, arguments)],
            env={**os.environ, **hub.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @pytest.mark.slow
    def test_pulls(self, hub, commit, tmp_path):
        process = self.begun(hub, "org/a", "--out", tmp_path / "out", "--quiet")
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (0, "")
        assert yaml.safe_load(stdout)["commit"] == commit
        assert faults.content(tmp_path / "out") == WANTED

    @pytest.mark.slow
    @pytest.mark.parametrize("fault", [
        {"stall_at": 100_000, "stall_seconds": 60}, {"status": 429, "retry_after": 60},
    ], ids=["stall", "wait"])  # fmt: skip
    @pytest.mark.parametrize("more", [[], ["--out", "out"]], ids=["cache", "folder"])
    def test_ctrl_c_ends_it_at_once(self, hub, commit, tmp_path, monkeypatch, fault, more):
        monkeypatch.chdir(tmp_path)
        hub.fail(Fault(kind="cdn", times=None, **fault))
        process = self.begun(hub, "org/a", *more)
        faults.wait_for(lambda: any(row.fault for row in hub.log))
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        stdout, stderr = process.communicate(timeout=60)
        assert time.monotonic() - begun < 3
        assert (process.returncode, stdout) == (130, "")
        assert stderr.splitlines()[-1].startswith("kifmerge: interrupted; ")
        assert "Traceback" not in stderr
        assert not (tmp_path / "out").exists()
