"""Merging checkpoints: a base, a new and a historical one into a folder like the base's.

Weights and importance are read and written in pieces, so that memory does not grow with the model;
the folder appears when it is whole. What is computed is what a round of the recurrent loop
computes, bit for bit.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from kifmerge.checkpoint.atomic import whole_folder, write_text
from kifmerge.checkpoint.mask import MaskSource
from kifmerge.checkpoint.pieces import read_piece
from kifmerge.checkpoint.provenance import (
    PROVENANCE_FILE,
    is_made,
    made_by,
    read_provenance,
    write_provenance,
)
from kifmerge.checkpoint.scores import Scores, open_scores
from kifmerge.checkpoint.sink import FolderSink, copy_companions, layout_of
from kifmerge.errors import RunError
from kifmerge.phases.agreement import (
    is_replayed,
    open_checkpoint,
    refuse_differing,
    refuse_independent,
    refuse_other_base,
    refuse_other_evidence,
)
from kifmerge.phases.card import model_card
from kifmerge.phases.checked import FiniteSource, ZeroSource
from kifmerge.phases.fuse import (
    ROLES,
    Evidence,
    HistoricalParent,
    OnProgress,
    Weights,
    fuse,
    gather_evidence,
)
from kifmerge.phases.presets import RecurrentOptions, Role
from kifmerge.phases.rules import RULES
from kifmerge.phases.unscored import Unscored, copy_unscored


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeInputs:
    """Folders that a merge reads.

    Attributes:
        base: where the new task's training started.
        new: trained on the new task.
        historical: trained on memory of the earlier tasks.
        importance: role -> importance snapshot.
        masks: role -> mask, instead of snapshots.
    """

    base: Path
    new: Path
    historical: Path
    importance: Mapping[Role, Path]
    masks: Mapping[Role, Path]

    @property
    def parents(self) -> dict[str, Path]:
        """All of them, under the names that are recorded."""
        return {
            "base": self.base,
            "new": self.new,
            "historical": self.historical,
            **{f"{role}_importance": path for role, path in self.importance.items()},
            **{f"{role}_mask": path for role, path in self.masks.items()},
        }

    def check(self, rule: str) -> None:
        """Refuse importance that a rule does not take, or the lack of what it needs.

        Raises:
            ValueError: naming what it takes.
        """
        num_given = (len(self.importance), len(self.masks))
        expected, fitting = {
            "nothing": ("no importance", [(0, 0)]),
            "masks": ("importance snapshots of both sides, or masks of both", [(2, 0), (0, 2)]),
            "scores": ("importance snapshots of both sides", [(2, 0)]),
        }[RULES[rule].needs]
        if num_given not in fitting:
            found = [role.replace("_", " ") for role in self.parents if "_" in role]
            raise ValueError(f"{rule} takes {expected}, found {', '.join(found) or 'none'}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """What a merge of files needs to be told beside its rule.

    Attributes:
        historical_parent: where the historical task vector starts; None finds out.
        unscored: what becomes of tensors without scores that differ; None refuses them.
        space: ``factor`` insists on fusing the factors of independent adapters.
    """

    historical_parent: HistoricalParent | None = None
    unscored: Unscored | None = None
    space: Literal["factor"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """What a merge is going to do.

    Attributes:
        rule: its name.
        historical_parent: where the historical task vector starts.
        num_tensors: of the output.
        num_parameters: elements of the output.
        num_unscored_tensors: those that no rule can judge.
        weight_passes: how often all weights are read: for their digests, and to fuse them.
        importance_passes: how often scores or masks are read.
        read_bytes: in all.
        write_bytes: of the output's weights.
    """

    rule: str
    historical_parent: HistoricalParent
    num_tensors: int
    num_parameters: int
    num_unscored_tensors: int
    weight_passes: int
    importance_passes: int
    read_bytes: int
    write_bytes: int


class Merge:
    """A merge whose inputs have been opened and found to belong together.

    Opening reads headers and JSON only; :meth:`run` does the work.

    Args:
        inputs: the folders.
        rule: the rule and its options.
        options: what else is to be known.

    Raises:
        ValueError: importance that the rule does not take, or not the importance that it needs.
        CheckpointError: an input that cannot be used, or that does not belong to the others.
    """

    def __init__(
        self, inputs: MergeInputs, rule: RecurrentOptions, options: MergeOptions | None = None
    ) -> None:
        inputs.check(rule.rule)
        self.inputs = inputs
        self.rule = rule
        self.options = options or MergeOptions()
        self._base, self._new, self._historical = (
            open_checkpoint(role, getattr(inputs, role)) for role in ("base", "new", "historical")
        )
        # Whose files, configuration and records the output is like.
        self._model = self._new if self._starts_at_zero else self._base
        self._check_inputs()
        self._scores: dict[Role, Scores] = {r: open_scores(p) for r, p in inputs.importance.items()}
        self._masks: dict[Role, MaskSource] = {r: MaskSource(p) for r, p in inputs.masks.items()}
        self._check_evidence()
        self.historical_parent: HistoricalParent = self._find_parent()

    @property
    def _starts_at_zero(self) -> bool:
        """Whether adapters are fused on a whole model, which has no factors of its own."""
        return self._new.is_adapter and self._historical.is_adapter and not self._base.is_adapter

    def _check_inputs(self) -> None:
        if self._new.is_adapter and self._historical.is_adapter and self.options.space is None:
            refuse_independent(self._base, self._new, self._historical)
        compared = [self._new, self._historical]
        if self._starts_at_zero:
            for adapter in compared:
                refuse_other_base(self._base, adapter)
        else:
            compared = [self._base, *compared]
        refuse_differing(compared)

    def _check_evidence(self) -> None:
        given = self._given
        if given:
            paths = {**self.inputs.importance, **self.inputs.masks}
            refuse_other_evidence(
                self._model.source, {role: (paths[role], given[role]) for role in ROLES}
            )

    @property
    def _given(self) -> Mapping[Role, Scores | MaskSource]:
        return self._scores or self._masks

    def _find_parent(self) -> HistoricalParent:
        if self.options.historical_parent is not None:
            return self.options.historical_parent
        return "new" if is_replayed(self._historical, self._new) else "base"

    def _scored_names(self) -> list[str]:
        source = self._model.source
        if self._given:
            judged = set(self._given["new"].names())
            return [name for name in source.names() if name in judged]
        return [name for name in source.names() if source.info(name).dtype.is_floating_point]

    def plan(self) -> MergePlan:
        """What :meth:`run` is going to do, known from headers alone."""
        source = self._model.source
        infos = [source.info(name) for name in source.names()]
        write_bytes = sum(info.nbytes for info in infos)
        needs = RULES[self.rule.rule].needs
        # A digest of everything, then: two passes for a threshold, one for bounds, none for masks.
        importance_passes = 0 if needs == "nothing" else 2
        if self._scores:
            importance_passes += 2 if needs == "masks" else 1
        importance_bytes = sum(source.num_bytes for source in self._given.values())
        num_inputs = 2 if self._starts_at_zero else 3
        return MergePlan(
            rule=self.rule.rule,
            historical_parent=self.historical_parent,
            num_tensors=len(infos),
            num_parameters=sum(info.numel for info in infos),
            num_unscored_tensors=len(infos) - len(self._scored_names()),
            weight_passes=2,
            importance_passes=importance_passes,
            read_bytes=2 * num_inputs * write_bytes + importance_passes * importance_bytes,
            write_bytes=write_bytes,
        )

    def made_by(self) -> dict[str, Any]:
        """What is recorded of how the output is made. Reads everything for its digest."""
        named = RULES[self.rule.rule].options
        of_masks = ("important_fraction", "scope") if self._masks else ()
        chosen = {key: getattr(self.rule, key) for key in named if key not in of_masks}
        options = {
            "rule": self.rule.rule,
            **chosen,
            **asdict(self.options),
            "historical_parent": self.historical_parent,
        }
        return made_by("merge", options, self.inputs.parents)

    def run(
        self,
        out_dir: Path,
        *,
        overwrite: bool = False,
        on_progress: OnProgress = lambda num_fused: None,
    ) -> tuple[dict[str, Any], bool]:
        """Make the merged checkpoint.

        Args:
            out_dir: becomes a checkpoint like the base: its files, configuration and tokenizer.
            overwrite: what the folder holds may go, once the merge is whole.
            on_progress: told the number of parameters fused after each piece.

        Returns:
            What was found, and whether it was made now: False if it was there already.

        Raises:
            RunError: the folder holds something else, or an input.
            CheckpointError: NaN or infinity, or tensors without scores that differ.
        """
        self._refuse_inputs_inside(out_dir)
        wanted = self.made_by()
        if is_made(out_dir, PROVENANCE_FILE, wanted, overwrite=overwrite):
            return read_provenance(out_dir)["merge"], False
        with whole_folder(out_dir, overwrite=overwrite) as temporary:
            source = self._model.source
            sink = FolderSink(temporary, source.stem, layout_of(source))
            figures = self._fuse_into(sink, on_progress)
            sink.commit()
            copy_companions(self._model.directory, temporary)
            write_text(temporary / "README.md", self._card(wanted, figures))
            write_provenance(
                temporary,
                {
                    **self._model.provenance,
                    "made_by": wanted,
                    "merge": figures,
                    "kifmerge": importlib.metadata.version("kifmerge"),
                },
            )
        return figures, True

    def _fuse_into(self, sink: FolderSink, on_progress: OnProgress) -> dict[str, Any]:
        base = ZeroSource(self._new.source) if self._starts_at_zero else self._base.source
        weights = Weights(
            base=FiniteSource(base),
            new=FiniteSource(self._new.source),
            historical=FiniteSource(self._historical.source),
            historical_parent=self.historical_parent,
        )
        scored = self._scored_names()
        others = sorted(set(self._model.source.names()) - set(scored))
        differing = copy_unscored(others, weights, self.options.unscored, sink)
        evidence = self._evidence()
        shares = fuse(scored, weights, evidence, self.rule, sink, on_progress=on_progress)
        thresholds = dict(zip(ROLES, evidence.thresholds if evidence else (), strict=False))
        return {
            "rule": self.rule.rule,
            "historical_parent": self.historical_parent,
            "num_tensors": len(scored) + len(others),
            "num_parameters": sum(self._model.source.info(name).numel for name in scored),
            "num_copied_tensors": len(others) - len(differing),
            "num_unscored_tensors": len(differing),
            **{f"{role}_threshold": x for role, x in thresholds.items() if x is not None},
            **shares,
        }

    def _evidence(self) -> Evidence | None:
        if self._masks:
            new, historical = (partial(read_piece, self._masks[role].read) for role in ROLES)
            return Evidence(new=new, historical=historical)
        return gather_evidence({r: FiniteSource(s) for r, s in self._scores.items()}, self.rule)

    def _refuse_inputs_inside(self, out_dir: Path) -> None:
        for path in self.inputs.parents.values():
            if out_dir.resolve() in path.resolve().parents:
                raise RunError(f"{out_dir} holds an input, {path}: choose another folder")

    def _card(self, wanted: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
        adapter_base = self._model.adapter_config.get("base_model_name_or_path")
        references = [str(self.inputs.base), str(self.inputs.new), str(self.inputs.historical)]
        return model_card(
            base_models=[adapter_base] if adapter_base else list(dict.fromkeys(references)),
            library_name="peft" if self._model.is_adapter else "transformers",
            made_by=wanted,
            figures=figures,
        )
