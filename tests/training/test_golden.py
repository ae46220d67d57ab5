"""The authors' released code, replayed: see tests/golden/README.md."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kifmerge.checkpoint.pieces import Range
from kifmerge.fusion.selection import mark_important
from kifmerge.tensor.fusion import recurrent_kif
from kifmerge.tensor.importance import score
from kifmerge.tensor.selection import importance_threshold
from kifmerge.training import loop as loop_module
from kifmerge.training.presets import PRESETS
from kifmerge.training.recurrent import RecurrentRounds
from kifmerge.training.trainer import RecurrentTrainer

GOLDEN = Path(__file__).parents[1] / "golden"
SIDES = {"new": "inner", "historical": "outer"}


@dataclass
class Trace:
    """One recorded run."""

    folder: Path
    details: dict
    tensors: dict

    def part(self, prefix):
        """Tensors under ``prefix.``, by parameter name."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def batch(self, number):
        return {key: value.long() for key, value in self.part(f"batch.{number:03d}").items()}

    def rounds(self):
        return range(self.details["rounds"])


@dataclass
class Replay:
    """What our loop did on the recorded batches."""

    fused: list = field(default_factory=list)
    masks: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    final: dict = field(default_factory=dict)
    num_rounds: int = 0


@pytest.fixture(
    scope="module", params=["recurrent_t5", "recurrent_llama", "recurrent_t5_accumulated"]
)
def trace(request):
    folder = GOLDEN / request.param
    details = json.loads((folder / "trace.json").read_text())
    return Trace(folder, details, safetensors.torch.load_file(folder / "trace.safetensors"))


@pytest.fixture(scope="module")
def replay(trace, tmp_path_factory):
    made = Replay()

    class RecordingRounds(RecurrentRounds):
        def fuse(self, **counts):
            self_masks = {}
            for role in self.accumulators:
                scores = self.scores(role)
                marks = mark_important(scores, 0.2, "global", role)
                infos = {name: scores.info(name) for name in scores.names()}
                self_masks[role] = {
                    name: marks.show([Range(name, 0, info.numel)]).view(info.shape)
                    for name, info in infos.items()
                }
            made.masks.append(self_masks)
            done = super().fuse(**counts)
            made.fused.append(tiny.trained(model))
            return done

    class RecordingTrainer(RecurrentTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            made.losses.append(loss.item())
            return loss

    model = golden_model(trace)
    rows, batches = golden_rows(trace)
    trainer = RecordingTrainer(
        model,
        golden_arguments(trace, tmp_path_factory.mktemp("golden"), len(batches["inner"][0])),
        train_dataset=rows["inner"],
        data_collator=lambda chosen: {
            key: torch.stack([row[key] for row in chosen]) for key in chosen[0]
        },
        memory=rows["outer"],
        memory_batches=batches["outer"],
        recurrent=replace(
            PRESETS["released"],
            historical_scores="emptied" if trace.details["empty_outer"] else "kept",
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "RecurrentRounds", RecordingRounds)
        trainer.train()
    made.final = tiny.trained(model)
    made.num_rounds = len(trainer.rounds)
    return made


def golden_model(trace):
    """The base with the recorded adapter on it."""
    seq2seq = trace.details["arch"] == "t5"
    auto_class = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    lora = trace.details["lora"]
    model = get_peft_model(
        auto_class.from_pretrained(trace.folder / "base"),
        LoraConfig(
            r=lora["r"],
            lora_alpha=lora["alpha"],
            target_modules=lora["targets"],
            lora_dropout=lora["dropout"],
            task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        ),
    )
    initial = trace.part("lora_init")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == initial.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(initial[name])
    return model


def golden_rows(trace):
    """The recorded batches as rows of each kind, and the row numbers of each batch."""
    rows, batches = {"inner": [], "outer": []}, {"inner": [], "outer": []}
    for number, kind in enumerate(trace.details["batches"]):
        batch = trace.batch(number)
        num_rows = len(batch["input_ids"])
        first = len(rows[kind])
        batches[kind].append(list(range(first, first + num_rows)))
        rows[kind] += [{key: value[i] for key, value in batch.items()} for i in range(num_rows)]
    return rows, batches


def golden_arguments(trace, output_dir, batch_size):
    return tiny.arguments(
        output_dir,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=trace.details.get("accumulation", 1),
        learning_rate=trace.details["lr"],
        warmup_steps=trace.details["warmup"],
        lr_scheduler_type=trace.details["schedule"],
        max_steps=trace.details["steps"],
        max_grad_norm=trace.details["max_grad_norm"],
    )


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.mark.parametrize("side", ["inner", "outer"])
def test_masks_of_recorded_scores_are_the_recorded_masks(trace, side):
    for number in trace.rounds():
        sensitivity = trace.part(f"round.{number}.sensitivity_{side}")
        uncertainty = trace.part(f"round.{number}.uncertainty_{side}")
        expected = trace.part(f"round.{number}.mask_{side}")
        scores = {name: score(sensitivity[name], uncertainty[name]) for name in sensitivity}
        chosen = importance_threshold(list(scores.values()), 0.2)
        assert scores.keys() == expected.keys()
        assert all(
            torch.equal(scores[name] > chosen.value, expected[name].bool()) for name in scores
        )
        assert 0 < chosen.num_above == sum(int(mask.sum()) for mask in expected.values())


def test_recorded_vectors_fuse_to_the_recorded_weights(trace):
    for number in trace.rounds():
        parts = [
            trace.part(f"round.{number}.{part}")
            for part in ("theta_b", "delta_in", "delta_out", "mask_inner", "mask_outer")
        ]
        fused = {
            name: recurrent_kif(*(p[name] for p in parts[:3]), *(p[name].bool() for p in parts[3:]))
            for name in parts[0]
        }
        assert largest_difference(fused, trace.part(f"round.{number}.theta_fused")) <= 1e-6


def test_replayed_losses_are_the_recorded_ones(trace, replay):
    assert replay.losses == pytest.approx(trace.details["losses"], rel=0, abs=1e-4)


def test_every_replayed_round_marks_what_was_marked(trace, replay):
    for number in trace.rounds():
        for role, side in SIDES.items():
            expected = trace.part(f"round.{number}.mask_{side}")
            found = replay.masks[number][role]
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name].bool()) for name in found)


def test_every_replayed_round_fuses_to_the_recorded_weights(trace, replay):
    assert replay.num_rounds == len(replay.fused) == trace.details["rounds"]
    for number in trace.rounds():
        expected = trace.part(f"round.{number}.theta_fused")
        assert largest_difference(replay.fused[number], expected) <= 1e-6


def test_replay_ends_at_the_recorded_weights(trace, replay):
    assert largest_difference(replay.final, trace.part("lora_final")) <= 1e-6
