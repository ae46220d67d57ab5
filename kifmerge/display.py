"""What a person sees: progress on stderr, tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from kifmerge.phases.report import Table
    from kifmerge.phases.stage import Moment
    from kifmerge.training.train import Progress as Steps
    from kifmerge.trials import Trial


class ProgressDisplay:
    """Live bars on a terminal, one line per finished activity elsewhere, nothing when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, markup=False, emoji=False)
        self._bars: dict[object, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line to stderr."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def on_moment(self, trial: Trial, moment: Moment) -> None:
        """Show where a trial is."""
        description = f"{trial.method} seed {trial.seed}: {moment.activity} {moment.task}"
        if not self._console.is_terminal:
            if moment.done == moment.total:
                self.say(f"{description}, {moment.total} done {_figures(moment)}".rstrip())
            return
        self._show(trial, description, moment.done, moment.total, _figures(moment))

    def on_step(self, phase: str, progress: Steps) -> None:
        """Show how many steps of a phase are made."""
        if self._console.is_terminal:
            figures = "" if progress.loss is None else f"loss {progress.loss:.3f}"
            self._show(phase, phase, progress.step, progress.num_steps, figures)

    def _show(self, key: object, description: str, done: int, total: int, figures: str) -> None:
        """Move the bar of a key; another description begins it anew."""
        if key not in self._bars:
            self._bars[key] = self._progress.add_task(description, total=total, figures="")
        bar = self._bars[key]
        if self._progress.tasks[self._progress.task_ids.index(bar)].description != description:
            self._progress.reset(bar, total=total)
        self._progress.update(bar, description=description, completed=done, figures=figures)


def _figures(moment: Moment) -> str:
    parts = []
    if moment.num_rounds:
        parts.append(f"round {moment.num_rounds}")
    if moment.loss is not None:
        parts.append(f"loss {moment.loss:.3f}")
    return " ".join(parts)


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables to stdout; wide enough not to cut figures when it is not a terminal."""
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(width=10_000, markup=False, emoji=False)
    for table in tables:
        console.print(f"\n{table.title}", highlight=False)
        shown = RichTable()
        for number, name in enumerate(table.header):
            shown.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
