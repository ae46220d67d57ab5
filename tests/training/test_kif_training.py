"""What KIF asks of training: scores without the first step, orthogonal ranks, frozen elements."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from transformers import TrainerCallback

from kifmerge.errors import CheckpointError, TrainingError
from kifmerge.tensor.importance import ImportanceAccumulator
from kifmerge.training.kif_training import (
    KifMixin,
    KifTraining,
    read_task_scores,
)
from kifmerge.training.presets import KifOptions, RecurrentOptions
from kifmerge.training.trainer import RecurrentTrainer

pytestmark = pytest.mark.slow  # whole trainings


class Trainer(KifMixin, RecurrentTrainer):
    """A stock Trainer that can be trained as KIF wants it."""


def trainer(folder, model=None, kif=None, trained=None, callbacks=(), **changes):
    made = Trainer(
        tiny.lora_llama() if model is None else model,
        tiny.arguments(folder, **changes),
        train_dataset=tiny.rows(40),
        callbacks=list(callbacks),
    )
    options = KifOptions() if kif is None else kif
    made.use_kif(KifTraining(kif=options, recurrent=RecurrentOptions(), trained=trained))
    return made


def scored_by_hand(seen, kif, first):
    """An accumulator over the steps from ``first`` on."""
    names = list(seen.after[0])
    accumulator = ImportanceAccumulator(seen.after[0], kif.importance)
    for weights, gradients in zip(seen.after[first:], seen.gradients[first:], strict=True):
        accumulator.accumulate([weights[n] for n in names], [gradients[n] for n in names])
    return accumulator.state_dict()


class TestTaskScores:
    @pytest.mark.parametrize(("first_step", "first"), [("left-out", 1), ("counted", 0)])
    @pytest.mark.parametrize("unit", ["tensor", "lora-rank"])
    def test_the_very_first_step_is_left_out_unless_counted(
        self, tmp_path, unit, first_step, first
    ):
        kif = KifOptions(unit=unit, first_step=first_step)
        seen = tiny.Gradients()
        made = trainer(tmp_path, kif=kif, callbacks=[seen])
        made.train()
        accumulator = made.task_scores.accumulator
        assert accumulator.num_steps == 6 - first
        assert tiny.same(accumulator.state_dict(), scored_by_hand(seen, kif, first))
        others = scored_by_hand(seen, kif, 1 - first)
        assert not tiny.same(accumulator.state_dict(), others)

    def test_order_of_importance_by_unit(self):
        assert KifOptions(unit="lora-rank").importance.sensitivity == "mixed"
        assert KifOptions(unit="layer").importance.sensitivity == "first"
        chosen = KifOptions(unit="lora-rank", sensitivity="second")
        assert chosen.importance.sensitivity == "second"

    def test_refused_step_is_left_out(self, tmp_path):
        model = tiny.lora_llama()
        tiny.spoil_gradient(model, next(iter(tiny.trained(model))), 3, float("nan"))
        made = trainer(tmp_path, model)
        made.train()
        assert made.num_nonfinite_steps == 1
        assert made.task_scores.accumulator.num_steps == 6 - 2
        assert all(v.isfinite().all() for v in made.task_scores.accumulator.state_dict().values())

    def test_without_gradients_is_an_error(self, tmp_path):
        class Thief(TrainerCallback):
            def on_pre_optimizer_step(self, *args, **kwargs):
                kwargs["model"].zero_grad()

        made = trainer(tmp_path, callbacks=[Thief()])
        with pytest.raises(TrainingError, match="no parameter has a gradient"):
            made.train()

    def test_kept_scores_come_back(self, tmp_path):
        made = trainer(tmp_path)
        made.train()
        made.task_scores.save(tmp_path)
        tensors, num_steps = read_task_scores(tmp_path)
        assert num_steps == 5
        assert tiny.same(tensors, made.task_scores.accumulator.state_dict())

    def test_of_other_parameters_are_refused(self, tmp_path):
        made = trainer(tmp_path)
        made.train()
        made.task_scores.save(tmp_path)
        other = trainer(tmp_path, tiny.llama())
        other.task_scores.resume_from = tmp_path
        with pytest.raises(CheckpointError, match="scores of other parameters, first at"):
            other.train()

    @pytest.mark.parametrize("damage", ["remove", "cut"])
    def test_damaged_scores_are_refused(self, tmp_path, damage):
        made = trainer(tmp_path)
        made.train()
        made.task_scores.save(tmp_path)
        path = tmp_path / "scores.safetensors"
        content = path.read_bytes()
        path.unlink() if damage == "remove" else path.write_bytes(content[:50])
        with pytest.raises(CheckpointError, match="does not hold the scores of the task"):
            read_task_scores(tmp_path)


def penalty_gradients(weights):
    """0.1 x the mean of ||A A^T - I||_F and ||B^T B - I||_F, and its gradient, in float64."""
    leaves = {n: w.double().requires_grad_() for n, w in weights.items()}
    rows = [value if ".lora_A." in name else value.T for name, value in leaves.items()]
    grams = [row @ row.T for row in rows]
    total = sum((gram - torch.eye(len(gram), dtype=gram.dtype)).norm() for gram in grams)
    term = 0.1 * total / len(grams)
    return term.item(), dict(zip(leaves, torch.autograd.grad(term, leaves.values()), strict=True))


class Micro(TrainerCallback):
    """Remembers the loss that the Trainer logs."""

    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


class TestOrthogonality:
    @pytest.mark.parametrize("weighting", ["by tokens", "by micro-batch"])
    @pytest.mark.parametrize("accumulation", [1, 2, 4])
    def test_weighs_a_tenth_of_a_step_however_many_micro_batches(
        self, tmp_path, accumulation, weighting
    ):
        """The gradient of a step differs by that of the term, and its loss by the term."""
        seen, losses = {}, {}
        for unit in ("tensor", "lora-rank"):
            watcher, micro = tiny.Gradients(), Micro()
            made = trainer(
                tmp_path,
                kif=KifOptions(unit=unit),
                callbacks=[watcher, micro],
                gradient_accumulation_steps=accumulation,
                max_grad_norm=0.0,
                max_steps=1,
            )
            made.model_accepts_loss_kwargs = weighting == "by tokens"
            made.train()
            seen[unit], losses[unit] = watcher, micro.losses[0]
        term, expected = penalty_gradients(seen["tensor"].before[0])
        without, with_term = (seen[unit].gradients[0] for unit in ("tensor", "lora-rank"))
        for name, gradient in expected.items():
            torch.testing.assert_close(
                (with_term[name] - without[name]).double(), gradient, atol=1e-6, rtol=1e-4
            )
        assert losses["lora-rank"] - losses["tensor"] == pytest.approx(term, abs=2e-4)

    def test_comes_before_clipping(self, tmp_path):
        watcher = tiny.Gradients()
        kif = KifOptions(orthogonality=1000.0)
        trainer(
            tmp_path, kif=kif, callbacks=[watcher], max_grad_norm=0.5, max_steps=1
        ).train()  # fmt: skip
        norms = [g.norm() for g in watcher.gradients[0].values()]
        assert float(torch.stack(norms).norm()) == pytest.approx(0.5, rel=1e-3)

    def test_keeps_ranks_apart(self, tmp_path):
        found = {}
        for weight in (0.0, 1.0):
            model = tiny.lora_llama()
            kif = KifOptions(orthogonality=weight)
            trainer(tmp_path, model, kif, max_steps=40, learning_rate=0.05).train()
            found[weight] = penalty_gradients(tiny.trained(model))[0]
        assert found[1.0] < 0.5 * found[0.0]

    def test_default_by_unit(self):
        weights = [KifOptions(unit=u).orthogonality_weight for u in ("tensor", "lora-rank")]
        assert weights == [0.0, 0.1]
        assert KifOptions(unit="lora-rank", orthogonality=0.0).orthogonality_weight == 0.0

    def test_without_an_adapter_is_an_error(self, tmp_path):
        with pytest.raises(TrainingError, match="trains no LoRA adapter"):
            trainer(tmp_path, tiny.llama(), KifOptions(orthogonality=0.1))


def halves(model):
    """True for every other element."""
    marks = {}
    for name, value in tiny.trained(model).items():
        marks[name] = (torch.arange(value.numel()) % 2 == 0).view(value.shape)
    return marks


class TestFrozenElements:
    @pytest.mark.parametrize(
        "changes",
        [
            {"optim": "adamw_torch", "weight_decay": 0.5},
            {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.5},
            {"optim": "adafactor"},
            {"optim": "rmsprop", "weight_decay": 0.5},
            {"optim": "adagrad", "gradient_accumulation_steps": 2},
        ],
        ids=lambda changes: changes["optim"],
    )
    def test_stay_bit_for_bit(self, tmp_path, changes):
        model = tiny.llama()
        before, marks = tiny.trained(model), halves(model)
        trainer(tmp_path, model, trained=marks, **changes).train()
        after = tiny.trained(model)
        moved = 0
        for name, mark in marks.items():
            assert torch.equal(after[name][~mark], before[name][~mark]), name
            moved += int((after[name][mark] != before[name][mark]).sum())
        assert moved > 0.5 * sum(int(mark.sum()) for mark in marks.values())

    def test_count_neither_in_clipping_nor_as_nonfinite(self, tmp_path):
        model = tiny.llama()
        marks = halves(model)
        name = next(iter(marks))
        marks[name].view(-1)[0] = False
        tiny.spoil_gradient(model, name, 2, float("nan"))
        watcher = tiny.Gradients()
        made = trainer(
            tmp_path, model, trained=marks, callbacks=[watcher], max_grad_norm=0.01, max_steps=3
        )
        made.train()
        assert made.num_nonfinite_steps == 0
        for gradients in watcher.gradients:
            assert all(not gradients[n][~mark].any() for n, mark in marks.items())
            norms = [g.norm() for g in gradients.values()]
            assert float(torch.stack(norms).norm()) == pytest.approx(0.01, rel=1e-3)

    def test_all_marked_is_plain_training(self, tmp_path):
        weights = []
        for everything in (True, False):
            model = tiny.llama()
            marks = {
                n: torch.ones_like(v, dtype=torch.bool) for n, v in tiny.trained(model).items()
            }
            made = trainer(tmp_path, model, trained=marks if everything else None)
            made.train()
            weights.append(tiny.trained(model))
        assert tiny.same(*weights)

    def test_pass_over_memory_is_not_scored(self, tmp_path):
        model = tiny.lora_llama()
        kif = KifOptions(unit="lora-rank")
        made = trainer(tmp_path, model, kif, trained=halves(model))
        assert made.task_scores is None


class TestOptions:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"unit": "head"}, "unit: 'head' is none of tensor, lora-rank, layer"),
            ({"first_step": "both"}, "first_step: 'both' is none of left-out, counted"),
            ({"sensitivity": "third"}, "sensitivity: 'third' is none of"),
            ({"betas": (0.5, 1.0)}, r"betas must lie in \[0, 1\)"),
            ({"shared_weights": (1.0, 1.0)}, "must add up to 1"),
            ({"shared_weights": (1.0,)}, "must be two numbers"),
            ({"important_fraction": 1.5}, r"important_fraction must lie in \[0, 1\]"),
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"orthogonality": -0.1}, "orthogonality must be at least 0"),
            ({"memory_steps": 0}, "memory_steps must be at least 1"),
            ({"memory_learning_rate": -1.0}, "memory_learning_rate must be at least 0"),
            ({"new_weight": 0.0, "cumulative_weight": 0.0}, "one of them above 0"),
        ],
    )
    def test_out_of_range(self, changes, message):
        with pytest.raises(ValueError, match=message):
            KifOptions(**changes)

    def test_reach_the_engine(self):
        kif = KifOptions(
            unit="layer", important_fraction=0.4, shared_weights=(0.1, 0.9), temperature=2.0
        )
        fusion = dataclasses.asdict(kif.fusion("kif"))
        expected = {"rule": "kif", "unit": "layer", "important_fraction": 0.4}
        expected |= {"shared_weights": (0.1, 0.9), "temperature": 2.0}
        assert {key: fusion[key] for key in expected} == expected
