"""Tasks: where their rows are, and the rows themselves, read when first needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kifmerge.errors import DataError
from kifmerge.models.data import DataOptions, Example, labels_met, read_examples
from kifmerge.models.model import Kind
from kifmerge.phases.evaluate import Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """One task of a sequence.

    Attributes:
        name: used in folders and tables.
        train: source of the training rows (see :func:`kifmerge.models.data.read_examples`).
        test: source of the test rows.
        columns: template per form key, where the source's own columns do not fit.
        labels: declared labels; empty takes those met in the training rows.
        train_rows: a fixed random sample of so many; None takes all.
        test_rows: likewise.
        metric: of language models: ``exact-match`` or ``rouge-l``.
    """

    name: str
    train: str
    test: str
    columns: Mapping[str, str] | None = None
    labels: Sequence[str] = ()
    train_rows: int | None = None
    test_rows: int | None = None
    metric: Metric = "exact-match"


class Task:
    """A task with its rows, read when first needed."""

    def __init__(self, options: TaskOptions) -> None:
        self.options = options
        self.name = options.name

    @cached_property
    def train(self) -> list[Example]:
        """Training rows."""
        return self._read(self.options.train, self.options.train_rows, self.options.labels)

    @cached_property
    def test(self) -> list[Example]:
        """Test rows; their labels must be among the task's."""
        return self._read(self.options.test, self.options.test_rows, self.options.labels)

    @cached_property
    def labels(self) -> list[str]:
        """Declared labels, or those met in the training rows, sorted."""
        return list(self.options.labels) or sorted(labels_met(self.train))

    def _read(self, source: str, num_rows: int | None, labels: Sequence[str]) -> list[Example]:
        columns = self.options.columns or {}
        return read_examples(source, DataOptions(columns=columns, labels=labels, num_rows=num_rows))


def check_rows(tasks: Sequence[TaskOptions], kind: Kind) -> None:
    """Read all rows of all tasks, so that what is wrong with any of them shows at once.

    Raises:
        DataError: with the problems of all sources; for a classifier also when a test row's label
            is not among the task's, and could never be answered.
    """
    problems = []
    for task in map(Task, tasks):
        for part in ("train", "test"):
            try:
                getattr(task, part)
            except DataError as error:
                problems.append(str(error))
        if kind == "classifier" and not problems:
            strange = sorted(set(labels_met(task.test)) - set(task.labels))
            if strange:
                names = ", ".join(map(repr, strange))
                problems.append(
                    f"{task.options.test}: labels {names} are not among those of "
                    f"task {task.name}: {', '.join(task.labels)}"
                )
    if problems:
        raise DataError("\n".join(problems))
