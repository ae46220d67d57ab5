"""The files of a pruning, shared by all ranks: a mask by its tensors, a checkpoint by its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kifmerge.checkpoint.mask import STEM, MaskSink, MaskSource
from kifmerge.checkpoint.pieces import Piece, pieces, read_piece, split_piece
from kifmerge.checkpoint.ranks import Ranks
from kifmerge.checkpoint.shared_folder import wait_for_files
from kifmerge.checkpoint.sink import FileRecord, FolderSink, layout_of
from kifmerge.checkpoint.source import FolderSource, Source
from kifmerge.checkpoint.workers import Workers
from kifmerge.fusion.checked import FiniteSource
from kifmerge.fusion.fuse import OnProgress
from kifmerge.fusion.unscored import Unscored, UnscoredTensors
from kifmerge.fusion.weights import Weights

ShowMask = Callable[[Piece], Tensor]

_PARTS = "parts"


def write_mask(
    directory: Path,
    evidence: Source,
    show: ShowMask,
    details: dict[str, Any],
    workers: Workers,
    ranks: Ranks,
    on_progress: OnProgress,
) -> None:
    """Write a mask.

    Args:
        directory: an existing folder, the same for all ranks.
        evidence: says names and shapes.
        show: bool for the parameters of a piece.
        details: content of ``mask.json``; gets ``num_important``.
        workers: share the work.
        ranks: share it too.
        on_progress: told the number of parameters marked after each piece.
    """
    on_progress = ranks.adding_up(on_progress)
    names = evidence.names()
    shapes = {name: evidence.info(name).shape for name in names}
    own = ranks.share(names, lambda name: evidence.info(name).numel)
    if ranks.is_first:
        sink = MaskSink(directory, shapes.items(), details)
    else:
        part_dir = _part_dir(directory, ranks.rank)
        part_dir.mkdir(parents=True)
        sink = MaskSink(part_dir, ((name, shapes[name]) for name in own), {})

    def write_piece(piece: Piece) -> tuple[int, int]:
        shown = show(piece)
        for part, values in split_piece(shown, piece):
            sink.add(part.name, part.start, values)
        return shown.numel(), int(torch.count_nonzero(shown))

    num_important = 0
    for num_marked, num_found in workers.map(write_piece, pieces(evidence, own)):
        num_important += num_found
        on_progress(num_marked)
    if not ranks.is_first:
        sink.commit()
    size = 0 if ranks.is_first else (part_dir / f"{STEM}.safetensors").stat().st_size
    found = ranks.to_first((num_important, size))
    if not ranks.is_first:
        return
    for rank, (_, num_bytes) in enumerate(found[1:], 1):
        part_dir = _part_dir(directory, rank)
        wait_for_files(part_dir, {f"{STEM}.safetensors": num_bytes}, ranks)
        sink.add_packed(MaskSource(part_dir).stored)
    if ranks.size > 1:
        shutil.rmtree(directory / _PARTS)
    details["num_important"] = sum(number for number, _ in found)  # written with the mask
    sink.commit()


def _part_dir(directory: Path, rank: int) -> Path:
    return directory / _PARTS / str(rank)


def write_pruned(
    directory: Path,
    base: FolderSource,
    weights: Weights,
    judged: Sequence[str],
    show: ShowMask,
    *,
    unscored: Unscored | None,
    workers: Workers,
    ranks: Ranks,
) -> dict[str, Any]:
    """Write the weights of a pruned checkpoint, in files like the base's.

    Args:
        directory: an existing folder, the same for all ranks.
        base: what unimportant parameters go back to.
        weights: of the base, and of the model to be pruned.
        judged: names of the tensors that the mask speaks of.
        show: bool for the parameters of a piece.
        unscored: whose other tensors are taken where they differ.
        workers: share the work.
        ranks: share it too.

    Returns:
        On the first rank, size and SHA-256 of each file by name.

    Raises:
        CheckpointError: NaN or infinity, or other tensors that differ.
    """
    is_judged = frozenset(judged).__contains__
    (model,) = weights.models
    others = [name for name in base.names() if not is_judged(name)]
    copies = UnscoredTensors(others, weights, unscored, workers, ranks)
    layout = layout_of(base)
    sizes = {file: sum(info.nbytes for _, info in infos) for file, infos in layout.items()}
    own = {file: layout[file] for file in ranks.share(layout, sizes.__getitem__)}
    sink = FolderSink(directory, base.stem, own)
    chosen, other = (
        source if weights.nonfinite == "keep" else FiniteSource(source) for source in (model, base)
    )

    def prune_piece(piece: Piece) -> None:
        # Chosen, not computed: base + (model - base) would round.
        kept = read_piece(other.read, piece)
        pruned = torch.where(show(piece), read_piece(chosen.read, piece).to(kept.dtype), kept)
        for part, values in split_piece(pruned, piece):
            sink.add(part.name, part.start, values)

    names = [name for infos in own.values() for name, _ in infos]
    work = pieces(base, filter(is_judged, names), kind_of=lambda name: model.info(name).dtype)
    for _ in workers.map(prune_piece, work):
        pass
    copies.copy([name for name in names if not is_judged(name)], sink)
    records = ranks.to_first([sink.finish(file).as_dict() for file in own])
    finished = {record["name"]: record for of_rank in records for record in of_rank}
    if not ranks.is_first:
        return {}
    if ranks.size > 1:
        wait_for_files(directory, {n: record["num_bytes"] for n, record in finished.items()}, ranks)
    every = [FileRecord(**finished[file]) for file in layout]
    FolderSink(directory, base.stem, layout, finished=every).commit()
    return {r.name: {"sha256": r.sha256, "bytes": r.num_bytes} for r in every}


def learn_digests(sources: Mapping[str, FolderSource], ranks: Ranks) -> None:
    """Let the first rank know the digests of tensors that the others have read."""
    own = {role: source.digests.finished() for role, source in sources.items()}
    for digests in ranks.to_first(own):
        for role, source in sources.items():
            source.digests.know(digests[role])
