"""The card of what is published: how it was made, what it derives from, how to use it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.provenance import PROVENANCE_FILE, read_details
from kifmerge.errors import CheckpointError
from kifmerge.hub.target import Target
from kifmerge.phases.card import (
    card,
    command_section,
    facts_section,
    merge_section,
    rebuild_section,
    score_section,
)
from kifmerge.phases.inspect import Kind
from kifmerge.phases.licence import Licence
from kifmerge.phases.lineage import Lineage, pipeline_tag
from kifmerge.phases.parcel import IMPORTANCE_FOLDER, Parcel
from kifmerge.phases.report import Report

_REPORT_FILE = "results.json"
_REPORT_FORMAT = "kifmerge.report"


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What is said of an artifact that merges look at.

    Attributes:
        what: it is.
        record: name of its JSON.
        tag: of its card.
        rule: of a merge that shows its use.
        option: of that merge, after the side.
    """

    what: str
    record: str
    tag: str
    rule: str
    option: str


_EVIDENCE: Mapping[Kind, _Evidence] = {
    "importance snapshot": _Evidence(
        "how important each parameter of a model is to a task",
        "importance.json", "importance", "recurrent-kif", "importance",
    ),
    "mask": _Evidence(
        "which parameters of a model are important, one bit each",
        "mask.json", "mask", "recurrent-kif", "mask",
    ),
    "skill units": _Evidence(
        "how important each skill unit of a model is, the parameters that share one score",
        "units.json", "skill-units", "kif", "units",
    ),
}  # fmt: skip


def published_card(
    parcel: Parcel, target: Target, lineage: Lineage, licence: Licence, report: Report | None
) -> str:
    """Text of the card.

    Args:
        parcel: what is published.
        target: where.
        lineage: what it derives from.
        licence: of it.
        report: what a run measured.
    """
    of_kind = _EVIDENCE.get(parcel.kind)
    is_adapter = parcel.kind == "adapter"
    made_by: Mapping[str, Any] = parcel.details.get("made_by") or {}
    is_merge = made_by.get("command") == "merge"
    front = {
        "base_model": [base.repo_id for base in lineage.bases],
        "base_model_relation": lineage.relation if lineage.bases else None,
        "library_name": "kifmerge" if of_kind else "peft" if is_adapter else "transformers",
        **licence.front,
        "pipeline_tag": None if of_kind else pipeline_tag(parcel),
        "tags": [of_kind.tag if of_kind else "merge" if is_merge else parcel.kind, "kifmerge"],
    }
    middle = (
        _evidence_sections(of_kind, parcel, target)
        if of_kind
        else _model_sections(parcel, target, made_by)
    )
    sections = [
        *middle,
        "" if report is None else score_section(report),
        _origin_section(lineage, licence),
        rebuild_section(str(target), made_by) if is_merge else "",
    ]
    return card(front, target.repo_id.partition("/")[2], sections)


def read_report(run_dir: Path) -> Report:
    """The report that a finished run has left in its folder.

    Raises:
        CheckpointError: none there, or not a report.
    """
    path = run_dir / _REPORT_FILE
    content = read_details(path)
    if not content:
        raise CheckpointError(
            f"{path}: no report there: expected the folder of a run that has ended (kifmerge run)"
        )
    try:
        if content["format"] != _REPORT_FORMAT:
            raise ValueError(f"its format is {content['format']}")
        matrices = {
            score: {
                method: {int(seed): matrix for seed, matrix in by_seed.items()}
                for method, by_seed in methods.items()
            }
            for score, methods in content["matrices"].items()
        }
        return Report(
            content["name"],
            content["tasks"],
            matrices,
            content["num_steps"],
            content.get("num_nonfinite_steps", {}),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a report of a run ({error})") from error


def _model_sections(parcel: Parcel, target: Target, made_by: Mapping[str, Any]) -> list[str]:
    if not made_by:
        sections = ["How it was made is not recorded."]
    elif made_by["command"] == "merge":
        sections = [merge_section(made_by, parcel.details.get("merge", {}))]
    else:
        sections = [command_section(made_by, PROVENANCE_FILE)]
    if any(name.startswith(f"{IMPORTANCE_FOLDER}/") for name in parcel.files):
        where = f"hf://{target}/{IMPORTANCE_FOLDER}"
        sections.append(
            f"`{IMPORTANCE_FOLDER}/` tells how important each parameter was to this training: give "
            f"`{where}` to `kifmerge merge` as `--new-importance` or `--historical-importance`."
        )
    return sections


def _evidence_sections(kind: _Evidence, parcel: Parcel, target: Target) -> list[str]:
    details = parcel.details
    made_by = details.get("made_by")
    this = "historical" if details.get("role") == "historical" else "new"
    other = "new" if this == "historical" else "historical"
    hidden = ("format", "version", "made_by", "shapes", "not_in_files", "threshold")
    facts = {key: value for key, value in details.items() if key not in hidden}
    return [
        f"This tells {kind.what}: the evidence by which `kifmerge merge` fuses models.",
        command_section(made_by, kind.record) if made_by else "",
        facts_section(facts),
        f"""## How to use it

```sh
kifmerge merge --rule {kind.rule} --base BASE --new NEW --historical HISTORICAL \\
    --{this}-{kind.option} {target} --{other}-{kind.option} OTHER --out merged
```""",
    ]


def _origin_section(lineage: Lineage, licence: Licence) -> str:
    lines = []
    if lineage.local:
        names = ", ".join(f"`{name}`" for name in lineage.local)
        lines.append(f"It derives from {names} too, where it was made, and not on the Hub.")
    lines.append(licence.note)
    text = "\n\n".join(line for line in lines if line)
    return f"## Origin and licence\n\n{text}" if text else ""
