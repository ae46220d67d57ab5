"""What all tests share: patient hypothesis, no network, Ctrl-C, and where real data may be."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"

# A shell that starts the tests in the background has them ignore Ctrl-C, and their children too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("kifmerge", deadline=None, derandomize=True)
settings.load_profile("kifmerge")

# Real benchmark tasks, TASK/train.jsonl and TASK/test.jsonl, are not part of the project.
DATA_DIR = Path(
    os.environ.get("KIFMERGE_DATA", Path(__file__).parents[2] / "shared" / "data")
).absolute()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    if not (DATA_DIR / "agnews" / "train.jsonl").exists():
        pytest.skip("no benchmark data: set KIFMERGE_DATA to a folder with TASK/train.jsonl")
    return DATA_DIR
