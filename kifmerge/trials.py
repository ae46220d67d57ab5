"""Trials, each one method under one seed: run in turn, or several at once in processes."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kifmerge.models.model import quieten_libraries
from kifmerge.phases.sequence import TaskSequence
from kifmerge.phases.stage import Moment, SequenceOptions
from kifmerge.training.methods import METHODS

START = "start"


@dataclass(frozen=True, slots=True)
class Trial:
    """One method under one seed; the method ``start`` makes what the others share."""

    method: str
    seed: int

    @property
    def folder(self) -> Path:
        """Within the run folder."""
        return Path(self.method) / f"seed-{self.seed}"


OnMoment = Callable[[Trial, Moment], None]


def run_trials(
    trials: Sequence[Trial],
    options: SequenceOptions,
    out_dir: Path,
    num_jobs: int,
    on_moment: OnMoment,
) -> None:
    """Run trials one after the other here, or several at once in processes of their own.

    An error in one process ends the run after the trials under way; what is finished stays.
    """
    if num_jobs == 1 or len(trials) == 1:
        for trial in trials:
            _run_trial(trial, options, out_dir, functools.partial(on_moment, trial))
        return
    num_threads = max(1, (os.cpu_count() or 1) // num_jobs)
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        with _interrupts_ignored():  # inherited by the processes that are started here
            manager = stack.enter_context(context.Manager())
            pool = stack.enter_context(
                ProcessPoolExecutor(
                    num_jobs,
                    mp_context=context,
                    initializer=torch.set_num_threads,
                    initargs=(num_threads,),
                )
            )
            moments = manager.Queue()
            pending = [pool.submit(_run_in_worker, t, options, out_dir, moments) for t in trials]
        try:
            _relay(moments, pending, on_moment)
        except BaseException:
            for future in pending:
                future.cancel()
            raise


def _relay(moments: Any, pending: Sequence[Future[None]], on_moment: OnMoment) -> None:
    """Pass moments on until all trials have ended, be it with their process or an error."""
    while not all(future.done() for future in pending) or not moments.empty():
        with contextlib.suppress(queue.Empty):
            on_moment(*moments.get(timeout=0.2))
        for future in pending:
            if future.done():
                future.result()


def _run_in_worker(trial: Trial, options: SequenceOptions, out_dir: Path, moments: Any) -> None:
    """Run a trial where Ctrl-C ends it as it ends one in the foreground, but says nothing."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _run_trial(trial, options, out_dir, lambda moment: moments.put((trial, moment)))
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C for a moment; elsewhere than in the main thread it goes elsewhere anyway."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run_trial(
    trial: Trial, options: SequenceOptions, out_dir: Path, on_moment: Callable[[Moment], None]
) -> None:
    quieten_libraries()
    start_dir = out_dir / Trial(START, trial.seed).folder
    sequence = TaskSequence(options, trial.seed, start_dir, on_moment)
    if trial.method == START:
        sequence.run_start()
    else:
        sequence.run_method(METHODS[trial.method], out_dir / trial.folder)
