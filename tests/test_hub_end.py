"""A merge that waits for the network ends at once when it is asked to, or when it has failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import folders
import pytest
import torch
from loopback import Fault

COMMAND = Path(sys.executable).with_name("kifmerge")
SHAPES = {"a.weight": (2000, 700), "b.weight": (1500, 1000)}


@pytest.fixture
def arguments(hub, tmp_path):
    """Of a merge of two models on the Hub."""
    for number, name in enumerate(("base", "one", "two")):
        made = folders.random_tensors(number, SHAPES)
        if name == "two":
            made["a.weight"][-1, -1] = torch.nan
        num_shards = 0 if name == "base" else 2
        hub.add_repo(f"org/{name}", folders.save(tmp_path / name, made, num_shards=num_shards))
    models = ("--base", "org/base", "--model", "org/one", "--model", "org/two")
    return ("merge", "--rule", "task-arithmetic", *models, "--out", tmp_path / "out")


def begun(hub, *arguments):
    return subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        env={**os.environ, **hub.env, "HF_HUB_DOWNLOAD_TIMEOUT": "60"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("fetch", ["stream", "download"])
@pytest.mark.parametrize("fault", [
    {"stall_at": 1_000_000, "stall_seconds": 60}, {"status": 429, "retry_after": 60},
], ids=["stall", "wait"])  # fmt: skip
def test_ctrl_c(hub, arguments, tmp_path, fetch, fault):
    skip = 1 if fetch == "stream" and "status" in fault else 0  # the header comes
    hub.fail(Fault(kind="cdn", match="org/one/*", skip=skip, times=None, **fault))
    with begun(hub, *arguments, "--fetch", fetch) as process:
        faults.wait_for(lambda: any(row.fault for row in hub.log))
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        stdout, stderr = process.communicate()
    assert time.monotonic() - started < 4
    assert (process.returncode, stdout) == (130, "")
    assert "kifmerge: interrupted; " in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()
    assert not list(Path(hub.env["HF_HUB_CACHE"]).rglob("*.incomplete"))


@pytest.mark.slow
@pytest.mark.parametrize("fetch", ["stream", "download"])
def test_failure(hub, arguments, tmp_path, fetch):
    # One worker meets NaN while the other waits for the next shard of another model: nearly always.
    for _ in range(5):
        hub.mend()
        match = "org/one/model-00002*"
        hub.fail(Fault(kind="cdn", match=match, stall_at=0, stall_seconds=40, skip=1, times=None))
        started = time.monotonic()
        with begun(hub, *arguments, "--fetch", fetch, "--workers", 2) as process:
            stdout, stderr = process.communicate()
        assert time.monotonic() - started < 30
        assert (process.returncode, stdout) == (3, "")
        assert "a.weight" in stderr
        assert not (tmp_path / "out").exists()
        if any(row.fault for row in hub.log):
            return
    pytest.fail("no worker ever waited")
