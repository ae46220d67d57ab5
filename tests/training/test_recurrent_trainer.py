import math
from dataclasses import replace
from types import SimpleNamespace

import oracles
import pytest
import safetensors.torch
import tiny
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from kifmerge.errors import CheckpointError, TrainingError
from kifmerge.training.importance import refuse_without_gradients, require_gradients
from kifmerge.training.loop import MemoryBatches
from kifmerge.training.presets import PRESETS, RecurrentOptions
from kifmerge.training.recurrent import RecurrentRounds
from kifmerge.training.trainer import RecurrentMixin

pytestmark = pytest.mark.slow  # whole trainings

SHORT = RecurrentOptions(inner_steps=2, outer_steps=1)
MEMORY = tiny.rows(8, seed=1)
ADAPTER_FILE = "adapter_model.safetensors"


@pytest.fixture
def fused_weights(monkeypatch):
    """The live weights right after each fusion, in order."""
    recorded = []
    fuse = RecurrentRounds.fuse

    def recording(self, **counts):
        done = fuse(self, **counts)
        recorded.append({name: p.detach().clone() for name, p in self._parameters.items()})
        return done

    monkeypatch.setattr(RecurrentRounds, "fuse", recording)
    return recorded


def saved_adapter(checkpoint):
    """Weights of a saved LoRA adapter, under the names of the live parameters."""
    tensors = safetensors.torch.load_file(checkpoint / ADAPTER_FILE)
    return {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}


def checkpoints(output_dir):
    return sorted(int(path.name.partition("-")[2]) for path in output_dir.glob("checkpoint-*"))


def steps_of(trainer):
    return [(done.inner_steps, done.outer_steps) for done in trainer.rounds]


def train_by_hand(model, options, memory_batches, *, num_steps, learning_rate=1e-2):
    """The whole loop once more: plain PyTorch steps, the oracle's importance, masks and fusion."""
    parameters = dict(model.named_parameters())
    names = list(tiny.trained(model))
    optimizer = torch.optim.AdamW([parameters[n] for n in names], learning_rate, weight_decay=0.0)
    seen = {"new": {n: [] for n in names}, "historical": {n: [] for n in names}}
    new, base = tiny.rows(40), tiny.trained(model)
    memory_batches, in_round = list(memory_batches), 0

    def step(role, rows):
        tokens = torch.tensor([row["input_ids"] for row in rows])
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_([parameters[n] for n in names], 1.0)
        optimizer.step()
        for n in names:
            seen[role][n].append((parameters[n].detach().clone(), parameters[n].grad.clone()))
        optimizer.zero_grad()

    for number in range(num_steps):
        step("new", new[2 * number : 2 * number + 2])
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - (number + 1) / num_steps)
        in_round += 1
        if in_round < options.inner_steps and number + 1 < num_steps:
            continue
        in_round, after_inner = 0, tiny.trained(model)
        for _ in range(options.outer_steps):
            step("historical", [MEMORY[row] for row in memory_batches.pop(0)])
        if options.rule != "none":
            weights = dict(zip(names, weights_by_hand(seen, options), strict=True))
            for n in names:
                after_outer = parameters[n].detach()
                fused = oracles.fused(base[n], after_inner[n], after_outer, weights[n])
                parameters[n].data.copy_(fused)
        base = tiny.trained(model)
        seen["new"] = {n: [] for n in names}
    return base


def weights_by_hand(seen, options):
    """Weights of the two task vectors, parameter by parameter."""
    scores = {}
    for role, steps in seen.items():
        smoothed = [oracles.smoothed(of_one) for of_one in steps.values()]
        scores[role] = [sensitivity * uncertainty for sensitivity, uncertainty in smoothed]
    if options.rule == "average":
        return [torch.full((*tensor.shape, 2), 0.5) for tensor in scores["new"]]
    if options.rule == "recurrent-kif-adaptive":
        pairs = zip(*(oracles.min_max(scores[role]) for role in scores), strict=True)
        return [oracles.softmax_weights(*pair, options.temperature) for pair in pairs]
    pairs = zip(*(oracles.masks(scores[role], "0.2") for role in scores), strict=True)
    return [oracles.masked_weights(*pair) for pair in pairs]


@pytest.mark.parametrize("rule", ["none", "average", "recurrent-kif", "recurrent-kif-adaptive"])
def test_loop_equals_the_loop_made_by_hand(tmp_path, rule):
    options = replace(SHORT, rule=rule, outer_steps=2)
    batches = [[i % 8, (i + 3) % 8] for i in range(6)]
    model = tiny.lora_llama()
    tiny.trainer(
        model, tmp_path, memory=MEMORY, options=options, memory_batches=batches, max_steps=5
    ).train()
    expected = train_by_hand(tiny.lora_llama(), options, batches, num_steps=5)
    for name, value in tiny.trained(model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6)


def test_rules_lead_to_different_weights(tmp_path):
    ends = []
    for rule in ["none", "average", "recurrent-kif", "recurrent-kif-adaptive"]:
        model = tiny.lora_llama()
        tiny.trainer(model, tmp_path, memory=MEMORY, options=replace(SHORT, rule=rule)).train()
        ends.append(torch.cat([value.flatten() for value in tiny.trained(model).values()]))
    gaps = [(a - b).abs().max() for i, a in enumerate(ends) for b in ends[:i]]
    assert min(gaps) > 1e-4


@pytest.mark.parametrize(
    ("make_model", "classes"),
    [
        (tiny.lora_llama, False),
        (lambda: tiny.with_lora(tiny.t5()), False),
        (tiny.bert, True),
    ],
    ids=["causal LM with LoRA", "seq2seq LM with LoRA", "classifier, all parameters"],
)
def test_every_kind_of_model_is_trained_and_fused(tmp_path, make_model, classes):
    model = make_model()
    start = tiny.trained(model)
    trainer = tiny.trainer(
        model,
        tmp_path,
        new=tiny.rows(40, classes=classes),
        memory=tiny.rows(8, seed=1, classes=classes),
        options=SHORT,
    )
    trainer.train()
    assert steps_of(trainer) == [(2, 1)] * 3
    end = tiny.trained(model)
    # T5's cross-attention, BERT's key bias and the like may get no gradient worth a change.
    changed = [name for name in end if not torch.equal(end[name], start[name])]
    assert len(changed) > len(end) / 2
    assert all(value.isfinite().all() for value in end.values())
    for done in trainer.rounds:
        shares = [done.both, done.new_only, done.historical_only, done.neither]
        assert sum(shares) == pytest.approx(1.0)
        assert done.both + done.new_only == pytest.approx(0.2, abs=0.02)


def test_mixin_serves_any_subclass_of_trainer(tmp_path):
    class RecurrentSeq2SeqTrainer(RecurrentMixin, Seq2SeqTrainer):
        pass

    model = tiny.with_lora(tiny.t5())
    arguments = Seq2SeqTrainingArguments(
        **{**tiny.arguments(tmp_path, max_steps=2).to_dict(), "predict_with_generate": True}
    )
    trainer = RecurrentSeq2SeqTrainer(
        model, arguments, train_dataset=tiny.rows(8), memory=MEMORY, recurrent=SHORT
    )
    trainer.train()
    assert steps_of(trainer) == [(2, 1)]


def test_mixin_without_a_trainer_is_refused():
    class Lonely(RecurrentMixin):
        pass

    with pytest.raises(TrainingError, match=r"Lonely must derive from .*Trainer"):
        Lonely()


@pytest.mark.parametrize("memory", [None, []])
def test_training_without_memory_is_plain_training(tmp_path, memory):
    recurrent, plain = (tiny.lora_llama(lora_dropout=0.1) for _ in range(2))
    trainer = tiny.trainer(recurrent, tmp_path / "a", memory=memory, options=SHORT, save_steps=3)
    trainer.train()
    tiny.plain_trainer(plain, tmp_path / "b", save_steps=3).train()
    assert tiny.same(tiny.trained(recurrent), tiny.trained(plain))
    assert trainer.rounds == []
    assert not any("recurrent" in key for entry in trainer.state.log_history for key in entry)


def test_memory_that_cannot_be_indexed_is_not_passed_over_in_silence(tmp_path):
    with pytest.raises((TrainingError, TypeError), match="memory"):
        tiny.trainer(tiny.lora_llama(), tmp_path, memory=(row for row in MEMORY), options=SHORT)


@pytest.mark.parametrize(("tail", "expected"), [("fuse", [(4, 1), (3, 1)]), ("keep", [(4, 1)])])
def test_last_steps_that_fill_no_round_follow_the_tail(tmp_path, fused_weights, tail, expected):
    model = tiny.lora_llama()
    options = replace(SHORT, inner_steps=4, tail=tail)
    trainer = tiny.trainer(model, tmp_path, memory=MEMORY, options=options, max_steps=7)
    trainer.train()
    assert steps_of(trainer) == expected
    assert tiny.same(tiny.trained(model), fused_weights[-1]) == (tail == "fuse")


def test_training_shorter_than_a_round_is_one_tail(tmp_path):
    options = replace(SHORT, inner_steps=8)
    trainer = tiny.trainer(tiny.lora_llama(), tmp_path, memory=MEMORY, options=options, max_steps=3)
    trainer.train()
    assert steps_of(trainer) == [(3, 1)]


def test_only_parameters_that_require_gradients_change(tmp_path):
    model = tiny.lora_llama()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = tiny.trained(model)
    tiny.trainer(model, tmp_path, memory=MEMORY, options=SHORT).train()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert not any(torch.equal(parameters[name], value) for name, value in start.items())


@pytest.mark.parametrize("accumulated_loss", ["trainer", "micro-batch"])
def test_accumulated_micro_batches_equal_one_large_batch(tmp_path, accumulated_loss):
    batches = [[0, 1], [2, 3], [4, 5]]
    options = replace(SHORT, accumulated_loss=accumulated_loss)
    ends = []
    for size, accumulation in [(2, 1), (1, 2)]:
        model = tiny.lora_llama()
        trainer = tiny.trainer(
            model, tmp_path, memory=MEMORY, options=options, memory_batches=batches,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        assert steps_of(trainer) == [(2, 1)] * 3
        ends.append((tiny.trained(model), trainer.rounds[0].outer_loss))
    for name, value in ends[0][0].items():
        torch.testing.assert_close(value, ends[1][0][name], rtol=0, atol=1e-5)
    assert ends[0][1] == pytest.approx(ends[1][1], abs=1e-5)


@pytest.mark.parametrize("accumulated_loss", ["trainer", "micro-batch"])
def test_divided_outer_loss_moves_the_weights_by_its_share(tmp_path, accumulated_loss):
    settings = {
        "max_steps": 1,
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "lr_scheduler_type": "constant",
        "gradient_accumulation_steps": 2,
    }
    after_inner = tiny.lora_llama()
    tiny.plain_trainer(after_inner, tmp_path, **settings).train()
    moved, losses = {}, {}
    for outer_loss in ("whole", "divided"):
        model = tiny.lora_llama()
        options = RecurrentOptions(
            rule="none", inner_steps=1, outer_steps=1,
            outer_loss=outer_loss, accumulated_loss=accumulated_loss,
        )  # fmt: skip
        trainer = tiny.trainer(
            model, tmp_path, memory=MEMORY, options=options, memory_batches=[[0, 1]], **settings
        )
        trainer.train()
        start = tiny.trained(after_inner)
        moved[outer_loss] = {n: p - start[n] for n, p in tiny.trained(model).items()}
        losses[outer_loss] = trainer.rounds[0].outer_loss
    for name, value in moved["whole"].items():
        assert value.abs().max() > 1e-5
        torch.testing.assert_close(value, 2 * moved["divided"][name], rtol=1e-3, atol=1e-7)
    assert losses["whole"] == pytest.approx(losses["divided"], abs=1e-5)


def test_outer_steps_are_not_clipped_where_inner_ones_are_not(tmp_path):
    ends = []
    for max_grad_norm in (0.0, 1e9):
        model = tiny.lora_llama()
        tiny.trainer(
            model, tmp_path, memory=MEMORY, options=SHORT, max_grad_norm=max_grad_norm
        ).train()
        ends.append(tiny.trained(model))
    assert tiny.same(*ends)


def test_outer_steps_are_clipped_as_inner_ones_are(tmp_path):
    settings = {"max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant"}
    options = RecurrentOptions(rule="none", inner_steps=1, outer_steps=1)
    after_inner, model = tiny.lora_llama(), tiny.lora_llama()
    tiny.plain_trainer(after_inner, tmp_path, max_grad_norm=1e-3, **settings).train()
    tiny.trainer(
        model, tmp_path, memory=MEMORY, options=options, max_grad_norm=1e-3, **settings
    ).train()
    start, end = tiny.trained(after_inner), tiny.trained(model)
    moved = torch.cat([(end[name] - start[name]).double().flatten() for name in end])
    assert float(moved.norm()) == pytest.approx(1e-2 * 1e-3, rel=0.05)


def test_outer_step_takes_as_many_rows_as_an_inner_one_or_as_asked(tmp_path):
    class CountingMemory(list):
        num_read = 0

        def __getitem__(self, index):
            self.num_read += 1
            return super().__getitem__(index)

    for outer_batch_size, expected in [(None, 4), (3, 3)]:
        memory = CountingMemory(MEMORY)
        options = replace(SHORT, outer_batch_size=outer_batch_size)
        tiny.trainer(
            tiny.lora_llama(), tmp_path, memory=memory, options=options,
            max_steps=2, gradient_accumulation_steps=2,
        ).train()  # fmt: skip
        assert memory.num_read == expected


def test_memory_smaller_than_a_batch_is_taken_whole(tmp_path):
    trainer = tiny.trainer(tiny.lora_llama(), tmp_path, memory=MEMORY[:1], options=SHORT)
    trainer.train()
    assert all(math.isfinite(done.outer_loss) for done in trainer.rounds)
    assert sorted(MemoryBatches(3, 8, seed=0)[5]) == [0, 1, 2]


def test_memory_batches_depend_on_seed_and_step_alone():
    batches, again = MemoryBatches(50, 8, seed=7), MemoryBatches(50, 8, seed=7)
    drawn = [batches[step] for step in range(200)]
    assert drawn == [again[step] for step in reversed(range(200))][::-1]
    assert drawn[:20] != [MemoryBatches(50, 8, seed=8)[step] for step in range(20)]
    assert len({tuple(batch) for batch in drawn}) == 200


def test_memory_batches_hold_a_row_once_and_reach_every_row():
    drawn = [MemoryBatches(50, 8, seed=7)[step] for step in range(200)]
    assert all(len(set(batch)) == len(batch) == 8 for batch in drawn)
    assert {row for batch in drawn for row in batch} == set(range(50))


def test_drawing_memory_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    MemoryBatches(50, 8, seed=7)[0]
    assert torch.equal(torch.rand(1), expected)


def test_checkpoints_wait_for_the_round_and_hold_fused_weights(tmp_path, fused_weights):
    trainer = tiny.trainer(
        tiny.lora_llama(), tmp_path, memory=MEMORY, options=SHORT,
        max_steps=7, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    trainer.train()
    assert steps_of(trainer) == [(2, 1)] * 3 + [(1, 1)]
    assert checkpoints(tmp_path) == [4, 6, 7]
    for step, number in [(4, 1), (6, 2), (7, 3)]:
        assert tiny.same(saved_adapter(tmp_path / f"checkpoint-{step}"), fused_weights[number])


def test_evaluation_waits_for_the_round_and_sees_fused_weights(tmp_path, fused_weights):
    watcher = tiny.Weights()
    tiny.trainer(
        tiny.lora_llama(), tmp_path, memory=MEMORY, options=SHORT, callbacks=(watcher,),
        eval_dataset=tiny.rows(4, seed=2), max_steps=7, eval_strategy="steps", eval_steps=3,
    ).train()  # fmt: skip
    assert list(watcher.evaluated) == [4, 6, 7]
    for step, number in [(4, 1), (6, 2), (7, 3)]:
        assert tiny.same(watcher.evaluated[step], fused_weights[number])


def test_end_of_an_epoch_waits_for_the_round(tmp_path, fused_weights):
    watcher = tiny.Weights()
    trainer = tiny.trainer(
        tiny.lora_llama(), tmp_path, new=tiny.rows(6), memory=MEMORY, options=SHORT,
        eval_dataset=tiny.rows(4, seed=2), callbacks=(watcher,),
        max_steps=-1, num_train_epochs=3, save_strategy="epoch", eval_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    assert steps_of(trainer) == [(2, 1)] * 4 + [(1, 1)]
    assert checkpoints(tmp_path) == list(watcher.evaluated) == [4, 6, 9]
    for step, number in [(4, 1), (6, 2), (9, 4)]:
        assert tiny.same(saved_adapter(tmp_path / f"checkpoint-{step}"), fused_weights[number])
        assert tiny.same(watcher.evaluated[step], fused_weights[number])


def test_training_stopped_in_the_middle_of_a_round_fuses_and_saves_its_tail(
    tmp_path, fused_weights
):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    model = tiny.lora_llama()
    trainer = tiny.trainer(
        model, tmp_path, memory=MEMORY, options=SHORT, callbacks=(Stop(),),
        max_steps=10, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    trainer.train()
    assert steps_of(trainer) == [(2, 1), (1, 1)]
    assert tiny.same(tiny.trained(model), fused_weights[1])
    assert checkpoints(tmp_path) == [3]
    assert tiny.same(saved_adapter(tmp_path / "checkpoint-3"), fused_weights[1])


def test_training_stopped_between_micro_batches_leaves_the_half_step_out(tmp_path):
    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3

    ends = []
    for event in ("on_step_end", "on_substep_end"):
        model = tiny.lora_llama()
        trainer = tiny.trainer(
            model, tmp_path, memory=MEMORY, options=SHORT, max_steps=10,
            callbacks=(type("Stop", (TrainerCallback,), {event: stop})(),),
            gradient_accumulation_steps=2, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer.train()
        assert steps_of(trainer) == [(2, 1), (1, 1)]
        ends.append(tiny.trained(model))
    assert tiny.same(*ends)


RESUMED = {
    "default": SHORT,
    "released": replace(PRESETS["released"], inner_steps=2, outer_steps=1),
    "paper": replace(PRESETS["paper"], inner_steps=2, outer_steps=1),
    "both scores kept": replace(SHORT, new_scores="kept"),
    "average": replace(SHORT, rule="average"),
    "none": replace(SHORT, rule="none"),
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
def test_resumed_training_ends_at_the_same_bits(tmp_path, options):
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3}

    def make(output_dir):
        model = tiny.lora_llama(lora_dropout=0.2)
        trainer = tiny.trainer(model, output_dir, memory=MEMORY, options=options, **settings)
        return model, trainer

    straight, trainer = make(tmp_path / "straight")
    trainer.train()
    resumed, second = make(tmp_path / "resumed")
    assert checkpoints(tmp_path / "straight")[0] == 4
    second.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert tiny.same(tiny.trained(resumed), tiny.trained(straight))
    assert second.rounds == trainer.rounds


def test_state_is_loaded_at_the_live_parameters():
    live = torch.nn.Parameter(torch.zeros(4))
    rounds = RecurrentRounds({"w": live}, replace(SHORT, rule="average"))
    live.data.fill_(8.0)
    rounds.load_state({}, {"num_rounds": 3})
    live.data.fill_(10.0)
    rounds.begin_outer()
    done = rounds.fuse(inner_steps=1, outer_steps=1, outer_loss=0.0)
    assert torch.equal(live.detach(), torch.full((4,), 9.0))
    assert done.index == 4


def test_resumed_training_goes_on_counting_steps_left_out(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    model = tiny.lora_llama()
    tiny.spoil_gradient(model, next(iter(tiny.trained(model))), 1, math.nan)
    tiny.trainer(model, tmp_path, memory=MEMORY, options=SHORT, **settings).train()
    second = tiny.trainer(tiny.lora_llama(), tmp_path, memory=MEMORY, options=SHORT, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.num_nonfinite_steps == 1


def test_resuming_from_a_checkpoint_without_our_state_is_refused(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    tiny.plain_trainer(tiny.lora_llama(), tmp_path, **settings).train()
    trainer = tiny.trainer(tiny.lora_llama(), tmp_path, memory=MEMORY, options=SHORT, **settings)
    with pytest.raises(CheckpointError, match="does not hold this run's recurrent state") as caught:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert str(tmp_path / "checkpoint-2") in str(caught.value)


def damage_json(folder):
    (folder / "recurrent.json").write_text("{")


def drop_a_counter(folder):
    (folder / "recurrent.json").write_text('{"num_rounds": 1}')


def truncate_tensors(folder):
    path = folder / "recurrent.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def state_of_another_model(folder):
    tensors = safetensors.torch.load_file(folder / "recurrent.safetensors")
    other = {key: torch.zeros(1) for key in tensors}
    safetensors.torch.save_file(other, folder / "recurrent.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        damage_json,
        drop_a_counter,
        truncate_tensors,
        state_of_another_model,
    ],
)
def test_resuming_from_damaged_state_is_refused(tmp_path, damage):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    tiny.trainer(tiny.lora_llama(), tmp_path, memory=MEMORY, options=SHORT, **settings).train()
    damage(tmp_path / "checkpoint-2")
    trainer = tiny.trainer(tiny.lora_llama(), tmp_path, memory=MEMORY, options=SHORT, **settings)
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_inner_gradient_leaves_the_step_out_whole(tmp_path, bad):
    model, watcher = tiny.lora_llama(), tiny.Weights()
    tiny.spoil_gradient(model, list(tiny.trained(model))[-1], 2, bad)
    options = replace(SHORT, inner_steps=4)
    trainer = tiny.trainer(
        model, tmp_path, memory=MEMORY, options=options, callbacks=(watcher,), max_steps=4
    )
    trainer.train()
    assert tiny.same(watcher.after[2], watcher.after[1])
    assert not tiny.same(watcher.after[3], watcher.after[2])
    assert trainer.num_nonfinite_steps == 1
    assert all(value.isfinite().all() for value in tiny.trained(model).values())


@pytest.mark.parametrize("outer_optimizer", ["shared", "separate"])
def test_nonfinite_outer_gradient_leaves_the_step_out_whole(tmp_path, outer_optimizer):
    options = replace(SHORT, rule="none", outer_optimizer=outer_optimizer)
    model, plain = tiny.lora_llama(), tiny.lora_llama()
    tiny.spoil_gradient(model, list(tiny.trained(model))[-1], 3, math.nan)
    constant = {"max_steps": 2, "lr_scheduler_type": "constant"}
    trainer = tiny.trainer(model, tmp_path, memory=MEMORY, options=options, **constant)
    trainer.train()
    tiny.plain_trainer(plain, tmp_path, **constant).train()
    assert tiny.same(tiny.trained(model), tiny.trained(plain))
    assert trainer.num_nonfinite_steps == 1


@pytest.mark.parametrize("weights", ["after", "before"])
@pytest.mark.parametrize("backward", [2, 3])
def test_step_left_out_is_not_in_the_importance(tmp_path, weights, backward):
    model = tiny.lora_llama()
    tiny.spoil_gradient(model, next(iter(tiny.trained(model))), backward, math.nan)
    options = replace(SHORT, outer_steps=2, weights=weights, new_scores="kept")
    trainer = tiny.trainer(model, tmp_path, memory=MEMORY, options=options, max_steps=2)
    trainer.train()
    accumulators = trainer.loop.rounds.accumulators
    counted = {role: accumulator.num_steps for role, accumulator in accumulators.items()}
    assert counted == {"new": 2 - (backward == 2), "historical": 2 - (backward == 3)}


@pytest.mark.parametrize("backward", [2, 3])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite_gradient_may_end_the_training_and_is_named(tmp_path, backward, bad):
    model = tiny.lora_llama()
    culprit = list(tiny.trained(model))[-1]
    tiny.spoil_gradient(model, culprit, backward, bad)
    options = replace(SHORT, nonfinite="raise")
    trainer = tiny.trainer(model, tmp_path, memory=MEMORY, options=options)
    with pytest.raises(TrainingError, match="is not finite") as caught:
        trainer.train()
    # By then clipping has spread a NaN to all, so that the first culprit cannot be told any more.
    assert (culprit if bad == math.inf else "every parameter") in str(caught.value)
    assert ("outer step 1" if backward == 3 else "optimizer step 2") in str(caught.value)


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizer_that_leaves_no_gradients_is_refused_by_name(tmp_path, optim):
    with pytest.raises(TrainingError, match=optim):
        tiny.trainer(tiny.lora_llama(), tmp_path, memory=MEMORY, options=SHORT, optim=optim)


def test_engine_that_keeps_its_gradients_is_refused_by_name():
    with pytest.raises(TrainingError, match="DeepSpeed"):
        refuse_without_gradients(SimpleNamespace(optim="adamw_torch", deepspeed="config.json"))


def test_model_without_a_single_gradient_is_refused():
    with pytest.raises(TrainingError, match="no parameter has a gradient"):
        require_gradients([None, None])
    require_gradients([None, torch.zeros(1)])


def test_model_that_is_frozen_whole_is_refused(tmp_path):
    model = tiny.llama().requires_grad_(False)
    trainer = tiny.trainer(model, tmp_path, memory=MEMORY, options=SHORT)
    with pytest.raises((TrainingError, ValueError), match=r"frozen|empty parameter list"):
        trainer.train()


VARIANTS = {
    "weights before": replace(SHORT, weights="before"),
    "tensor scope": replace(SHORT, scope="tensor"),
    "adaptive": replace(SHORT, rule="recurrent-kif-adaptive"),
    "drop": replace(SHORT, redundant="drop"),
    "second order": replace(SHORT, sensitivity="second"),
    "mixed": replace(SHORT, sensitivity="mixed", score="sensitivity"),
    "separate optimizer": replace(SHORT, outer_optimizer="separate"),
    "paper": replace(PRESETS["paper"], inner_steps=2, outer_steps=1),
}


@pytest.fixture(scope="module")
def default_end(tmp_path_factory):
    model = tiny.lora_llama()
    output_dir = tmp_path_factory.mktemp("default")
    tiny.trainer(model, output_dir, memory=MEMORY, options=SHORT).train()
    return tiny.trained(model)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_makes_a_difference_and_finite_weights(tmp_path, default_end, options):
    model = tiny.lora_llama()
    trainer = tiny.trainer(model, tmp_path, memory=MEMORY, options=options)
    trainer.train()
    assert len(trainer.rounds) == 3
    assert all(value.isfinite().all() for value in tiny.trained(model).values())
    assert not tiny.same(tiny.trained(model), default_end)


def test_separate_optimizer_has_its_own_learning_rate(tmp_path):
    still, plain = tiny.lora_llama(), tiny.lora_llama()
    options = replace(SHORT, rule="none", outer_optimizer="separate", outer_learning_rate=0.0)
    tiny.trainer(still, tmp_path, memory=MEMORY, options=options).train()
    tiny.plain_trainer(plain, tmp_path).train()
    assert tiny.same(tiny.trained(still), tiny.trained(plain))


def test_bfloat16_autocast_runs_and_fuses(tmp_path):
    model = tiny.lora_llama()
    trainer = tiny.trainer(model, tmp_path, memory=MEMORY, options=SHORT, bf16=True)
    trainer.train()
    assert len(trainer.rounds) == 3
    for value in tiny.trained(model).values():
        assert value.dtype == torch.float32
        assert value.isfinite().all()


def test_logs_carry_the_latest_round_beside_the_loss(tmp_path):
    trainer = tiny.trainer(tiny.lora_llama(), tmp_path, memory=MEMORY, options=SHORT, max_steps=5)
    trainer.train()
    logs = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert not any(key.startswith("recurrent/") for key in logs[1])
    for step, number in [(2, 1), (3, 1), (4, 2), (5, 3)]:
        expected = trainer.rounds[number - 1].as_dict()
        found = {k: v for k, v in logs[step].items() if k.startswith("recurrent/")}
        assert found == {f"recurrent/{key}": value for key, value in expected.items()}
    assert logs[5]["recurrent/index"] == 3
    assert {"recurrent/outer_loss", "recurrent/new_threshold", "recurrent/both"} <= logs[5].keys()


def test_memory_batches_stay_out_of_the_logged_training(tmp_path):
    """Up to the first fusion nothing differs; what only counts rows never does."""
    settings = {"include_num_input_tokens_seen": "all", "max_steps": 5}
    recurrent = tiny.trainer(
        tiny.lora_llama(), tmp_path / "a", memory=MEMORY, options=SHORT, **settings
    )
    plain = tiny.plain_trainer(tiny.lora_llama(), tmp_path / "b", **settings)
    logs = []
    for trainer in (recurrent, plain):
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert recurrent.state.total_flos == plain.state.total_flos > 0
    assert recurrent.state.num_input_tokens_seen == 5 * 2 * tiny.ROW_TOKENS
    for ours, stock in zip(*logs, strict=True):
        assert ours["num_input_tokens_seen"] == stock["num_input_tokens_seen"]
        same = [ours[key] == stock[key] for key in ("loss", "grad_norm")]
        assert same == [stock["step"] <= SHORT.inner_steps] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"inner_steps": 0},
        {"outer_steps": 0},
        {"important_fraction": 1.5},
        {"temperature": 0.0},
        {"new_betas": (1.0, 0.5)},
        {"historical_betas": (0.5, -0.1)},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"must|at least"):
        RecurrentOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "recurent-kif"},
        {"tail": "fused"},
        {"redundant": "averaged"},
        {"scope": "tensors"},
        {"nonfinite": "rais"},
        {"outer_batch_size": 0},
        {"outer_batch_size": -1},
    ],
)
def test_misspelt_choices_and_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RecurrentOptions(**options)


def test_half_precision_parameters_are_fused_in_float32():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(1000, generator=generator).bfloat16() for _ in range(3)]
    parameter = torch.nn.Parameter(weights[0].clone())
    rounds = RecurrentRounds({"w": parameter}, replace(SHORT, rule="average"))
    parameter.data.copy_(weights[1])
    rounds.begin_outer()
    parameter.data.copy_(weights[2])
    rounds.fuse(inner_steps=1, outer_steps=1, outer_loss=0.0)
    expected = oracles.fused(*weights, torch.full((1000, 2), 0.5)).bfloat16()
    assert torch.equal(parameter.detach(), expected)


def test_plain_training_keeps_nonfinite_gradients_from_the_weights_too(tmp_path):
    model = tiny.lora_llama()
    tiny.spoil_gradient(model, next(iter(tiny.trained(model))), 2, math.nan)
    trainer = tiny.trainer(model, tmp_path, options=SHORT, max_steps=3)
    trainer.train()
    assert trainer.num_nonfinite_steps == 1
    assert all(value.isfinite().all() for value in tiny.trained(model).values())


def test_plain_training_may_end_at_a_nonfinite_gradient(tmp_path):
    model = tiny.lora_llama()
    tiny.spoil_gradient(model, next(iter(tiny.trained(model))), 2, math.nan)
    trainer = tiny.trainer(model, tmp_path, options=replace(SHORT, nonfinite="raise"), max_steps=3)
    with pytest.raises(TrainingError, match="optimizer step 2 is not finite"):
        trainer.train()
