"""Evaluation: predictions first, kept whole; scores are computed from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from kifmerge.checkpoint.atomic import write_text
from kifmerge.phases.data import Example
from kifmerge.phases.encode import prompt_features
from kifmerge.phases.model import LoadedModel

Metric = Literal["exact-match", "rouge-l"]


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


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as JSONL, atomically."""
    rows = [{k: v for k, v in asdict(row).items() if v is not None} for row in predictions]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_predictions(path: Path) -> list[Prediction]:
    """Read what :func:`write_predictions` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Prediction(**json.loads(line)) for line in file]


def _exact_match(prediction: str, reference: str) -> float:
    return float(prediction.strip().lower() == reference.strip().lower())


def _rouge_l(prediction: str, reference: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return float(scorer.score(reference, prediction)["rougeL"].fmeasure)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
