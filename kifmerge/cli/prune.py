"""The prune command: mark what is important."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kifmerge.cli.options import (
    AllowOption,
    DiskRateOption,
    DryRunOption,
    FetchOption,
    FractionOption,
    JsonOption,
    NetworkRateOption,
    NonfiniteOption,
    QuietOption,
    ReplaceOption,
    ScopeOption,
    WorkersOption,
    given,
    parse_allowed,
    parse_rates,
)
from kifmerge.cli.output import print_plan
from kifmerge.cli.reporting import (
    as_usage,
    collecting_seldom,
    opener,
    print_result,
    ranks_of_command,
    reporting,
    workers_of_rank,
)


def prune(
    out: Annotated[Path, typer.Option(help="Folder of the mask to make.")],
    importance: Annotated[
        str | None, typer.Option(metavar="REF", help="Importance snapshot.")
    ] = None,
    units: Annotated[
        str | None, typer.Option(metavar="REF", help="Skill units instead: see group.")
    ] = None,
    important_fraction: FractionOption = None,
    scope: ScopeOption = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Prune this checkpoint too, into OUT/checkpoint."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="REF", help="What its unimportant parameters go back to."),
    ] = None,
    unscored: Annotated[
        Literal["base", "model"] | None,
        typer.Option(help="Whose tensors without scores to take where base and model differ."),
    ] = None,
    allow: AllowOption = None,
    nonfinite: NonfiniteOption = "refuse",
    fetch: FetchOption = "auto",
    workers: WorkersOption = None,
    dry_run: DryRunOption = False,
    disk_rate: DiskRateOption = None,
    network_rate: NetworkRateOption = None,
    overwrite: ReplaceOption = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Mark the important parameters of a model: a mask, and the model with only those changed."""
    rates = parse_rates(disk_rate, network_rate, dry_run=dry_run)
    with collecting_seldom(), ranks_of_command(dry_run=dry_run) as ranks:
        from kifmerge.phases.prune import Prune, PruneInputs, PruneOptions

        with as_usage():
            if (model is None) != (base is None):
                raise ValueError("--model and --base go together")
            if model is None and unscored is not None:
                raise ValueError("--unscored goes with --model")
            chosen = {
                "important_fraction": important_fraction,
                "scope": scope,
                "unscored": unscored,
            }
            options = PruneOptions(
                allowed=parse_allowed(allow), nonfinite=nonfinite, **given(chosen)
            )
            given_inputs = {"importance": importance, "units": units, "model": model, "base": base}
            folders = opener(fetch, quiet=quiet, ranks=ranks)
            inputs = PruneInputs(**folders.open_each(given(given_inputs)))
            pruning = Prune(inputs, options, num_workers=workers_of_rank(workers, ranks))
        plan = pruning.plan()
        if dry_run:
            found = pruning.estimate(rates) if rates else None
            print_plan(plan, found, json_output=json_output)
            return
        with reporting(
            "marking", plan.num_parameters, quiet=quiet, is_first=ranks.is_first
        ) as on_progress:
            figures, is_new = pruning.run(
                out, overwrite=overwrite, on_progress=on_progress, ranks=ranks
            )
        if ranks.is_first:
            print_result(out, figures, is_new=is_new, json_output=json_output, quiet=quiet)
