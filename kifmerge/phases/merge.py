"""Merging checkpoints into a folder like the base's: two sides of a training, or any number.

Weights and importance are read, fused and written in pieces, so that memory does not grow with the
model; each output file is noted when it is whole, so that a killed merge goes on from there; the
folder appears when all of it is. What is computed is what a round of the recurrent loop computes,
bit for bit.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kifmerge.checkpoint.atomic import write_text
from kifmerge.checkpoint.companions import copy_companions, tell_dtype
from kifmerge.checkpoint.destination import Destination, LocalDestination
from kifmerge.checkpoint.header import DTYPES
from kifmerge.checkpoint.pieces import CPU_PIECE_BYTES
from kifmerge.checkpoint.provenance import (
    PROVENANCE_FILE,
    made_by,
    write_provenance,
)
from kifmerge.checkpoint.sink import Layout, layout_of, new_layout, with_dtype
from kifmerge.checkpoint.workers import num_processors, peak_bytes, worker_pool
from kifmerge.errors import (
    check_at_least,
    check_choices,
)
from kifmerge.hub.folder import HubFolder
from kifmerge.phases.card import model_card
from kifmerge.phases.fetching import settle, tell
from kifmerge.phases.fuse import OnProgress
from kifmerge.phases.fuse_files import fuse_files
from kifmerge.phases.inputs import HistoricalParent, MergeInputs, OpenInputs
from kifmerge.phases.licence import find_licence
from kifmerge.phases.meaning import Difference
from kifmerge.phases.parents import refuse_unexpected
from kifmerge.phases.rules import FusionOptions
from kifmerge.phases.selection import counting_bytes
from kifmerge.phases.unscored import Unscored
from kifmerge.phases.weights import Nonfinite

DtypeName = Literal["bfloat16", "float16", "float32"]
_TORCH_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}

# Libraries that a merge loads, its threads, and what the allocator keeps between pieces.
_SPARE_BYTES = 24 << 20
# Buffers of all workers together, and of one: where there are many, or more than two models and
# a base, pieces are smaller.
_MOST_BUFFER_BYTES = 96 << 20
_WORKER_BUFFER_BYTES = 13 << 20
LEAST_PIECE_BYTES = 1 << 16


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


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """What a merge is going to do.

    Attributes:
        rule: its name.
        historical_parent: where the historical task vector starts, of the two-sided form.
        num_models: that are merged.
        num_tensors: of the output.
        num_parameters: elements of the output.
        num_unscored_tensors: those that no rule can judge.
        num_files: of the output.
        weight_passes: how often the weights are read.
        importance_passes: how often scores or masks are read.
        read_bytes: in all, where no tensors without scores differ.
        write_bytes: of the output's weights.
        pulled_bytes: of weights, scores and masks that come over the network.
        fetch: how each input on the Hub is read, and why.
        peak_memory_bytes: about what the process will need: Python and torch, and the buffers of
            all workers together.
    """

    rule: str
    historical_parent: HistoricalParent | None
    num_models: int
    num_tensors: int
    num_parameters: int
    num_unscored_tensors: int
    num_files: int
    weight_passes: int
    importance_passes: int
    read_bytes: int
    write_bytes: int
    pulled_bytes: int
    fetch: tuple[str, ...]
    peak_memory_bytes: int


class Merge:
    """A merge whose inputs have been opened and found to belong together.

    Opening reads headers and JSON only; :meth:`run` does the work.

    Args:
        inputs: the folders.
        rule: the rule and its options.
        options: what else is to be known.
        num_workers: threads; None: one per processor.
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
        )
        self._num_workers = num_processors() if num_workers is None else num_workers
        self._layout = self._find_layout()
        readings = self._open.readings(
            num_passes=self._weight_passes, num_evidence_passes=self._importance_passes
        )
        self._settled = settle(readings, write_bytes=self._write_bytes, spare_disk=spare_disk)

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

    @property
    def _piece_bytes(self) -> int:
        """Of a piece as float32, so that the buffers of all workers stay within their budget."""
        num_workers = max(self._num_workers, 1)
        budget_bytes = min(_MOST_BUFFER_BYTES, num_workers * _WORKER_BUFFER_BYTES)
        return max(min(CPU_PIECE_BYTES, budget_bytes // self._num_buffers), LEAST_PIECE_BYTES)

    @property
    def _num_buffers(self) -> int:
        """Pieces alive at once: per source as stored and as float32, per rule a few, per worker."""
        return max(self._num_workers, 1) * (3 * len(self._open.weights.sources) + 4)

    @property
    def _scratch_bytes(self) -> int:
        """What all workers take together, and the allocator keeps; measured."""
        buffer_bytes = self._num_buffers * self._piece_bytes
        # What is shown of each model takes about as much as the models.
        scratch_bytes = _SPARE_BYTES + buffer_bytes * (1 if self.rule.needs == "nothing" else 2)
        if self.rule.needs == "largest" or (self.rule.needs == "masks" and self.inputs.importance):
            scratch_bytes += counting_bytes(self._num_workers)
        return scratch_bytes + sum(settled.buffer_bytes for settled in self._settled)

    @property
    def _weight_passes(self) -> int:
        return 3 if self.rule.needs == "largest" else 1

    @property
    def _importance_passes(self) -> int:
        """Two passes for a threshold, one for bounds or means, and one to fuse; masks only that."""
        if not self._open.evidence_bytes:
            return 0
        return {"masks": 3, "scores": 2}.get(self.rule.needs, 1) if self.inputs.importance else 1

    @property
    def _write_bytes(self) -> int:
        return sum(info.nbytes for infos in self._layout.values() for _, info in infos)

    def plan(self) -> MergePlan:
        """What :meth:`run` is going to do, known from headers alone."""
        infos = [info for infos in self._layout.values() for _, info in infos]
        scored = self._open.scored_names()
        importance_passes = self._importance_passes
        return MergePlan(
            rule=self.rule.rule,
            historical_parent=self.historical_parent,
            num_models=len(self.inputs.models),
            num_tensors=len(infos),
            num_parameters=sum(info.numel for info in infos),
            num_unscored_tensors=len(infos) - len(scored),
            num_files=len(self._layout),
            weight_passes=self._weight_passes,
            importance_passes=importance_passes,
            read_bytes=self._weight_bytes(scored) + importance_passes * self._open.evidence_bytes,
            write_bytes=self._write_bytes,
            pulled_bytes=sum(settled.pulled_bytes for settled in self._settled),
            fetch=tuple(map(str, self._settled)),
            peak_memory_bytes=peak_bytes() + self._scratch_bytes,
        )

    def _weight_bytes(self, scored: Sequence[str]) -> int:
        """What is read of weights: all of them once, what is copied and what is ranked again."""
        sources, weights = self._open.sources.values(), self._open.weights
        whole = {id(s): sum(s.info(name).nbytes for name in s.names()) for s in sources}
        judged = {id(s): sum(s.info(name).nbytes for name in scored) for s in sources}
        like = id(self._open.like.source)
        num_bytes = sum(whole.values()) + whole[like] - judged[like]
        if self.rule.needs == "largest":
            # Two passes for a threshold, over both ends of each task vector.
            ends = [*weights.models, *map(weights.parent, range(len(weights.models)))]
            num_bytes += 2 * sum(judged.get(id(source), 0) for source in ends)
        return num_bytes

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
    ) -> tuple[dict[str, Any], bool]:
        """Make the merged checkpoint.

        Args:
            out: becomes a checkpoint like the base: its files, configuration and tokenizer.
            overwrite: what a folder on this disk holds may go, once the merge is whole.
            resume: go on there from the files that an interrupted merge has finished.
            expected: content of a ``kifmerge.json`` that this merge is to make again.
            on_progress: told the number of parameters fused after each piece.

        Returns:
            What was found, and whether it was made now: False if it was there already.

        Raises:
            RunError: the folder holds something else, or an input, or is being made elsewhere.
            CheckpointError: NaN or infinity, tensors without scores that differ, or inputs that
                are not those expected.
            TryAgainError: the disk has no room, or network or server failed.
        """
        if isinstance(out, Path):
            out = LocalDestination(path=out, resume=resume, overwrite=overwrite)
        out.refuse_inputs(self.inputs.parents.values())
        made = out.find_made(PROVENANCE_FILE, lambda: self.made_by(self._open.known_digests()))
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
                    self.rule,
                    work,
                    workers,
                    unscored=self.options.unscored,
                    most_bytes=self._piece_bytes,
                    on_progress=on_progress,
                )
            unchecked = self._open.unchecked_files
            if unchecked:
                warnings.warn(
                    f"streamed in another order than they are stored in, and so not compared with "
                    f"their hashes: {', '.join(unchecked)}; --fetch download compares them",
                    stacklevel=2,
                )
            figures = {
                "rule": self.rule.rule,
                "historical_parent": self.historical_parent,
            } | figures
            wanted = self.made_by()
            provenance = {
                **self._open.like.provenance,
                "made_by": wanted,
                "merge": figures,
                "files": records,
                "kifmerge": importlib.metadata.version("kifmerge"),
            }
            refuse_unexpected(provenance, expected)
            copy_companions(self.inputs.config_from or self._open.like.directory, work.directory)
            if self.options.dtype is not None:
                tell_dtype(work.directory / "config.json", self.options.dtype)
            write_text(work.directory / "README.md", self._card(wanted, figures, out.repository))
            write_provenance(work.directory, provenance)
        return figures, True

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
                warnings.warn(f"{licence.note} Set one in the card's front matter", stacklevel=3)
        return model_card(
            base_models=[adapter_base] if adapter_base else [str(folder) for folder in folders],
            library_name="peft" if like.is_adapter else "transformers",
            made_by=wanted,
            figures=figures,
            repository=repository,
            licence=licence,
        )
