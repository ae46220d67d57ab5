"""Commands that look at data and at models without training: memory, evaluate, importance."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kifmerge.cli.options import (
    AdapterOption,
    ColumnsOption,
    DryRunOption,
    JsonOption,
    ModelOption,
    QuietOption,
    ReplaceOption,
    RowsOption,
    SettingsOption,
    column_templates,
)
from kifmerge.cli.output import print_mapping
from kifmerge.cli.reporting import as_usage, ranks_of_command

if TYPE_CHECKING:
    from kifmerge.display import ProgressDisplay
    from kifmerge.models.data import DataOptions
    from kifmerge.recipe import Recipe

SourcesOption = Annotated[
    list[str],
    typer.Option("--data", metavar="FILE", help="Rows of a task, or hf://datasets/...; repeat it."),
]
LabelsOption = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="NAME", help="A label that outputs must be among; repeat it."),
]


def memory(
    sources: SourcesOption,
    fraction: Annotated[float, typer.Option(min=0, max=1, help="Share of each file to keep.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    seed: Annotated[int, typer.Option(help="File number k, from 0, is drawn with seed + k.")] = 0,
    columns: ColumnsOption = None,
    labels: LabelsOption = None,
    num_rows: RowsOption = None,
    overwrite: ReplaceOption = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw the replay buffer: a small, fixed share of each task, balanced over its labels."""
    from kifmerge.display import print_tables
    from kifmerge.phases.memory import write_memory
    from kifmerge.phases.report import Table

    options = _data_options(sources, columns, labels, num_rows)
    made = write_memory(sources, fraction, out, options, seed=seed, overwrite=overwrite)
    if not quiet and not made.is_new:
        typer.echo(f"done already: {out} holds these rows", err=True)
    if not quiet and not made.num_kept:
        typer.echo(f"a fraction of {fraction} of these rows is none: {out} is empty", err=True)
    if json_output:
        typer.echo(json.dumps(made.as_dict(), indent=2))
        return
    rows = [[p.source, str(p.num_rows), str(p.num_kept), str(p.seed)] for p in made.parts]
    total = ["total", str(sum(p.num_rows for p in made.parts)), str(made.num_kept), ""]
    title = f"Memory in {out}, {made.num_bytes:,} bytes"
    print_tables([Table(title, ["file", "rows", "kept", "seed"], [*rows, total])])


def evaluate(
    model: ModelOption,
    sources: SourcesOption,
    out: Annotated[Path, typer.Option(help="JSON file of scores; predictions go beside it.")],
    adapter: AdapterOption = None,
    metric: Annotated[
        Literal["exact-match", "rouge-l"], typer.Option(help="By which answers are scored.")
    ] = "exact-match",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 32,
    columns: ColumnsOption = None,
    labels: LabelsOption = None,
    num_rows: RowsOption = None,
    settings: SettingsOption = None,
    overwrite: ReplaceOption = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer the rows of one or more files and score the answers, file by file and on average."""
    from kifmerge.checkpoint.provenance import made_by
    from kifmerge.display import ProgressDisplay
    from kifmerge.models.data import read_examples
    from kifmerge.models.tables import pinned_source
    from kifmerge.phases.evaluate import evaluate_files, finished_evaluation, source_names
    from kifmerge.phases.measure import open_at_rest

    display = ProgressDisplay(quiet=quiet)
    reading = _data_options(sources, columns, labels, num_rows)
    pinned = [pinned_source(source, display.say) for source in sources]
    named = dict(zip(source_names(sources), pinned, strict=True))
    files = {name: read_examples(source, reading) for name, source in named.items()}
    found, adapter = _model_options(model, adapter, settings, display.say)
    options = {**_recorded(found, reading), "metric": metric, "batch_size": batch_size}
    parents = {"model": found.model.reference, "adapter": adapter}
    data = {f"data/{name}": source for name, source in named.items()}
    wanted = made_by("evaluate", options, {**parents, **data})
    if dry_run:
        print_mapping(wanted, json_output=json_output)
        return
    content = finished_evaluation(out, wanted, overwrite=overwrite)
    with display:
        if content is not None:
            display.say(f"{out} holds the scores of this very evaluation already: nothing to do")
        else:
            content = evaluate_files(
                open_at_rest(found.model, adapter, found.training, display.say),
                files,
                out,
                labels=reading.labels,
                metric=metric,
                batch_size=batch_size,
                made_by=wanted,
                on_batch=_counter(display, "evaluating", sum(map(len, files.values()))),
            )
        for name, row in content["files"].items():
            if row["unknown_labels"]:
                strange = ", ".join(map(repr, row["unknown_labels"]))
                display.say(f"{name}: the model has no label {strange}: such rows score 0")
    _print_scores(content, out, json_output=json_output)


def importance(
    model: ModelOption,
    source: Annotated[
        str, typer.Option("--data", metavar="FILE", help="Rows to be important for.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the snapshot to make.")],
    adapter: AdapterOption = None,
    average: Annotated[
        Literal["mean", "ema"],
        typer.Option(help="The plain mean over batches, or smoothed as in training."),
    ] = "mean",
    order: Annotated[
        Literal["first", "second", "mixed"],
        typer.Option(help="|w*g|, its square, or |w*g - (w*g)^2/2|."),
    ] = "first",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one gradient: it matters.")] = 8,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Use so many rows, drawn at random; all if not given.")
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="PATTERN",
            help="Measure only parameters whose name in the files matches, as *.q_proj.weight "
            "does; repeat it.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="In which the snapshot is written.")
    ] = "float32",
    nonfinite: Annotated[
        Literal["skip", "raise"],
        typer.Option(help="Leave out batches whose loss or gradient is not finite, or stop."),
    ] = "skip",
    columns: ColumnsOption = None,
    labels: LabelsOption = None,
    settings: SettingsOption = None,
    overwrite: ReplaceOption = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure which parameters of a model matter for some rows; its weights stay as they are."""
    from kifmerge.checkpoint.atomic import whole_folder
    from kifmerge.checkpoint.provenance import is_made, made_by
    from kifmerge.checkpoint.shared_folder import refuse_other_work
    from kifmerge.checkpoint.snapshot import DETAIL_FILE
    from kifmerge.display import ProgressDisplay
    from kifmerge.models.data import read_examples
    from kifmerge.models.tables import pinned_source
    from kifmerge.phases.measure import (
        ONE_PROCESS_SMOOTHS,
        MeasureOptions,
        checkpoint_files,
        measure_importance,
        open_at_rest,
        use_share_of_machine,
        write_measurement,
    )

    with ranks_of_command(dry_run=dry_run) as ranks:
        display = ProgressDisplay(quiet=quiet or not ranks.is_first)
        reading = _data_options([source], columns, labels, samples)
        source = pinned_source(source, display.say)
        examples = read_examples(source, reading)
        found, adapter = _model_options(model, adapter, settings, display.say)
        with as_usage():
            if ranks.size > 1 and average != "mean":
                raise ValueError(ONE_PROCESS_SMOOTHS)
        options = MeasureOptions(
            average=average,
            sensitivity=order,
            batch_size=batch_size,
            targets=tuple(targets or ()),
            nonfinite=nonfinite,
            dtype=dtype,
        )
        recorded = {**_recorded(found, reading), **dataclasses.asdict(options)}
        parents = {"model": found.model.reference, "adapter": adapter, "data": source}
        wanted = made_by("importance", recorded, parents)
        if dry_run:
            print_mapping(wanted, json_output=json_output)
            return
        refuse_other_work(wanted, ranks)
        with display:
            if ranks.from_first(lambda: is_made(out, DETAIL_FILE, wanted, overwrite=overwrite)):
                display.say(f"{out} holds this very snapshot already: nothing to do")
            else:
                use_share_of_machine(ranks)
                loaded = open_at_rest(found.model, adapter, found.training, display.say)
                measured = measure_importance(
                    loaded,
                    examples,
                    options,
                    checkpoint_files(found.model, adapter),
                    on_batch=_counter(display, "measuring", len(examples)),
                    say=display.say,
                    ranks=ranks,
                )
                details = {"model": found.model.reference, "adapter": adapter, "data": source}
                if ranks.is_first:
                    with whole_folder(out, overwrite=overwrite) as temporary:
                        write_measurement(temporary, measured, {**details, "made_by": wanted})
        if ranks.is_first:
            _print_measured(out, display, json_output=json_output)


def _print_measured(out: Path, display: ProgressDisplay, *, json_output: bool) -> None:
    from kifmerge.checkpoint.provenance import read_details
    from kifmerge.checkpoint.snapshot import DETAIL_FILE

    details = read_details(out / DETAIL_FILE)
    if details["skipped_batches"]:
        display.say(
            f"{details['skipped_batches']} batches left out: a loss or gradient was not finite"
        )
    if details["not_in_files"]:
        names, more = details["not_in_files"][:3], len(details["not_in_files"]) - 3
        shown = ", ".join(names) + (f" and {more} more" if more > 0 else "")
        display.say(f"not in the checkpoint's files, kept under their own names: {shown}")
    figures = (
        "options", "targets", "dtype", "model_dtype",
        "batch_size", "samples", "batches", "skipped_batches",
    )  # fmt: skip
    print_mapping({"out": str(out), **{k: details[k] for k in figures}}, json_output=json_output)


def _model_options(
    model: str, adapter: str | None, settings: Sequence[str] | None, say: Callable[[str], None]
) -> tuple[Recipe, str | None]:
    """How a model is used, by what its checkpoint says and the settings; and its adapter.

    What is on the Hub is pinned to the commits that it is at now.
    """
    from kifmerge.models.model import pinned_options, quieten_libraries
    from kifmerge.models.opening import pinned_parts, saved_section
    from kifmerge.recipe import phase_recipe

    quieten_libraries()
    base, adapter = pinned_parts(model, adapter, say)
    section = saved_section(base, adapter)
    no_task = {"name": "rows", "train": "rows", "test": "rows"}
    found = phase_recipe(None, settings or (), model=section, task=no_task, kept={})
    return dataclasses.replace(found, model=pinned_options(found.model)), adapter


def _recorded(found: Recipe, reading: DataOptions) -> dict[str, Any]:
    """The options that a result depends on, whatever the command."""
    return {"model": dataclasses.asdict(found.model), "data": dataclasses.asdict(reading)}


def _counter(display: ProgressDisplay, phase: str, total: int) -> Callable[[int], None]:
    """Adds up rows for a bar."""
    from kifmerge.training.train import Progress

    done = 0

    def on_batch(num_rows: int) -> None:
        nonlocal done
        done += num_rows
        display.on_step(phase, Progress(done, total, 0, None))

    return on_batch


def _print_scores(content: dict[str, Any], out: Path, *, json_output: bool) -> None:
    if json_output:
        typer.echo(json.dumps({"out": str(out), **content}, indent=2, ensure_ascii=False))
        return
    from kifmerge.display import print_tables
    from kifmerge.phases.report import Table

    kinds = [kind for kind in ("score", "own_labels_score") if kind in content["mean"]]
    rows = [
        [name, str(row["num_rows"]), *(f"{100 * row[kind]:.1f}" for kind in kinds)]
        for name, row in content["files"].items()
    ]
    mean = ["mean", "", *(f"{100 * content['mean'][kind]:.1f}" for kind in kinds)]
    title = f"{content['metric']} in %, kept in {out}"
    print_tables([Table(title, ["file", "rows", *kinds], [*rows, mean])])


def _data_options(
    sources: Sequence[str],
    columns: Sequence[str] | None,
    labels: Sequence[str] | None,
    num_rows: int | None,
) -> DataOptions:
    """How rows are read, from the options of the command line."""
    from kifmerge.models.data import DataOptions

    twice = sorted({source for source in sources if sources.count(source) > 1})
    if twice:
        raise typer.BadParameter(f"--data {twice[0]} is given twice")
    return DataOptions(
        columns=column_templates(columns), labels=tuple(labels or ()), num_rows=num_rows
    )
