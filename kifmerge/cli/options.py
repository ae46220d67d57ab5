"""Options that several commands share, under one name and with one help text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from kifmerge.fusion.estimate import Rates

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
DiskRateOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="With --dry-run: what the disk reads and writes a second, such as 500MB; estimates "
        "the time.",
    ),
]
NetworkRateOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="With --dry-run: what the network brings or takes a second."),
]
FractionOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of parameters found important; 0.2 if not given."),
]
ScopeOption = Annotated[
    Literal["global", "tensor"] | None,
    typer.Option(help="One threshold over the whole model, the default, or one per tensor."),
]
AllowOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIFFERENCE",
        help="A difference between the inputs that is meant: config, labels, vocab, tokenizer, "
        "chat-template, adapter, adapter-base or dtype; may be repeated.",
    ),
]
NonfiniteOption = Annotated[
    Literal["refuse", "keep"],
    typer.Option(help="NaN and infinity in the weights: an error, or carried on."),
]
FetchOption = Annotated[
    Literal["auto", "download", "stream"],
    typer.Option(
        help="Weights on the Hub: download them into the cache, stream them without keeping them, "
        "or what suits the work and the disk."
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(metavar="cpu|cuda|cuda:N", help="Where weights are fused; the same bytes."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, help="Threads that read, compute and write; one per processor."),
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


def given(options: Mapping[Any, Any]) -> dict[Any, Any]:
    """Those of some options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def parse_allowed(names: Sequence[str] | None) -> Any:
    """``--allow`` options as differences.

    Raises:
        BadParameter: one that does not exist.
    """
    from kifmerge.fusion.meaning import MEANINGS

    for name in names or ():
        if name not in MEANINGS:
            raise typer.BadParameter(f"--allow {name}: expected one of {', '.join(MEANINGS)}")
    return tuple(names or ())


def parse_rates(disk: str | None, network: str | None, *, dry_run: bool) -> Rates:
    """``--disk-rate`` and ``--network-rate``, such as 500MB or 500MB/s.

    Raises:
        BadParameter: no such rate, or nothing to estimate.
    """
    from kifmerge.fusion.estimate import Rates

    found = given({"--disk-rate": disk, "--network-rate": network})
    if found and not dry_run:
        raise typer.BadParameter(f"{', '.join(found)}: only --dry-run estimates how long it takes")
    rates = {}
    for option, text in found.items():
        try:
            rates[option] = parse_bytes(text.removesuffix("/s"))
        except typer.BadParameter as error:
            raise typer.BadParameter(f"{option}: {error}") from error
    return Rates(disk=rates.get("--disk-rate"), network=rates.get("--network-rate"))


def parse_bytes(text: str) -> int:
    """A size such as 5GB, 500MB or 2GiB in bytes.

    Raises:
        BadParameter: no such size.

    >>> parse_bytes("500MB"), parse_bytes("2 GiB"), parse_bytes("1000")
    (500000000, 2147483648, 1000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise typer.BadParameter(f"{text!r} is no size: expected one such as 5GB, 500MB or 2GiB")
    power = " KMGT".index(match[2].upper() or " ")
    num_bytes = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if num_bytes < 1:
        raise typer.BadParameter(f"{text!r} is no size: expected at least one byte")
    return num_bytes
