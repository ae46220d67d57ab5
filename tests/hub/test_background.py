"""Calls in the background: a few at a time, heard in their order."""

from __future__ import annotations

import threading
import time

import pytest

from kifmerge.hub import background
from kifmerge.hub.background import abandoning, in_background, in_order

# As many as the Hub's own client brings at once.
AT_ONCE = 8


def test_results_come_in_the_order_of_the_calls():
    def call(number):
        time.sleep(0.02 * (number % 3 == 0))
        return number

    assert list(in_order((lambda n=n: call(n)) for n in range(30))) == list(range(30))
    assert list(in_order([])) == []


def test_so_many_are_made_at_a_time_and_no_more():
    together, lock, now, most = threading.Barrier(AT_ONCE), threading.Lock(), [0], [0]

    def call():
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait(10)
        time.sleep(0.02)
        with lock:
            now[0] -= 1

    assert len(list(in_order([call] * (3 * AT_ONCE)))) == 3 * AT_ONCE
    assert most[0] == AT_ONCE


def test_the_first_that_fails_is_raised_and_no_more_are_begun():
    begun = []

    def call(number):
        begun.append(number)
        if number == 2:
            time.sleep(0.1)
        if number in (2, 4):
            raise ValueError(f"number {number}")
        return number

    found = in_order((lambda n=n: call(n)) for n in range(40))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="number 2"):
        next(found)
    assert max(begun) < 2 + AT_ONCE


def test_what_was_not_begun_when_it_ended_is_not_made(monkeypatch):
    let_go, made = threading.Event(), []
    busy = [in_background(lambda: let_go.wait(10)) for _ in range(background._NUM_THREADS)]
    ended = threading.Event()
    ended.set()
    with abandoning(ended), pytest.raises(InterruptedError):
        list(in_order([lambda: made.append(1)] * 3))
    let_go.set()
    assert all(future.result() for future in busy)
    in_background(lambda: None).result()
    # The one that was waited for was to be made; those after it were not.
    assert len(made) <= 1
