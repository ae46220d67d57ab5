"""Evaluation: predictions first, kept whole; scores are computed from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from kifmerge.checkpoint.atomic import whole_folder, write_json, write_text
from kifmerge.checkpoint.provenance import check_format, read_details
from kifmerge.errors import CheckpointError, RunError
from kifmerge.models.data import Example, labels_met
from kifmerge.models.encode import prompt_features
from kifmerge.models.model import LoadedModel

Metric = Literal["exact-match", "rouge-l"]

FORMAT = "kifmerge.evaluation"
VERSION = 1
DEFINITIONS = {
    "exact-match": "share of answers equal to the reference after lower-casing and trimming",
    "rouge-l": "mean F1 of the longest common subsequence of words, without stemming",
    "score": "of the metric; of a classifier over the union of all labels that it knows",
    "own_labels_score": "of a classifier: share of exact matches when only the labels of the file "
    "itself may be chosen",
    "mean": "plain mean over the files, whatever their numbers of rows",
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row's answer.

    Attributes:
        id: of the example.
        prediction: over all labels a classifier knows, or the generated text.
        reference: the right answer.
        own_prediction: a classifier's best among the labels of the row's own task.
    """

    id: str
    prediction: str
    reference: str
    own_prediction: str | None = None


def predict(
    loaded: LoadedModel,
    examples: Sequence[Example],
    own_labels: Sequence[str],
    *,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda num_rows: None,
) -> list[Prediction]:
    """Answer every example: greedy generation, or the classifier's best label.

    Rows are batched by length, so that little is spent on padding, and returned in their own order.

    Args:
        loaded: the model; left in evaluation mode.
        examples: of one task.
        own_labels: labels of that task, for a classifier.
        batch_size: rows at once.
        on_batch: told the number of rows done after each batch.
    """
    loaded.model.eval()
    features = prompt_features(loaded, examples)
    order = sorted(range(len(features)), key=lambda row: len(features[row]["input_ids"]))
    answer = _classify if loaded.options.kind == "classifier" else _generate
    found: dict[int, Prediction] = {}
    with torch.inference_mode():
        for rows in _batches(order, batch_size):
            answers = answer(loaded, [features[row] for row in rows], own_labels)
            for row, (prediction, own) in zip(rows, answers, strict=True):
                example = examples[row]
                found[row] = Prediction(example.id, prediction, example.output, own)
            on_batch(len(rows))
    return [found[row] for row in range(len(examples))]


def _batches(order: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


Answers = list[tuple[str, str | None]]


def _classify(
    loaded: LoadedModel, features: list[dict[str, Any]], own_labels: Sequence[str]
) -> Answers:
    batch = loaded.tokenizer.pad(features, return_tensors="pt").to(loaded.model.device)
    logits = loaded.model(**batch).logits.float()
    own = [number for number, label in enumerate(loaded.labels) if label in own_labels]
    best = logits.argmax(-1).tolist()
    if not own:
        return [(loaded.labels[number], None) for number in best]
    best_own = logits[:, own].argmax(-1).tolist()
    return [
        (loaded.labels[number], loaded.labels[own[own_number]])
        for number, own_number in zip(best, best_own, strict=True)
    ]


def _generate(
    loaded: LoadedModel, features: list[dict[str, Any]], _own_labels: Sequence[str]
) -> Answers:
    tokenizer, model = loaded.tokenizer, cast(Any, loaded.model)
    side = "left" if loaded.options.kind == "causal-lm" else "right"
    batch = tokenizer.pad(features, return_tensors="pt", padding_side=side).to(model.device)
    tokens = model.generate(
        **batch,
        max_new_tokens=loaded.options.max_output_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if loaded.options.kind == "causal-lm":
        tokens = tokens[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [(text.strip(), None) for text in texts]


def score_predictions(predictions: Sequence[Prediction], metric: Metric) -> dict[str, float]:
    """Scores in [0, 1] of one task's predictions, recomputable from what is kept.

    Returns:
        ``score``: share of answers equal to the reference after lower-casing and trimming, or the
        mean ROUGE-L F1. For classifiers also ``own_labels_score``: accuracy when only the task's
        own labels may be chosen.

    >>> rows = [Prediction("1", " Yes", "yes"), Prediction("2", "no", "yes")]
    >>> score_predictions(rows, "exact-match")
    {'score': 0.5}
    """
    rate = _rouge_l if metric == "rouge-l" else _exact_match
    scores = {"score": _mean([rate(row.prediction, row.reference) for row in predictions])}
    own = [row for row in predictions if row.own_prediction is not None]
    if own:
        scores["own_labels_score"] = _mean(
            [_exact_match(row.own_prediction or "", row.reference) for row in own]
        )
    return scores


def evaluate_files(
    loaded: LoadedModel,
    files: Mapping[str, Sequence[Example]],
    out: Path,
    *,
    labels: Sequence[str] = (),
    metric: Metric = "exact-match",
    batch_size: int = 32,
    made_by: Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] = lambda num_rows: None,
) -> dict[str, Any]:
    """Answer the rows of several files, keep the predictions, and write the scores.

    Args:
        loaded: the model; left in evaluation mode.
        files: name -> rows; the name is that of the file of its predictions.
        out: JSON file to write; predictions go into the folder :func:`predictions_dir` beside it.
            Whatever they hold is replaced: see :func:`finished_evaluation`.
        labels: of every file, for a classifier; those met in each if left out.
        metric: of the scores.
        batch_size: rows at once.
        made_by: recorded in the file.
        on_batch: told the number of rows done after each batch.

    Returns:
        What was written: scores of each file and their mean, definitions, labels of the rows that
        the model does not know and cannot answer.
    """
    rows: dict[str, dict[str, Any]] = {}
    folder = predictions_dir(out)
    with whole_folder(folder, overwrite=True) as temporary:
        for name, examples in files.items():
            met = list(labels) or sorted(labels_met(examples))
            own = met if loaded.options.kind == "classifier" else []
            predictions = predict(loaded, examples, own, batch_size=batch_size, on_batch=on_batch)
            write_predictions(temporary / f"{name}.jsonl", predictions)
            rows[name] = {
                "num_rows": len(predictions),
                **score_predictions(predictions, metric),
                "unknown_labels": [label for label in own if label not in loaded.labels],
            }
        out.unlink(missing_ok=True)  # scores never lie beside predictions that they are not of
    content = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": made_by,
        "definitions": DEFINITIONS,
        "metric": metric,
        "predictions": folder.name,
        "files": rows,
        "mean": _mean_scores(list(rows.values())),
    }
    write_json(out, content)
    return content


def predictions_dir(out: Path) -> Path:
    """Where the predictions behind a file of scores are kept."""
    return out.with_suffix(".predictions")


def finished_evaluation(
    out: Path, made_by: Mapping[str, Any], *, overwrite: bool
) -> dict[str, Any] | None:
    """What :func:`evaluate_files` has written to ``out`` already; None if it is still to be done.

    Raises:
        RunError: ``out`` or its predictions hold something else, not to be overwritten.
    """
    if out == predictions_dir(out):
        raise RunError(f"{out}: this is the name of the folder of predictions: choose another")
    in_the_way = [path for path in (out, predictions_dir(out)) if path.exists()]
    if out.is_file():
        try:
            found = read_details(out)
            check_format(found, FORMAT, VERSION, out)
        except CheckpointError:
            found = {}  # not of ours
        if found.get("made_by") == made_by and predictions_dir(out).is_dir():
            return found
    if in_the_way and (not overwrite or out.is_dir()):
        raise RunError(
            f"{in_the_way[0]} holds something else: choose another --out, or --overwrite it"
        )
    return None


def source_names(sources: Sequence[str]) -> list[str]:
    """A name for each source that no other has: of its file, and of as many folders as it takes.

    >>> source_names(["a/test.jsonl", "b/test.jsonl"])
    ['a-test', 'b-test']
    >>> source_names(["hf://datasets/org/name:test", "b/test.jsonl"])
    ['name-test', 'b-test']
    """
    parts = [
        [p for p in re.split(r"[/:]", re.sub(r"\.(jsonl?|csv|parquet)$", "", s)) if p]
        for s in sources
    ]
    names: list[str] = []
    for num_parts in range(1, max(map(len, parts), default=0) + 1):
        joined = ["-".join(part[-num_parts:]) for part in parts]
        names = [re.sub(r"[^\w.-]", "-", name).lstrip(".") or "rows" for name in joined]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{number}" for number, name in enumerate(names)]


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as JSONL, atomically."""
    rows = [{k: v for k, v in asdict(row).items() if v is not None} for row in predictions]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_predictions(path: Path) -> list[Prediction]:
    """Read what :func:`write_predictions` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Prediction(**json.loads(line)) for line in file]


def _mean_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean over the files of each score that all of them have."""
    return {
        name: _mean([row[name] for row in rows])
        for name in ("score", "own_labels_score")
        if all(name in row for row in rows)
    }


def _exact_match(prediction: str, reference: str) -> float:
    return float(prediction.strip().lower() == reference.strip().lower())


def _rouge_l(prediction: str, reference: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return float(scorer.score(reference, prediction)["rougeL"].fmeasure)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
