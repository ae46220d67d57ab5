"""Rows of a task: read from JSONL, JSON, CSV, Parquet or the Hub, whatever their form.

Forms, recognised by their keys: ``instruction``/``input``/``output``, ``prompt``/``completion``,
``messages`` and ``text``/``label``. Other tables are mapped with ``columns``, where each value is a
template over the table's own columns: ``{"text": "{title}\\n{content}", "label": "{label}"}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.atomic import write_text
from kifmerge.errors import MOST_PROBLEMS_SHOWN, DataError, problem_list
from kifmerge.models.tables import Row, is_on_hub, sample, table_rows

FORMS = (
    ("instruction", "output"),  # with or without "input"
    ("prompt", "completion"),
    ("messages",),
    ("text", "label"),
)


@dataclass(frozen=True, slots=True)
class Example:
    """One row: what the model is given, and what it should answer.

    Attributes:
        id: of the row, unique within its file.
        instruction: what to do; empty if the input says it all.
        input: what to do it with. A classifier sees this alone.
        output: the answer, or the label.
        messages: earlier turns of a conversation, for chat templates; empty otherwise.
    """

    id: str
    instruction: str
    input: str
    output: str
    messages: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """How the rows of a source become examples.

    Attributes:
        columns: form key -> template over the source's columns; empty if the keys fit already.
        labels: the labels that outputs must be among, in order; a whole number in a ``label``
            column counts into this list. Empty: whatever is met.
        num_rows: draw so many rows at random, always the same; None takes all.
    """

    columns: Mapping[str, str]
    labels: Sequence[str] = ()
    num_rows: int | None = None


def read_examples(source: str, options: DataOptions) -> list[Example]:
    """All examples of a source, or a fixed random sample of them.

    Args:
        source: path of a .jsonl, .json, .csv or .parquet file, or
            ``hf://datasets/ORG/NAME[@REVISION][/CONFIG]:SPLIT``.
        options: mapping, labels and sample size.

    Raises:
        DataError: file missing or empty, a bad row (the first ten are named by file and line), a
            label outside the declared ones.
        TryAgainError: the Hub could not be reached.
    """
    located = _located_rows(source, options.num_rows)
    if not located:
        raise DataError(f"{source} is empty: expected at least one row")
    examples, problems = [], []
    for place, row in located:
        try:
            examples.append(_example(row, place, options))
        except ValueError as error:
            problems.append(f"{place}: {error}")
            if len(problems) > MOST_PROBLEMS_SHOWN:
                break
    if problems:
        raise DataError(problem_list(f"cannot use the rows of {source}", problems))
    return examples


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples as JSONL, atomically."""
    write_text(path, as_jsonl(examples))


def as_jsonl(examples: Iterable[Example]) -> str:
    """Text of a JSONL file that :func:`read_examples` takes back unchanged."""
    lines = []
    for example in examples:
        row = {key: value for key, value in asdict(example).items() if value != ()}
        if example.messages:
            answer = {"role": "assistant", "content": example.output}
            row = {"id": example.id, "messages": [*example.messages, answer]}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def labels_met(examples: Iterable[Example]) -> list[str]:
    """Distinct outputs in the order of first meeting."""
    return list(dict.fromkeys(example.output for example in examples))


def _located_rows(source: str, num_rows: int | None) -> list[tuple[str, Row]]:
    """The chosen (place, row) pairs; the place is FILE:LINE, or the source and the row's number."""
    if is_on_hub(source):
        return list(table_rows(source, num_rows))
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source}: no such file")
    if path.suffix in (".csv", ".parquet"):
        return list(table_rows(source, num_rows))
    located = list(_json_rows(path) if path.suffix == ".json" else _jsonl_rows(path))
    return [located[index] for index in sample(len(located), num_rows)]


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    problems: list[str] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                problems.append(f"{place}: not UTF-8, {error.reason} at byte {error.start}")
                continue
            except json.JSONDecodeError as error:
                problems.append(f"{place}: invalid JSON, {error.msg} at column {error.colno}")
                continue
            if not isinstance(row, dict):
                problems.append(f"{place}: expected an object, found {type(row).__name__}")
                continue
            if not problems:
                yield place, row
    if problems:
        raise DataError(problem_list(f"cannot read {path}", problems))


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: invalid JSON, {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8, {error.reason} at byte {error.start}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects")
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def _example(row: Row, place: str, options: DataOptions) -> Example:
    if options.columns:
        row = {**_mapped(row, options.columns), "id": row.get("id")}
    own_id = row.get("id")
    example = _recognised(row, str(place.rpartition("/")[2] if own_id is None else own_id))
    if options.labels:
        output = _declared_label(row.get("label", example.output), options.labels)
        example = Example(example.id, example.instruction, example.input, output, example.messages)
    return example


def _mapped(row: Row, columns: Mapping[str, str]) -> Row:
    """Fill the templates; one that is a column and nothing else keeps the column's own type."""
    mapped = {}
    for key, template in columns.items():
        column = template[1:-1] if template[:1] == "{" and template[-1:] == "}" else None
        try:
            mapped[key] = row[column] if column in row else template.format(**row)
        except KeyError as error:
            raise ValueError(
                f"missing column {error}: the mapping names it, the row has {', '.join(row)}"
            ) from None
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(f"{key}: cannot fill the template {template!r}: {error}") from None
    return mapped


def _recognised(row: Row, row_id: str) -> Example:
    form = next((form for form in FORMS if all(key in row for key in form)), None)
    if form is None:
        wanted = " or ".join("/".join(form) for form in FORMS)
        raise ValueError(f"missing column: expected {wanted}, found {', '.join(row) or 'nothing'}")
    if form == ("messages",):
        return _conversation(row, row_id)
    values = {key: _text(row, key) for key in form}
    if form == ("instruction", "output"):
        text = _text(row, "input") if row.get("input") is not None else ""
        return Example(row_id, values["instruction"], text, values["output"])
    given, answer = values.values()
    return Example(row_id, "", given, answer)


def _conversation(row: Row, row_id: str) -> Example:
    messages = row["messages"]
    if (
        not isinstance(messages, list)
        or len(messages) < 2
        or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
        or not all(isinstance(m.get("role"), str) for m in messages)
        or messages[-1]["role"] != "assistant"
    ):
        raise ValueError(
            "messages: expected a list of {role, content}, all text, that ends with an answer of "
            "the assistant"
        )
    earlier = tuple({"role": m["role"], "content": m["content"]} for m in messages[:-1])
    return Example(row_id, "", earlier[-1]["content"], messages[-1]["content"], earlier)


def _text(row: Row, key: str) -> str:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{key}: expected text, found {type(value).__name__}")
    return str(value)


def _declared_label(value: Any, labels: Sequence[str]) -> str:
    text = str(value).strip()
    if text in labels:
        return text
    if isinstance(value, int) and 0 <= value < len(labels):
        return labels[value]
    raise ValueError(f"label {text!r} is not among the declared: {', '.join(labels)}")
