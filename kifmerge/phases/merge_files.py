"""The files of a merged checkpoint, one after the other; each is noted when it is on the disk.

Several ranks look for thresholds together, and each makes some of the files.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kifmerge.checkpoint.destination import Work
from kifmerge.checkpoint.pieces import pieces, read_piece
from kifmerge.checkpoint.ranks import Ranks
from kifmerge.checkpoint.shared_folder import wait_for_files
from kifmerge.checkpoint.sink import FileRecord, FolderSink, Layout
from kifmerge.checkpoint.source import FolderSource
from kifmerge.checkpoint.workers import Workers
from kifmerge.errors import DamagedTransferError
from kifmerge.fusion.fuse import OnProgress, Overlap, fuse
from kifmerge.fusion.inputs import OpenInputs
from kifmerge.fusion.unscored import Unscored, UnscoredTensors
from kifmerge.hub.folder import HubFolder


def fuse_files(
    inputs: OpenInputs,
    layout: Layout,
    work: Work,
    workers: Workers,
    ranks: Ranks,
    *,
    unscored: Unscored | None,
    most_bytes: int,
    on_progress: OnProgress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make all files that are not finished yet, and the index.

    What is returned, and all that is known of the inputs, is complete on the first rank alone.

    Args:
        inputs: what is read.
        layout: of the output.
        work: where the files go.
        workers: share the work.
        ranks: share it too.
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
    sizes = {name: sum(info.nbytes for _, info in infos) for name, infos in layout.items()}
    left = [name for name in layout if name not in work.finished]
    work.refuse_full_disk([sizes[name] for name in left])
    if ranks.is_first:
        _take_over(work, inputs)
    scored = inputs.scored_names()
    is_scored = frozenset(scored)
    others = [name for name in inputs.like.source.names() if name not in is_scored]
    copies = UnscoredTensors(others, inputs.weights, unscored, workers, ranks)
    evidence = inputs.evidence(scored, workers, ranks)
    on_progress = ranks.adding_up(on_progress)
    own = {name: layout[name] for name in ranks.share(left, sizes.__getitem__)}
    sink = FolderSink(work.directory, inputs.like.source.stem, own)

    def fuse_file(names: Sequence[str]) -> Overlap:
        overlap = Overlap()
        # In the order of the file, which is hashed while it is written.
        for is_judged, run in itertools.groupby(names, key=is_scored.__contains__):
            if not is_judged:
                copies.copy(run, sink)
                continue
            found = fuse(
                run, inputs.weights, evidence, inputs.rule, sink,
                workers=workers, most_bytes=most_bytes, on_progress=on_progress,
            )  # fmt: skip
            overlap.add(found)
        return overlap

    # Waiting for the disk costs no processor: the next file is begun meanwhile.
    with ThreadPoolExecutor(1, "kifmerge-disk") as disk:
        noted: list[Future[None]] = []
        for file_name, infos in own.items():
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
    finished = _bring_together(inputs, work, ranks)
    records = _write_index(inputs, layout, work, finished, ranks)
    total = sum((_recorded_overlap(record) for record in finished.values()), Overlap())
    figures = {
        "num_tensors": len(scored) + len(others),
        "num_parameters": sum(inputs.like.source.info(name).numel for name in scored),
        "num_copied_tensors": len(others) - len(copies.differing),
        "num_unscored_tensors": len(copies.differing),
        **{f"{role}_threshold": value for role, value in evidence.thresholds.items()},
        **total.shares(list(inputs.inputs.models)),
    }
    return figures, records


def _bring_together(inputs: OpenInputs, work: Work, ranks: Ranks) -> dict[str, Mapping[str, Any]]:
    """Let the first rank know what the others have seen of the inputs, and what they have made.

    Returns:
        File name -> what was noted; on the first rank of all files.
    """
    own = {"finished": dict(work.finished), "seen": inputs.seen()}
    finished: dict[str, Mapping[str, Any]] = {}
    for found in ranks.to_first(own):
        finished |= found["finished"]
        inputs.learn(found["seen"])
    return finished


def _write_index(
    inputs: OpenInputs,
    layout: Layout,
    work: Work,
    finished: Mapping[str, Mapping[str, Any]],
    ranks: Ranks,
) -> dict[str, dict[str, Any]]:
    """Write the index of all files; returns size and SHA-256 of each by name."""
    if not ranks.is_first:
        return {}
    records = [
        FileRecord(name, record["num_bytes"], record["sha256"])
        for name, record in sorted(finished.items())
    ]
    if ranks.size > 1:
        wait_for_files(work.directory, {r.name: r.num_bytes for r in records}, ranks)
    FolderSink(work.directory, inputs.like.source.stem, layout, finished=records).commit()
    return {r.name: {"sha256": r.sha256, "bytes": r.num_bytes} for r in records}


def _take_over(work: Work, inputs: OpenInputs) -> None:
    """Learn what an interrupted merge knew of the inputs of the files that it has finished."""
    unchecked: set[str] = set()
    for record in work.finished.values():
        unchecked.update(record["unchecked"])
    for role, source in inputs.streamable.items():
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


def _read_again(source: FolderSource, known: Mapping[str, str]) -> None:
    """Read again what an interrupted merge has used of files that it may not have streamed whole.

    Only whole files can be compared with their hashes: what it used may have come damaged. A file
    that is in the cache by now, or is to be downloaded, tells that as well.

    Args:
        source: of tensors.
        known: tensor -> digest that it had then.

    Raises:
        DamagedTransferError: it has another one now.
    """
    folder = source.directory
    if not isinstance(folder, HubFolder):
        return
    for file_name, names in source.files.items():
        file = folder.open(file_name)
        used = [name in known for name in names if source.info(name).numel]
        if all(used) or not any(used):
            continue
        how = "reading" if file.is_here or folder.fetch != "stream" else "pulling"
        folder.say(f"{file.label}: {how} again what the interrupted merge used, to compare it")
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
    digests = {role: s.digests.finished(names) for role, s in inputs.streamable.items()}
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
