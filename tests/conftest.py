"""What all tests share: patient hypothesis, no network, few threads, Ctrl-C, where real data is."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from loopback import LoopbackHub

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Every processor has a process of its own already; the tests' own models set one thread too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

collect_ignore = ["loopback"]

# A shell that starts the tests in the background has them ignore Ctrl-C, and their children too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("kifmerge", deadline=None, derandomize=True)
settings.load_profile("kifmerge")

# Real benchmark tasks, TASK/train.jsonl and TASK/test.jsonl, are not part of the project.
DATA_DIR = Path(
    os.environ.get("KIFMERGE_DATA", Path(__file__).parents[2] / "shared" / "data")
).absolute()


def pytest_collection_finish() -> None:
    """Keep modules and tests out of garbage collection: every Trainer ends with a whole one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    if not (DATA_DIR / "agnews" / "train.jsonl").exists():
        pytest.skip("no benchmark data: set KIFMERGE_DATA to a folder with TASK/train.jsonl")
    return DATA_DIR


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Serve an empty Hub of this test's own, which the client takes for the real one.

    The client reads its environment when it is imported, so what it has read is replaced too.
    """
    from huggingface_hub import close_session, constants, hf_api
    from huggingface_hub.utils import _cache_manager

    with LoopbackHub() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        home = server.env["HF_HOME"]
        url = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": url,
            "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
            "HF_HOME": home,
            "HF_HUB_CACHE": server.env["HF_HUB_CACHE"],
            "HF_ASSETS_CACHE": server.env["HF_ASSETS_CACHE"],
            "HF_XET_CACHE": server.env["HF_XET_CACHE"],
            "HF_TOKEN_PATH": server.env["HF_TOKEN_PATH"],
            "HF_STORED_TOKENS_PATH": f"{home}/stored_tokens",
            "AGENT_HARNESSES_PATH": f"{home}/.agent_harnesses.json",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(hf_api.api, "_whoami_cache", {}, raising=False)
        monkeypatch.setattr(_cache_manager, "HF_HUB_CACHE", server.env["HF_HUB_CACHE"])
        bars = importlib.import_module("huggingface_hub.utils.tqdm")
        monkeypatch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        _forget_connections(close_session)
        yield server
    # After the server: a connection that is being opened while the client is closed stays open.
    _forget_connections(close_session)


def _forget_connections(close_session: Callable[[], None]) -> None:
    """Drop what the client keeps of the servers that it spoke to."""
    close_session()
    files = sys.modules.get("huggingface_hub.hf_file_system")
    if files is not None:
        files.HfFileSystem.clear_instance_cache()
