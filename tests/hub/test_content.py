"""Parts of a file that are compared with the repository's hash, and with what came before."""

from __future__ import annotations

import pytest

from kifmerge.errors import DamagedTransferError
from kifmerge.hub.content import ContentCheck


@pytest.mark.parametrize("again", [(0, 30), (10, 20), (10, 30), (20, 30)])
def test_parts_that_come_again_may_be_cut_otherwise(again):
    content, (start, stop) = bytes(range(30)), again
    for changed_at in (start, stop - 1):
        check = ContentCheck("file", 40, "0" * 64, None)
        for at in (0, 20, 10):
            check.feed(at, content[at : at + 10])
        check.feed(start, memoryview(content)[start:stop])
        changed = bytearray(content[start:stop])
        changed[changed_at - start] ^= 1
        with pytest.raises(DamagedTransferError, match=f"file: bytes {start} to {stop} came twice"):
            check.feed(start, changed)


@pytest.mark.parametrize("again", [(0, 15), (5, 10), (5, 30)])
def test_what_was_never_known_alone_is_not_compared(again):
    check = ContentCheck("file", 40, "0" * 64, None)
    for start in (0, 10, 20):
        check.feed(start, bytes(10))
    start, stop = again
    check.feed(start, b"x" * (stop - start))


def test_what_is_not_compared_is_not_claimed_to_have_passed():
    check = ContentCheck("file", 3, None, None)
    check.feed(0, b"abc")
    assert not check.has_passed
