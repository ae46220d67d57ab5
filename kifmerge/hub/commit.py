"""What goes into a repository: one commit at a time, certain even where its answer is lost.

Contents are uploaded first, as often as it takes: what the Hub has of them is not sent again. The
commit names the one that it follows and is never sent twice without looking: after a failure the
branch tells whether it came about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import constants

from kifmerge.errors import CheckpointError, problem_list
from kifmerge.hub.client import (
    PassingError,
    Patience,
    Say,
    hub_api,
    hub_errors,
    patiently,
    silent,
    status_of,
)
from kifmerge.hub.draft import Change, Draft
from kifmerge.hub.target import Target, find_head, open_target, parse_target
from kifmerge.hub.upload import one_line

__all__ = ["Change", "Committed", "Target", "commit_change", "open_target", "parse_target"]

# HTTP: the branch is not where the commit expects it; the server failed, perhaps after the act.
_HAS_MOVED, _FAILED = 412, 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What became of a change.

    Attributes:
        commit: that holds it.
        url: of the commit, or of the pull request.
        is_new: False if all of it was there already.
        num_files: added, replaced or removed.
        num_bytes: of the files added or replaced; what the Hub had of them was not sent again.
    """

    commit: str
    url: str
    is_new: bool
    num_files: int = 0
    num_bytes: int = 0


def commit_change(
    target: Target,
    change: Change,
    message: str,
    *,
    parent: str,
    pull_request: bool = False,
    say: Say = silent,
) -> Committed:
    """Bring a change into a repository by one commit, or by none if it is there.

    Args:
        target: the repository and branch, which must be there.
        change: what is wanted.
        message: the first line is the title.
        parent: commit that the branch is at, as :func:`open_target` tells.
        pull_request: ask for it to be merged into the branch, instead.
        say: told of long waits.

    Raises:
        CheckpointError: a file is not what was expected, the token does not allow it, or somebody
            else has committed in between.
        TryAgainError: network or server failed.
    """
    draft = Draft(target, change, parent, say)
    if draft.is_empty:
        return Committed(commit=parent, url=_commit_url(target, parent), is_new=False)
    delivery = _Delivery(draft, message, parent, pull_request=pull_request, say=say)
    if pull_request and (found := delivery.find()) is not None:
        return found
    draft.upload(pull_request=pull_request)
    return delivery.deliver()


class _Delivery:
    """A commit, sent until it is known to be there."""

    def __init__(
        self, draft: Draft, message: str, parent: str, *, pull_request: bool, say: Say
    ) -> None:
        self._draft = draft
        self._target = draft.target
        self._title, _, text = message.partition("\n")
        self._text = text.strip()
        self._parent = parent
        self._is_pull_request = pull_request
        self._say = say

    def deliver(self) -> Committed:
        """Send the commit, and look at what is there after each failure."""
        patience = Patience(self._say)
        while True:
            try:
                committed = self._send()
                break
            except PassingError as error:
                is_over = False
                try:
                    patience.endure(error)
                except PassingError:
                    is_over = True
                # After the wait: what seemed to fail may take its time.
                found = self.find()
                if found is not None:
                    return self._told(found.commit, found.url)
                if is_over:
                    raise
        problems = self._draft.problems_at(committed.commit)
        if problems:
            heading = (
                f"{committed.url} is not what was sent, though the Hub took it: look at the "
                "repository's .gitignore, mend or revert it, and push again"
            )
            raise CheckpointError(problem_list(heading, problems))
        return committed

    def find(self) -> Committed | None:
        """The change, where it is in the branch or in a pull request of this title already.

        Raises:
            CheckpointError: the branch holds another commit instead.
        """
        if self._is_pull_request:
            return self._find_pull_request()
        head = find_head(self._target, self._say)
        if head == self._parent:
            return None
        problems = [] if head is None else self._draft.problems_at(head)
        if head is None or problems:
            raise CheckpointError(
                f"committing to {self._target}: somebody else has changed the branch in between: "
                f"expected it at {self._parent}, found it at {head}, which does not hold what was "
                "sent. Look at it, and run the same command again"
            )
        return Committed(commit=head, url=_commit_url(self._target, head), is_new=False)

    def _find_pull_request(self) -> Committed | None:
        def listed() -> list[Any]:
            target = self._target
            found = hub_api().get_repo_discussions(
                target.repo_id,
                repo_type=target.kind,
                discussion_type="pull_request",
                discussion_status="open",
            )
            return [one for one in found if one.title == self._title]

        for one in patiently(listed, f"looking for pull requests of {self._target}", self._say):
            target = Target(
                repo_id=self._target.repo_id, kind=self._target.kind, branch=f"refs/pr/{one.num}"
            )
            head = find_head(target, self._say)
            if head is not None and not self._draft.problems_at(head):
                return Committed(commit=head, url=one.url, is_new=False)
        return None

    def _send(self) -> Committed:
        what, target = f"committing to {self._target}", self._target
        try:
            with hub_errors(what):
                made = hub_api().create_commit(
                    target.repo_id,
                    self._draft.operations(),
                    commit_message=self._title,
                    commit_description=self._text,
                    repo_type=target.kind,
                    revision=target.revision,
                    create_pr=self._is_pull_request,
                    parent_commit=self._parent,
                )
        except CheckpointError as error:
            status = status_of(error.__cause__) or 0
            if status == _HAS_MOVED or status >= _FAILED:
                raise PassingError(str(error)) from error
            raise
        except ValueError as error:  # README.md says something that the Hub does not take
            raise CheckpointError(f"{what}: {one_line(error)}") from error
        return self._told(made.oid, made.pr_url or made.commit_url)

    def _told(self, commit: str, url: str) -> Committed:
        changed, removed = self._draft.changed, self._draft.removed
        return Committed(
            commit=commit,
            url=url,
            is_new=True,
            num_files=len(changed) + len(removed),
            num_bytes=sum(changed.values()),
        )


def _commit_url(target: Target, commit: str) -> str:
    kind = "" if target.kind == "model" else f"{target.kind}s/"
    return f"{constants.ENDPOINT}/{kind}{target.repo_id}/commit/{commit}"
