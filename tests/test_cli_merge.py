"""The merge command: exit codes, streams, and what is refused."""

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
import merges
import pytest
import synthetic
import torch
from typer.testing import CliRunner

from kifmerge.checkpoint.snapshot import write_snapshot
from kifmerge.cli import app
from kifmerge.cli.merge import RuleName
from kifmerge.fusion.rules import RULES, FusionOptions
from kifmerge.training.presets import KifOptions, RecurrentOptions

SHAPES = {"a.weight": (30, 20), "b.weight": (50,)}
LAYERED = {
    "h.0.a.weight": (30, 20), "h.0.b.weight": (5,), "h.1.a.weight": (9,), "h.1.b.weight": (5, 4),
    "h.2.a.weight": (4,), "head.weight": (7,),
}  # fmt: skip
KILLED = """
import os, sys
from kifmerge.cli import app
from kifmerge.fusion import fuse
from kifmerge.phases import merge_plan
import time

merge_plan.CPU_PIECE_BYTES, merge_plan.LEAST_PIECE_BYTES = 64, 1
split = fuse.split_piece


def slowly(*arguments):
    os.write(1, b"fusing\\n")  # at once: workers write at the same time
    time.sleep(2)
    return split(*arguments)


fuse.split_piece = slowly
sys.argv = ["kifmerge", *sys.argv[1:]]
app()
"""


@pytest.fixture
def folder(tmp_path):
    merges.Files(tmp_path).write(shapes=SHAPES)
    return tmp_path


def arguments(folder, *more, rule="recurrent-kif", evidence="importance", out="out"):
    roles = [x for role in ("base", *merges.TWO) for x in (f"--{role}", folder / role)]
    sides = merges.TWO if evidence else ()
    given = [x for s in sides for x in (f"--{s}-{evidence}", folder / f"{s}-{evidence}")]
    return ["merge", "--rule", rule, *roles, *given, "--out", folder / out, *more]


def invoke(*given):
    return CliRunner().invoke(app, [str(argument) for argument in given])


def spoken(result):
    """What it says on stderr, in one line and without frames."""
    return " ".join(result.stderr.replace("\u2502", " ").split())


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
        assert plan["read_bytes"] == 3 * 4 * 650 + 3 * 2 * 8 * 650
        assert (plan["weight_passes"], plan["importance_passes"]) == (1, 3)
        assert (plan["num_models"], plan["num_files"]) == (2, 1)
        assert plan["peak_memory_bytes"] > 50_000_000
        assert sorted(folder.iterdir()) == before

    def test_dry_run_estimates_the_time(self, folder):
        rates = ["--disk-rate", "10KB/s", "--network-rate", "1 MB"]
        plan = json.loads(invoke(*arguments(folder, "--dry-run", "--json", *rates)).stdout)
        seconds = round((plan["read_bytes"] + plan["write_bytes"]) / 10_000)
        assert plan["estimate"]["seconds"] == plan["estimate"]["disk_seconds"] == seconds > 1
        shown = invoke(*arguments(folder, "--dry-run", *rates)).stdout
        assert f"\nestimate:\n  time: {seconds} s\n" in shown
        assert "nothing cached" in shown
        assert "estimate" not in invoke(*arguments(folder, "--dry-run")).stdout

    @pytest.mark.parametrize(
        ("more", "told"),
        [
            (["--dry-run", "--disk-rate", "fast"], "--disk-rate: 'fast' is no size"),
            (["--dry-run", "--network-rate", "0MB"], "--network-rate: '0MB' is no size"),
            (["--disk-rate", "1MB"], "--disk-rate: only --dry-run estimates"),
        ],
    )
    def test_rates_that_are_none(self, folder, more, told):
        result = invoke(*arguments(folder, *more))
        assert result.exit_code == 2
        assert told in " ".join(result.stderr.split())
        assert not (folder / "out").exists()

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
            (["--important-fraction", "1"], "kif"),
            (["--shared-weights", "0.9,0.1"], "kif"),
            (["--unit", "layer"], "kif-adaptive"),
            (["--temperature", "0.01"], "kif-adaptive"),
            (["--historical-parent", "new"], "average"),
            (["--weight", "1", "--weight", "3"], "linear"),
            (["--no-normalise"], "linear"),
            (["--weight", "1", "--weight", "-1"], "task-arithmetic"),
            (["--scale", "0.5"], "task-arithmetic"),
            (["--density", "0.7"], "ties"),
            (["--scope", "tensor"], "ties"),
            (["--scale", "0.5"], "magmax"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else value,
    )
    def test_every_option_matters(self, folder, more, rule):
        merges.Files(folder).write(shapes=LAYERED)
        for seed, side in enumerate(merges.TWO):
            scores = folders.random_tensors(seed, LAYERED)
            kept = {f"score/{n}": t.abs() + (n == "head.weight") for n, t in scores.items()}
            write_snapshot(folder / f"{side}-importance", kept, {})
        given = {"rule": rule, "evidence": "importance" if "kif" in rule else None}
        assert invoke(*arguments(folder, **given)).exit_code == 0
        assert invoke(*arguments(folder, *more, **given, out="other")).exit_code == 0
        first, other = (folders.load(folder / out) for out in ("out", "other"))
        assert not merges.same_bits(first, other)

    @pytest.mark.parametrize("more", [["--workers", "1"], ["--workers", "3"], ["--quiet"]], ids=str)
    def test_other_options_change_nothing(self, folder, more):
        for out, options in (("one", []), ("two", more)):
            assert invoke(*arguments(folder, *options, out=out)).exit_code == 0
        assert synthetic.files(folder / "one") == synthetic.files(folder / "two")

    def test_masks_instead_of_snapshots(self, folder):
        for side in merges.TWO:
            importance, mask = (folder / f"{side}-{kind}" for kind in ("importance", "mask"))
            assert invoke("prune", "--importance", importance, "--out", mask).exit_code == 0
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
            ([], "recurrent-kif", None, "takes importance snapshots of all models"),
            ([], "average", "importance", "average takes no importance"),
            ([], "linear", "mask", "linear takes no importance"),
            ([], "recurrent-kif-adaptive", "mask", "takes importance snapshots"),
            ([], "kif", None, "kif takes units of both sides, or importance snapshots or masks"),
            ([], "slerp", "importance", "--rule"),
            (["--temperature", "1"], "recurrent-kif", "importance", "--temperature means nothing"),
            (["--redundant", "drop"], "average", None, "--redundant means nothing to average"),
            (["--density", "0.5"], "magmax", None, "--density means nothing to magmax"),
            (["--weight", "1", "--weight", "1"], "magmax", None, "--weight means nothing"),
            (["--scope", "tensor"], "recurrent-kif", "mask", "--scope means nothing beside masks"),
            (["--scope", "tensor"], "recurrent-kif", "units", "nothing beside units"),
            (["--unit", "layer"], "kif", "units", "--unit goes with importance snapshots"),
            (["--shared-weights", "1"], "recurrent-kif", "importance", "expected two numbers"),
            (["--shared-weights", "a,b"], "recurrent-kif", "importance", "expected two numbers"),
            (["--shared-weights", "nan,1"], "recurrent-kif", "importance", "must be two numbers"),
            (["--shared-weights", "1,1"], "kif", "importance", "must add up to 1"),
            (["--weight", "1"], "recurrent-kif", "importance", "give --shared-weights"),
            (["--weight", "1"], "linear", None, "one weight for each of 2 models, found 1"),
            (["--weight", "1", "--weight", "-1"], "linear", None, "must not add up to 0"),
            (["--weight", "1", "--weight", "nan"], "ties", None, "must be finite numbers"),
            (["--scale", "inf"], "magmax", None, "scale must be finite"),
            (["--temperature", "0"], "recurrent-kif-adaptive", "importance", "must be positive"),
            (["--important-fraction", "1.5"], "recurrent-kif", "importance", "less than or equal"),
            (["--unscored", "historical"], "recurrent-kif", "importance", "--unscored"),
            (["--historical-parent", "new"], "linear", None, "under a rule on task vectors"),
            (["--space", "weight"], "recurrent-kif", "importance", "--space"),
            (["--model", "x"], "recurrent-kif", "importance", "--model goes alone"),
            (["--importance", "x"], "recurrent-kif", None, "--importance goes with --model"),
            (["--dtype", "float64"], "average", None, "--dtype"),
            (["--shard-size", "5 shoes"], "average", None, "'5 shoes' is no size"),
            (["--shard-size", "0"], "average", None, "expected at least one byte"),
            (["--allow", "shapes"], "average", None, "--allow shapes: expected one of config"),
            (["--nonfinite", "drop"], "average", None, "--nonfinite"),
            (["--workers", "0"], "average", None, "--workers"),
        ],
    )  # fmt: skip
    def test_mistakes_of_usage_exit_with_2(self, folder, more, rule, evidence, match):
        result = invoke(*arguments(folder, *more, rule=rule, evidence=evidence))
        assert result.exit_code == 2
        assert match in spoken(result)
        assert result.stdout == ""
        assert not (folder / "out").exists()

    @pytest.mark.parametrize(
        ("left_out", "match"),
        [
            ("--rule", "give --rule, or the kifmerge.json"),
            ("--base", "recurrent-kif works on task vectors: it takes a base"),
            ("--new", "give --new and --historical, or --model once for each"),
            ("--historical", "give --new and --historical"),
            ("--new-importance", "found historical importance"),
            ("--out", "Missing option '--out'"),
        ],
    )
    def test_what_is_missing_exits_with_2(self, folder, left_out, match):
        words = arguments(folder)
        place = words.index(left_out)
        result = invoke(*words[:place], *words[place + 2 :])
        assert result.exit_code == 2
        assert match in spoken(result)

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

    @pytest.mark.slow
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
            assert left == [".out.unfinished"]
        assert invoke(*arguments(folder)).exit_code == 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def given_names():
    return {"base", *merges.TWO, *(f"{side}-importance" for side in merges.TWO)}


def test_rules_of_the_command_are_those_of_the_table():
    assert set(typing.get_args(RuleName)) == {*RULES, "recurrent-average"}


def test_help_tells_the_defaults():
    text = " ".join(invoke("merge", "--help").stdout.split())
    options = FusionOptions()
    weights, kif_weights = (
        ",".join(map(str, of.shared_weights)) for of in (RecurrentOptions(), KifOptions())
    )
    for told in (
        f"{options.important_fraction} if not given",
        f"{weights}, or {kif_weights} under kif",
        f"{options.temperature} if not given",
        f"{options.scale:g} if not given",
        f"that ties keeps; {options.density}",
        "averaged, the default, or left out" if options.redundant == "average" else "?",
        "One threshold over the whole model, the default" if options.scope == "global" else "?",
        "Divide by the sum of the weights: linear does" if options.normalise else "?",
    ):
        assert told in text, told


def test_each_option_of_the_rules_is_one_of_the_command():
    every = {option for rule in RULES.values() for option in rule.options}
    assert every <= {field.name for field in dataclasses.fields(FusionOptions)}
    text = invoke("merge", "--help").stdout
    for option in every:
        flag = "--weight " if option == "weights" else f"--{option.replace('_', '-')} "
        assert flag in text, flag
