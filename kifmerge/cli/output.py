"""What commands print on stdout: YAML for people, JSON for scripts."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from kifmerge.fusion.estimate import Estimate
    from kifmerge.phases.merge_plan import MergePlan
    from kifmerge.phases.prune_plan import PrunePlan


def print_mapping(content: dict[str, Any], *, json_output: bool) -> None:
    """Print a mapping of plain values."""
    if json_output:
        typer.echo(json.dumps(content, indent=2))
        return
    import yaml

    typer.echo(yaml.safe_dump(content, sort_keys=False), nl=False)


def print_plan(
    plan: MergePlan | PrunePlan, estimate: Estimate | None, *, json_output: bool
) -> None:
    """Print what would be done, and how long it takes if that was asked for."""
    content = asdict(plan)
    if estimate is not None:
        content["estimate"] = {"time": _duration(estimate.seconds), **asdict(estimate)}
    print_mapping(content, json_output=json_output)


def _duration(seconds: int) -> str:
    """About how long, in the two largest units.

    >>> _duration(42), _duration(4000), _duration(200_000)
    ('42 s', '1 h 6 min', '2 d 7 h')
    """
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if not minutes:
        return f"{seconds} s"
    if not hours:
        return f"{minutes} min {seconds % 60} s"
    if not days:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"
