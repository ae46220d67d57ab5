"""The loop, the accumulator and selection on a CUDA device, mixed precision and scaler included."""

from dataclasses import replace

import merges
import pytest
import tiny
import torch

from kifmerge.checkpoint.device import find_device
from kifmerge.fusion.rules import RULES, FusionOptions
from kifmerge.phases.merge import Merge
from kifmerge.tensor.importance import ImportanceAccumulator
from kifmerge.tensor.selection import importance_threshold
from kifmerge.training.presets import RecurrentOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHORT = RecurrentOptions(inner_steps=2, outer_steps=2)
MEMORY = tiny.rows(6, seed=1)


def train(tmp_path, options=SHORT, model=None, **changes):
    model = model or tiny.lora_llama()
    trainer = tiny.trainer(
        model, tmp_path, memory=MEMORY, options=options, **{"use_cpu": False, **changes}
    )
    trainer.train()
    return trainer, model


def test_device_and_cpu_fuse_to_the_same_weights(tmp_path):
    _, on_device = train(tmp_path / "device")
    _, on_cpu = train(tmp_path / "cpu", use_cpu=True)
    expected = tiny.trained(on_cpu)
    for name, value in tiny.trained(on_device).items():
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-3, atol=1e-4)


def test_all_parameters_are_fused_on_the_device(tmp_path):
    trainer, model = train(tmp_path, model=tiny.llama())
    assert len(trainer.rounds) == 3
    assert all(value.is_cuda and value.isfinite().all() for value in tiny.trained(model).values())


@pytest.mark.parametrize("outer_optimizer", ["shared", "separate"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_scaler_is_undone_in_outer_steps(tmp_path, outer_optimizer, max_grad_norm):
    """With the scale left in, a step of SGD would be thousands of times too long."""
    options = replace(SHORT, outer_optimizer=outer_optimizer, outer_learning_rate=1e-2)
    same = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": max_grad_norm}
    half, in_half = train(tmp_path / "half", options, fp16=True, **same)
    _, in_float = train(tmp_path / "float", options, **same)
    assert half.accelerator.scaler is not None
    assert half.num_nonfinite_steps == 0
    start = tiny.trained(tiny.lora_llama())
    for name, value in tiny.trained(in_half).items():
        expected = tiny.trained(in_float)[name].cpu() - start[name]
        torch.testing.assert_close(value.cpu() - start[name], expected, rtol=0.1, atol=2e-5)


def test_overflow_under_the_scaler_is_skipped_whole_and_counted(tmp_path):
    model = tiny.lora_llama()
    tiny.spoil_gradient(model, next(iter(tiny.trained(model))), 2, float("inf"))
    options = replace(SHORT, nonfinite="raise")  # an overflow is part of the search for a scale
    trainer, model = train(tmp_path, options, model=model, fp16=True)
    assert trainer.num_nonfinite_steps == 1
    assert all(value.isfinite().all() for value in tiny.trained(model).values())


@pytest.mark.parametrize("outer_optimizer", ["shared", "separate"])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_resumed_training_ends_with_the_same_bits(tmp_path, precision, outer_optimizer):
    options = replace(SHORT, outer_optimizer=outer_optimizer)
    _, straight = train(tmp_path, options, save_strategy="steps", save_steps=2, **precision)
    resumed = tiny.lora_llama()
    tiny.trainer(
        resumed, tmp_path, memory=MEMORY, options=options, use_cpu=False, **precision
    ).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.same(tiny.trained(straight), tiny.trained(resumed))


def test_selection_on_the_device_equals_selection_on_the_cpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scores = (torch.randn(3_000_001, device="cuda") ** 4).to(dtype)
        found = importance_threshold([scores], 0.2)
        assert found == importance_threshold([scores.cpu()], 0.2)
        assert found.num_above == int((scores.float() > found.value).sum())


def test_accumulator_lives_beside_its_parameters():
    weights = [torch.randn(1000, device="cuda"), torch.randn(3, 5, device="cuda")]
    gradients = [torch.randn_like(weight) for weight in weights]
    on_device = ImportanceAccumulator({"a": weights[0], "b": weights[1]})
    on_cpu = ImportanceAccumulator({"a": weights[0].cpu(), "b": weights[1].cpu()})
    assert on_device.update(weights, gradients)
    assert on_cpu.update([w.cpu() for w in weights], [g.cpu() for g in gradients])
    for (name, scores), (_, expected) in zip(on_device.scores(), on_cpu.scores(), strict=True):
        assert scores.is_cuda, name
        torch.testing.assert_close(scores.cpu(), expected)


@pytest.mark.parametrize("rule", [name for name in RULES if not RULES[name].two_sided])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_merge_on_the_device_is_that_of_the_processor(tmp_path, rule, num_workers):
    files = merges.Files(tmp_path, merges.roles_of(3)).write(torch.bfloat16, shards=[2] * 4)
    options = FusionOptions(rule=rule)
    base = RULES[rule].needs_base
    files.merge(options, "on-cpu", base=base)
    inputs = files.inputs(merges.usual_evidence(options), base=base)
    device = find_device("cuda")
    merge = Merge(inputs, options, device=device, num_workers=num_workers)
    merge.run(tmp_path / "on-device")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        expected = (tmp_path / "on-cpu" / name).read_bytes()
        assert (tmp_path / "on-device" / name).read_bytes() == expected
