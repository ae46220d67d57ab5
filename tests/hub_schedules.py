"""Schedules of faults: what goes wrong while a command talks to the Hub; from a seed each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loopback import Fault

READS = ("info", "resolve", "cdn")
WRITES = (
    "info", "create", "branch", "refs", "paths-info", "preupload", "yaml", "batch", "put", "verify",
    "complete", "commit",
)  # fmt: skip
# Scenario -> kinds of its requests.
SCENARIOS = {
    "pull": READS,
    "merge, streamed": READS,
    "merge, downloaded": READS,
    "push": WRITES,
    "hub to hub": (*READS, *WRITES),
}
# About how many there are, and of them for contents from the CDN.
NUM_REQUESTS = {
    "pull": 23, "merge, streamed": 270, "merge, downloaded": 75, "push": 14, "hub to hub": 174,
}  # fmt: skip
NUM_CDN = {"pull": 15, "merge, streamed": 230, "merge, downloaded": 18, "hub to hub": 73}
# One file, of which every file of the output takes a part.
IN_PARTS = {"merge, streamed": "org/historical/*", "hub to hub": "org/historical/*"}
PASSING = (408, 429, 500, 502, 503, 504)
LASTING = (400, 401, 403, 404, 409, 410, 412, 416, 418)
# A stall is longer than what the command waits for an answer.
TIMEOUT_SECONDS = 0.4
STALL_SECONDS = 0.7


@dataclass(frozen=True)
class Schedule:
    """What is going to happen.

    Attributes:
        seed: that all of it follows from.
        scenario: what is run.
        faults: of the server.
        interruption: ``ctrl-c`` or ``kill``, and with which request; None for neither.
        is_replaced: whether something is there already, in the place of the result.
        part_bytes: of uploads; None for whole ones.
        fetch_again: how inputs are read when the command goes on; None for as before.
    """

    seed: int
    scenario: str
    faults: tuple[Fault, ...]
    interruption: tuple[str, int] | None
    is_replaced: bool
    part_bytes: int | None
    fetch_again: str | None


def schedule(seed: int) -> Schedule:
    """Of a seed: scenarios take turns."""
    chance = random.Random(seed)
    scenario = list(SCENARIOS)[seed % len(SCENARIOS)]
    number = chance.choice((1, 1, 1, 2, 2, 3, 4))
    interruption = None
    if chance.random() < 0.3:
        interruption = (
            chance.choice(("ctrl-c", "ctrl-c", "kill")),
            _place(chance, NUM_REQUESTS[scenario]) + 1,
        )
    return Schedule(
        seed=seed,
        scenario=scenario,
        faults=tuple(_fault(chance, scenario, _kinds(chance, scenario)) for _ in range(number)),
        interruption=interruption,
        is_replaced=chance.random() < 0.5,
        part_bytes=chance.choice((None, None, 5000)),
        fetch_again=chance.choice((None, "stream", "download")),
    )


def _in_parts(chance: random.Random, scenario: str) -> dict[str, Any]:
    """Damage to what is not whole, and so not compared, before the last file of the output."""
    if scenario not in IN_PARTS:
        return {}
    return {"kind": "cdn", "match": IN_PARTS[scenario], "skip": chance.randrange(3)}


def _place(chance: random.Random, number: int) -> int:
    """One of so many; often one of the last, when there is something to go on from."""
    return chance.randrange(chance.choice((0, number * 6 // 7)), number)


def _kinds(chance: random.Random, scenario: str) -> Sequence[str]:
    """Of the requests that a fault may meet."""
    kinds = SCENARIOS[scenario]
    # What is sent comes late, among hundreds of reads.
    return WRITES if "commit" in kinds and chance.random() < 0.5 else kinds


def _fault(chance: random.Random, scenario: str, kinds: Sequence[str]) -> Fault:
    act = chance.choice(
        (
            *2 * ("passing",),
            *3 * ("corrupt",),
            "lasting",
            "reset",
            "expire",
            "range",
            "body",
            "slow",
            *(("lost", "lost") if "commit" in kinds else ()),
        )
    )
    kind = "commit" if act == "lost" else chance.choice((*kinds, None))
    if act == "corrupt" and chance.random() < 0.8:
        # Any other answer that is damaged is mostly found out by whoever parses it.
        kind = chance.choice(("cdn", "cdn", "resolve")) if "cdn" in kinds else "put"
    most = {"cdn": NUM_CDN.get(scenario, 1), "resolve": 8, None: NUM_REQUESTS[scenario]}
    how: dict[str, Any] = {
        "kind": kind,
        "skip": chance.choice((0, _place(chance, most.get(kind, 4)))),
        # Beyond our patience, and beyond all.
        "times": chance.choice((1, 1, 1, 2, 3, 7, 40, None)),
    }
    offset = chance.choice((0, 1, 7, 100, 1000, 5000))
    is_late = chance.random() < 0.3
    match act:
        case "passing" | "lasting" | "lost":
            status = chance.choice(LASTING if act == "lasting" else PASSING)
            how |= {"status": status, "retry_after": chance.choice((None, 0, 1))}
            how["after_act"] = is_late or act == "lost"
        case "reset":
            how |= {"reset": True, "after_act": is_late}
        case "expire":
            how |= {"expire": True, "kind": chance.choice(("cdn", "put"))}
        case "range":
            how |= {chance.choice(("ignore_range", "wrong_range")): True}
            how["kind"] = chance.choice(("cdn", "resolve"))
        case "body":
            how[chance.choice(("truncate_at", "reset_at"))] = offset
        case "corrupt":
            how[chance.choice(("corrupt_at", "corrupt_file_at"))] = offset
            how |= chance.choice(({}, _in_parts(chance, scenario)))
        case "slow":
            # What takes time takes it rarely.
            how["times"] = chance.choice((1, 2))
            slow = {"stall_at": offset, "stall_seconds": STALL_SECONDS}
            how |= chance.choice(({"rate": 20_000.0}, slow))
    return Fault(**how)


def passes(fault: Fault) -> bool:
    """Whether what goes wrong may pass, and does not damage what comes."""
    is_damage = fault.corrupt_at is not None or fault.corrupt_file_at is not None
    return fault.status not in LASTING and not is_damage
