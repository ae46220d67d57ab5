"""Commands that look at what is there: inspect."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kifmerge.cli.options import JsonOption
from kifmerge.cli.output import print_mapping

if TYPE_CHECKING:
    from kifmerge.phases.inspect import Inspection
    from kifmerge.phases.layers import Layer, TensorEntry
    from kifmerge.phases.report import Table

_DIGEST_SHOWN = 12


def inspect(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REF", help="Folder: checkpoint, adapter, snapshot, mask, state or run."
        ),
    ],
    important_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Of a snapshot: the share to find important.")
    ] = 0.2,
    json_output: JsonOption = False,
) -> None:
    """Show what a folder is, where it came from and what it holds, without loading it."""
    from kifmerge.display import print_tables
    from kifmerge.phases.inspect import inspect_folder, kind_of

    kind = kind_of(reference)
    if kind == "run folder":
        from kifmerge.run import run_status

        status = run_status(reference)
        content = {"kind": kind, "reference": reference, **status}
        tables = [_trial_table(content.pop("trials"))] if not json_output else []
    else:
        found = inspect_folder(reference, important_fraction)
        content = found.as_dict() if json_output else _summary(found)
        tables = [_tensor_table(found), _layer_table(found)]
        if kind == "importance snapshot" and important_fraction and not found.total.num_important:
            typer.echo("no score exceeds the threshold: nothing is important", err=True)
    print_mapping(content, json_output=json_output)
    if not json_output:
        print_tables(tables)


def _summary(found: Inspection) -> dict[str, Any]:
    """What is said of a folder above its tables, digests cut short."""
    made_by: Any = "not recorded"
    if found.made_by is not None:
        parents = found.made_by.get("parents", {})
        made_by = {**found.made_by, "parents": {r: _parent(p) for r, p in parents.items()}}
    return {
        "kind": found.kind,
        "reference": found.reference,
        "made_by": made_by,
        **json.loads(json.dumps(found.facts)),
    }


def _parent(parent: dict[str, Any]) -> str:
    digest = parent.get("digest")
    return f"{parent.get('reference')} ({digest[:_DIGEST_SHOWN] if digest else 'no digest'})"


def _tensor_table(found: Inspection) -> Table:
    from kifmerge.phases.report import Table

    columns: dict[str, Callable[[TensorEntry], str]] = {
        "tensor": lambda tensor: tensor.name,
        "shape": lambda tensor: " x ".join(map(str, tensor.shape)) or "-",
        "dtype": lambda tensor: tensor.dtype,
        "bytes": lambda tensor: f"{tensor.num_bytes:,}",
    }
    if len({tensor.file for tensor in found.tensors}) > 1:
        columns["file"] = lambda tensor: tensor.file
    rows = [[show(tensor) for show in columns.values()] for tensor in found.tensors]
    return Table("Tensors", list(columns), rows)


def _layer_table(found: Inspection) -> Table:
    from kifmerge.phases.report import Table

    columns: dict[str, Callable[[Layer], str]] = {
        "file" if found.kind == "trainer state" else "layer": lambda layer: layer.name,
        "tensors": lambda layer: str(layer.num_tensors),
        "parameters": lambda layer: f"{layer.num_parameters:,}",
        "bytes": lambda layer: f"{layer.num_bytes:,}",
    }
    if found.total.mean_score is not None:
        columns["mean score"] = lambda layer: _figure(layer.mean_score, ".4g")
    if found.total.num_important is not None:
        columns["important"] = lambda layer: _figure(layer.important_fraction, ".1%")
    rows = [[show(layer) for show in columns.values()] for layer in (*found.layers, found.total)]
    return Table("Totals", list(columns), rows)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _trial_table(trials: list[dict[str, Any]]) -> Table:
    from kifmerge.phases.report import Table

    return Table(
        "Stages",
        ["method", "seed", "finished", "missing"],
        [
            [
                trial["method"],
                str(trial["seed"]),
                f"{len(trial['finished'])} of {len(trial['finished']) + len(trial['missing'])}",
                " ".join(trial["missing"]) or "-",
            ]
            for trial in trials
        ],
    )
