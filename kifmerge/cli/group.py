"""The command that makes skill units: group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kifmerge.cli.options import DryRunOption, FetchOption, JsonOption, QuietOption, ReplaceOption
from kifmerge.cli.output import print_mapping
from kifmerge.cli.reporting import as_usage, opener, print_result, reporting


def group(
    importance: Annotated[
        str, typer.Option(metavar="REF", help="Importance snapshot of the new task.")
    ],
    unit: Annotated[
        Literal["tensor", "lora-rank", "layer"], typer.Option(help="What shares one score.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the skill units to make.")],
    historical_units: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Skill units after the task before, to add up to."),
    ] = None,
    new_weight: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Of the new scores in the sum; 0.3 if not given."),
    ] = None,
    cumulative_weight: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Of the scores before in the sum; 0.7 if not given."),
    ] = None,
    fetch: FetchOption = "auto",
    dry_run: DryRunOption = False,
    overwrite: ReplaceOption = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Group parameters into skill units: a score for each, and one cumulative over the tasks."""
    from kifmerge.fusion.unit_scores import GroupOptions
    from kifmerge.phases.group import Group

    weights = {"new_weight": new_weight, "cumulative_weight": cumulative_weight}
    given = {name: value for name, value in weights.items() if value is not None}
    with as_usage():
        if given and historical_units is None:
            flags = " or ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{flags} means nothing without --historical-units")
        options = GroupOptions(unit=unit, **given)
    folders = opener(fetch, quiet=quiet)
    before = None if historical_units is None else folders.open(historical_units)
    grouping = Group(folders.open(importance), options, historical_units=before)
    plan = grouping.plan()
    if dry_run:
        print_mapping(plan, json_output=json_output)
        return
    with reporting("grouping", plan["num_parameters"], quiet=quiet) as on_progress:
        figures, is_new = grouping.run(out, overwrite=overwrite, on_progress=on_progress)
    print_result(out, figures, is_new=is_new, json_output=json_output, quiet=quiet)
