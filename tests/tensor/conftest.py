"""The compiled part, and what replaces it."""

import contextlib
from collections.abc import Iterator

import pytest

from kifmerge.tensor import native

_needs_library = pytest.mark.skipif(not native.is_built(), reason="there was no C compiler")
_BUILT, _IDS = pytest.param(True, marks=_needs_library), ["built", "torch"]


@pytest.fixture(params=[_BUILT, False], ids=_IDS)
def built_or_not(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same test with the compiled part, and without it."""
    with _built(request.param):
        yield


@pytest.fixture(
    scope="module", params=[_BUILT, pytest.param(False, marks=pytest.mark.slow)], ids=_IDS
)
def all_built_or_not(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same for all tests of a module."""
    with _built(request.param):
        yield


@contextlib.contextmanager
def _built(is_built: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not is_built:
            patch.setattr(native, "_library", lambda: None)
        yield
