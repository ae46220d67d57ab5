"""Merging checkpoints into a folder like the base's: two sides of a training, or any number.

Weights and importance are read, fused and written in pieces, so that memory does not grow with the
model; each output file is noted when it is whole, so that a killed merge goes on from there; the
folder appears when all of it is. What is computed is what a round of the recurrent loop computes,
bit for bit.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from kifmerge.checkpoint.atomic import write_text
from kifmerge.checkpoint.companions import copy_companions, tell_dtype
from kifmerge.checkpoint.destination import Destination, LocalDestination
from kifmerge.checkpoint.header import DTYPES
from kifmerge.checkpoint.provenance import (
    PROVENANCE_FILE,
    made_by,
    write_provenance,
)
from kifmerge.checkpoint.ranks import ALONE, Ranks
from kifmerge.checkpoint.sink import Layout, layout_of, new_layout, with_dtype
from kifmerge.checkpoint.workers import num_processors, worker_pool
from kifmerge.errors import (
    check_at_least,
    check_choices,
)
from kifmerge.fusion.estimate import Estimate, Load, Rates, estimate
from kifmerge.fusion.fetching import settle, tell
from kifmerge.fusion.fuse import OnProgress
from kifmerge.fusion.inputs import HistoricalParent, MergeInputs, OpenInputs
from kifmerge.fusion.meaning import Difference
from kifmerge.fusion.rules import FusionOptions
from kifmerge.fusion.unscored import Unscored
from kifmerge.fusion.weights import Nonfinite
from kifmerge.hub.folder import HubFolder
from kifmerge.phases.card import model_card
from kifmerge.phases.licence import find_licence
from kifmerge.phases.merge_files import fuse_files
from kifmerge.phases.merge_plan import MergeNeeds, MergePlan
from kifmerge.phases.parents import refuse_unexpected

DtypeName = Literal["bfloat16", "float16", "float32"]
_TORCH_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """What a merge of files needs to be told beside its rule.

    Attributes:
        historical_parent: where the historical task vector starts; None finds out.
        unscored: what becomes of tensors without scores that differ; None refuses them.
        space: ``factor`` insists on fusing the factors of independent adapters.
        allowed: differences between the inputs that are meant.
        nonfinite: NaN and infinity in an input are refused, or carried on (``keep``).
        shard_bytes: size of the output's files at most; None: files like the base's.
        dtype: of the output's floating-point tensors; None: the base's.
    """

    historical_parent: HistoricalParent | None = None
    unscored: Unscored | None = None
    space: Literal["factor"] | None = None
    allowed: tuple[Difference, ...] = ()
    nonfinite: Nonfinite = "refuse"
    shard_bytes: int | None = None
    dtype: DtypeName | None = None

    def __post_init__(self) -> None:
        """Refuse choices that do not exist and numbers out of range."""
        check_choices(self)
        check_at_least(self, shard_bytes=1)


class Merge:
    """A merge whose inputs have been opened and found to belong together.

    Opening reads headers and JSON only; :meth:`run` does the work.

    Args:
        inputs: the folders.
        rule: the rule and its options.
        options: what else is to be known.
        num_workers: threads; None: one per processor.
        device: an accelerator to fuse on; None: the processor. The bytes are the same.
        spare_disk: of inputs on the Hub, keep no whole model on this disk.

    Raises:
        ValueError: inputs that the rule does not take, or not what it needs.
        CheckpointError: an input that cannot be used, or that does not belong to the others.
    """

    def __init__(
        self,
        inputs: MergeInputs,
        rule: FusionOptions,
        options: MergeOptions | None = None,
        *,
        num_workers: int | None = None,
        device: torch.device | None = None,
        spare_disk: bool = False,
    ) -> None:
        if rule.rule == "recurrent-kif" and not inputs.is_two_sided and rule.weights is None:
            rule = replace(rule, weights=(1.0,) * len(inputs.models))
        self.inputs = inputs
        self.rule = rule
        self.options = options or MergeOptions()
        if self.options.unscored == "base" and inputs.base is None:
            raise ValueError("there is no base whose tensors without scores could be taken")
        if self.options.unscored == "new" and not inputs.is_two_sided:
            raise ValueError(
                "no model is the new one, whose tensors without scores are to be taken"
            )
        self._open = OpenInputs(
            inputs,
            rule,
            historical_parent=self.options.historical_parent,
            space=self.options.space,
            allowed=self.options.allowed,
            nonfinite=self.options.nonfinite,
            device=device,
        )
        self._num_workers = num_processors() if num_workers is None else num_workers
        self._layout = self._find_layout()
        self._needs = MergeNeeds(
            opened=self._open,
            rule=rule,
            layout=self._layout,
            num_workers=self._num_workers,
            spare_disk=spare_disk,
        )
        self._settled = settle(
            self._needs.readings(), write_bytes=self._needs.write_bytes, spare_disk=spare_disk
        )

    @property
    def historical_parent(self) -> HistoricalParent | None:
        """Where the historical task vector starts, of the two-sided form."""
        return self._open.historical_parent

    def _find_layout(self) -> Layout:
        like, most_bytes = self._open.like.source, self.options.shard_bytes
        dtype = None if self.options.dtype is None else _TORCH_DTYPES[self.options.dtype]
        layout = with_dtype(layout_of(like), dtype)
        if most_bytes is None:
            return layout
        tensors = (tensor for infos in layout.values() for tensor in infos)
        return new_layout(tensors, like.stem, most_bytes)

    def plan(self) -> MergePlan:
        """What :meth:`run` is going to do, known from headers alone."""
        return self._needs.plan(self._settled)

    def estimate(self, rates: Rates) -> Estimate:
        """How long :meth:`run` takes at some rates of disk and network."""
        return estimate(self.load(), rates)

    def load(self) -> Load:
        """What :meth:`run` asks of the machine."""
        return self._needs.load(self._settled)

    def _recorded_options(self) -> dict[str, Any]:
        """All that the output depends on beside its inputs."""
        of_masks = ("important_fraction", "scope") if self.inputs.masks else ()
        rule = {key: value for key, value in self.rule.recorded().items() if key not in of_masks}
        return {**rule, **asdict(self.options), "historical_parent": self.historical_parent}

    def made_by(self, digests: Mapping[str, str | None] | None = None) -> dict[str, Any]:
        """What is recorded of how the output is made. Reads all that has not been read yet.

        Args:
            digests: role -> digest, where they need not be taken.
        """
        known = self._open.digests() if digests is None else digests
        return made_by("merge", self._recorded_options(), self.inputs.parents, known)

    def run(
        self,
        out: Path | Destination,
        *,
        overwrite: bool = False,
        resume: bool = False,
        expected: Mapping[str, Any] | None = None,
        on_progress: OnProgress = lambda num_fused: None,
        ranks: Ranks = ALONE,
    ) -> tuple[dict[str, Any], bool]:
        """Make the merged checkpoint.

        Args:
            out: becomes a checkpoint like the base: its files, configuration and tokenizer.
            overwrite: what a folder on this disk holds may go, once the merge is whole.
            resume: go on there from the files that an interrupted merge has finished.
            expected: content of a ``kifmerge.json`` that this merge is to make again.
            on_progress: told the number of parameters fused after each piece.
            ranks: share the work; several take a folder.

        Returns:
            What was found, and whether it was made now: False if it was there already.

        Raises:
            RunError: the folder holds something else, or an input, or is being made elsewhere.
            CheckpointError: NaN or infinity, tensors without scores that differ, or inputs that
                are not those expected.
            TryAgainError: the disk has no room, or network or server failed.
        """
        if isinstance(out, Path):
            out = LocalDestination(path=out, resume=resume, overwrite=overwrite, ranks=ranks)
        if ranks.size > 1 and out.repository is not None:
            raise ValueError("a repository is made by one process: several make a folder")
        self._open.refuse_shared_streams(ranks)
        out.refuse_inputs(self.inputs.parents.values())
        made = ranks.from_first(partial(out.find_made, PROVENANCE_FILE, self._known_made_by))
        if made is not None:
            return made["merge"], False
        description = {
            "command": "merge",
            "options": self._recorded_options(),
            "inputs": self._open.states(),
            "kifmerge": importlib.metadata.version("kifmerge"),
        }
        with out.begin(description) as work:
            tell(self._settled)
            with worker_pool(self._num_workers) as workers:
                figures, records = fuse_files(
                    self._open,
                    self._layout,
                    work,
                    workers,
                    ranks,
                    unscored=self.options.unscored,
                    most_bytes=self._needs.piece_bytes,
                    on_progress=on_progress,
                )
            if ranks.is_first:
                figures = {
                    "rule": self.rule.rule,
                    "historical_parent": self.historical_parent,
                } | figures
                self._complete(work.directory, figures, records, out.repository, expected)
        return ranks.from_first(lambda: figures), True

    def _known_made_by(self) -> dict[str, Any]:
        return self.made_by(self._open.known_digests())

    def _complete(
        self,
        directory: Path,
        figures: Mapping[str, Any],
        records: Mapping[str, Any],
        repository: str | None,
        expected: Mapping[str, Any] | None,
    ) -> None:
        """Write what belongs to a checkpoint beside its weights."""
        unchecked = self._open.unchecked_files
        if unchecked:
            warnings.warn(
                f"streamed in another order than they are stored in, and so not compared with "
                f"their hashes: {', '.join(unchecked)}; --fetch download compares them",
                stacklevel=3,
            )
        wanted = self.made_by()
        provenance = {
            **self._open.like.provenance,
            "made_by": wanted,
            "merge": figures,
            "files": records,
            "kifmerge": importlib.metadata.version("kifmerge"),
        }
        refuse_unexpected(provenance, expected)
        copy_companions(self.inputs.config_from or self._open.like.directory, directory)
        if self.options.dtype is not None:
            tell_dtype(directory / "config.json", self.options.dtype)
        write_text(directory / "README.md", self._card(wanted, figures, repository))
        write_provenance(directory, provenance)

    def _card(
        self, wanted: Mapping[str, Any], figures: Mapping[str, Any], repository: str | None
    ) -> str:
        like = self._open.like
        adapter_base = like.adapter_config.get("base_model_name_or_path")
        base = [] if self.inputs.base is None else [self.inputs.base]
        folders = dict.fromkeys([*base, *self.inputs.models.values()])
        licence = None
        if repository is not None:
            on_hub = [folder.reference for folder in folders if isinstance(folder, HubFolder)]
            licence = find_licence(on_hub)
            if licence.is_doubtful:
                warnings.warn(f"{licence.note} Set one in the card's front matter", stacklevel=4)
        return model_card(
            base_models=[adapter_base] if adapter_base else [str(folder) for folder in folders],
            library_name="peft" if like.is_adapter else "transformers",
            made_by=wanted,
            figures=figures,
            repository=repository,
            licence=licence,
        )
