"""The client of the Hub: what it raises in our words, and patience with what may pass.

Everything goes through huggingface_hub, so that its endpoint, token, cache, proxies and offline
mode are those of all other tools on the machine.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import constants
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

LIBRARY = "kifmerge"
# With the waits below: about a quarter of a minute without any progress. Read when they are used.
MOST_TRIES = 6
FIRST_WAIT_SECONDS = 0.5
MOST_WAIT_SECONDS = 30.0
# Beyond this the user is told to come back later.
MOST_ASKED_SECONDS = 600.0
_PASSING = (408, 429, 500, 502, 503, 504)
_SECONDS = re.compile(r"(\d+(?:\.\d+)?)")
# Requests that remain, and seconds until there are more.
_RATE_LIMIT = re.compile(r";\s*r=0\s*;\s*t=(\d+)")
_MOST_TOLD = 200

Say = Callable[[str], None]
Result = TypeVar("Result")


def silent(text: str) -> None:
    """Say nothing."""


def hub_api() -> huggingface_hub.HfApi:
    """The client, as the environment configures it."""
    return huggingface_hub.HfApi(endpoint=constants.ENDPOINT, library_name=LIBRARY)


def is_offline() -> bool:
    """Whether nothing is to be sent."""
    return bool(constants.HF_HUB_OFFLINE)


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


def patiently(call: Callable[[], Result], what: str, say: Say = silent) -> Result:
    """Call until it succeeds, with longer and longer waits after failures that may pass.

    For calls that may be made twice.

    Args:
        call: what to do.
        what: it is, for messages: "reading org/name".
        say: told of waits.

    Raises:
        CheckpointError: a failure that stays.
        TryAgainError: it did not pass in time.
    """
    patience = Patience(say)
    while True:
        try:
            with hub_errors(what):
                return call()
        except PassingError as error:
            patience.endure(error)


class Patience:
    """Waits after failures that may pass, as long as there are not too many in a row.

    Args:
        say: told of long waits.
    """

    def __init__(self, say: Say = silent) -> None:
        self._say = say
        self._num_failures = 0

    def endure(self, error: PassingError) -> None:
        """Wait after a failure.

        Raises:
            PassingError: it is one too many.
        """
        self._num_failures += 1
        if error.is_final or self._num_failures >= MOST_TRIES:
            raise error
        pause(self._num_failures, error, self._say)

    def note_progress(self) -> None:
        """Begin to count anew."""
        self._num_failures = 0


def pause(attempt: int, error: PassingError, say: Say) -> None:
    """Wait after a failed attempt, as long as the server asks for, or longer each time.

    Args:
        attempt: number of failures in a row, from 1.
        error: the failure.
        say: told of long waits.

    Raises:
        PassingError: the server asks for more patience than we have.
    """
    seconds = min(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), MOST_WAIT_SECONDS)
    # Many clients that fail together should not come back together.
    seconds *= random.uniform(0.75, 1.25)
    if error.asked_seconds is not None:
        if error.asked_seconds > MOST_ASKED_SECONDS:
            raise error
        seconds = max(seconds, error.asked_seconds)
    if seconds >= 5:
        say(f"{error}; waiting {seconds:.0f} s")
    time.sleep(seconds)


class PassingError(TryAgainError):
    """A failure of the network or the server that may pass.

    Attributes:
        asked_seconds: how long the server asks to wait; None if it does not say.
        is_final: whether patience has been shown already.
    """

    def __init__(
        self, message: str, asked_seconds: float | None = None, *, is_final: bool = False
    ) -> None:
        super().__init__(message)
        self.asked_seconds = asked_seconds
        self.is_final = is_final


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Put what the client raises into our words: one line, and what to do next.

    Raises:
        CheckpointError: a failure that stays.
        PassingError: one that may pass.
    """
    try:
        yield
    except KifmergeError:
        raise
    except Exception as error:
        ours = _in_our_words(error, what)
        if ours is None:
            raise
        raise ours from error


def _in_our_words(error: Exception, what: str) -> KifmergeError | None:
    """None for what does not come from the Hub."""
    met = error.__cause__
    if isinstance(error, LocalEntryNotFoundError | ValueError) and isinstance(met, Exception):
        # The client tells of what it met when it asked for a file.
        ours = _in_our_words(met, what)
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


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of the answer that an error of the client tells of; None without one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _of_status(error: HfHubHTTPError, what: str) -> KifmergeError:
    response, status = getattr(error, "response", None), status_of(error)
    told = _without_token(str(getattr(error, "server_message", None) or "").strip()).splitlines()
    reason = f"HTTP {status}" + (f", {told[0][:_MOST_TOLD]}" if told else "")
    if status in _PASSING:
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


def asked_seconds(headers: Any) -> float | None:
    """How long an answer asks to wait, in its Retry-After or RateLimit; None if it does not.

    >>> asked_seconds({"retry-after": "7"}), asked_seconds({"ratelimit": '"api";r=0;t=55'})
    (7.0, 55.0)
    """
    found = _SECONDS.fullmatch(str(headers.get("retry-after") or "").strip())
    found = found or _RATE_LIMIT.search(str(headers.get("ratelimit") or ""))
    return None if found is None else float(found[1])


def is_passing(status: int) -> bool:
    """Whether an HTTP status says that the same request may succeed later."""
    return status in _PASSING


def _word(error: BaseException) -> str:
    """The kind of an error alone: its text may hold a signed address."""
    return type(error).__name__
