"""What a published artifact derives from, as the front matter of its card says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kifmerge.checkpoint.provenance import read_details
from kifmerge.checkpoint.source import ADAPTER_CONFIG
from kifmerge.errors import CheckpointError
from kifmerge.fusion.inputs import EVIDENCE_ENDS
from kifmerge.hub.reference import Reference, parse_reference
from kifmerge.phases.card import hub_reference
from kifmerge.phases.parcel import Parcel

Relation = Literal["merge", "adapter", "finetune"]

# Roles of a command's parents that are models; of a merge all but evidence and configuration.
_MODEL_ROLES: Mapping[str, tuple[str, ...]] = {
    "prune": ("base", "model"),
    "train": ("model", "adapter"),
    "replay": ("model", "adapter"),
}
# The end of the name of an architecture, or the task of an adapter -> what it is used for.
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What a model or adapter derives from.

    Attributes:
        bases: on the Hub, at the commits that are known.
        local: what else, as it is recorded: on the disk of whoever made it.
        relation: of the artifact to its bases; None if it is not known.
    """

    bases: tuple[Reference, ...] = ()
    local: tuple[str, ...] = ()
    relation: Relation | None = None


def lineage_of(parcel: Parcel, told: Sequence[str] = ()) -> Lineage:
    """What the records of an artifact say of its bases; of evidence for merges, nothing.

    Args:
        parcel: what is published.
        told: repositories that are its bases, whatever is recorded.
    """
    made_by: Mapping[str, Any] = parcel.details.get("made_by") or {}
    is_model = parcel.kind in ("checkpoint", "adapter")
    relation = _relation(parcel, made_by.get("command")) if is_model else None
    if told or not is_model:
        given = tuple(Reference(repo_id=repo_id) for repo_id in told)
        return Lineage(bases=given, relation=relation)
    if parcel.kind == "adapter":
        found = [_base_of_adapter(parcel.directory)]
    elif made_by:
        found = [(str(p["reference"]), hub_reference(p)) for p in _models(made_by)]
    else:  # of a run, which records how its model is loaded
        model = parcel.details.get("model") or {}
        name = model.get("reference")
        found = [] if name is None else [(str(name), hub_reference({"reference": name}))]
    bases = {base.repo_id: base for _, base in found if base is not None}
    local = dict.fromkeys(text for text, base in found if base is None and text)
    return Lineage(bases=tuple(bases.values()), local=tuple(local), relation=relation)


def pipeline_tag(parcel: Parcel) -> str | None:
    """What the Hub should offer to do with a model; None where its configuration does not tell."""
    if parcel.kind == "adapter":
        task = read_details(parcel.directory / ADAPTER_CONFIG).get("task_type")
        return _PIPELINES.get(str(task))
    config = read_details(parcel.directory / "config.json")
    names = config.get("architectures") or [""]
    ends = (tag for end, tag in _PIPELINES.items() if str(names[0]).endswith(end))
    return next(ends, None)


def _relation(parcel: Parcel, command: str | None) -> Relation | None:
    if parcel.kind == "adapter":
        return "adapter"
    if command is None:
        return "finetune" if parcel.details.get("model") else None
    return "merge" if command == "merge" else "finetune"


def _models(made_by: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    parents: Mapping[str, Mapping[str, Any]] = made_by.get("parents") or {}
    roles = _MODEL_ROLES.get(str(made_by.get("command")))
    if roles is None:
        left_out = ("config_from",)
        roles = tuple(r for r in parents if r not in left_out and not r.endswith(EVIDENCE_ENDS))
    return [parents[role] for role in roles if role in parents]


def _base_of_adapter(directory: Path) -> tuple[str, Reference | None]:
    """What its configuration names: a repository, unless there is such a path here."""
    config = read_details(directory / ADAPTER_CONFIG)
    name = str(config.get("base_model_name_or_path") or "")
    try:
        found = parse_reference(name) if name else Path()
    except CheckpointError:
        found = Path(name)
    if not isinstance(found, Reference):
        return name, None
    revision = config.get("revision")
    return name, found if revision is None else found.pinned(str(revision))
