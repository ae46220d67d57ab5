"""Publishing: what a folder holds goes into a repository on the Hub, in one commit.

A card that says how it was made is written on the way, unless there is one of somebody's own; the
folder itself is not changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from kifmerge.checkpoint.repository import stale_weights
from kifmerge.checkpoint.snapshot import DETAIL_FILE
from kifmerge.errors import CheckpointError
from kifmerge.fusion.tokens import has_tokenizer
from kifmerge.hub.client import Say, silent
from kifmerge.hub.commit import Change, commit_change
from kifmerge.hub.draft import Draft
from kifmerge.hub.folder import HubFolder, open_hub_folder
from kifmerge.hub.target import (
    Target,
    look_up,
    open_target,
    parse_target,
    refuse_other_visibility,
)
from kifmerge.phases.card import is_ours
from kifmerge.phases.inspect import kind_of
from kifmerge.phases.licence import Licence, find_licence
from kifmerge.phases.lineage import lineage_of
from kifmerge.phases.parcel import CARD_FILE, IMPORTANCE_FOLDER, Parcel, open_parcel
from kifmerge.phases.published_card import published_card, read_report


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishOptions:
    """How something is published.

    Attributes:
        private: whether others must not see it; None takes what is there, or the Hub's default.
        pull_request: ask for it to be merged into the branch, instead of committing to it.
        message: of the commit; None says what it is.
        base_models: repositories that it derives from; empty takes what is recorded.
        licence: as the Hub calls it; None takes that of the bases.
        report_dir: folder of a run whose scores the card shows.
    """

    private: bool | None = None
    pull_request: bool = False
    message: str | None = None
    base_models: tuple[str, ...] = ()
    licence: str | None = None
    report_dir: Path | None = None

    def __post_init__(self) -> None:
        """Refuse bases that are no repositories, and a commit without a title."""
        for name in self.base_models:
            try:
                base = parse_target(name)
            except CheckpointError as error:
                raise ValueError(f"base model {error}") from error
            if base != Target(repo_id=name):
                raise ValueError(f"base model {name}: expected ORG/NAME, without a revision")
        if self.message is not None and not self.message.partition("\n")[0].strip():
            raise ValueError("the message of the commit has no first line")


class Publication:
    """What of a folder goes where, once the folder has been found whole.

    Args:
        directory: on this disk.
        target: where it goes.
        options: how.
        say: told what is worth knowing.

    Raises:
        CheckpointError: nothing that is published, half of something, or damaged files.
    """

    def __init__(
        self,
        directory: Path,
        target: Target,
        options: PublishOptions | None = None,
        *,
        say: Say = silent,
    ) -> None:
        self.target = target
        self.options = options or PublishOptions()
        self.parcel = open_parcel(directory)
        self._say = say
        self._report = None
        if self.options.report_dir is not None:
            self._report = read_report(self.options.report_dir)
        self._own_card = _read_own_card(directory / CARD_FILE)

    def plan(self) -> dict[str, Any]:
        """What would be sent, kept and removed, in bytes; changes nothing anywhere.

        Raises:
            CheckpointError: the repository cannot be seen, is not as private as asked, or holds
                something else.
            TryAgainError: network or server failed.
        """
        target, main = self.target, Target(repo_id=self.target.repo_id, kind=self.target.kind)
        standing = look_up(target, self._say)
        refuse_other_visibility(target, standing, self.options.private)
        head = standing.head
        if head is None and standing.is_private is not None:  # a branch to come starts at main
            head = look_up(main, self._say).head
        draft = Draft(target, self._change(head), head, self._say)
        return {
            "repository": target.repo_id,
            "branch": target.revision,
            "exists": standing.is_private is not None,
            "private": self.options.private if head is None else standing.is_private,
            "kind": self.parcel.kind,
            "send": draft.changed,
            "keep": draft.unchanged,
            "remove": draft.removed,
            "left_out": dict(self.parcel.left_out),
            "num_files": len(draft.changed) + len(draft.removed),
            "num_bytes": sum(draft.changed.values()),
        }

    def run(self) -> tuple[dict[str, Any], bool]:
        """Publish, in one commit.

        Returns:
            What was committed where, and whether it was now: False if all of it was there already.

        Raises:
            CheckpointError: a file is not the one recorded, the token does not allow it, or
                somebody else has changed the branch in between.
            TryAgainError: network or server failed.
        """
        head = open_target(self.target, private=self.options.private, say=self._say)
        committed = commit_change(
            self.target,
            self._change(head),
            self.options.message or f"Push {self.parcel.kind} with kifmerge",
            parent=head,
            pull_request=self.options.pull_request,
            say=self._say,
        )
        figures = {key: value for key, value in asdict(committed).items() if key != "is_new"}
        repository = {"repository": self.target.repo_id, "branch": self.target.revision}
        return {**repository, **figures}, committed.is_new

    def _change(self, head: str | None) -> Change:
        """What is wanted of the repository as it stands."""
        there = None if head is None else open_hub_folder(self.target.at(head), say=self._say)
        names = {} if there is None else there.files
        if there is not None:
            _refuse_other_kind(there, self.parcel)
        self._tell_lacks(names)
        additions: dict[str, Path | bytes] = {
            name: self.parcel.directory / name for name in self.parcel.files if name != CARD_FILE
        }
        card = self._choose_card(there)
        if card is not None:
            additions[CARD_FILE] = card
        return Change(
            additions=additions,
            removals=_stale(names, self.parcel.files),
            sha256=self.parcel.sha256,
        )

    def _tell_lacks(self, there: Mapping[str, Any]) -> None:
        """Say what users of a checkpoint will miss, or find though it is none of this one's."""
        files = self.parcel.files
        if self.parcel.kind == "checkpoint":
            if "config.json" not in files:
                self._say("no config.json: transformers will not load it")
            if not has_tokenizer(self.parcel.directory):
                self._say("no tokenizer: who loads it takes another's")
        old = f"{IMPORTANCE_FOLDER}/{DETAIL_FILE}"
        if old in there and old not in files:
            self._say(f"{IMPORTANCE_FOLDER}/ of an earlier push stays in {self.target}")

    def _choose_card(self, there: HubFolder | None) -> bytes | None:
        """The user's own card, the repository's own (None), or one that is written now."""
        whose = ""
        if self._own_card is not None:
            whose = f"{self.parcel.directory / CARD_FILE} is yours: sent as it is"
        elif there is not None and CARD_FILE in there.files:
            text = (there / CARD_FILE).read_text(encoding="utf-8", errors="replace")
            if not is_ours(text):
                whose = (
                    f"{CARD_FILE} of {self.target.repo_id} is not kifmerge's: it stays. Delete it "
                    "there to have one written that says how this was made"
                )
        if not whose:
            return self._card.encode()
        self._say(whose)
        options = self.options
        if options.base_models or options.licence or options.report_dir:
            _warn(f"{CARD_FILE} is not written by kifmerge: it says nothing of the options for it")
        return self._own_card

    @cached_property
    def _card(self) -> str:
        parcel, options = self.parcel, self.options
        lineage = lineage_of(parcel, options.base_models)
        if lineage.local:
            _warn(
                f"{', '.join(lineage.local)}: no repository on the Hub, so not among the card's "
                "base models: --base-model ORG/NAME names them"
            )
        if options.licence is not None:
            licence = Licence(front={"license": options.licence})
        else:
            licence = find_licence(lineage.bases, self._say)
        if licence.is_doubtful:
            _warn(f"{licence.note} --license ID sets one")
        return published_card(parcel, self.target, lineage, licence, self._report)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _read_own_card(path: Path) -> bytes | None:
    """A card that somebody has written; None if there is none, or one that is written anew.

    Raises:
        CheckpointError: its front matter cannot be read.
    """
    if not path.is_file():
        return None
    content = path.read_bytes()
    text = content.decode("utf-8", errors="replace")
    if is_ours(text):
        return None
    parts = text.split("---", 2)
    if len(parts) == 3 and not parts[0].strip():
        try:
            yaml.safe_load(parts[1])
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise CheckpointError(f"{path}: its front matter is no YAML: {problem}") from error
    return content


def _stale(there: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Weights that an earlier push has left, folder by folder."""
    folders = {name.rpartition("/")[0] for name in new}
    return [
        f"{folder}/{name}" if folder else name
        for folder in sorted(folders)
        for name in stale_weights(_inside(there, folder), _inside(new, folder))
    ]


def _inside(names: Mapping[str, Any], folder: str) -> list[str]:
    start = f"{folder}/" if folder else ""
    inner = [name.removeprefix(start) for name in names if name.startswith(start)]
    return [name for name in inner if "/" not in name]


def _refuse_other_kind(there: HubFolder, parcel: Parcel) -> None:
    """Refuse a repository that holds something else: who opens it would find one for the other.

    Raises:
        CheckpointError: naming both.
    """
    try:
        found = kind_of(there)
    except CheckpointError:
        return  # nothing that kifmerge knows
    if found != parcel.kind:
        raise CheckpointError(
            f"{there.reference.repo_id} holds another kind of artifact ({found}) than "
            f"{parcel.directory} ({parcel.kind}): choose another repository or branch"
        )
