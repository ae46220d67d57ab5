"""Commands that work on weights without training: prune, merge."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kifmerge.cli.options import DryRunOption, JsonOption, QuietOption, ReplaceOption
from kifmerge.cli.output import print_mapping

if TYPE_CHECKING:
    from kifmerge.phases.merge import MergeInputs
    from kifmerge.phases.presets import RecurrentOptions

RuleName = Literal["recurrent-kif", "recurrent-kif-adaptive", "average", "recurrent-average"]
FractionOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of parameters found important; 0.2 if not given."),
]
ScopeOption = Annotated[
    Literal["global", "tensor"] | None,
    typer.Option(help="One threshold over the whole model, the default, or one per tensor."),
]


def prune(
    importance: Annotated[Path, typer.Option(metavar="DIR", help="Importance snapshot.")],
    out: Annotated[Path, typer.Option(help="Folder of the mask to make.")],
    important_fraction: FractionOption = None,
    scope: ScopeOption = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="REF", help="Prune this checkpoint too, into OUT/checkpoint."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="REF", help="What its unimportant parameters go back to."),
    ] = None,
    unscored: Annotated[
        Literal["base", "model"] | None,
        typer.Option(help="Whose tensors without scores to take where base and model differ."),
    ] = None,
    dry_run: DryRunOption = False,
    overwrite: ReplaceOption = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Mark the important parameters of a model: a mask, and the model with only those changed."""
    from kifmerge.phases.prune import Prune, PruneOptions

    chosen = {"important_fraction": important_fraction, "scope": scope, "unscored": unscored}
    with _as_usage():
        options = PruneOptions(**_given(chosen))
        if (model is None) != (base is None):
            raise ValueError("--model and --base go together")
        if model is None and unscored is not None:
            raise ValueError("--unscored goes with --model")
    pruning = Prune(importance, options, model=model, base=base)
    plan = pruning.plan()
    if dry_run:
        print_mapping(plan, json_output=json_output)
        return
    with _reporting("marking", plan["num_parameters"], quiet=quiet) as on_progress:
        figures, is_new = pruning.run(out, overwrite=overwrite, on_progress=on_progress)
    _print_result(out, figures, is_new=is_new, json_output=json_output, quiet=quiet)


def merge(
    rule: Annotated[RuleName, typer.Option(help="How the two task vectors are fused.")],
    base: Annotated[Path, typer.Option(metavar="REF", help="Where the new task started.")],
    new: Annotated[Path, typer.Option(metavar="REF", help="Trained on the new task.")],
    historical: Annotated[
        Path, typer.Option(metavar="REF", help="Trained on memory of the earlier tasks.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the merged checkpoint to make.")],
    new_importance: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Importance snapshot of the new task.")
    ] = None,
    historical_importance: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Importance snapshot of the earlier tasks.")
    ] = None,
    new_mask: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Mask of the new task: see prune.")
    ] = None,
    historical_mask: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Mask of the earlier tasks.")
    ] = None,
    important_fraction: FractionOption = None,
    scope: ScopeOption = None,
    redundant: Annotated[
        Literal["average", "drop"] | None,
        typer.Option(help="What neither side finds important: halved, the default, or left out."),
    ] = None,
    shared_weights: Annotated[
        str | None,
        typer.Option(
            metavar="NEW,HISTORICAL",
            help="Weights where both sides find a parameter important; 0.4,0.6 if not given.",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of recurrent-kif-adaptive; 0.25 if not given.")
    ] = None,
    historical_parent: Annotated[
        Literal["new", "base"] | None,
        typer.Option(
            help="Where the historical task vector starts; at new if replay made it from there."
        ),
    ] = None,
    unscored: Annotated[
        Literal["base", "new", "average"] | None,
        typer.Option(help="What becomes of tensors without scores where the inputs differ."),
    ] = None,
    space: Annotated[
        Literal["factor"] | None,
        typer.Option(help="Insist on fusing the LoRA factors of independent adapters."),
    ] = None,
    dry_run: DryRunOption = False,
    overwrite: ReplaceOption = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fuse what was learnt anew with what must be kept, by which parameters matter to which."""
    from kifmerge.phases.merge import Merge, MergeInputs, MergeOptions

    with _as_usage():
        inputs = MergeInputs(
            base=base,
            new=new,
            historical=historical,
            importance=_given({"new": new_importance, "historical": historical_importance}),
            masks=_given({"new": new_mask, "historical": historical_mask}),
        )
        chosen = {
            "important_fraction": important_fraction,
            "scope": scope,
            "redundant": redundant,
            "shared_weights": shared_weights,
            "temperature": temperature,
        }
        options = _rule_options(rule, _given(chosen), inputs)
    further = MergeOptions(historical_parent=historical_parent, unscored=unscored, space=space)
    merging = Merge(inputs, options, further)
    plan = merging.plan()
    if dry_run:
        print_mapping(dataclasses.asdict(plan), json_output=json_output)
        return
    with _reporting("fusing", plan.num_parameters, quiet=quiet) as on_progress:
        figures, is_new = merging.run(out, overwrite=overwrite, on_progress=on_progress)
    _print_result(out, figures, is_new=is_new, json_output=json_output, quiet=quiet)


def _given(options: dict[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _rule_options(rule: RuleName, chosen: dict[str, Any], inputs: MergeInputs) -> RecurrentOptions:
    """The rule with its options; what it would not look at is a mistake.

    Raises:
        ValueError: naming the option.
    """
    from kifmerge.phases.presets import RecurrentOptions
    from kifmerge.phases.rules import RULES

    name = "average" if rule == "recurrent-average" else rule
    inputs.check(name)
    for option in chosen:
        flag = f"--{option.replace('_', '-')}"
        if option not in RULES[name].options:
            raise ValueError(f"{flag} means nothing to {rule}")
        if inputs.masks and option in ("important_fraction", "scope"):
            raise ValueError(f"{flag} means nothing beside masks, which are made already")
    if "shared_weights" in chosen:
        try:
            weights = tuple(float(weight) for weight in chosen["shared_weights"].split(","))
        except ValueError:
            weights = ()
        if len(weights) != 2:
            raise ValueError(
                f"--shared-weights: expected two numbers such as 0.4,0.6, "
                f"found {chosen['shared_weights']}"
            )
        chosen = {**chosen, "shared_weights": weights}
    return RecurrentOptions(rule=name, **chosen)


@contextlib.contextmanager
def _as_usage() -> Iterator[None]:
    """Options that do not fit together are a mistake of usage."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextlib.contextmanager
def _reporting(phase: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show progress on a terminal, and warnings as plain lines, both on stderr."""
    done, shown = 0, -1
    on_terminal = sys.stderr.isatty() and not quiet

    def on_progress(num_parameters: int) -> None:
        nonlocal done, shown
        done += num_parameters
        percent = 100 * done // max(total, 1)
        if on_terminal and percent > shown:
            shown = percent
            typer.echo(f"\r{phase} {percent:3d} %", err=True, nl=False)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield on_progress
    if on_terminal and shown >= 0:
        typer.echo(err=True)
    for warning in caught:
        typer.echo(f"kifmerge: warning: {warning.message}", err=True)


def _print_result(
    out: Path, figures: dict[str, Any], *, is_new: bool, json_output: bool, quiet: bool
) -> None:
    if not is_new and not quiet:
        typer.echo(f"{out} is already made: nothing to do", err=True)
    print_mapping({"out": str(out), **figures}, json_output=json_output)
