"""What the client of the Hub raises, in our words.

To know its errors is to load its HTTP library, a tenth of what starting a merge takes beyond torch:
imported where something has failed, or is about to be asked for.
"""

from __future__ import annotations

import errno
import functools
import json
import sys
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kifmerge.errors import CheckpointError, KifmergeError, TryAgainError
from kifmerge.hub.client import PassingError, asked_seconds, is_offline, is_passing, status_of

_MOST_TOLD = 200
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
# More special kinds first: a gated repository counts as not found for the client.
_LASTING: dict[type[Exception], str] = {
    GatedRepoError: f"the repository is gated: ask for access on its page, then {_LOG_IN}",
    RepositoryNotFoundError: "no such repository, or a private one that your token does not open: "
    f"check the name, or {_LOG_IN}",
    RemoteEntryNotFoundError: "no such file or folder in the repository",
    RevisionNotFoundError: "no such branch, tag or commit in the repository",
    HFValidationError: "no name that a repository can have",
    FileMetadataError: "the answer lacks what the Hub says of a file: a proxy may drop headers",
}
_OFFLINE = (
    "HF_HUB_OFFLINE is set, and it is not in the cache: unset it, or fetch it with `kifmerge pull` "
    "while there is a network"
)


@functools.cache
def transport_errors() -> tuple[type[Exception], ...]:
    """What the client's HTTP library raises when a connection fails, whichever library it is."""
    return (_library().TransportError, _library().StreamError, ConnectionError, TimeoutError)


@functools.cache
def timeout_errors() -> tuple[type[Exception], ...]:
    """What the client's HTTP library raises when an answer takes too long."""
    return (_library().TimeoutException, TimeoutError)


def _library() -> Any:
    base = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return sys.modules[base.__module__.partition(".")[0]]


def in_our_words(error: Exception, what: str) -> KifmergeError | None:
    """None for what does not come from the Hub."""
    met = error.__cause__
    if isinstance(error, LocalEntryNotFoundError | ValueError) and isinstance(met, Exception):
        # The client tells of what it met when it asked for a file.
        ours = in_our_words(met, what)
        if ours is not None:
            return ours
    advice = next((text for kind, text in _LASTING.items() if isinstance(error, kind)), None)
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError) and is_offline():
        advice = _OFFLINE
    if advice is not None:
        return CheckpointError(f"{what}: {advice}")
    if isinstance(error, HfHubHTTPError):
        return _of_status(error, what)
    reason = _passing_reason(error)
    if reason is not None:
        return PassingError(f"{what}: {reason}")
    return _of_disk(error, what) if isinstance(error, OSError) else None


def _passing_reason(error: Exception) -> str | None:
    if isinstance(error, LocalEntryNotFoundError):
        return f"the Hub cannot be reached ({_word(error.__cause__ or error)})"
    if isinstance(error, transport_errors()):
        return f"the connection failed ({_word(error)})"
    if isinstance(error, RuntimeError) and "closed" in str(error):
        # Where one thread cannot connect, the client closes what all of them share.
        return "the connection was closed"
    if isinstance(error, OSError) and error.errno is None:  # the client's check of the size
        return "the file came incomplete"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "the answer is none of the Hub's: a proxy or a log-in page may stand in between"
    return None


def _of_disk(error: OSError, what: str) -> KifmergeError | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TryAgainError(f"{what}: disk full: make room, or set HF_HOME to another disk")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CheckpointError(
            f"{what}: {error.filename} cannot be written ({error.strerror}): set HF_HOME to a "
            "folder that can"
        )
    return None


def _of_status(error: HfHubHTTPError, what: str) -> KifmergeError:
    response, status = getattr(error, "response", None), status_of(error)
    told = _without_token(str(getattr(error, "server_message", None) or "").strip()).splitlines()
    reason = f"HTTP {status}" + (f", {told[0][:_MOST_TOLD]}" if told else "")
    if status is not None and is_passing(status):
        asked = None if response is None else asked_seconds(response.headers)
        return PassingError(f"{what}: the Hub answers {reason}", asked)
    if status == 401:
        return CheckpointError(f"{what}: your token is not accepted ({reason}): {_LOG_IN}")
    if status == 403:
        return CheckpointError(
            f"{what}: your token does not allow it ({reason}): take one that may, with "
            "`hf auth login` or HF_TOKEN"
        )
    return CheckpointError(f"{what}: the Hub answers {reason}")


def _without_token(text: str) -> str:
    """A server's words, which may repeat what it was sent."""
    token = huggingface_hub.get_token()
    return text.replace(token, "***") if token else text


def _word(error: BaseException) -> str:
    """The kind of an error alone: its text may hold a signed address."""
    return type(error).__name__
