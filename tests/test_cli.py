"""The command line: exit codes, which stream holds what, and help without heavy libraries."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import synthetic
import yaml
from typer.testing import CliRunner

from kifmerge.cli import app

COMMAND = Path(sys.executable).with_name("kifmerge")
COMMANDS = (
    "demo", "run", "report", "train", "replay", "importance", "memory", "group", "prune",
    "merge", "evaluate", "inspect", "diff", "verify", "pull", "push",
)  # fmt: skip
HEAVY = ("torch", "transformers", "pydantic", "numpy", "safetensors", "rich.progress", "yaml")


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    return synthetic.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(recipe_path, tmp_path_factory):
    """What a whole command did: its run folder and its result; copy it before changing it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, invoke("run", recipe_path, "--out", out)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def command(*arguments, **options):
    return subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def error_lines(result) -> list[str]:
    """Lines of stderr, which must be a message and no traceback."""
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()


class TestHelp:
    @pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
    def test_answers_without_heavy_libraries(self, arguments):
        # For a command's own help Typer loads pydantic by itself.
        heavy = [name for name in HEAVY if name != "pydantic" or "run" not in arguments]
        program = (
            "import sys\n"
            "from kifmerge.cli import main\n"
            f"sys.argv = ['kifmerge', *{arguments}]\n"
            "try:\n    main()\n"
            "except SystemExit as end:\n    assert not end.code\n"
            f"print('loaded:', *(name for name in {heavy} if name in sys.modules))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1].strip() == "loaded:"

    def test_lists_every_command(self):
        result = invoke("--help")
        assert result.exit_code == 0
        for name in COMMANDS:
            assert f"\n  {name} " in result.stdout

    @pytest.mark.parametrize("name", COMMANDS)
    def test_of_every_command_and_option(self, name):
        result = invoke(name, "--help")
        assert result.exit_code == 0
        for option in ("--json", "--help"):
            assert option in result.stdout
        lines = result.stdout.splitlines()
        for number, line in enumerate(lines):
            if line.strip().startswith("--"):
                described = len(line.split("  ")) > 2 or lines[number + 1].startswith(" " * 10)
                assert described, line

    def test_is_shown_where_nothing_is_asked(self):
        result = invoke()
        assert result.exit_code == 2
        assert "Usage" in result.output

    def test_version_of_the_module_and_of_the_command(self):
        module = subprocess.run(
            [sys.executable, "-m", "kifmerge", "--version"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert module.stdout.startswith("kifmerge 0.")
        assert command("--version").stdout == module.stdout


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["teach"],
            ["run"],
            ["run", "recipe.yaml"],
            ["run", "recipe.yaml", "--out", "x", "--jobs", "0"],
            ["run", "recipe.yaml", "--out", "x", "--recipe"],
            ["demo", "--seed", "one"],
            ["report"],
        ],
    )
    def test_mistakes_exit_with_2(self, arguments):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "Usage" in result.stderr


class TestRun:
    def test_prints_tables_and_where_the_report_is(self, finished):
        out, result = finished
        assert result.exit_code == 0
        assert "Metrics in %" in result.stdout
        assert "recurrent-kif" in result.stdout
        assert f"report: {out}/report.md" in result.stderr
        assert "recurrent-kif seed 0: training sizes, 6 done" in result.stderr

    def test_report_prints_the_same(self, finished):
        out, result = finished
        again = invoke("report", out)
        assert (again.exit_code, again.stdout, again.stderr) == (0, result.stdout, "")

    def test_json_is_all_there_is_on_stdout(self, finished):
        out, _ = finished
        result = invoke("report", out, "--json")
        assert json.loads(result.stdout) == json.loads((out / "results.json").read_text())

    @pytest.mark.slow
    def test_json_and_quiet_of_the_installed_command(self, finished, recipe_path, tmp_path):
        out = tmp_path / "run"
        shutil.copytree(finished[0], out)
        shutil.rmtree(out / "sequential")
        done = command("run", recipe_path, "--out", out, "--resume", "--json", "--quiet")
        assert (done.returncode, done.stderr) == (0, "")
        content = json.loads(done.stdout)
        assert content["format"] == "kifmerge.report"
        assert content == json.loads((finished[0] / "results.json").read_text())

    @pytest.mark.slow
    def test_bracketed_names_are_shown_as_they_are(self, recipe_path, tmp_path):
        out = tmp_path / "[bold]run[" / "[/a]"
        content = yaml.safe_load(recipe_path.read_text())
        tasks = [{**task, "name": f"[red]{task['name']}"} for task in content["tasks"]]
        path = recipe_path.with_name("bracketed.yaml")
        path.write_text(yaml.safe_dump({**content, "tasks": tasks, "methods": ["sequential"]}))
        result = invoke("run", path, "--out", out)
        assert result.exit_code == 0, result.output
        assert "[red]colours" in result.stdout
        assert f"report: {out}/report.md" in result.stderr
        assert "training [red]sizes" in result.stderr

    @pytest.mark.parametrize("more", [[], ["--json"]])
    def test_dry_run_prints_the_recipe_and_writes_nothing(self, recipe_path, tmp_path, more):
        out = tmp_path / "run"
        result = invoke(
            "run", recipe_path, "--out", out, "--dry-run", "--set", "seeds=[0, 4]", *more
        )
        assert result.exit_code == 0
        assert yaml.safe_load(result.stdout)["seeds"] == [0, 4]
        assert list(tmp_path.iterdir()) == []
        if more:
            assert json.loads(result.stdout)["recurrent"]["inner_steps"] == 2


class TestErrors:
    def test_recipe(self, recipe_path, tmp_path):
        result = invoke("run", recipe_path, "--out", tmp_path / "run", "--set", "trainig.epochs=1")
        assert result.exit_code == 3
        assert result.stdout == ""
        assert error_lines(result) == [
            f"kifmerge: the recipe {recipe_path} cannot be used:",
            "  - trainig: unknown key: did you mean training?",
        ]
        assert list(tmp_path.iterdir()) == []

    def test_missing_recipe_is_one_line(self, tmp_path):
        result = invoke("run", tmp_path / "none.yaml", "--out", tmp_path / "run")
        assert result.exit_code == 3
        assert error_lines(result) == [
            f"kifmerge: cannot read the recipe {tmp_path}/none.yaml: No such file or directory"
        ]

    def test_folder_in_the_way(self, finished, recipe_path):
        out, _ = finished
        result = invoke("run", recipe_path, "--out", out, "--quiet")
        assert result.exit_code == 3
        assert error_lines(result) == [
            f"kifmerge: {out} is not empty: --resume goes on with it, --overwrite starts anew"
        ]

    def test_report_of_no_run(self, tmp_path):
        result = invoke("report", tmp_path)
        assert result.exit_code == 3
        assert error_lines(result) == [
            f"kifmerge: {tmp_path} is not a run folder: no manifest.json"
        ]

    @pytest.mark.slow
    def test_bad_row_of_the_installed_command(self, recipe_path, tmp_path):
        bad = synthetic.write_rows(tmp_path / "bad.jsonl", [{"text": "a", "label": "x"}, "{"])
        done = command(
            "run", recipe_path, "--out", tmp_path / "run", "--set", f"tasks.1.train={bad}"
        )
        assert (done.returncode, done.stdout) == (3, "")
        lines = error_lines(done)
        assert lines[0] == f"kifmerge: cannot read {bad}:"
        assert lines[1].startswith(f"  - {bad}:2: invalid JSON")
        assert len(lines) == 2

    @pytest.mark.parametrize(
        ("setting", "words"),
        [
            ("tasks.1.test=none.jsonl", "none.jsonl: no such file"),
            ("tasks.0.labels=[warm]", "label 'cold' is not among the declared: warm"),
            ("model.config.model_type=brt", "brt"),
            ("model.config.num_attention_heads=3", "3"),
            ("model.tokenizer=none/such", "none/such"),
            ("model={kind: classifier, reference: none/such}", "none/such"),
            (
                "model.lora={targets: [q_proj]}",
                "LoRA targets ['q_proj'] match no module",
            ),
        ],
    )
    def test_what_the_user_can_mend(self, recipe_path, tmp_path, setting, words):
        out = tmp_path / "run"
        result = invoke("run", recipe_path, "--out", out, "--quiet", "--set", setting)
        assert (result.exit_code, result.stdout) == (3, ""), result.exception
        assert any(words in line for line in error_lines(result))
        # Nothing half-made: what is there is whole, so that mending and running again is all.
        assert not list(out.rglob(".unfinished-*"))
        assert not list(out.rglob("stage.json"))

    @pytest.mark.slow
    def test_mended_recipe_runs_in_the_folder_that_its_mistake_left(self, recipe_path, tmp_path):
        out = tmp_path / "run"
        first = invoke("run", recipe_path, "--out", out, "--set", "tasks.1.test=none.jsonl")
        assert first.exit_code == 3
        again = invoke("run", recipe_path, "--out", out)
        assert again.exit_code == 0, again.stderr

    def test_resume_and_overwrite_contradict(self, finished, recipe_path, tmp_path):
        out = tmp_path / "run"
        shutil.copytree(finished[0], out)
        before = synthetic.files(out)
        result = invoke("run", recipe_path, "--out", out, "--resume", "--overwrite")
        assert result.exit_code in (2, 3)
        assert synthetic.files(out) == before

    def test_our_bugs_keep_their_traceback(self, monkeypatch, tmp_path):
        def broken(run_dir):
            raise ZeroDivisionError("a bug of ours")

        monkeypatch.setattr("kifmerge.run.collect_report", broken)
        result = invoke("report", tmp_path)
        assert result.exit_code == 1
        assert isinstance(result.exception, ZeroDivisionError)


class TestInterrupt:
    def test_in_process(self, monkeypatch, tmp_path):
        def interrupted(run_dir):
            raise KeyboardInterrupt

        monkeypatch.setattr("kifmerge.run.collect_report", interrupted)
        result = invoke("report", tmp_path)
        assert result.exit_code == 130
        assert error_lines(result) == ["kifmerge: interrupted; finished stages are kept"]

    @pytest.mark.slow
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_of_the_installed_command_keeps_finished_stages(self, recipe_path, tmp_path, jobs):
        out = tmp_path / "run"
        settings = ("--quiet", "--set", "training.epochs=10")
        process = subprocess.Popen(
            [COMMAND, "run", recipe_path, "--out", out, "--jobs", str(jobs), *settings],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 60
        while not (out / "sequential").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (130, "")
        assert stderr == "kifmerge: interrupted; finished stages are kept\n"
        assert (out / "start/seed-0/01-colours/stage.json").exists()
        assert not list(out.rglob(".unfinished-*"))


@pytest.mark.parametrize("choice", ["skip", "raise"])
def test_nonfinite_gradients_have_an_option_of_their_own(recipe_path, tmp_path, choice):
    arguments = ("run", recipe_path, "--out", tmp_path / "run", "--nonfinite", choice)
    result = invoke(*arguments, "--dry-run", "--json")
    assert json.loads(result.stdout)["recurrent"]["nonfinite"] == choice


def test_nonfinite_choice_that_does_not_exist_is_refused(recipe_path, tmp_path):
    result = invoke("run", recipe_path, "--out", tmp_path / "run", "--nonfinite", "ignore")
    assert result.exit_code == 3
    assert "recurrent.nonfinite" in result.stderr
