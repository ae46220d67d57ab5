"""Commands for a whole sequence of tasks: demo, run, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kifmerge.cli.options import JobsOption, JsonOption, OverwriteOption, QuietOption
from kifmerge.cli.output import print_mapping

if TYPE_CHECKING:
    from kifmerge.phases.report import Report


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Keep tasks, recipe and run here; else they are removed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of tasks, weights and training.")] = 0,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show the whole idea in a minute: a tiny model learns four tasks, and forgets or does not."""
    from kifmerge.demo import run_demo
    from kifmerge.display import ProgressDisplay

    with ProgressDisplay(quiet=quiet) as display:
        report = run_demo(out, seed=seed, on_moment=display.on_moment)
        if out is not None:
            display.say(f"kept in {out}: look around, or change {out}/recipe.yaml and run it")
    _print_report(report, json_output=json_output, overview=True)


def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML.")],
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace an option of the recipe."),
    ] = None,
    nonfinite: Annotated[
        str | None,
        typer.Option(metavar="skip|raise", help="Steps whose gradient is not finite."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted or an extended run.")
    ] = False,
    overwrite: OverwriteOption = False,
    jobs: JobsOption = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe and stop.")] = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Learn the tasks of a recipe in order, by each of its methods, and report what was kept."""
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with a run, --overwrite removes it: choose one")
    from kifmerge.display import ProgressDisplay
    from kifmerge.recipe import load_recipe

    chosen = [f"recurrent.nonfinite={nonfinite}"] if nonfinite is not None else []
    loaded = load_recipe(recipe, [*(settings or []), *chosen])
    if dry_run:
        print_mapping(loaded.as_dict(), json_output=json_output)
        return
    from kifmerge.run import run_recipe

    with ProgressDisplay(quiet=quiet) as display:
        report = run_recipe(
            loaded,
            out,
            resume=resume,
            overwrite=overwrite,
            num_jobs=jobs,
            on_moment=display.on_moment,
            say=display.say,
        )
        display.say(f"report: {out / 'report.md'}")
    _print_report(report, json_output=json_output)


def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder that kifmerge run made.")],
    json_output: JsonOption = False,
) -> None:
    """Print the report of a run folder, computed from the predictions it keeps."""
    from kifmerge.run import collect_report

    _print_report(collect_report(run_dir), json_output=json_output)


def _print_report(found: Report, *, json_output: bool, overview: bool = False) -> None:
    if json_output:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    from kifmerge.display import print_tables
    from kifmerge.phases.report import overview_table, report_tables

    print_tables([overview_table(found)] if overview else report_tables(found))
