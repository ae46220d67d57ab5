"""Contents of files on their way to the Hub, which does not want again what it has."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from kifmerge.errors import CheckpointError
from kifmerge.hub.client import PassingError, Say, hub_api, patiently, silent, status_of
from kifmerge.hub.target import Target

# Where the client warns of failures that it then tries again, with the whole address.
_CLIENT_LOG = "huggingface_hub.utils._http"
_QUERY = re.compile(r"\?\S*")
# Of a request that joins the parts of an upload, with the end of its path: parts came damaged, or
# they are joined already and the answer was lost.
_UNJOINED = (400, 404)
_JOIN = re.compile(r"/complete\w*")
_XET_REFUSAL = re.compile(r"client error \((\d+).*xet-write-token", re.DOTALL)


def upload(
    target: Target,
    additions: Sequence[CommitOperationAdd],
    *,
    pull_request: bool = False,
    say: Say = silent,
) -> None:
    """Send contents for a commit to come, by Xet or as LFS objects, as the client decides.

    Small files stay with the commit. May be asked again: what is there is not sent twice.

    Raises:
        CheckpointError: a file that cannot be read, or the token does not allow it.
        TryAgainError: network or server failed.
    """
    what = f"uploading to {target}"

    def send() -> None:
        with _upload_errors(what), _unsigned_warnings():
            hub_api().preupload_lfs_files(
                target.repo_id,
                additions=additions,
                repo_type=target.kind,
                revision=target.revision,
                create_pr=pull_request,
            )

    if additions:
        patiently(send, what, say)


@contextlib.contextmanager
def reading_files() -> Iterator[None]:
    """Tell of files on this disk that cannot be read.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


@contextlib.contextmanager
def _upload_errors(what: str) -> Iterator[None]:
    """Tell of failures that the client wraps, or takes for others.

    Raises:
        CheckpointError: a failure that stays.
        PassingError: one that may pass.
    """
    try:
        with reading_files(), _unwrapped(what):
            yield
    except HfHubHTTPError as error:
        if str(error.response.url).startswith(constants.ENDPOINT) and not _is_unjoined(error):
            raise
        # The store behind signed addresses: one has expired, or bytes came otherwise than sent.
        raise PassingError(f"{what}: the store refused a part (HTTP {status_of(error)})") from error
    except ConnectionError as error:
        refusal = _XET_REFUSAL.search(str(error))
        if refusal is None:
            raise
        raise CheckpointError(
            f"{what}: the server takes no upload by Xet (HTTP {refusal[1]}): if it never does, set "
            "HF_HUB_DISABLE_XET=1 and run the same command again"
        ) from error
    except (HFValidationError, json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as error:  # what the server says of an object that it does not take
        raise CheckpointError(f"{what}: {one_line(error)}") from error


def _is_unjoined(error: HfHubHTTPError) -> bool:
    path = urlsplit(str(error.response.url)).path
    return status_of(error) in _UNJOINED and _JOIN.fullmatch(path[path.rfind("/") :]) is not None


@contextlib.contextmanager
def _unwrapped(what: str) -> Iterator[None]:
    """Raise what happened in a thread that sends, which the client wraps."""
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        # Xet's own, whose text may hold a signed address.
        raise PassingError(f"{what}: it failed ({type(error).__name__})") from error


@contextlib.contextmanager
def _unsigned_warnings() -> Iterator[None]:
    """Have the client warn without the signatures of addresses, which whoever reads could use."""
    logger = logging.getLogger(_CLIENT_LOG)
    logger.addFilter(_cut_queries)
    try:
        yield
    finally:
        logger.removeFilter(_cut_queries)


def _cut_queries(record: logging.LogRecord) -> bool:
    record.msg, record.args = _QUERY.sub("", record.getMessage()), ()
    return True
