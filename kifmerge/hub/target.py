"""Where commits go: a branch of a repository, created where it is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from kifmerge.errors import CheckpointError
from kifmerge.hub.client import Say, hub_api, is_offline, patiently, silent
from kifmerge.hub.reference import Reference, RepoKind, parse_remote

_MAIN = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where commits go.

    Attributes:
        repo_id: ``org/name``.
        kind: of the repository.
        branch: that they go to; None is the main one.
    """

    repo_id: str
    kind: RepoKind = "model"
    branch: str | None = None

    @property
    def revision(self) -> str:
        """Name of the branch."""
        return self.branch or _MAIN

    def at(self, commit: str) -> Reference:
        """The repository as it stands at a commit."""
        return Reference(repo_id=self.repo_id, kind=self.kind, revision=commit)

    def __str__(self) -> str:
        return str(Reference(repo_id=self.repo_id, kind=self.kind, revision=self.branch))


def parse_target(text: str) -> Target:
    """What names a repository, with or without a branch; never a path on this disk.

    Raises:
        CheckpointError: no such name, a commit, or a folder in a repository.

    >>> print(parse_target("org/name"), parse_target("hf://datasets/org/name@v2"))
    org/name hf://datasets/org/name@v2
    """
    found = parse_remote(text)
    if found.folder:
        raise CheckpointError(f"{text}: expected a repository, without a folder in it")
    if found.is_pinned:
        raise CheckpointError(f"{text}: expected a branch, found a commit, which never changes")
    return Target(repo_id=found.repo_id, kind=found.kind, branch=found.revision)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a target stands.

    Attributes:
        is_private: whether others do not see it; None where there is no such repository.
        head: commit of the branch; None where there is no such branch.
    """

    is_private: bool | None = None
    head: str | None = None


def look_up(target: Target, say: Say = silent) -> Standing:
    """Ask how a target stands; changes nothing.

    Raises:
        CheckpointError: the token is not accepted, or the client is offline on purpose.
        TryAgainError: network or server failed.
    """
    if is_offline():
        raise CheckpointError(f"{target}: HF_HUB_OFFLINE is set: unset it to reach the Hub")
    info = _info(target, None, say)
    if info is None:
        return Standing()
    head = info.sha if target.branch is None else find_head(target, say)
    return Standing(is_private=bool(info.private), head=head)


def find_head(target: Target, say: Say = silent) -> str | None:
    """The commit that the branch is at; None if there is no such branch.

    Raises:
        CheckpointError: the token is not accepted.
        TryAgainError: network or server failed.
    """
    info = _info(target, target.branch, say)
    return None if info is None else info.sha


def open_target(target: Target, *, private: bool | None = None, say: Say = silent) -> str:
    """Create the repository, and the branch from the main one, where they are missing.

    Args:
        target: where commits are to go.
        private: whether others must not see it; None takes what is there, or the Hub's default.
        say: told what is created, and of long waits.

    Returns:
        The commit that the branch is at.

    Raises:
        CheckpointError: the token does not allow it, or the repository is there and not as private
            as asked.
        TryAgainError: network or server failed.
    """
    standing = look_up(target, say)
    if standing.is_private is None:
        _create(target, private, say)
        standing = look_up(target, say)
    refuse_other_visibility(target, standing, private)
    if standing.head is None and target.branch is not None and standing.is_private is not None:
        _create_branch(target, say)
        standing = look_up(target, say)
    if standing.head is None:
        raise CheckpointError(f"{target}: nothing to commit to, or nothing that your token opens")
    return standing.head


def refuse_other_visibility(target: Target, standing: Standing, private: bool | None) -> None:
    """Refuse a repository that is public where a private one was asked for, or the other way.

    Raises:
        CheckpointError: naming both.
    """
    if private is None or standing.is_private in (None, private):
        return
    found, wanted = ("private", "public") if standing.is_private else ("public", "private")
    raise CheckpointError(
        f"{target.repo_id} is there already and {found}, not {wanted}: change it in its settings, "
        f"choose another name, or leave out --{wanted}"
    )


def _info(target: Target, revision: str | None, say: Say) -> Any:
    """What the Hub tells of the repository at a revision; None if there is no such thing."""

    def ask() -> Any:
        try:
            return hub_api().repo_info(target.repo_id, repo_type=target.kind, revision=revision)
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None

    return patiently(ask, f"looking up {target}", say)


def _create(target: Target, private: bool | None, say: Say) -> None:
    def create() -> None:
        hub_api().create_repo(target.repo_id, repo_type=target.kind, private=private, exist_ok=True)

    patiently(create, f"creating {target.repo_id}", say)
    visibility = {None: "", True: ", private", False: ", public"}[private]
    say(f"created {target.repo_id}{visibility}")


def _create_branch(target: Target, say: Say) -> None:
    def create() -> None:
        hub_api().create_branch(
            target.repo_id, branch=target.revision, repo_type=target.kind, exist_ok=True
        )

    patiently(create, f"creating {target}", say)
    say(f"created the branch {target.revision} of {target.repo_id}")
