"""Training on one task: how many steps, what changes, what is reported."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest
import synthetic
import tiny
import torch

from kifmerge.models.data import Example
from kifmerge.models.model import ModelOptions, load_model
from kifmerge.models.scratch import make_base
from kifmerge.models.tokenizer import TokenizerOptions
from kifmerge.training.recurrent import RecurrentOptions
from kifmerge.training.train import (
    TrainingFolders,
    TrainingOptions,
    train_task,
    training_arguments,
)

pytestmark = pytest.mark.slow  # whole trainings

ROWS = [
    Example(str(number), "", row["text"], row["label"])
    for number, row in enumerate(synthetic.rows("colours", 20))
]
MEMORY = [
    Example(str(number), "", row["text"], row["label"])
    for number, row in enumerate(synthetic.rows("sizes", 6))
]
LABELS = ["cold", "warm", "large", "little"]
OPTIONS = TrainingOptions(epochs=1, batch_size=4, learning_rate=0.01, device="cpu")
SHORT = RecurrentOptions(inner_steps=2, outer_steps=1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = TokenizerOptions(kind="bytes", vocabulary_size=300)
    llama = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24}
    llama |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    t5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
    classifier = {**synthetic.MODEL, "tokenizer": TokenizerOptions()}
    made = {
        "classifier": ModelOptions(**classifier),
        "stock": ModelOptions(**{**classifier, "pooling": "own"}),
        "causal-lm": ModelOptions(kind="causal-lm", config=llama, tokenizer=tokenizer),
        "seq2seq-lm": ModelOptions(
            kind="seq2seq-lm", config={**t5, "num_heads": 2}, tokenizer=tokenizer, dropout=0.0
        ),
    }
    texts = [example.input for example in [*ROWS, *MEMORY]]
    return {n: make_base(o, texts, folder / n, seed=0) for n, o in made.items()}


@pytest.fixture
def trained(bases, tmp_path):
    """Train a fresh model; returns its weights and the record."""

    def train(kind="classifier", memory=(), recurrent=SHORT, rows=ROWS, seed=1, **changes):
        loaded = load_model(bases[kind], LABELS, seed=0)
        options = dataclasses.replace(OPTIONS, **changes)
        record = train_task(
            loaded, rows, memory, options, recurrent, seed=seed, folders=new_folders(tmp_path)
        )
        return tiny.trained(loaded.model), record

    return train


def new_folders(tmp_path):
    return TrainingFolders(steps=Path(tempfile.mkdtemp(dir=tmp_path)))


def close(left, right) -> bool:
    return all(torch.allclose(left[name], right[name], atol=1e-5) for name in left)


class TestSteps:
    @pytest.mark.parametrize(
        ("changes", "num_steps"),
        [
            ({}, 5),
            ({"epochs": 2}, 10),
            ({"batch_size": 8}, 3),
            ({"accumulation": 2}, 3),
            ({"max_steps": 4}, 4),
            ({"max_steps": 7}, 7),
        ],
    )
    def test_of_plain_training(self, trained, changes, num_steps):
        _, record = trained(**changes)
        assert (record.num_steps, record.num_outer_steps, record.rounds) == (num_steps, 0, [])

    def test_of_the_recurrent_loop(self, trained):
        _, record = trained(memory=MEMORY)
        # Two whole rounds of 2 and 1, and the tail of one step fused like a round.
        assert [(r.inner_steps, r.outer_steps) for r in record.rounds] == [(2, 1), (2, 1), (1, 1)]
        assert (record.num_steps, record.num_outer_steps) == (5, 3)

    def test_losses_are_logged_and_none_is_lost(self, trained):
        _, record = trained(epochs=5)
        assert len(record.losses) == 2
        assert record.losses[-1] < record.losses[0]
        assert record.num_nonfinite_steps == 0
        assert record.train_seconds > 0


class TestWeights:
    @pytest.mark.parametrize("kind", ["classifier", "stock", "causal-lm", "seq2seq-lm"])
    def test_all_kinds_learn(self, trained, kind):
        _, record = trained(kind, memory=MEMORY, epochs=12)
        assert record.losses[-1] < record.losses[0]

    def test_same_seed_same_weights(self, trained):
        one, two, other = (trained(memory=MEMORY, seed=seed)[0] for seed in (1, 1, 2))
        assert tiny.same(one, two)
        assert not tiny.same(one, other)

    def test_without_memory_the_loop_is_plain_training(self, trained):
        assert tiny.same(trained()[0], trained(recurrent=None)[0])
        assert not tiny.same(trained()[0], trained(memory=MEMORY)[0])

    @pytest.mark.parametrize("kind", ["classifier", "stock", "causal-lm", "seq2seq-lm"])
    def test_accumulated_micro_batches_make_the_same_step(self, trained, kind):
        """4 x 1 rows and 2 x 2 rows: the mean over the same rows, up to rounding."""
        rows = [dataclasses.replace(row, output="warm") for row in ROWS]
        settings = {"rows": rows, "optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0}
        whole, _ = trained(kind, batch_size=4, **settings)
        halves, _ = trained(kind, batch_size=2, accumulation=2, **settings)
        assert close(whole, halves)

    def test_language_model_s_tokens_weigh_alike_over_micro_batches(self, trained):
        """Answers of many lengths: a causal model's loss is the mean over all tokens of a step."""
        rows = [dataclasses.replace(r, output="warm " * (n % 5)) for n, r in enumerate(ROWS)]
        settings = {"rows": rows, "optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0}
        whole, _ = trained("causal-lm", batch_size=4, **settings)
        halves, _ = trained("causal-lm", batch_size=2, accumulation=2, **settings)
        assert close(whole, halves)

    def test_gradients_are_clipped(self, trained):
        settings = {"optimizer": "sgd", "learning_rate": 1.0, "schedule": "constant"}
        before, _ = trained(max_steps=1, **{**settings, "learning_rate": 0.0})
        after, _ = trained(max_steps=1, max_grad_norm=1e-3, **settings)
        moved = torch.cat([(after[n] - before[n]).flatten() for n in before])
        assert moved.norm() == pytest.approx(1e-3, rel=1e-2)


class TestProgress:
    def test_is_told_after_every_step(self, bases, tmp_path):
        seen = []
        loaded = load_model(bases["classifier"], LABELS, seed=0)
        options = dataclasses.replace(OPTIONS, epochs=3)
        train_task(
            loaded,
            ROWS,
            MEMORY,
            options,
            SHORT,
            seed=0,
            folders=new_folders(tmp_path),
            on_progress=seen.append,
        )
        assert [p.step for p in seen] == list(range(1, 16))
        assert {p.num_steps for p in seen} == {15}
        assert [p.num_rounds for p in seen] == sorted(p.num_rounds for p in seen)
        assert seen[0].loss is None
        assert seen[-1].loss is not None


class TestOptions:
    def test_are_passed_on(self, tmp_path):
        options = TrainingOptions(
            epochs=2.5,
            batch_size=3,
            accumulation=4,
            learning_rate=0.5,
            schedule="cosine",
            warmup_steps=6,
            weight_decay=0.25,
            max_grad_norm=2.0,
            device="cpu",
        )
        made = training_arguments(options, seed=9, output_dir=str(tmp_path))
        assert made.num_train_epochs == 2.5
        assert made.max_steps == -1
        assert made.per_device_train_batch_size == 3
        assert made.gradient_accumulation_steps == 4
        assert (made.learning_rate, made.lr_scheduler_type.value) == (0.5, "cosine")
        assert (made.warmup_steps, made.weight_decay, made.max_grad_norm) == (6, 0.25, 2.0)
        assert (made.seed, made.device.type) == (9, "cpu")
        assert (made.save_strategy.value, made.save_steps) == ("steps", 200)

    @pytest.mark.parametrize(
        "changes",
        [
            {"optimizer": "adamw_trch"},
            {"schedule": "linaer"},
            {"batch_size": 0},
            {"accumulation": 0},
            {"learning_rate": -1.0},
            {"max_steps": 0},
            {"epochs": 0},
        ],
        ids=str,
    )
    def test_that_cannot_be(self, changes):
        with pytest.raises(ValueError, match=next(iter(changes))):
            TrainingOptions(**changes)

    def test_only_the_last_step_is_left_on_disk(self, trained, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        trained(memory=MEMORY, save_steps=2)
        (folder,) = tmp_path.iterdir()
        assert [inner.name for inner in folder.iterdir()] == ["step-00000005"]
