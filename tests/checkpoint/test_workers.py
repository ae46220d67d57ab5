"""Workers: results in order, one error, and nothing that goes on when the work has ended."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time

import faults
import pytest
import torch

from kifmerge.checkpoint.workers import Workers, num_processors, peak_bytes, worker_pool

NUMS = [0, 1, 2, 5]


@pytest.fixture(params=NUMS)
def workers(request):
    made = Workers(request.param)
    yield made
    made.close()


@pytest.fixture
def pool():
    made = Workers(3)
    yield made
    made.close()


def slow_square(number):
    time.sleep(random.random() / 500)
    return number * number


class Record:
    """A function that notes what it was called with, when it is through."""

    def __init__(self, *, fails_at=(), seconds=0.0):
        self.done = []
        self._fails_at = fails_at
        self._seconds = seconds

    def __call__(self, number):
        time.sleep(self._seconds)
        if number in self._fails_at:
            raise ValueError(f"item {number}")
        self.done.append(number)
        return number

    def assert_over(self):
        """Nothing more is done."""
        before = list(self.done)
        time.sleep(3 * self._seconds + 0.05)
        assert self.done == before


class TestMap:
    @pytest.mark.parametrize("num_items", [0, 1, 3, 50])
    def test_results_come_in_the_order_of_the_items(self, workers, num_items):
        expected = [number * number for number in range(num_items)]
        assert list(workers.map(slow_square, range(num_items))) == expected

    def test_items_are_worked_on_at_the_same_time(self):
        barrier = threading.Barrier(3, timeout=30)
        workers = Workers(3)
        assert list(workers.map(lambda _: barrier.wait() >= 0, range(6))) == [True] * 6
        workers.close()

    def test_without_threads_it_is_the_caller_s_own(self):
        assert set(Workers(0).map(lambda _: threading.get_ident(), range(3))) == {
            threading.get_ident()
        }

    def test_stream_is_not_taken_in_faster_than_results_are_taken_out(self, workers):
        """What is kept does not grow with the stream."""
        taken = []
        results = workers.map(lambda number: number, map_noting(taken, itertools.count()))
        for num_results in range(1, 40):
            next(results)
            assert len(taken) - num_results <= workers.num + 3
        results.close()

    def test_items_taken_during_a_call_may_be_spread_again(self, pool):
        sums = pool.map(lambda number: number, range(5))
        assert [a + b for a, b in zip(sums, pool.map(slow_square, range(5)), strict=True)] == [
            0, 2, 6, 12, 20,
        ]  # fmt: skip


def map_noting(taken, items):
    for item in items:
        taken.append(item)
        yield item


class TestErrors:
    def test_first_error_in_the_items_order_ends_the_work(self, workers):
        record = Record(fails_at=(7, 8, 9), seconds=0.005)
        taken, results = [], []

        def collect():
            for result in workers.map(record, map_noting(taken, range(1000))):
                results.append(result)  # noqa: PERF402 - until it fails

        with pytest.raises(ValueError, match="item 7"):
            collect()
        assert results == list(range(7))
        assert len(taken) < 30
        record.assert_over()

    def test_error_of_the_stream_itself_ends_the_work(self, workers):
        record = Record(seconds=0.01)

        def broken():
            yield from range(4)
            raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"):
            list(workers.map(record, broken()))
        record.assert_over()

    def test_they_can_be_used_again_after_an_error(self, workers):
        with pytest.raises(ValueError, match="item 1"):
            list(workers.map(Record(fails_at=(1,)), range(10)))
        assert list(workers.map(slow_square, range(4))) == [0, 1, 4, 9]


class TestEnd:
    """Who goes on, or away, must find that nothing writes any more."""

    def test_closed_early(self, workers):
        record = Record(seconds=0.02)
        results = workers.map(record, range(100))
        assert [next(results), next(results)] == [0, 1]
        results.close()
        record.assert_over()
        assert len(record.done) < 20

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
    def test_error_of_who_takes_the_results(self, workers, error):
        record = Record(seconds=0.02)

        def take():
            for result in workers.map(record, range(100)):
                if result == 2:
                    raise error

        with pytest.raises(error):
            take()
        record.assert_over()
        assert len(record.done) < 20

    def test_interrupted_while_waiting_for_a_result(self, pool):
        """As by Ctrl-C, which nearly always comes then; the one waited for may take the longest."""
        done = []

        def work(number):
            time.sleep(0.1)
            if number == 0:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
            done.append(number)

        with pytest.raises(KeyboardInterrupt):
            list(pool.map(work, range(100)))
        assert 0 in done
        before = list(done)
        time.sleep(0.3)
        assert done == before
        assert len(done) < 20


class TestPool:
    @pytest.fixture(autouse=True)
    def threads(self):
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        yield
        torch.set_num_threads(before)

    def test_torch_has_one_thread_in_each_worker_and_as_many_as_before_afterwards(self):
        with worker_pool(2) as workers:
            seen = list(workers.map(lambda _: torch.get_num_threads(), range(20)))
        assert seen == [1] * 20
        assert torch.get_num_threads() == 3

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_torch_has_its_threads_again_after_an_error(self, error):
        def fail():
            with worker_pool(2) as workers:
                list(workers.map(slow_square, range(3)))
                raise error

        with pytest.raises(error):
            fail()
        assert torch.get_num_threads() == 3

    def test_threads_end_with_it(self):
        before = set(threading.enumerate())
        with worker_pool(4) as workers:
            list(workers.map(slow_square, range(20)))
            assert len(set(threading.enumerate()) - before) == 4
        assert set(threading.enumerate()) <= before

    def test_as_many_as_processors_unless_told_otherwise(self):
        with worker_pool() as workers:
            assert workers.num == num_processors() == len(os.sched_getaffinity(0))
        with worker_pool(0) as workers:
            assert workers.num == 0


class TestPeak:
    def test_grows_with_what_is_held(self):
        def hold(say):
            before = peak_bytes()
            held = b"x" * (1 << 28)
            say({"before": before, "after": peak_bytes(), "held": len(held)})

        found = faults.fork(hold).end().said()  # its peak is not that of the tests before
        assert 10_000_000 < found["before"] < found["after"]
        assert abs(found["after"] - found["before"] - found["held"]) <= 50_000_000

    @pytest.mark.slow
    def test_is_that_of_this_process_alone(self):
        """A large process may start a small one."""
        held = torch.ones(1 << 27)
        code = "from kifmerge.checkpoint.workers import peak_bytes; print(peak_bytes())"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert int(found.stdout) < held.nbytes
