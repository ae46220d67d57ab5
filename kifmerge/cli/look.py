"""Commands that look at what is there: inspect, diff, verify."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kifmerge.cli.options import FetchOption, JsonOption, QuietOption
from kifmerge.cli.output import print_mapping
from kifmerge.cli.reporting import opener, reporting

if TYPE_CHECKING:
    from kifmerge.checkpoint.folder import Folders
    from kifmerge.fusion.layers import Layer, TensorEntry
    from kifmerge.phases.diff import Change, Diff
    from kifmerge.phases.inspect import Inspection
    from kifmerge.phases.report import Table
    from kifmerge.phases.verify import Verification

_DIGEST_SHOWN = 12


def inspect(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REF", help="Folder: checkpoint, adapter, snapshot, mask, units, state or run."
        ),
    ],
    important_fraction: Annotated[
        float,
        typer.Option(min=0, max=1, help="Of a snapshot or units: the share to find important."),
    ] = 0.2,
    fetch: FetchOption = "auto",
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what a folder is, where it came from and what it holds, without loading it."""
    from kifmerge.display import print_tables
    from kifmerge.phases.inspect import inspect_folder, kind_of

    folder = opener(fetch, quiet=quiet).open(reference)
    kind = kind_of(folder)
    if kind == "run folder":
        from kifmerge.run import run_status

        status = run_status(reference)
        content = {"kind": kind, "reference": reference, **status}
        tables = [_trial_table(content.pop("trials"))] if not json_output else []
    else:
        found = inspect_folder(folder, important_fraction)
        content = found.as_dict() if json_output else _summary(found)
        has_tensors = kind != "skill units"
        tables = [_tensor_table(found), _layer_table(found)] if has_tensors else []
        if kind == "importance snapshot" and important_fraction and not found.total.num_important:
            typer.echo("no score exceeds the threshold: nothing is important", err=True)
    print_mapping(content, json_output=json_output)
    if not json_output:
        print_tables(tables)


def diff(
    first: Annotated[
        str,
        typer.Argument(metavar="REF", help="Folder: checkpoint, adapter, snapshot or mask."),
    ],
    second: Annotated[
        str, typer.Argument(metavar="REF", help="Another of the same kind, compared with it.")
    ],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Show each tensor instead of each layer.")
    ] = False,
    fetch: FetchOption = "auto",
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show how far the numbers of two folders are apart, layer by layer."""
    from kifmerge.display import print_tables
    from kifmerge.phases.diff import FolderDiff

    folders = opener(fetch, quiet=quiet)
    compared = FolderDiff(folders.open(first), folders.open(second))
    with reporting("comparing", compared.num_values, quiet=quiet) as on_progress:
        found = compared.run(on_progress=on_progress)
    content = found.as_dict()
    if json_output:
        print_mapping(content, json_output=True)
        return
    print_mapping(
        {key: content[key] for key in ("kind", "first", "second", "is_same")}, json_output=False
    )
    changes = ("tensor", found.tensors) if tensors else ("layer", found.layers)
    print_tables([_change_table(*changes, found.total), *_apart_tables(found)])


def verify(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REF", help="Folder: checkpoint, adapter, snapshot, mask, units, state or run."
        ),
    ],
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check that a folder is whole, holds numbers only, and is what its records say."""
    from kifmerge.display import print_tables
    from kifmerge.phases.verify import verify_folder, weight_bytes

    def say(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    directory = _brought(reference, opener("download", quiet=quiet))
    with reporting("reading", weight_bytes(directory), quiet=quiet) as on_progress:
        found = verify_folder(directory, on_progress=on_progress, say=say)
    content = found.as_dict()
    if json_output:
        print_mapping(content, json_output=True)
    else:
        parents = {p.role: f"{p.state} ({p.reference})" for p in found.parents}
        shown = {
            "reference": reference,
            "is_sound": content["is_sound"],
            "parents": parents,
            "notes": found.notes,
        }
        print_mapping(
            {key: value for key, value in shown.items() if value != {}}, json_output=False
        )
        print_tables([_file_table(found)] if found.files else [])
    found.refuse_problems()


def _brought(reference: str, folders: Folders) -> str:
    """A folder on this disk: of the Hub's, the cache's, with every file compared with its hash."""
    folder = folders.open(reference)
    if isinstance(folder, Path):
        return reference
    from kifmerge.phases.pull import Pull

    directory, _, _ = Pull(str(folder), say=folders.say).run()
    return str(directory)


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


def _change_table(what: str, changes: Sequence[Change], total: Change) -> Table:
    from kifmerge.phases.report import Table

    columns: dict[str, Callable[[Change], str]] = {
        what: lambda change: change.name,
        **({} if what == "tensor" else {"tensors": lambda change: str(change.num_tensors)}),
        "parameters": lambda change: f"{change.num_values:,}",
        "changed": lambda change: _share(change.num_changed, change.num_values),
        "max change": lambda change: format(change.max_change, ".4g"),
        "mean change": lambda change: format(change.mean_change, ".4g"),
        "relative change": lambda change: _figure(change.relative_change, ".4g"),
        "cosine": lambda change: _figure(change.cosine, ".6f"),
    }
    if any(total.num_nonfinite):
        columns["not finite"] = lambda change: " / ".join(f"{n:,}" for n in change.num_nonfinite)
    rows = [[show(change) for show in columns.values()] for change in (*changes, total)]
    return Table("Changes", list(columns), rows)


def _apart_tables(found: Diff) -> list[Table]:
    """Tensors that only one of two folders has, or that both have in different forms."""
    from kifmerge.phases.report import Table

    rows = [
        *([name, "there", "none"] for name in found.only_first),
        *([name, "none", "there"] for name in found.only_second),
        *([name, *sides] for name, sides in found.other_shape.items()),
        *([name, *sides] for name, sides in found.other_dtype.items()),
    ]
    return [Table("Not alike", ["tensor", "first", "second"], rows)] if rows else []


def _share(part: int, whole: int) -> str:
    """A percentage, in which nothing and all differ from almost nothing and almost all."""
    if not part:
        return "none"
    if 0 < part < whole * 0.0001:
        return "<0.01%"
    if whole * 0.9999 < part < whole:
        return ">99.99%"
    return f"{part / whole:.2%}"


def _file_table(found: Verification) -> Table:
    from kifmerge.phases.report import Table

    rows = [
        [
            file.file,
            str(file.num_tensors),
            f"{file.num_bytes:,}",
            "unreadable" if file.num_nonfinite is None else f"{file.num_nonfinite:,}",
            file.sha256,
        ]
        for file in found.files
    ]
    return Table("Files", ["file", "tensors", "bytes", "not finite", "SHA-256"], rows)
