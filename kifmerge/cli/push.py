"""The push command: publish what a folder holds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from kifmerge.cli.options import DryRunOption, JsonOption, QuietOption
from kifmerge.cli.output import print_mapping
from kifmerge.cli.reporting import as_usage, opener, reporting


def push(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Checkpoint, adapter, importance snapshot, mask or skill units."
        ),
    ],
    repository: Annotated[
        str, typer.Argument(metavar="ORG/NAME[@BRANCH]", help="Created if it is not there.")
    ],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who may see it; the Hub's default if not given."),
    ] = None,
    branch: Annotated[
        str | None, typer.Option(metavar="NAME", help="Commit to this branch, created from main.")
    ] = None,
    pull_request: Annotated[
        bool, typer.Option("--pr", help="Open a pull request instead of committing.")
    ] = False,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Of the commit; the first line is its title.")
    ] = None,
    base_models: Annotated[
        list[str] | None,
        typer.Option(
            "--base-model",
            metavar="ORG/NAME",
            help="What it derives from, for the card, instead of what is recorded; may be "
            "repeated.",
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="For the card, instead of the bases' own."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="RUN_DIR", help="Show the scores of this run in the card."),
    ] = None,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish a folder on the Hub in one commit, with a card that says how it was made."""
    from dataclasses import replace

    from kifmerge.hub.target import parse_target
    from kifmerge.phases.publish import Publication, PublishOptions

    target = parse_target(repository)
    with as_usage():
        if branch is not None and target.branch not in (None, branch):
            raise ValueError(f"{repository} names another branch than --branch {branch}")
        options = PublishOptions(
            private=private,
            pull_request=pull_request,
            message=message,
            base_models=tuple(base_models or ()),
            licence=licence,
            report_dir=report,
        )

    say = opener("auto", quiet=quiet).say
    target = replace(target, branch=branch or target.branch)
    with reporting("uploading", 1, quiet=quiet), _bars(shown=sys.stderr.isatty() and not quiet):
        publication = Publication(directory, target, options, say=say)
        figures, is_new = (publication.plan(), True) if dry_run else publication.run()
    if not is_new:
        say(f"{target} holds all of it already: nothing to do")
    print_mapping(figures, json_output=json_output)


@contextlib.contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Have the client show what it sends, or nothing; what the environment says of it holds."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
