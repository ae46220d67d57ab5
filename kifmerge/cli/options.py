"""Options that several commands share, under one name and with one help text."""

from __future__ import annotations

from collections.abc import Sequence
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
ModelOption = Annotated[
    str, typer.Option("--model", metavar="REF", help="Base, whole model or adapter.")
]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", metavar="REF", help="LoRA adapter on top of the base.")
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option, such as training.epochs=3."),
]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="KEY=TEMPLATE", help="Maps the columns, as in a recipe."),
]
RowsOption = Annotated[
    int | None,
    typer.Option("--rows", min=1, help="Use so many rows of each file, drawn at random."),
]
ReplaceOption = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Check all, print what would be done, and stop.")
]


def column_templates(columns: Sequence[str] | None) -> dict[str, str]:
    """``--column`` options as a mapping.

    Raises:
        BadParameter: no KEY=TEMPLATE, or a key given twice.
    """
    templates = {}
    for column in columns or []:
        key, separator, template = column.partition("=")
        if not separator or not key or key in templates:
            problem = "is given twice" if key in templates else "is not KEY=TEMPLATE"
            raise typer.BadParameter(f"--column {column} {problem}")
        templates[key] = template
    return templates
