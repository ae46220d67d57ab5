"""What a merge does not import: it would take longer than the merge."""

from __future__ import annotations

import subprocess
import sys

import merges
import pytest

PROGRAM = """
import sys
from kifmerge.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end
assert "torch" in sys.modules
heavy = {"transformers", "tokenizers", "peft", "accelerate", "huggingface_hub.errors"}
print(*heavy & sys.modules.keys())
"""


@pytest.mark.parametrize("command", ["merge", "prune"])
def test_merge_and_prune_import_neither_models_nor_the_hub(tmp_path, command):
    files = merges.Files(tmp_path).write()
    for role in ("base", *merges.TWO):
        (files.folder / role / "tokenizer.json").write_text("{}")
    if command == "prune":
        given = ["prune", "--importance", tmp_path / "new-importance"]
    else:
        given = ["merge", "--rule", "recurrent-kif", "--base", tmp_path / "base"]
        for role in merges.TWO:
            given += [f"--{role}", tmp_path / role]
            given += [f"--{role}-importance", tmp_path / f"{role}-importance"]
    words = [str(word) for word in (*given, "--out", tmp_path / "out", "--quiet")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
    assert (tmp_path / "out").is_dir()


def test_nothing_is_collected_when_the_command_ends():
    program = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_freeze_count() > 10_000, file=sys.stderr))
sys.argv = ["kifmerge", "--version"]
from kifmerge.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == "True\n"


@pytest.mark.parametrize(
    ("words", "num_prepared"), [(["report", "--help"], 1), (["--help"], 16), (["repport"], 16)]
)
def test_only_the_command_that_is_asked_for_is_prepared(words, num_prepared):
    program = """
import sys
from unittest import mock
import typer.main
from kifmerge.cli import main
prepare = typer.main.get_command_from_info
with mock.patch("typer.main.get_command_from_info", wraps=prepare) as prepared:
    try:
        main()
    except SystemExit:
        print(prepared.call_count)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str(num_prepared)
    assert ("Did you mean 'report'?" in done.stderr) == (words == ["repport"])
