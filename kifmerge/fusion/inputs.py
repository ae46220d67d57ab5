"""What a merge reads: a base, models, and what is known of their importance, opened and checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from kifmerge.checkpoint.folder import Folder, file_sizes, has_file
from kifmerge.checkpoint.mask import MaskSource
from kifmerge.checkpoint.ranks import Ranks
from kifmerge.checkpoint.scores import Scores, open_scores
from kifmerge.checkpoint.source import ADAPTER_CONFIG, FolderSource, Source
from kifmerge.checkpoint.units import Units, UnitSource, read_units
from kifmerge.checkpoint.workers import Workers
from kifmerge.errors import CheckpointError
from kifmerge.fusion.agreement import (
    Checkpoint,
    is_replayed,
    open_checkpoint,
    refuse_independent,
    refuse_other_base,
    refuse_other_evidence,
)
from kifmerge.fusion.checked import FiniteSource, ZeroSource
from kifmerge.fusion.evidence import (
    NOTHING,
    Evidence,
    evidence_from_masks,
    evidence_from_scores,
    evidence_from_units,
    evidence_from_vectors,
)
from kifmerge.fusion.fetching import Reading
from kifmerge.fusion.fuse import ROLES
from kifmerge.fusion.meaning import Difference, check_config, check_meaning
from kifmerge.fusion.rules import RULES, FusionOptions, Needs
from kifmerge.fusion.weights import Nonfinite, Weights
from kifmerge.hub.folder import HubFolder

# Where the historical task vector starts: at the new task's weights when the historical training
# went on from there, as in the recurrent loop, or at the base.
HistoricalParent = Literal["new", "base"]

_TAKES: Mapping[Needs, tuple[str, tuple[str, ...]]] = {
    "nothing": ("no importance", ()),
    "largest": ("no importance", ()),
    "masks": ("importance snapshots of all models, masks of all, or units of all",
              ("importance", "masks", "units")),
    "scores": ("importance snapshots of all models, or units of all", ("importance", "units")),
    "unit-masks": ("units of both sides, or importance snapshots or masks of both",
                   ("units", "importance", "masks")),
    "unit-scores": ("units of both sides, or importance snapshots of both",
                    ("units", "importance")),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeInputs:
    """Folders that a merge reads.

    Attributes:
        base: where task vectors start; None for rules that work on weights alone.
        models: role -> folder: ``new`` and ``historical``, or ``model_1``, ``model_2``...
        importance: role -> importance snapshot.
        masks: role -> mask, instead.
        units: role -> skill units, instead.
        config_from: whose configuration and tokenizer the output gets; None: the base's.
    """

    base: Folder | None
    models: Mapping[str, Folder]
    importance: Mapping[str, Folder] = field(default_factory=dict)
    masks: Mapping[str, Folder] = field(default_factory=dict)
    units: Mapping[str, Folder] = field(default_factory=dict)
    config_from: Folder | None = None

    @property
    def parents(self) -> dict[str, Folder]:
        """All of them, under the names that are recorded."""
        return {
            **({} if self.base is None else {"base": self.base}),
            **self.models,
            **{f"{role}_importance": path for role, path in self.importance.items()},
            **{f"{role}_mask": path for role, path in self.masks.items()},
            **{f"{role}_units": path for role, path in self.units.items()},
            **({} if self.config_from is None else {"config_from": self.config_from}),
        }

    @property
    def is_two_sided(self) -> bool:
        """Whether these are the new and the historical side of one training."""
        return tuple(self.models) == ROLES

    def check(self, options: FusionOptions) -> None:
        """Refuse inputs that a rule does not take, or the lack of what it needs.

        Raises:
            ValueError: naming what it takes.
        """
        rule = RULES[options.rule]
        if rule.two_sided and not self.is_two_sided:
            raise ValueError(f"{options.rule} takes one new and one historical model")
        if rule.needs_base and self.base is None:
            raise ValueError(f"{options.rule} works on task vectors: it takes a base")
        if options.weights is not None and len(options.weights) != len(self.models):
            raise ValueError(
                f"expected one weight for each of {len(self.models)} models, "
                f"found {len(options.weights)}"
            )
        expected, kinds = _TAKES[rule.needs]
        given = {
            kind: set(getattr(self, kind))
            for kind in ("importance", "masks", "units")
            if getattr(self, kind)
        }
        complete = [kind for kind in kinds if given.get(kind) == set(self.models)]
        if (kinds and len(complete) != 1) or len(given) != len(complete):
            named = [r.replace("_", " ") for r in self.parents if r.endswith(EVIDENCE_ENDS)]
            raise ValueError(f"{options.rule} takes {expected}, found {', '.join(named) or 'none'}")


EVIDENCE_ENDS = ("_importance", "_mask", "_units")


class OpenInputs:
    """Inputs that have been opened, from headers and JSON alone, and found to belong together.

    Args:
        inputs: the folders.
        rule: the rule and its options.
        historical_parent: where the historical task vector starts; None finds out.
        space: ``factor`` insists on fusing the factors of independent adapters.
        allowed: differences of meaning that are meant.
        nonfinite: whether NaN and infinity are errors.
        device: an accelerator to fuse on; None: the processor.

    Attributes:
        inputs: the folders.
        rule: the rule and its options.
        like: the checkpoint whose files, and unless told otherwise whose configuration, the output
            is like: the base, or the first model where there is none of its kind.
        evidence_sources: role -> folder and source of what is known of importance.
        weights: base and models, to be read.
        historical_parent: of the two-sided form, what was found; else None.

    Raises:
        ValueError: inputs that the rule does not take, or not what it needs.
        CheckpointError: an input that cannot be used, or that does not belong to the others.
    """

    def __init__(
        self,
        inputs: MergeInputs,
        rule: FusionOptions,
        *,
        historical_parent: HistoricalParent | None,
        space: Literal["factor"] | None,
        allowed: Collection[Difference],
        nonfinite: Nonfinite,
        device: torch.device | None = None,
    ) -> None:
        inputs.check(rule)
        self.inputs = inputs
        self.rule = rule
        self._base = None if inputs.base is None else open_checkpoint("base", inputs.base)
        self._models = {role: open_checkpoint(role, path) for role, path in inputs.models.items()}
        first = next(iter(self._models.values()))
        # Adapters on a whole model, which has no factors of its own, start at zero.
        starts_at_zero = first.is_adapter and self._base is not None and not self._base.is_adapter
        self.like = first if self._base is None or starts_at_zero else self._base
        self._check_models(starts_at_zero, space, allowed)
        self._check_config_from(allowed)
        self._scores: dict[str, Scores] = {r: open_scores(p) for r, p in inputs.importance.items()}
        self._masks: dict[str, MaskSource] = {r: MaskSource(p) for r, p in inputs.masks.items()}
        self._units: dict[str, Units] = {r: read_units(p) for r, p in inputs.units.items()}
        self._unchecked_elsewhere: set[str] = set()
        self.evidence_sources = self._find_evidence()
        if self.evidence_sources:
            refuse_other_evidence(self.like.source, self.evidence_sources)
        self.historical_parent = self._find_parent(historical_parent)
        base: Source | None = None if self._base is None else self._base.source
        self.weights = Weights(
            base=ZeroSource(first.source) if starts_at_zero else base,
            models=[model.source for model in self._models.values()],
            parents=[None, 0] if self.historical_parent == "new" else [],
            nonfinite=nonfinite,
            device=device,
        )

    def _check_models(
        self,
        starts_at_zero: bool,
        space: Literal["factor"] | None,
        allowed: Collection[Difference],
    ) -> None:
        models = list(self._models.values())
        if all(model.is_adapter for model in models) and space is None and len(models) > 1:
            refuse_independent(self._base, models)
        compared = models
        if self._base is not None and starts_at_zero:
            for adapter in models:
                refuse_other_base(self._base, adapter)
        elif self._base is not None:
            compared = [self._base, *models]
        if len(compared) > 1:
            check_meaning(compared, allowed)

    def _check_config_from(self, allowed: Collection[Difference]) -> None:
        folder = self.inputs.config_from
        if folder is None:
            return
        check_config(self.like, folder, allowed)
        name = ADAPTER_CONFIG if self.like.is_adapter else "config.json"
        if not has_file(folder, name):
            raise CheckpointError(f"{folder} holds no {name}, which the output is to get")

    def _find_evidence(self) -> dict[str, tuple[Folder, Source]]:
        like = self.like.source
        inputs = self.inputs
        return {
            **{role: (inputs.importance[role], scores) for role, scores in self._scores.items()},
            **{role: (inputs.masks[role], mask) for role, mask in self._masks.items()},
            **{
                role: (inputs.units[role], UnitSource(u, like, [True] * len(u.units), role))
                for role, u in self._units.items()
            },
        }

    @property
    def evidence_bytes(self) -> int:
        """What reading all scores or masks once reads."""
        scores, masks = self._scores.values(), self._masks.values()
        return sum(s.num_bytes for s in scores) + sum(m.num_bytes for m in masks)

    def _find_parent(self, told: HistoricalParent | None) -> HistoricalParent | None:
        if not self.inputs.is_two_sided:
            return None
        if told is not None:
            return told
        new, historical = self._models.values()
        return "new" if is_replayed(historical, new) else "base"

    @property
    def sources(self) -> dict[str, FolderSource]:
        """Role -> weights of every model that is read."""
        checkpoints: dict[str, Checkpoint] = dict(self._models)
        if self._base is not None and self.weights.base is self._base.source:
            checkpoints["base"] = self._base
        return {role: checkpoint.source for role, checkpoint in checkpoints.items()}

    def readings(self, *, num_passes: int, num_evidence_passes: int) -> list[Reading]:
        """What is going to be read, in the order of the output's files.

        Args:
            num_passes: over the weights.
            num_evidence_passes: over scores or masks.
        """
        names = self.like.source.names()
        found = [
            Reading(source=source, names=names, num_passes=num_passes)
            for source in self.sources.values()
        ]
        judged = frozenset(self.scored_names())
        unjudged = [name for name in names if name not in judged]
        if unjudged:  # compared first, and then handed on
            found.append(Reading(source=self.like.source, names=unjudged))
        stored = [scores.stored for scores in self._scores.values()]
        stored += [mask.stored for mask in self._masks.values()]
        found += [
            Reading(source=source, names=source.names(), num_passes=num_evidence_passes)
            for source in stored
            if isinstance(source, FolderSource)
        ]
        return found

    def scored_names(self) -> list[str]:
        """Names of the tensors that the rule judges, in the order of the output's files."""
        source = self.like.source
        given = self.evidence_sources
        if given:
            judged = set(next(iter(given.values()))[1].names())
            return [name for name in source.names() if name in judged]
        return [name for name in source.names() if source.info(name).dtype.is_floating_point]

    def evidence(self, names: Sequence[str], workers: Workers, ranks: Ranks) -> Evidence:
        """What the rule is shown of each model; reads the scores, or the weights, for thresholds.

        Raises:
            CheckpointError: NaN or infinity among them.
        """
        roles = list(self._models)
        if self._masks:
            return evidence_from_masks({role: self._masks[role] for role in roles})
        if self._units:
            units = {role: self._units[role] for role in roles}
            return evidence_from_units(units, self.like.source, self.rule)
        if self._scores:
            scores = {role: FiniteSource(self._scores[role]) for role in roles}
            return evidence_from_scores(scores, self.rule, workers, ranks)
        if self.rule.needs == "largest":
            return evidence_from_vectors(self.weights, names, self.rule, workers, ranks)
        return NOTHING

    def digests(self) -> dict[str, str | None]:
        """Role -> digest of every input, as provenance records it; reads what was not read yet."""
        return {role: source.fingerprint() for role, source in self._read_sources.items()}

    def known_digests(self) -> dict[str, str | None]:
        """Role -> digest, without reading what is on the Hub: those are known by their commits."""
        return {
            role: None if isinstance(self.inputs.parents[role], HubFolder) else source.fingerprint()
            for role, source in self._read_sources.items()
        }

    @property
    def _read_sources(self) -> dict[str, Source]:
        known: dict[str, Source] = {**self.sources}
        known |= {f"{role}_importance": scores for role, scores in self._scores.items()}
        known |= {f"{role}_mask": mask for role, mask in self._masks.items()}
        return known

    @property
    def streamable(self) -> dict[str, FolderSource]:
        """Role -> what is read once, along with the files of the output: weights and masks."""
        masks = {f"{role}_mask": mask.stored for role, mask in self._masks.items()}
        return {**self.sources, **masks}

    @property
    def stored(self) -> dict[str, FolderSource]:
        """Role -> the files of every input whose tensors have digests."""
        scores = {f"{role}_importance": scores.stored for role, scores in self._scores.items()}
        files = {role: s for role, s in scores.items() if isinstance(s, FolderSource)}
        return {**self.streamable, **files}

    @property
    def _hub_folders(self) -> list[HubFolder]:
        parents = dict.fromkeys(self.inputs.parents.values())
        return [folder for folder in parents if isinstance(folder, HubFolder)]

    def refuse_shared_streams(self, ranks: Ranks) -> None:
        """Refuse that several ranks stream: no part of a file can be compared with its hash.

        Raises:
            ValueError: they would.
        """
        streamed = [str(folder) for folder in self._hub_folders if folder.fetch != "download"]
        if streamed and ranks.size > 1:
            raise ValueError(f"several processes download: {', '.join(streamed)} is streamed")

    @property
    def unchecked_files(self) -> list[str]:
        """Files on the Hub that were streamed in an order in which no hash could be taken."""
        own = {f"{folder}/{name}" for folder in self._hub_folders for name in folder.unchecked}
        return sorted(own | self._unchecked_elsewhere)

    def seen(self) -> dict[str, Any]:
        """What was found out while reading, for :meth:`learn` of another rank."""
        digests = {role: source.digests.finished() for role, source in self.stored.items()}
        return {"digests": digests, "unchecked": self.unchecked_files}

    def learn(self, seen: Mapping[str, Any]) -> None:
        """Take over what another rank has seen."""
        for role, source in self.stored.items():
            source.digests.know(seen["digests"][role])
        self._unchecked_elsewhere.update(seen["unchecked"])

    def states(self) -> dict[str, Any]:
        """Role -> reference, and names, sizes and times of its files: what a resumed work needs."""
        return states(self.inputs.parents)


def states(parents: Mapping[str, Folder]) -> dict[str, Any]:
    """Role -> reference of a folder, and names, sizes and times of its files."""
    return {
        role: {"reference": str(folder), "files": _file_states(folder)}
        for role, folder in parents.items()
    }


def _file_states(folder: Folder) -> list[list[Any]]:
    """What changes when a file does; of a commit nothing can."""
    if isinstance(folder, HubFolder):
        return []
    sizes = file_sizes(folder)
    return [[name, size, (folder / name).stat().st_mtime_ns] for name, size in sizes.items()]
