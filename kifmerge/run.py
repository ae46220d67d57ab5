"""Running a recipe: the run folder, its lock and manifest, all methods and seeds, the report.

DIR/recipe.yaml          the recipe with every option resolved
DIR/manifest.json        format, versions, and at which commits references to the Hub were then
DIR/start/seed-S/        the stages that all methods share
DIR/METHOD/seed-S/       the stages of one method (see kifmerge.phases.sequence)
DIR/report.md, results.json, metrics.csv
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import yaml

from kifmerge.checkpoint.atomic import whole_file, write_json, write_text
from kifmerge.checkpoint.provenance import read_details
from kifmerge.errors import RunError, problem_list
from kifmerge.hub.client import Say, silent
from kifmerge.models.opening import bring
from kifmerge.models.origin import pinned
from kifmerge.models.tables import pinned_source
from kifmerge.phases.evaluate import read_predictions, score_predictions
from kifmerge.phases.plot import can_draw, draw_report
from kifmerge.phases.report import Report, as_csv, as_markdown
from kifmerge.phases.sequence import (
    STAGE_FILE,
    at_once_folder,
    method_stages,
    prediction_path,
    stage_folders,
)
from kifmerge.phases.tasks import Task, check_rows
from kifmerge.recipe import Recipe, parse_recipe, read_content
from kifmerge.tensor.metrics import Cell
from kifmerge.training.methods import METHODS
from kifmerge.training.train import refuse_process_group
from kifmerge.trials import START, OnMoment, Trial, run_trials

FORMAT = "kifmerge.run"
VERSION = 1
RECIPE_FILE = "recipe.yaml"
MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
_PACKAGES = ("kifmerge", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")

# A run that is resumed may have been given more of these.
_EXTENDABLE = ("tasks", "methods", "seeds")


def run_recipe(
    recipe: Recipe,
    out_dir: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    num_jobs: int = 1,
    on_moment: OnMoment = lambda trial, moment: None,
    say: Say = silent,
) -> Report:
    """Run all methods and seeds of a recipe and write the report.

    Args:
        recipe: what to run.
        out_dir: the run folder; new or empty, unless ``resume`` or ``overwrite``.
        resume: go on with an interrupted run, or with a finished one whose recipe was extended by
            tasks, methods or seeds. Finished stages are kept.
        overwrite: remove an earlier run in the folder first.
        num_jobs: trials at once, each in a process of its own with its share of the cores.
        on_moment: told where each trial is, from the calling process.
        say: told what is fetched from the Hub.

    What the recipe names on the Hub is pinned to a commit when the run begins, and stays there
    however often it is resumed.

    Raises:
        RunError: the folder is not empty, holds another recipe's run, or is in use.
        DataError, CheckpointError, TrainingError: see the phases; finished stages stay.
        TryAgainError: network or server failed.
    """
    refuse_process_group()
    out_dir = Path(out_dir)
    with _run_folder(recipe, out_dir, say, resume=resume, overwrite=overwrite) as chosen:
        bring(chosen.model, None, say)
        options = chosen.sequence()
        starts = [Trial(START, seed) for seed in recipe.seeds]
        trials = [Trial(method, seed) for seed in recipe.seeds for method in recipe.methods]
        for wave in (starts, trials):
            run_trials(wave, options, out_dir, num_jobs, on_moment)
        report = collect_report(out_dir)
        write_json(out_dir / "results.json", report.as_dict())
        write_text(out_dir / "metrics.csv", as_csv(report.metric_rows()))
        write_text(out_dir / "report.md", as_markdown(report))
        if can_draw():
            with whole_file(out_dir / "report.png") as temporary:
                draw_report(report, temporary)
    return report


def collect_report(run_dir: Path | str) -> Report:
    """Compute the report of a run folder from the predictions it keeps.

    Trials without their last stage are left out.

    Raises:
        RunError: not a run folder.
    """
    run_dir = Path(run_dir)
    recipe = _kept_recipe(run_dir)
    tasks = [Task(task) for task in recipe.tasks]
    matrices: dict[str, dict[str, dict[int, list[list[Cell]]]]] = {}
    num_steps: dict[str, int] = {}
    num_nonfinite: dict[str, int] = {}
    for method in recipe.methods:
        for seed in recipe.seeds:
            stages = _trial_stages(run_dir, Trial(method, seed), tasks)
            if stages[-1] is None or not (stages[-1] / STAGE_FILE).exists():
                continue
            for score, matrix in _matrices(stages, recipe).items():
                matrices.setdefault(score, {}).setdefault(method, {})[seed] = matrix
            done = [_training(stage) for stage in stages if stage is not None]
            steps = sum(t["num_steps"] + t["num_outer_steps"] for t in done if t)
            num_steps.setdefault(method, steps)
            num_nonfinite.setdefault(method, 0)
            num_nonfinite[method] += sum(t["num_nonfinite_steps"] for t in done if t)
    return Report(recipe.name, [t.name for t in tasks], matrices, num_steps, num_nonfinite)


def run_status(run_dir: Path | str) -> dict[str, Any]:
    """What a run folder is about and how far it is, as plain JSON values.

    Returns:
        Name, tasks, methods and seeds of the recipe, the versions that ran it and, trial by trial
        (the stages that all methods share first), which stages are finished and which missing.

    Raises:
        RunError: not a run folder, or one of a newer version.
        CheckpointError: a damaged manifest.
    """
    run_dir = Path(run_dir)
    recipe = _kept_recipe(run_dir)
    manifest = read_details(run_dir / MANIFEST_FILE)
    tasks = [Task(task) for task in recipe.tasks]
    stages: dict[Trial, list[Path]] = {}
    for seed in recipe.seeds:
        start = stages[Trial(START, seed)] = stage_folders(
            run_dir / Trial(START, seed).folder, tasks[:1]
        )
        for method in recipe.methods:
            trial = Trial(method, seed)
            folders = _trial_stages(run_dir, trial, tasks)
            stages[trial] = [f for f in folders if f is not None and f not in start]
    return {
        "name": recipe.name,
        "tasks": [task.name for task in tasks],
        "methods": list(recipe.methods),
        "seeds": list(recipe.seeds),
        "versions": {"python": manifest.get("python"), **manifest.get("packages", {})},
        "trials": [
            {
                "method": trial.method,
                "seed": trial.seed,
                "finished": [f.name for f in folders if (f / STAGE_FILE).exists()],
                "missing": [f.name for f in folders if not (f / STAGE_FILE).exists()],
            }
            for trial, folders in stages.items()
        ],
    }


def _trial_stages(run_dir: Path, trial: Trial, tasks: Sequence[Task]) -> list[Path | None]:
    """Folders of stages 0..T; None where the method has no such stage."""
    folder = run_dir / trial.folder
    if METHODS[trial.method].at_once:
        return [None] * len(tasks) + [at_once_folder(folder, tasks)]
    start_dir = run_dir / Trial(START, trial.seed).folder
    return list(method_stages(start_dir, folder, tasks, METHODS[trial.method]))


def _matrices(stages: Sequence[Path | None], recipe: Recipe) -> dict[str, list[list[Cell]]]:
    rows = [
        [_cell_scores(stage, task.name, task.metric) for task in recipe.tasks] for stage in stages
    ]
    names = {name: None for row in rows for scores in row for name in scores}
    return {name: [[scores.get(name) for scores in row] for row in rows] for name in names}


def _cell_scores(stage: Path | None, task_name: str, metric: Any) -> dict[str, float]:
    path = prediction_path(stage, task_name) if stage is not None else None
    if path is None or not path.exists():
        return {}
    return score_predictions(read_predictions(path), metric)


def _training(stage: Path) -> dict[str, Any] | None:
    """What training did at a stage; None before any."""
    record: dict[str, Any] | None = _read_json(stage / STAGE_FILE).get("training")
    return record


@contextlib.contextmanager
def _run_folder(
    recipe: Recipe, out_dir: Path, say: Say, *, resume: bool, overwrite: bool
) -> Iterator[Recipe]:
    """Lock the folder, check that it may be used, and write recipe and manifest into it.

    Yields the recipe with all references pinned. If the body fails before a single stage is
    finished, the folder is left empty.
    """
    is_run = _is_run(out_dir)
    if _is_occupied(out_dir) and not is_run:
        raise RunError(f"{out_dir} is not empty and holds no run of ours: choose another folder")
    if is_run and not (resume or overwrite):
        raise RunError(f"{out_dir} is not empty: --resume goes on with it, --overwrite starts anew")
    with _locked(out_dir):
        kept = _kept_recipe(out_dir) if is_run and not overwrite else None
        pins: dict[str, str] = {}
        if kept is not None:
            pins |= read_details(out_dir / MANIFEST_FILE).get("references", {})
        recipe = _pinned(recipe, pins, say)
        if kept is not None:
            _check_extension(kept, recipe, out_dir)
        # A mistake in the last task's rows should not show after hours of training on the first.
        known = {task.name for task in kept.tasks} if kept is not None else set()
        try:
            check_rows([t for t in recipe.tasks if t.name not in known], recipe.model.kind)
            if overwrite:
                _empty(out_dir)
            write_text(out_dir / RECIPE_FILE, yaml.safe_dump(recipe.as_dict(), sort_keys=False))
            write_json(out_dir / MANIFEST_FILE, _manifest(pins))
            yield recipe
        except BaseException:
            if not any(out_dir.rglob(STAGE_FILE)):
                _empty(out_dir)
            raise


def _pinned(recipe: Recipe, pins: dict[str, str], say: Say) -> Recipe:
    """The recipe with everything on the Hub at a commit.

    Args:
        recipe: as it was given.
        pins: reference as given -> pinned: those in it are not looked up, new ones are added.
        say: told of waits.
    """

    def pin(text: str, look_up: Callable[[str, Say], str] = pinned) -> str:
        if text not in pins:
            found = look_up(text, say)
            if found == text:
                return text
            pins[text] = found
        return pins[text]

    model = recipe.model
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            model,
            reference=None if model.reference is None else pin(model.reference),
            tokenizer=pin(model.tokenizer) if isinstance(model.tokenizer, str) else model.tokenizer,
        ),
        tasks=[
            dataclasses.replace(
                task, train=pin(task.train, pinned_source), test=pin(task.test, pinned_source)
            )
            for task in recipe.tasks
        ],
    )


def _is_occupied(out_dir: Path) -> bool:
    """Whether there is anything in the folder but what a run leaves that was killed at once."""
    if out_dir.exists() and not out_dir.is_dir():
        raise RunError(f"{out_dir} is a file: expected a folder, or nothing yet")
    passing = (LOCK_FILE, RECIPE_FILE)
    return out_dir.exists() and any(entry.name not in passing for entry in out_dir.iterdir())


def _is_run(out_dir: Path) -> bool:
    try:
        return _read_json(out_dir / MANIFEST_FILE).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def _locked(out_dir: Path) -> Iterator[None]:
    """Keep other processes out of the folder."""
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out_dir / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RunError(f"{out_dir} is in use by another process") from None
    try:
        yield
    finally:
        lock.release()


def _empty(out_dir: Path) -> None:
    for entry in out_dir.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK_FILE:
            entry.unlink()


def _manifest(pins: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "references": dict(pins),
    }


def _kept_recipe(run_dir: Path) -> Recipe:
    manifest_path, recipe_path = run_dir / MANIFEST_FILE, run_dir / RECIPE_FILE
    if not manifest_path.exists() or not recipe_path.exists():
        raise RunError(f"{run_dir} is not a run folder: no {MANIFEST_FILE}")
    manifest = read_details(manifest_path)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise RunError(
            f"{manifest_path}: expected format {FORMAT} version {VERSION}, "
            f"found {manifest.get('format')} version {manifest.get('version')}"
        )
    return parse_recipe({**read_content(recipe_path), "data_dir": None}, str(recipe_path))


def _check_extension(old: Recipe, new: Recipe, out_dir: Path) -> None:
    """Refuse a resume under a recipe that would have made the finished stages differently."""
    before, after = old.as_dict(), new.as_dict()
    problems = [
        f"{key} was {before[key]!r} and is now {after[key]!r}"
        for key in before
        if key not in (*_EXTENDABLE, "data_dir", "name") and before[key] != after[key]
    ]
    if after["tasks"][: len(before["tasks"])] != before["tasks"]:
        problems.append("tasks: finished ones may only be followed by further ones")
    if problems:
        raise RunError(problem_list(f"{out_dir} holds a run of another recipe", problems))


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
