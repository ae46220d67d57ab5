"""The merge command: fuse checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kifmerge.cli.options import (
    AllowOption,
    DeviceOption,
    DiskRateOption,
    DryRunOption,
    FetchOption,
    FractionOption,
    JsonOption,
    NetworkRateOption,
    NonfiniteOption,
    QuietOption,
    ReplaceOption,
    ScopeOption,
    WorkersOption,
    given,
    parse_allowed,
    parse_bytes,
    parse_rates,
)
from kifmerge.cli.output import print_plan
from kifmerge.cli.reporting import (
    as_usage,
    collecting_seldom,
    opener,
    print_result,
    ranks_of_command,
    reporting,
    workers_of_rank,
)

if TYPE_CHECKING:
    from kifmerge.checkpoint.destination import Destination
    from kifmerge.checkpoint.ranks import Ranks
    from kifmerge.fusion.inputs import MergeInputs
    from kifmerge.fusion.rules import FusionOptions
    from kifmerge.hub.client import Say

RuleName = Literal[
    "recurrent-kif", "recurrent-kif-adaptive", "average", "recurrent-average", "kif",
    "kif-adaptive", "linear", "task-arithmetic", "ties", "magmax",
]  # fmt: skip


def merge(
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR|hf://ORG/NAME",
            help="Merged checkpoint to make: a folder, or a repository.",
        ),
    ],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="kifmerge.json of a merge: make the same one again."),
    ] = None,
    rule: Annotated[RuleName | None, typer.Option(help="How the models are fused.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="REF", help="Where task vectors start.")
    ] = None,
    new: Annotated[str | None, typer.Option(metavar="REF", help="Trained on the new task.")] = None,
    historical: Annotated[
        str | None, typer.Option(metavar="REF", help="Trained on memory of the earlier tasks.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="REF", help="Instead of new and historical: any number, repeated."),
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="One per --model, in their order; all alike if none.")
    ] = None,
    new_importance: Annotated[
        str | None, typer.Option(metavar="REF", help="Importance snapshot of the new task.")
    ] = None,
    historical_importance: Annotated[
        str | None, typer.Option(metavar="REF", help="Importance snapshot of the earlier tasks.")
    ] = None,
    importance: Annotated[
        list[str] | None,
        typer.Option(metavar="REF", help="Importance snapshot, one per --model in their order."),
    ] = None,
    new_mask: Annotated[
        str | None, typer.Option(metavar="REF", help="Mask of the new task: see prune.")
    ] = None,
    historical_mask: Annotated[
        str | None, typer.Option(metavar="REF", help="Mask of the earlier tasks.")
    ] = None,
    mask: Annotated[
        list[str] | None, typer.Option(metavar="REF", help="Mask, one per --model.")
    ] = None,
    new_units: Annotated[
        str | None, typer.Option(metavar="REF", help="Skill units of the new task: see group.")
    ] = None,
    historical_units: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Units of the earlier tasks: cumulative scores count."),
    ] = None,
    units: Annotated[
        list[str] | None, typer.Option(metavar="REF", help="Skill units, one per --model.")
    ] = None,
    important_fraction: FractionOption = None,
    scope: ScopeOption = None,
    redundant: Annotated[
        Literal["average", "drop"] | None,
        typer.Option(help="What no model finds important: averaged, the default, or left out."),
    ] = None,
    shared_weights: Annotated[
        str | None,
        typer.Option(
            metavar="NEW,HISTORICAL",
            help="Weights where both sides are important: 0.4,0.6, or 0.3,0.7 under kif.",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the adaptive rules; 0.25 if not given.")
    ] = None,
    unit: Annotated[
        Literal["tensor", "lora-rank", "layer"] | None,
        typer.Option(help="Skill units of the kif rules, where they are given snapshots."),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Of the sum of task vectors; 1 if not given.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of a task vector that ties keeps; 0.2."),
    ] = None,
    normalise: Annotated[
        bool | None, typer.Option(help="Divide by the sum of the weights: linear does.")
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
    allow: AllowOption = None,
    nonfinite: NonfiniteOption = "refuse",
    config_from: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Whose configuration and tokenizer to copy; the base's."),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of the output's files, such as 5GB; like the base's."),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Of the output's weights; the base's if not given."),
    ] = None,
    fetch: FetchOption = "auto",
    private: Annotated[
        bool | None,
        typer.Option(help="Whether others must not see a repository that --out creates."),
    ] = None,
    workers: WorkersOption = None,
    device: DeviceOption = "cpu",
    dry_run: DryRunOption = False,
    disk_rate: DiskRateOption = None,
    network_rate: NetworkRateOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted merge into the same OUT.")
    ] = False,
    overwrite: ReplaceOption = False,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fuse checkpoints: new with historical knowledge, or any number, by what matters to each."""
    rates = parse_rates(disk_rate, network_rate, dry_run=dry_run)
    with collecting_seldom(), ranks_of_command(dry_run=dry_run) as ranks:
        from kifmerge.checkpoint.device import find_device
        from kifmerge.fusion.inputs import MergeInputs
        from kifmerge.fusion.rules import RULES
        from kifmerge.phases.merge import Merge, MergeOptions
        from kifmerge.phases.rebuild import recorded_merge

        folders = opener(fetch, quiet=quiet, ranks=ranks)
        expected = None
        told: dict[str, Any] = {
            "important_fraction": important_fraction,
            "scope": scope,
            "redundant": redundant,
            "shared_weights": shared_weights,
            "temperature": temperature,
            "unit": unit,
            "scale": scale,
            "density": density,
            "normalise": normalise,
            "weights": tuple(weight) if weight else None,
        }
        with as_usage():
            if ranks.size > 1 and _is_repository(out):
                raise ValueError("a repository is made by one process: several make a folder")
            if file is not None:
                _refuse_beside_file(
                    rule, base, new, historical, model, given(told), new_importance,
                    historical_importance, importance, new_mask, historical_mask, mask, new_units,
                    historical_units, units, historical_parent, unscored, space, allow,
                    nonfinite != "refuse", config_from, shard_size, dtype,
                )  # fmt: skip
                recorded = recorded_merge(file, folders)
                inputs, options, further = recorded.inputs, recorded.rule, recorded.options
                expected = recorded.content
            else:
                models = _models(new, historical, model)
                scores = _by_role(
                    "importance", models, new_importance, historical_importance, importance
                )
                masks = _by_role("mask", models, new_mask, historical_mask, mask)
                inputs = MergeInputs(
                    base=folders.open(base) if base else None,
                    models=folders.open_each(models),
                    importance=folders.open_each(scores),
                    masks=folders.open_each(masks),
                    units=folders.open_each(
                        _by_role("units", models, new_units, historical_units, units)
                    ),
                    config_from=folders.open(config_from) if config_from else None,
                )
                options = _rule_options(rule, given(told), inputs)
                if historical_parent and not (
                    inputs.is_two_sided and RULES[options.rule].needs_base
                ):
                    raise ValueError(
                        "--historical-parent goes with --new and --historical under a rule on task "
                        "vectors"
                    )
                further = MergeOptions(
                    historical_parent=historical_parent,
                    unscored=unscored,
                    space=space,
                    allowed=parse_allowed(allow),
                    nonfinite=nonfinite,
                    shard_bytes=None if shard_size is None else parse_bytes(shard_size),
                    dtype=dtype,
                )
            merging = Merge(
                inputs,
                options,
                further,
                num_workers=workers_of_rank(workers, ranks),
                device=find_device(device, ranks.local_rank),
                spare_disk=_is_repository(out),
            )
        plan = merging.plan()
        if dry_run:
            found = merging.estimate(rates) if rates else None
            print_plan(plan, found, json_output=json_output)
            return
        destination = _destination(
            out,
            resume=resume,
            overwrite=overwrite,
            private=private,
            say=folders.say,
            ranks=ranks,
        )
        with reporting(
            "fusing", plan.num_parameters, quiet=quiet, is_first=ranks.is_first
        ) as on_progress:
            figures, is_new = merging.run(
                destination, expected=expected, on_progress=on_progress, ranks=ranks
            )
        if ranks.is_first:
            print_result(out, figures, is_new=is_new, json_output=json_output, quiet=quiet)


def _is_repository(out: str) -> bool:
    from kifmerge.hub.reference import SCHEME

    return out.startswith(SCHEME)


def _destination(
    out: str, *, resume: bool, overwrite: bool, private: bool | None, say: Say, ranks: Ranks
) -> Destination:
    if _is_repository(out):
        # Loads most of the Hub's client: not for a merge on this disk.
        from kifmerge.checkpoint.repository import RepositoryDestination
        from kifmerge.hub.target import parse_target

        return RepositoryDestination(target=parse_target(out), private=private, say=say)
    from kifmerge.checkpoint.destination import LocalDestination

    return LocalDestination(path=Path(out), resume=resume, overwrite=overwrite, ranks=ranks)


def _refuse_beside_file(*others: Any) -> None:
    """Refuse options beside a file that says all.

    Raises:
        ValueError: there are some.
    """
    if any(others):
        raise ValueError("the file says what is merged and how: leave out those options")


def _models(
    new: str | None, historical: str | None, models: Sequence[str] | None
) -> dict[str, str]:
    """Role -> model.

    Raises:
        ValueError: neither form, or both.
    """
    if models and (new or historical):
        raise ValueError("--model goes alone: without --new and --historical")
    if models:
        return {f"model_{number}": path for number, path in enumerate(models, 1)}
    if new is None or historical is None:
        raise ValueError("give --new and --historical, or --model once for each model")
    return {"new": new, "historical": historical}


def _by_role(
    kind: str,
    models: dict[str, str],
    new: str | None,
    historical: str | None,
    each: Sequence[str] | None,
) -> dict[str, str]:
    """Role -> what is known of its importance.

    Raises:
        ValueError: of the other form, or not one for each model.
    """
    is_two_sided = "new" in models
    if is_two_sided and each:
        raise ValueError(f"--{kind} goes with --model: give --new-{kind} and --historical-{kind}")
    if not is_two_sided and (new or historical):
        raise ValueError(f"--new-{kind} and --historical-{kind} go with --new and --historical")
    if is_two_sided:
        return given({"new": new, "historical": historical})
    if each and len(each) != len(models):
        raise ValueError(f"give --{kind} once for each of {len(models)} models, or not at all")
    return dict(zip(models, each or (), strict=False))


def _rule_options(
    rule: RuleName | None, chosen: dict[str, Any], inputs: MergeInputs
) -> FusionOptions:
    """The rule with its options; what it would not look at is a mistake.

    Raises:
        ValueError: naming the option.
    """
    from kifmerge.fusion.rules import RULES, FusionOptions

    if rule is None:
        raise ValueError("give --rule, or the kifmerge.json of a merge to make again")
    name = "average" if rule == "recurrent-average" else rule
    for option in chosen:
        flag = "--weight" if option == "weights" else f"--{option.replace('_', '-')}"
        if option not in RULES[name].options:
            raise ValueError(f"{flag} means nothing to {rule}")
        if inputs.masks and option in ("important_fraction", "scope"):
            raise ValueError(f"{flag} means nothing beside masks, which are made already")
        if inputs.units and option == "scope":
            raise ValueError(f"{flag} means nothing beside units, which have one threshold")
        if option == "shared_weights" and not inputs.is_two_sided:
            raise ValueError(f"{flag} goes with --new and --historical: give --weight")
        if option == "weights" and inputs.is_two_sided and not _is_baseline(name):
            raise ValueError(f"{flag} goes with --model: give --shared-weights")
        if option == "unit" and not inputs.importance:
            raise ValueError(f"{flag} goes with importance snapshots")
    if "shared_weights" in chosen:
        chosen = {**chosen, "shared_weights": _two_numbers(chosen["shared_weights"])}
    return FusionOptions(rule=name, **chosen)


def _is_baseline(rule: str) -> bool:
    return rule in ("linear", "task-arithmetic", "ties")


def _two_numbers(text: str) -> tuple[float, float]:
    try:
        new, historical = (float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(
            f"--shared-weights: expected two numbers such as 0.4,0.6, found {text}"
        ) from None
    return new, historical
