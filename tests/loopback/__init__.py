"""A server on this machine that speaks as the Hub does, for tests and benchmarks."""

from loopback.faults import Fault
from loopback.hub import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, LoopbackHub
from loopback.log import Row
from loopback.store import Commit

__all__ = ["OTHER_TOKEN", "READ_TOKEN", "WRITE_TOKEN", "Commit", "Fault", "LoopbackHub", "Row"]
