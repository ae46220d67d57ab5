"""The run folder: what it holds, who may touch it, and that it always ends with the same bytes."""

from __future__ import annotations

import json
import multiprocessing
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

from kifmerge.errors import DataError, RunError
from kifmerge.run import Trial, collect_report
from kifmerge.tensor.metrics import continual_metrics

COMMAND = Path(sys.executable).with_name("kifmerge")
CHECKPOINT_FILES = {
    "config.json",
    "kifmerge.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
SEQUENTIAL_LAST = Path("sequential/seed-0/02-sizes")
pytestmark = pytest.mark.slow  # whole trainings

_HOLD = """
import sys, filelock

with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    return synthetic.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(recipe_path, tmp_path_factory):
    """The folder of a finished run; copy it before changing anything."""
    out = tmp_path_factory.mktemp("finished") / "run"
    synthetic.run(recipe_path, out)
    return out


@pytest.fixture
def copied(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    return out


def changed(recipe_path: Path, **changes: object) -> Path:
    """The same recipe beside the first one, with other sections."""
    content = yaml.safe_load(recipe_path.read_text())
    path = recipe_path.with_name("changed.yaml")
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def with_third_task(recipe_path: Path, **changes: object) -> Path:
    tasks = yaml.safe_load(recipe_path.read_text())["tasks"]
    folder = recipe_path.parent
    for part in ("train", "test"):
        synthetic.write_rows(folder / f"sounds-{part}.jsonl", synthetic.rows("sounds", 12))
    added = {"name": "sounds", "train": "sounds-train.jsonl", "test": "sounds-test.jsonl"}
    return changed(recipe_path, tasks=[*tasks, {**added, **changes}])


def times(directory: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}


def stages(directory: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(directory)) for path in directory.rglob("stage.json"))


class TestFolder:
    def test_holds_what_is_documented(self, finished):
        assert stages(finished) == [
            "recurrent-kif/seed-0/02-sizes",
            "sequential/seed-0/02-sizes",
            "start/seed-0/00-before",
            "start/seed-0/01-colours",
        ]
        found = set(synthetic.files(finished))
        for stage in stages(finished):
            inside = {name.removeprefix(f"{stage}/") for name in found if name.startswith(stage)}
            expected = {f"checkpoint/{name}" for name in CHECKPOINT_FILES} | {
                "predictions/colours.jsonl",
                "predictions/sizes.jsonl",
                "stage.json",
            }
            assert inside - {"memory.jsonl"} == expected
            assert ("memory.jsonl" in inside) == ("00-before" not in stage)
        top = {name for name in found if "/" not in name}
        assert top >= {"recipe.yaml", "manifest.json", "report.md", "results.json", "metrics.csv"}

    def test_nothing_unfinished_is_left(self, finished):
        assert not list(finished.rglob(".unfinished-*"))

    def test_manifest_names_format_and_versions(self, finished):
        manifest = json.loads((finished / "manifest.json").read_text())
        assert (manifest["format"], manifest["version"]) == ("kifmerge.run", 1)
        assert {"kifmerge", "torch", "transformers"} <= set(manifest["packages"])

    def test_stage_records_its_training(self, finished):
        training = json.loads((finished / SEQUENTIAL_LAST / "stage.json").read_text())["training"]
        assert (training["num_steps"], training["num_outer_steps"]) == (6, 0)
        kif_stage = finished / "recurrent-kif/seed-0/02-sizes/stage.json"
        training = json.loads(kif_stage.read_text())["training"]
        assert (training["num_steps"], training["num_outer_steps"]) == (6, 3)
        assert [done["inner_steps"] for done in training["rounds"]] == [2, 2, 2]

    def test_memory_is_a_balanced_share_of_the_task(self, finished):
        # 24 rows, a fifth of them: 4, two of each label.
        for stage in ("start/seed-0/01-colours", SEQUENTIAL_LAST):
            lines = (finished / stage / "memory.jsonl").read_text().splitlines()
            outputs = [json.loads(line)["output"] for line in lines]
            assert len(outputs) == 4
            assert sorted(outputs.count(label) for label in set(outputs)) == [2, 2]

    def test_no_temporary_path_is_kept_in_the_recipe(self, finished, recipe_path):
        kept = yaml.safe_load((finished / "recipe.yaml").read_text())
        assert kept["tasks"][0]["train"] == str(recipe_path.parent / "colours-train.jsonl")


class TestReport:
    def test_matrix_has_a_row_before_training(self, finished):
        matrices = collect_report(finished).matrices
        assert set(matrices) == {"score", "own_labels_score"}
        for methods in matrices.values():
            assert set(methods) == {"sequential", "recurrent-kif"}
            for by_seed in methods.values():
                assert [len(row) for row in by_seed[0]] == [2, 2, 2]
                assert all(cell is not None for row in by_seed[0] for cell in row)

    def test_methods_share_their_first_two_rows(self, finished):
        scores = collect_report(finished).matrices["score"]
        assert scores["sequential"][0][:2] == scores["recurrent-kif"][0][:2]

    def test_scores_come_from_the_kept_predictions(self, copied):
        path = copied / SEQUENTIAL_LAST / "predictions/colours.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        synthetic.write_rows(path, [{**row, "prediction": row["reference"]} for row in rows])
        scores = collect_report(copied).matrices["score"]
        assert scores["sequential"][0][2][0] == 1.0

    def test_is_what_the_run_returned_and_wrote(self, recipe_path, finished):
        again = synthetic.run(recipe_path, finished, resume=True)
        assert again.as_dict() == collect_report(finished).as_dict()
        assert again.as_dict() == json.loads((finished / "results.json").read_text())

    def test_steps_count_inner_and_outer(self, finished):
        # 24 rows in batches of 4: 6 steps a task; recurrent: 3 outer steps more in the second.
        assert collect_report(finished).num_steps == {"sequential": 12, "recurrent-kif": 15}

    def test_unfinished_trial_is_left_out(self, copied):
        shutil.rmtree(copied / "recurrent-kif/seed-0/02-sizes")
        assert set(collect_report(copied).matrices["score"]) == {"sequential"}

    def test_folder_without_manifest_is_refused(self, tmp_path):
        with pytest.raises(RunError, match=r"is not a run folder: no manifest\.json"):
            collect_report(tmp_path)

    def test_newer_version_is_refused(self, copied):
        (copied / "manifest.json").write_text('{"format": "kifmerge.run", "version": 2}')
        with pytest.raises(RunError, match=r"expected format kifmerge\.run version 1, found .* 2"):
            collect_report(copied)


class TestMethods:
    @pytest.fixture(scope="class")
    def every_method(self, recipe_path, tmp_path_factory):
        out = tmp_path_factory.mktemp("methods") / "run"
        methods = [
            "sequential",
            "replay-mixed",
            "replay-interleaved",
            "recurrent-average",
            "recurrent-kif",
            "recurrent-kif-adaptive",
            "multitask",
        ]
        report = synthetic.run(recipe_path, out, [f"methods=[{', '.join(methods)}]"])
        return out, report

    def test_each_ends_with_weights_of_its_own(self, every_method):
        out, _ = every_method
        last = [
            path.read_bytes() for path in out.glob("*/seed-0/02-*/checkpoint/model.safetensors")
        ]
        assert len(last) == len(set(last)) == 7

    def test_steps_of_each(self, every_method):
        # Mixed: 28 rows, 7 steps in the second task. Interleaved ones: 6 and 3 outer.
        assert every_method[1].num_steps == {
            "sequential": 12,
            "replay-mixed": 13,
            "replay-interleaved": 15,
            "recurrent-average": 15,
            "recurrent-kif": 15,
            "recurrent-kif-adaptive": 15,
            "multitask": 12,
        }

    def test_multitask_has_a_last_row_only(self, every_method):
        matrix = every_method[1].matrices["score"]["multitask"][0]
        assert matrix[:2] == [[None, None], [None, None]]
        assert None not in matrix[2]
        metrics = continual_metrics(matrix)
        assert metrics.op is not None
        assert metrics.bwt is None

    def test_multitask_starts_from_the_untrained_model(self, every_method):
        out, _ = every_method
        assert stages(out / "multitask") == ["seed-0/02-all-tasks"]


class TestSameBytes:
    def test_two_runs_are_identical(self, recipe_path, finished, tmp_path):
        synthetic.run(recipe_path, tmp_path / "again")
        assert synthetic.weights(tmp_path / "again") == synthetic.weights(finished)
        for name in ("metrics.csv", "results.json", "report.md"):
            assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()

    def test_another_seed_gives_other_weights(self, recipe_path, finished, tmp_path):
        synthetic.run(recipe_path, tmp_path / "run", ["seeds=[1]"])
        ours = (tmp_path / "run/start/seed-1/base/model.safetensors").read_bytes()
        assert ours != (finished / "start/seed-0/base/model.safetensors").read_bytes()

    @pytest.mark.parametrize(
        "lost",
        [
            ["recurrent-kif/seed-0/02-sizes", "sequential/seed-0/02-sizes"],
            ["start/seed-0/01-colours"],
            ["sequential", "start"],
        ],
    )
    def test_lost_stages_are_made_again(self, recipe_path, finished, copied, lost):
        for folder in lost:
            shutil.rmtree(copied / folder)
        synthetic.run(recipe_path, copied, resume=True)
        assert synthetic.weights(copied) == synthetic.weights(finished)

    def test_resume_of_a_finished_run_touches_no_stage(self, recipe_path, copied):
        before = {folder: times(copied / folder) for folder in ("start", "sequential")}
        synthetic.run(recipe_path, copied, resume=True)
        assert before == {folder: times(copied / folder) for folder in before}

    def test_leftovers_of_a_killed_process_go(self, recipe_path, copied):
        leftover = copied / "sequential/seed-0/.unfinished-abc"
        (leftover / "02-sizes").mkdir(parents=True)
        synthetic.run(recipe_path, copied, resume=True)
        assert not leftover.exists()

    @pytest.mark.slow
    def test_trials_in_processes_of_their_own_are_the_same(self, recipe_path, finished, tmp_path):
        moments = []
        report = synthetic.run(
            recipe_path,
            tmp_path / "run",
            num_jobs=2,
            on_moment=lambda trial, moment: moments.append((trial, moment.task)),
        )
        assert synthetic.weights(tmp_path / "run") == synthetic.weights(finished)
        assert report.as_dict() == collect_report(finished).as_dict()
        assert (Trial("recurrent-kif", 0), "sizes") in moments

    @pytest.mark.slow
    def test_killed_command_resumes_to_the_same_bytes(self, recipe_path, finished, tmp_path):
        out = tmp_path / "run"
        command = [COMMAND, "run", recipe_path, "--out", out, "--quiet"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        first_stage = out / "start/seed-0/01-colours"
        deadline = time.monotonic() + 60
        while not first_stage.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert first_stage.exists()
        assert not (out / "report.md").exists()
        synthetic.run(recipe_path, out, resume=True)
        assert synthetic.weights(out) == synthetic.weights(finished)
        assert not list(out.rglob(".unfinished-*"))


@pytest.mark.slow
class TestExtension:
    def test_further_task_goes_on_from_the_finished_ones(self, recipe_path, copied):
        old = ("start/seed-0/00-before", "start/seed-0/01-colours", SEQUENTIAL_LAST)
        before = {folder: times(copied / folder) for folder in old}
        report = synthetic.run(with_third_task(recipe_path), copied, resume=True)
        for folder in old:
            now = times(copied / folder)
            assert {path: now[path] for path in before[folder]} == before[folder]
            added = {Path(path).name for path in now.keys() - before[folder].keys()}
            assert added == {"sounds.jsonl"}
        for method in ("sequential", "recurrent-kif"):
            matrix = report.matrices["score"][method][0]
            assert [len(row) for row in matrix] == [3, 3, 3, 3]
            assert all(cell is not None for row in matrix for cell in row)
            details = json.loads(
                (copied / method / "seed-0/03-sounds/checkpoint/kifmerge.json").read_text()
            )
            assert details["labels"] == ["cold", "warm", "large", "little", "loud", "soft"]

    def test_old_stages_keep_their_head(self, recipe_path, copied):
        synthetic.run(with_third_task(recipe_path), copied, resume=True)
        provenance = copied / SEQUENTIAL_LAST / "checkpoint/kifmerge.json"
        assert len(json.loads(provenance.read_text())["labels"]) == 4

    def test_stock_head_grows_and_trains(self, tmp_path):
        model = {**synthetic.MODEL, "pooling": "own"}
        recipe_path = synthetic.write_recipe(tmp_path, model=model)
        synthetic.run(recipe_path, tmp_path / "run")
        report = synthetic.run(with_third_task(recipe_path), tmp_path / "run", resume=True)
        assert None not in report.matrices["score"]["recurrent-kif"][0][3]

    def test_further_method_and_seed(self, recipe_path, copied):
        before = times(copied / "sequential")
        settings = ["methods=[sequential, recurrent-kif, multitask]", "seeds=[0, 1]"]
        report = synthetic.run(recipe_path, copied, settings, resume=True)
        assert times(copied / "sequential") == {
            **times(copied / "sequential/seed-1"),
            **before,
        }
        assert {m: set(s) for m, s in report.matrices["score"].items()} == {
            "sequential": {0, 1},
            "recurrent-kif": {0, 1},
            "multitask": {0, 1},
        }

    def test_bad_further_task_leaves_the_finished_ones(self, recipe_path, copied):
        bad = with_third_task(recipe_path, labels=["loud", "quiet"])
        before = synthetic.weights(copied)
        with pytest.raises(DataError, match=r"sounds-\w+\.jsonl:2: label 'soft' is not among"):
            synthetic.run(bad, copied, resume=True)
        assert synthetic.weights(copied) == before
        # The recipe that made what is there still goes on, or the bad task could never be mended.
        mended = with_third_task(recipe_path, labels=["loud", "soft"])
        assert synthetic.run(mended, copied, resume=True).task_names[-1] == "sounds"

    def test_lost_stages_on_both_sides_of_a_kept_one(self, tmp_path):
        recipe_path = synthetic.write_recipe(
            tmp_path, list(synthetic.TASKS), methods=["sequential"]
        )
        out = tmp_path / "run"
        synthetic.run(recipe_path, out)
        before = synthetic.weights(out)
        for stage in ("02-sizes", "04-tastes"):
            shutil.rmtree(out / "sequential/seed-0" / stage)
        synthetic.run(recipe_path, out, resume=True)
        assert synthetic.weights(out) == before


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"training": {"epochs": 2, "batch_size": 4}}, "training was"),
            ({"recurrent": {"preset": "paper"}}, "recurrent was"),
            ({"memory": {"fraction": 0.5}}, "memory was"),
            ({"model": {**synthetic.MODEL, "max_tokens": 8}}, "model was"),
        ],
    )
    def test_resume_under_another_recipe(self, recipe_path, copied, changes, key):
        before = synthetic.files(copied)
        with pytest.raises(RunError, match=f"run of another recipe:\n  - {key}"):
            synthetic.run(changed(recipe_path, **changes), copied, resume=True)
        assert synthetic.files(copied) == before

    def test_resume_with_other_first_tasks(self, recipe_path, copied):
        tasks = yaml.safe_load(recipe_path.read_text())["tasks"]
        for others in (tasks[::-1], tasks[:1]):
            with pytest.raises(RunError, match="tasks: finished ones may only be followed"):
                synthetic.run(changed(recipe_path, tasks=others), copied, resume=True)

    def test_finished_run_without_resume(self, recipe_path, copied):
        before = synthetic.files(copied)
        with pytest.raises(RunError, match="--resume goes on with it, --overwrite starts anew"):
            synthetic.run(recipe_path, copied)
        assert synthetic.files(copied) == before

    def test_overwrite_starts_anew(self, recipe_path, copied):
        (copied / "sequential/seed-7").mkdir()
        (copied / "note.txt").write_text("of the earlier run")
        synthetic.run(recipe_path, copied, ["seeds=[1]"], overwrite=True)
        assert not (copied / "note.txt").exists()
        assert sorted(p.name for p in (copied / "sequential").iterdir()) == ["seed-1"]

    @pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
    def test_folder_that_is_not_ours(self, recipe_path, tmp_path, options):
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos/summer.jpg").write_bytes(b"\xff\xd8")
        (tmp_path / "results.json").write_text("{}")
        before = synthetic.files(tmp_path)
        with pytest.raises(RunError, match="is not empty"):
            synthetic.run(recipe_path, tmp_path, **options)
        assert synthetic.files(tmp_path) == before

    @pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
    def test_manifest_of_another_program(self, recipe_path, tmp_path, options):
        (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
        (tmp_path / "icon.svg").write_text("<svg/>")
        before = synthetic.files(tmp_path)
        with pytest.raises(RunError):
            synthetic.run(recipe_path, tmp_path, **options)
        assert {k: v for k, v in synthetic.files(tmp_path).items() if k != ".lock"} == before

    @pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
    def test_output_that_is_a_file(self, recipe_path, tmp_path, options):
        path = tmp_path / "notes.txt"
        path.write_text("mine")
        with pytest.raises(RunError, match=r"notes\.txt"):
            synthetic.run(recipe_path, path, **options)
        assert path.read_text() == "mine"

    @pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
    def test_folder_in_use_by_another_process(self, recipe_path, copied, options):
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLD, copied / ".lock"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with holder:
            assert holder.stdout.readline() == b"held\n"
            before = synthetic.files(copied)
            with pytest.raises(RunError, match="is in use by another process"):
                synthetic.run(recipe_path, copied, **options)
            assert synthetic.files(copied) == before
        synthetic.run(recipe_path, copied, **options)

    def test_run_that_died_before_its_manifest_can_go_on(self, recipe_path, tmp_path):
        (tmp_path / ".lock").touch()
        synthetic.run(recipe_path, tmp_path, resume=True)

    @pytest.mark.slow
    @pytest.mark.timeout(30)
    def test_killed_worker_ends_the_run(self, recipe_path, tmp_path):
        def kill_a_worker(trial, moment):
            if trial.method == "sequential":
                for child in multiprocessing.active_children():
                    if child.name.startswith("SpawnProcess"):
                        os.kill(child.pid, signal.SIGKILL)

        with pytest.raises(Exception, match="process"):
            synthetic.run(recipe_path, tmp_path / "run", num_jobs=2, on_moment=kill_a_worker)
