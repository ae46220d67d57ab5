"""The client of the Hub, and patience with failures that may pass.

Everything goes through huggingface_hub, so that its endpoint, token, cache, proxies and offline
mode are those of all other tools on the machine.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import constants

from kifmerge.errors import KifmergeError, TryAgainError

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
        # Knows the client's errors, and loads its HTTP library for them.
        from kifmerge.hub.failures import in_our_words

        ours = in_our_words(error, what)
        if ours is None:
            raise
        raise ours from error


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of the answer that an error of the client tells of; None without one."""
    return getattr(getattr(error, "response", None), "status_code", None)


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
