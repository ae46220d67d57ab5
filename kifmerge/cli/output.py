"""What commands print on stdout: YAML for people, JSON for scripts."""

from __future__ import annotations

import json
from typing import Any

import typer


def print_mapping(content: dict[str, Any], *, json_output: bool) -> None:
    """Print a mapping of plain values."""
    if json_output:
        typer.echo(json.dumps(content, indent=2))
        return
    import yaml

    typer.echo(yaml.safe_dump(content, sort_keys=False), nl=False)
