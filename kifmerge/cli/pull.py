"""The pull command: files of the Hub onto this disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kifmerge.cli.options import DryRunOption, JsonOption, QuietOption, ReplaceOption
from kifmerge.cli.output import print_mapping
from kifmerge.cli.reporting import opener, print_result, reporting


def pull(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REF", help="ORG/NAME[@REVISION], or hf://ORG/NAME[@REVISION]/FOLDER."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to make of the files; else the standard cache.")
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Files that are wanted, such as *.json; may be repeated. A pickle comes only "
            "by a pattern that ends as it does.",
        ),
    ] = None,
    dry_run: DryRunOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted pull into the same OUT.")
    ] = False,
    overwrite: ReplaceOption = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Pull a folder of the Hub, every file compared with its hash; no pickles unless asked for."""
    if out is None and (resume or overwrite):
        raise typer.BadParameter("--resume and --overwrite go with --out")
    from kifmerge.phases.pull import Pull

    pulling = Pull(reference, patterns=file or (), say=opener("stream", quiet=quiet).say)
    plan = pulling.plan()
    if dry_run:
        print_mapping(plan, json_output=json_output)
        return
    with reporting("pulling", plan["num_bytes"], quiet=quiet) as on_progress:
        directory, figures, is_new = pulling.run(
            out, overwrite=overwrite, resume=resume, on_progress=on_progress
        )
    print_result(directory, figures, is_new=is_new, json_output=json_output, quiet=quiet)
