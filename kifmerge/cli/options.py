"""Options that several commands share, under one name and with one help text."""

from __future__ import annotations

from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
JobsOption = Annotated[
    int, typer.Option("--jobs", min=1, help="Methods and seeds at once, each in its own process.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Remove an earlier run in the folder first.")
]
