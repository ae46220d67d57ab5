"""The files of a merged checkpoint, one after the other; each is noted when it is on the disk."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kifmerge.checkpoint.destination import Work
from kifmerge.checkpoint.mask import MaskSource
from kifmerge.checkpoint.pieces import pieces, read_piece
from kifmerge.checkpoint.sink import FileRecord, FolderSink, Layout
from kifmerge.checkpoint.source import FolderSource
from kifmerge.checkpoint.workers import Workers
from kifmerge.errors import DamagedTransferError
from kifmerge.hub.folder import HubFolder
from kifmerge.phases.fuse import OnProgress, Overlap, fuse
from kifmerge.phases.inputs import OpenInputs
from kifmerge.phases.rules import FusionOptions
from kifmerge.phases.unscored import Unscored, UnscoredTensors


def fuse_files(
    inputs: OpenInputs,
    layout: Layout,
    rule: FusionOptions,
    work: Work,
    workers: Workers,
    *,
    unscored: Unscored | None,
    most_bytes: int,
    on_progress: OnProgress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make all files that are not finished yet, and the index.

    Args:
        inputs: what is read.
        layout: of the output.
        rule: with its options.
        work: where the files go.
        workers: share the work.
        unscored: what becomes of tensors without scores that differ.
        most_bytes: of a piece.
        on_progress: told the number of parameters fused after each piece.

    Returns:
        What was found, and size and SHA-256 of each file by name.

    Raises:
        CheckpointError: NaN or infinity, or tensors without scores that differ.
        TryAgainError: the disk has no room, network or server failed, or what an interrupted merge
            has used came damaged.
    """
    left = {name: infos for name, infos in layout.items() if name not in work.finished}
    work.refuse_full_disk([sum(info.nbytes for _, info in infos) for infos in left.values()])
    finished = _take_over(work, inputs)
    scored = inputs.scored_names()
    is_scored = frozenset(scored)
    others = [name for name in inputs.like.source.names() if name not in is_scored]
    copies = UnscoredTensors(others, inputs.weights, unscored, workers)
    evidence = inputs.evidence(scored, workers)
    sink = FolderSink(work.directory, inputs.like.source.stem, layout, finished=finished)

    def fuse_file(names: Sequence[str]) -> Overlap:
        overlap = Overlap()
        # In the order of the file, which is hashed while it is written.
        for is_judged, run in itertools.groupby(names, key=is_scored.__contains__):
            if not is_judged:
                copies.copy(run, sink)
                continue
            found = fuse(
                run, inputs.weights, evidence, rule, sink,
                workers=workers, most_bytes=most_bytes, on_progress=on_progress,
            )  # fmt: skip
            overlap.add(found)
        return overlap

    # Waiting for the disk costs no processor: the next file is begun meanwhile.
    with ThreadPoolExecutor(1, "kifmerge-disk") as disk:
        noted: list[Future[None]] = []
        for file_name, infos in left.items():
            names = [name for name, _ in infos]
            overlap = fuse_file(names)
            if work.holds_one:
                # In this thread, where Ctrl-C ends the wait.
                _finish(file_name, names, overlap, inputs, sink, work)
                continue
            noted.append(disk.submit(_finish, file_name, names, overlap, inputs, sink, work))
            for done in filter(Future.done, noted):
                done.result()
        for pending in noted:
            pending.result()
    sink.commit()
    total = sum((_recorded_overlap(record) for record in work.finished.values()), Overlap())
    figures = {
        "num_tensors": len(scored) + len(others),
        "num_parameters": sum(inputs.like.source.info(name).numel for name in scored),
        "num_copied_tensors": len(others) - len(copies.differing),
        "num_unscored_tensors": len(copies.differing),
        **{f"{role}_threshold": value for role, value in evidence.thresholds.items()},
        **total.shares(list(inputs.inputs.models)),
    }
    records = {
        name: {"sha256": record.sha256, "bytes": record.num_bytes}
        for name, record in sorted(sink.records.items())
    }
    return figures, records


def _take_over(work: Work, inputs: OpenInputs) -> list[FileRecord]:
    """The files that an interrupted merge has finished, and what it knew of their inputs."""
    unchecked: set[str] = set()
    for record in work.finished.values():
        unchecked.update(record["unchecked"])
    for role, source in _streamable(inputs).items():
        known: dict[str, str] = {}
        for record in work.finished.values():
            known |= record["digests"].get(role, {})
        _read_again(source, known)
        source.digests.know(known)
    if unchecked:
        warnings.warn(
            "streamed by the interrupted merge in another order than they are stored in, and so "
            f"not compared with their hashes: {', '.join(sorted(unchecked))}",
            stacklevel=3,
        )
    return [
        FileRecord(name, record["num_bytes"], record["sha256"])
        for name, record in work.finished.items()
    ]


def _streamable(inputs: OpenInputs) -> dict[str, FolderSource]:
    """Role -> what is read once, along with the files of the output: weights and masks."""
    masks = {
        f"{role}_mask": evidence.stored
        for role, (_, evidence) in inputs.evidence_sources.items()
        if isinstance(evidence, MaskSource)
    }
    return {**inputs.sources, **masks}


def _read_again(source: FolderSource, known: Mapping[str, str]) -> None:
    """Stream again what an interrupted merge has used of files that it did not stream whole.

    Only whole files can be compared with their hashes: what it used may have come damaged.

    Args:
        source: of tensors.
        known: tensor -> digest that it had then.

    Raises:
        DamagedTransferError: it has another one now.
    """
    folder = source.directory
    if not isinstance(folder, HubFolder) or folder.fetch != "stream":
        return
    for file_name, names in source.files.items():
        file = folder.open(file_name)
        used = [name in known for name in names if source.info(name).numel]
        if file.is_here or all(used) or not any(used):
            continue
        folder.say(f"{file.label}: pulling again what the interrupted merge used, to compare it")
        for piece in pieces(source, [name for name in names if name in known]):
            read_piece(source.read, piece)
        found = source.digests.finished(names)
        differing = [name for name in found if name in known and found[name] != known[name]]
        if differing:
            raise DamagedTransferError(
                f"{file.label}: {differing[0]} came otherwise than to the interrupted merge: what "
                "that made of it is not to be kept"
            )


def _finish(
    file_name: str,
    names: Sequence[str],
    overlap: Overlap,
    inputs: OpenInputs,
    sink: FolderSink,
    work: Work,
) -> None:
    """Bring a file to the disk, and note it with all that need not be read again for it."""
    digests = {role: s.digests.finished(names) for role, s in _streamable(inputs).items()}
    work.note(
        {
            **sink.finish(file_name).as_dict(),
            "overlap": {"counts": overlap.counts, "num_marked": overlap.num_marked},
            "digests": digests,
            "unchecked": inputs.unchecked_files,
        }
    )


def _recorded_overlap(record: Mapping[str, Any]) -> Overlap:
    return Overlap(record["overlap"]["counts"], record["overlap"]["num_marked"])
