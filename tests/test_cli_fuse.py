"""The commands prune and merge: exit codes, streams, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import folders
import pytest
import torch
from typer.testing import CliRunner

from kifmerge.checkpoint.snapshot import write_snapshot
from kifmerge.cli import app
from kifmerge.cli.fuse import RuleName
from kifmerge.phases.presets import RecurrentOptions
from kifmerge.phases.rules import RULES

SHAPES = {"a.weight": (30, 20), "b.weight": (50,)}
KILLED = """
import sys
from kifmerge.checkpoint import pieces
from kifmerge.cli import app
from kifmerge.phases import fuse
import time

pieces.CPU_PIECE_BYTES = 64
split = fuse.split_piece


def slowly(*arguments):
    print("fusing", flush=True)
    time.sleep(0.2)
    return split(*arguments)


fuse.split_piece = slowly
sys.argv = ["kifmerge", *sys.argv[1:]]
app()
"""


@pytest.fixture
def folder(tmp_path):
    for number, role in enumerate(("base", "new", "historical")):
        folders.save(tmp_path / role, folders.random_tensors(number, SHAPES))
    for seed, side in enumerate(("new", "historical")):
        tensors = folders.random_tensors(0, SHAPES)
        folders.snapshot(tmp_path / f"{side}-importance", seed, tensors, role=side)
    return tmp_path


def arguments(folder, *more, rule="recurrent-kif", evidence="importance", out="out"):
    roles = [x for role in ("base", "new", "historical") for x in (f"--{role}", folder / role)]
    sides = ("new", "historical") if evidence else ()
    given = [x for s in sides for x in (f"--{s}-{evidence}", folder / f"{s}-{evidence}")]
    return ["merge", "--rule", rule, *roles, *given, "--out", folder / out, *more]


def invoke(*given):
    return CliRunner().invoke(app, [str(argument) for argument in given])


def prune(folder, *more, side="new", out="new-mask"):
    return invoke(
        "prune", "--importance", folder / f"{side}-importance", "--out", folder / out, *more
    )


class TestMerge:
    def test_result_on_stdout_and_nothing_on_stderr(self, folder):
        result = invoke(*arguments(folder, "--json"))
        assert (result.exit_code, result.stderr) == (0, "")
        figures = json.loads(result.stdout)
        assert figures["out"] == str(folder / "out")
        assert figures["num_tensors"] == 2
        shares = [figures[key] for key in ("both", "new_only", "historical_only", "neither")]
        assert sum(shares) == pytest.approx(1.0)
        assert folders.load(folder / "out").keys() == SHAPES.keys()

    def test_text_for_people(self, folder):
        result = invoke(*arguments(folder))
        assert "rule: recurrent-kif\n" in result.stdout

    def test_done_merge_says_so_and_prints_the_same(self, folder):
        first, again = (invoke(*arguments(folder)) for _ in range(2))
        assert again.exit_code == 0
        assert again.stdout == first.stdout
        assert again.stderr == f"{folder / 'out'} is already made: nothing to do\n"
        assert invoke(*arguments(folder, "--quiet")).stderr == ""

    def test_dry_run_writes_nothing(self, folder):
        before = sorted(folder.iterdir())
        result = invoke(*arguments(folder, "--dry-run", "--json"))
        assert result.exit_code == 0
        plan = json.loads(result.stdout)
        assert (plan["num_tensors"], plan["write_bytes"]) == (2, 4 * 650)
        assert plan["read_bytes"] == 6 * 4 * 650 + 4 * 2 * 8 * 650
        assert (plan["weight_passes"], plan["importance_passes"]) == (2, 4)
        assert sorted(folder.iterdir()) == before

    def test_dry_run_finds_what_does_not_fit(self, folder):
        folders.save(folder / "new", {"a.weight": torch.zeros(1)})
        result = invoke(*arguments(folder, "--dry-run"))
        assert result.exit_code == 3
        assert "these are different models" in result.stderr

    @pytest.mark.parametrize("rule", ["average", "recurrent-average"])
    def test_average_by_both_its_names(self, folder, rule):
        assert invoke(*arguments(folder, rule=rule, evidence=None)).exit_code == 0
        base, new, historical = (folders.load(folder / r) for r in ("base", "new", "historical"))
        for name, value in folders.load(folder / "out").items():
            expected = base[name] + 0.5 * (new[name] - base[name])
            expected = expected + 0.5 * (historical[name] - base[name])
            torch.testing.assert_close(value, expected)

    @pytest.mark.parametrize(
        ("more", "rule"),
        [
            (["--important-fraction", "0.5"], "recurrent-kif"),
            (["--scope", "tensor"], "recurrent-kif"),
            (["--redundant", "drop"], "recurrent-kif"),
            (["--shared-weights", "1,1"], "recurrent-kif"),
            (["--historical-parent", "new"], "recurrent-kif"),
            (["--temperature", "2.5"], "recurrent-kif-adaptive"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else value,
    )
    def test_every_option_matters(self, folder, more, rule):
        assert invoke(*arguments(folder, rule=rule)).exit_code == 0
        assert invoke(*arguments(folder, *more, rule=rule, out="other")).exit_code == 0
        first, other = (folders.load(folder / out)["a.weight"] for out in ("out", "other"))
        assert not torch.equal(first, other)

    def test_masks_instead_of_snapshots(self, folder):
        for side in ("new", "historical"):
            assert prune(folder, side=side, out=f"{side}-mask").exit_code == 0
        assert invoke(*arguments(folder, evidence="mask")).exit_code == 0
        assert invoke(*arguments(folder, out="by-scores")).exit_code == 0
        first, other = (folders.load(folder / out) for out in ("out", "by-scores"))
        assert all(torch.equal(first[name], value) for name, value in other.items())

    def test_warning_is_a_plain_line(self, folder):
        tensors = {"score/a.weight": torch.ones(30, 20), "score/b.weight": torch.ones(50)}
        write_snapshot(folder / "new-importance", tensors, {})
        result = invoke(*arguments(folder))
        assert result.exit_code == 0
        assert result.stderr == (
            "kifmerge: warning: the new importance scores are all equal: "
            "nothing is found important\n"
        )

    @pytest.mark.parametrize(
        ("more", "rule", "evidence", "match"),
        [
            ([], "recurrent-kif", None, "takes importance snapshots of both sides"),
            ([], "average", "importance", "average takes no importance"),
            ([], "recurrent-kif-adaptive", "mask", "takes importance snapshots"),
            (["--temperature", "1"], "recurrent-kif", "importance", "--temperature means nothing"),
            (["--redundant", "drop"], "average", None, "--redundant means nothing to average"),
            (["--scope", "tensor"], "recurrent-kif", "mask", "--scope means nothing beside masks"),
            (["--shared-weights", "1"], "recurrent-kif", "importance", "expected two numbers"),
            (["--shared-weights", "a,b"], "recurrent-kif", "importance", "expected two numbers"),
            (["--temperature", "0"], "recurrent-kif-adaptive", "importance", "must be positive"),
            (
                ["--important-fraction", "1.5"],
                "recurrent-kif",
                "importance",
                "less than or equal to 1",
            ),
            (["--unscored", "historical"], "recurrent-kif", "importance", "--unscored"),
            (["--space", "weight"], "recurrent-kif", "importance", "--space"),
            ([], "ties", "importance", "--rule"),
        ],
    )
    def test_mistakes_of_usage_exit_with_2(self, folder, more, rule, evidence, match):
        result = invoke(*arguments(folder, *more, rule=rule, evidence=evidence))
        assert result.exit_code == 2
        assert match in " ".join(result.stderr.replace("\u2502", " ").split())
        assert result.stdout == ""
        assert not (folder / "out").exists()

    @pytest.mark.parametrize(
        ("spoil", "match"),
        [
            (lambda f: (f / "base/model.safetensors").unlink(), "base holds no weights"),
            (lambda f: truncate(f / "new/model.safetensors"), "new/model.safetensors: truncated"),
            (lambda f: truncate(f / "new-importance/importance.safetensors"), "truncated"),
            (
                lambda f: (f / "historical-importance/importance.json").unlink(),
                "no importance.json",
            ),
            (lambda f: (f / "base/config.json").write_text("{"), "config.json: cannot be read"),
            (
                lambda f: (f / "base/config.json").write_text('{"quantization_config": {"x": 1}}'),
                "is quantised",
            ),
            (lambda f: (f / "out").mkdir() or (f / "out/x").touch(), "out is not empty"),
            (lambda f: (f / "new/kifmerge.json").write_text("[]"), "kifmerge.json: expected"),
        ],
        ids=range(8),
    )
    def test_what_the_user_can_mend_exits_with_3(self, folder, spoil, match):
        spoil(folder)
        before = sorted(folder.rglob("*"))
        result = invoke(*arguments(folder))
        assert result.exit_code == 3
        assert match in result.stderr
        assert result.stderr.startswith("kifmerge: ")
        assert (result.stdout, sorted(folder.rglob("*"))) == ("", before)

    def test_overwrite(self, folder):
        (folder / "out").mkdir()
        (folder / "out/x").touch()
        assert invoke(*arguments(folder, "--overwrite")).exit_code == 0
        assert not (folder / "out/x").exists()

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_killed_midway_leaves_no_folder(self, folder, number):
        command = [sys.executable, "-c", KILLED, *map(str, arguments(folder))]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process:  # fmt: skip
            assert process.stdout.readline() == "fusing\n"
            time.sleep(0.3)
            process.send_signal(number)
            _, error = process.communicate()
        left = [path.name for path in folder.iterdir() if path.name not in given_names()]
        assert not (folder / "out").exists()
        if number == signal.SIGINT:
            assert (process.returncode, left) == (130, [])
            assert "interrupted" in error
        else:
            assert all(name.startswith(".unfinished-") for name in left)
        assert invoke(*arguments(folder)).exit_code == 0


class TestPrune:
    def test_mask_and_figures(self, folder):
        result = prune(folder, "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        figures = json.loads(result.stdout)
        assert (figures["num_parameters"], figures["fraction"]) == (650, 0.2)
        assert figures["num_important"] == 130
        assert {path.name for path in (folder / "new-mask").iterdir()} == {
            "mask.json", "mask.safetensors",
        }  # fmt: skip

    def test_pruned_checkpoint(self, folder):
        result = prune(folder, "--model", folder / "new", "--base", folder / "base")
        assert result.exit_code == 0
        found = folders.load(folder / "new-mask/checkpoint")
        base, new = (folders.load(folder / role) for role in ("base", "new"))
        kept = sum(int((found[name] != base[name]).sum()) for name in found)
        assert kept == 130
        assert all(((found[n] == base[n]) | (found[n] == new[n])).all() for n in found)

    def test_done_says_so(self, folder):
        first, again = prune(folder), prune(folder)
        assert (again.exit_code, again.stdout) == (0, first.stdout)
        assert "is already made" in again.stderr

    def test_dry_run(self, folder):
        result = prune(folder, "--dry-run", "--json")
        assert json.loads(result.stdout)["num_parameters"] == 650
        assert not (folder / "new-mask").exists()

    @pytest.mark.parametrize(
        "more",
        [["--model", "x"], ["--base", "x"], ["--unscored", "base"], ["--important-fraction", "2"]],
        ids=str,
    )
    def test_mistakes_of_usage_exit_with_2(self, folder, more):
        assert prune(folder, *more).exit_code == 2
        assert not (folder / "new-mask").exists()

    def test_missing_snapshot_exits_with_3(self, tmp_path):
        result = prune(tmp_path)
        assert result.exit_code == 3
        assert "holds no importance snapshot" in result.stderr


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def given_names():
    return {"base", "new", "historical", "new-importance", "historical-importance"}


def test_rules_of_the_command_are_those_of_the_table():
    assert set(typing.get_args(RuleName)) == {*RULES, "recurrent-average"}


def test_help_tells_the_defaults_of_the_loop():
    text = " ".join(invoke("merge", "--help").stdout.split())
    options = RecurrentOptions()
    weights = ",".join(map(str, options.shared_weights))
    for told in (
        f"{options.important_fraction} if not given",
        f"{weights} if not given",
        f"{options.temperature} if not given",
        "halved, the default, or left out" if options.redundant == "average" else "?",
        "One threshold over the whole model, the default" if options.scope == "global" else "?",
    ):
        assert told in text
    every = {field.name for field in dataclasses.fields(options)}
    assert {option for rule in RULES.values() for option in rule.options} <= every
