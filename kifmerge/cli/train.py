"""Commands that train: train (inner steps on a new task) and replay (outer steps on memory)."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kifmerge.cli.options import (
    AdapterOption,
    ColumnsOption,
    DryRunOption,
    JsonOption,
    ModelOption,
    QuietOption,
    ReplaceOption,
    RowsOption,
    SettingsOption,
    column_templates,
)
from kifmerge.cli.output import print_mapping

if TYPE_CHECKING:
    from kifmerge.display import ProgressDisplay
    from kifmerge.phases.chain import ChainStep
    from kifmerge.training.steps import PhaseRecord

OutOption = Annotated[Path, typer.Option("--out", help="Folder to make.")]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", help="Recipe whose options are taken: see kifmerge run.")
]
StateOption = Annotated[
    Path | None, typer.Option("--state", help="State that the step before left: OUT/state.")
]
SeedOption = Annotated[
    int | None, typer.Option(help="Of row order, dropout, memory batches; the state's, or 0.")
]


def train(
    model: ModelOption,
    data: Annotated[str, typer.Option(help="Rows of the new task.")],
    out: OutOption,
    adapter: AdapterOption = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps to make now; all that are left if not given.")
    ] = None,
    total_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the whole task, instead of its epochs.")
    ] = None,
    state: StateOption = None,
    recipe: RecipeOption = None,
    settings: SettingsOption = None,
    seed: SeedOption = None,
    initial_seed: Annotated[
        int | None, typer.Option(help="Of a fresh adapter or head; the seed if not given.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Label that the head covers; those met are added.")
    ] = None,
    kif: Annotated[
        bool, typer.Option("--kif", help="Train and score the whole task as KIF does: kif.*.")
    ] = False,
    only_units: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            help="Train only skill units important to earlier tasks (KIF-M, a reconstruction).",
        ),
    ] = None,
    columns: ColumnsOption = None,
    num_rows: RowsOption = None,
    overwrite: ReplaceOption = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train on a new task, or some steps of it: makes checkpoint, importance snapshot, state."""
    if kif and only_units is not None:
        raise typer.BadParameter("--kif scores a task, --only-units goes over memory: choose one")
    from kifmerge.display import ProgressDisplay
    from kifmerge.models.data import labels_met
    from kifmerge.phases.chain import train_into

    display = ProgressDisplay(quiet=quiet)
    extra = [] if total_steps is None else [f"training.max_steps={total_steps}"]
    task = {"train": data, "columns": column_templates(columns) or None, "train_rows": num_rows}
    step, examples = _step(
        model, adapter, task, state, recipe, [*(settings or []), *extra], display.say,
        kif=kif, only_units=only_units, seed=seed, initial_seed=initial_seed, num_steps=steps,
    )  # fmt: skip
    if step.model.kind == "classifier":
        labels = list(dict.fromkeys([*(label or []), *sorted(labels_met(examples))]))
        step = dataclasses.replace(step, labels=labels)
    if dry_run:
        print_mapping(step.made_by("train"), json_output=json_output)
        return
    with display:
        record, made_now = train_into(
            out,
            step,
            examples,
            overwrite=overwrite,
            on_progress=functools.partial(display.on_step, "training"),
            say=display.say,
        )
        _finish(display, out, record, made_now, json_output=json_output)


def replay(
    model: ModelOption,
    memory: Annotated[str, typer.Option(help="Rows of earlier tasks: see kifmerge memory.")],
    out: OutOption,
    adapter: AdapterOption = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Outer steps; recurrent.outer_steps if not given.")
    ] = None,
    state: StateOption = None,
    recipe: RecipeOption = None,
    settings: SettingsOption = None,
    seed: SeedOption = None,
    overwrite: ReplaceOption = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make outer steps on memory: checkpoint, importance snapshot and state, as train does."""
    from kifmerge.display import ProgressDisplay
    from kifmerge.phases.chain import replay_into

    display = ProgressDisplay(quiet=quiet)
    step, examples = _step(
        model, adapter, {"train": memory}, state, recipe, settings or [], display.say,
        seed=seed, initial_seed=None, num_steps=steps,
    )  # fmt: skip
    if dry_run:
        print_mapping(step.made_by("replay"), json_output=json_output)
        return
    with display:
        record, made_now = replay_into(out, step, examples, overwrite=overwrite, say=display.say)
        _finish(display, out, record, made_now, json_output=json_output)


def _step(
    model: str,
    adapter: str | None,
    task: dict[str, Any],
    state: Path | None,
    recipe: Path | None,
    settings: list[str],
    say: Callable[[str], None],
    *,
    kif: bool = False,
    only_units: str | None = None,
    **numbers: int | None,
) -> tuple[ChainStep, list[Any]]:
    """The step with its rows, every option found: from the state, the recipe, the settings.

    What is on the Hub is pinned to the commits that it is at now.
    """
    from kifmerge.models.model import pinned_options, quieten_libraries
    from kifmerge.models.opening import pinned_parts, saved_section
    from kifmerge.models.origin import pinned
    from kifmerge.models.tables import pinned_source
    from kifmerge.phases.chain import ChainStep, kept_sections
    from kifmerge.phases.tasks import Task
    from kifmerge.recipe import phase_recipe

    quieten_libraries()
    base, adapter = pinned_parts(model, adapter, say)
    kept = kept_sections(state)
    kept_seed = kept.pop("seed", 0)
    uses_kif = kif or only_units is not None or "kif" in kept
    unused = [setting for setting in settings if setting.startswith("kif.")]
    if unused and not uses_kif:
        raise typer.BadParameter(f"--set {unused[0]}: nothing is trained for KIF without --kif")
    given = numbers["seed"]
    seed = kept_seed if given is None else given
    found = phase_recipe(
        recipe,
        settings,
        model=saved_section(base, adapter),
        task={"name": "task", "test": task["train"], **task},
        kept=kept,
    )
    rows = found.tasks[0]
    rows = dataclasses.replace(rows, train=pinned_source(rows.train, say))
    initial_seed = numbers["initial_seed"]
    step = ChainStep(
        model=pinned_options(found.model),
        adapter=adapter,
        training=found.training,
        recurrent=found.recurrent,
        seed=seed,
        initial_seed=seed if initial_seed is None else initial_seed,
        source=rows.train,
        state_dir=state,
        num_steps=numbers["num_steps"],
        kif=found.kif if uses_kif else None,
        only_units=None if only_units is None else pinned(only_units, say),
    )
    return step, Task(rows).train


def _finish(
    display: ProgressDisplay, out: Path, record: PhaseRecord, made_now: bool, *, json_output: bool
) -> None:
    """Say what was made, or that it was there already."""
    if not made_now:
        display.say(f"{out} is already made by this very step: nothing to do")
    if json_output:
        figures = {"out": str(out), "made_now": made_now, **dataclasses.asdict(record)}
        typer.echo(json.dumps(figures, indent=2))
        return
    left = record.total_steps - record.step
    typer.echo(f"{out}: {record.num_steps} steps, {left} of {record.total_steps} left")
