import json
import math

import oracles
import pytest
import safetensors.torch
import tiny
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from kifmerge.checkpoint.snapshot import read_snapshot
from kifmerge.errors import TrainingError
from kifmerge.tensor.importance import ImportanceOptions
from kifmerge.training.importance import ImportanceCallback, as_in_checkpoint, checkpoint_names

pytestmark = pytest.mark.slow  # whole trainings

CHECKPOINTED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
MODELS = {
    "LoRA": tiny.lora_llama,
    "LoRA with modules to save": lambda: tiny.lora_llama(modules_to_save=["lm_head", "norm"]),
    "all parameters": tiny.llama,
    "all parameters, head tied": lambda: tiny.llama(tie_word_embeddings=True),
}


def train(model, output_dir, callback, *others, **settings):
    tiny.plain_trainer(model, output_dir, callbacks=(callback, *others), **settings).train()
    return read_snapshot(output_dir / "importance")


def saved_names(checkpoint):
    """Names in the one safetensors file of a checkpoint."""
    (file,) = checkpoint.glob("*model.safetensors")
    return set(safetensors.torch.load_file(file))


@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("weights", ["after", "before"])
def test_training_watched_is_training_bit_for_bit(tmp_path, make_model, weights):
    watched, plain = make_model(), make_model()
    callback = ImportanceCallback(ImportanceOptions(weights=weights))
    train(watched, tmp_path / "a", callback, **CHECKPOINTED)
    tiny.plain_trainer(plain, tmp_path / "b", **CHECKPOINTED).train()
    assert tiny.same(tiny.trained(watched), tiny.trained(plain))


@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS.keys())
def test_names_are_those_in_the_checkpoint_file(tmp_path, make_model):
    snapshot = train(make_model(), tmp_path, ImportanceCallback(), **CHECKPOINTED)
    assert set(snapshot.names) == saved_names(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS.keys())
def test_shapes_and_places_are_those_of_the_weights_in_the_checkpoint_file(tmp_path, make_model):
    model = make_model()
    train(model, tmp_path, ImportanceCallback(), **CHECKPOINTED)
    (file,) = (tmp_path / "checkpoint-4").glob("*model.safetensors")
    saved = safetensors.torch.load_file(file)
    names = checkpoint_names(model)
    assert len(set(names.values())) == len(names)
    for name, value in tiny.trained(model).items():
        assert torch.equal(saved[names[name]], value)


def test_names_are_those_in_the_file_where_saving_splits_stacked_experts(tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    model.save_pretrained(tmp_path)
    named = as_in_checkpoint(model, dict(model.named_parameters()))
    file = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert named.keys() == file.keys()
    assert all(torch.equal(named[name], value) for name, value in file.items())


def test_every_checkpoint_has_the_snapshot_of_its_moment(tmp_path):
    details = {"role": "historical", "task": "a"}
    callback = ImportanceCallback(details=details)
    last = train(tiny.lora_llama(), tmp_path, callback, **CHECKPOINTED)
    for step in (2, 4):
        snapshot = read_snapshot(tmp_path / f"checkpoint-{step}" / "importance")
        assert snapshot.details["steps"] == step
        assert snapshot.details.items() >= details.items()
    assert tiny.same(dict(snapshot.scores()), dict(last.scores()))
    first = read_snapshot(tmp_path / "checkpoint-2" / "importance")
    assert not tiny.same(dict(first.scores()), dict(last.scores()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "before", "betas": (0.55, 0.7)},
        {"sensitivity": "mixed"},
        {"sensitivity": "second", "score": "sensitivity"},
    ],
)
def test_scores_equal_the_oracle_of_the_steps_recorded(tmp_path, options):
    recorder, model = tiny.Gradients(), tiny.lora_llama()
    callback = ImportanceCallback(ImportanceOptions(**options))
    snapshot = train(model, tmp_path, callback, recorder, max_steps=4)
    scores, names = dict(snapshot.scores()), checkpoint_names(model)
    weights = recorder.before if options.get("weights") == "before" else recorder.after
    assert len(weights) == snapshot.details["steps"] == 4
    for name in tiny.trained(model):
        steps = [(w[name], g[name]) for w, g in zip(weights, recorder.gradients, strict=True)]
        sensitivity, uncertainty = oracles.smoothed(
            steps, kind=options.get("sensitivity", "first"), betas=options.get("betas", (0.85,) * 2)
        )
        alone = options.get("score") == "sensitivity"
        expected = sensitivity if alone else sensitivity * uncertainty
        found = scores[names[name]].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-18)


def test_gradients_are_those_of_the_whole_clipped_step(tmp_path):
    snapshots = [
        train(
            tiny.lora_llama(), tmp_path / str(size), ImportanceCallback(), max_steps=3,
            per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
        )
        for size in (4, 1)
    ]  # fmt: skip
    whole, accumulated = (dict(snapshot.scores()) for snapshot in snapshots)
    for name, value in whole.items():
        torch.testing.assert_close(accumulated[name], value, rtol=2e-2, atol=1e-9)


def test_resumed_training_goes_on_with_the_importance_of_the_steps_before(tmp_path):
    straight = train(tiny.lora_llama(), tmp_path, ImportanceCallback(), **CHECKPOINTED)
    resumed = tiny.plain_trainer(
        tiny.lora_llama(), tmp_path, callbacks=(ImportanceCallback(),), **CHECKPOINTED
    )
    expected = dict(straight.scores())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.same(dict(read_snapshot(tmp_path / "importance").scores()), expected)


def test_options_are_recorded_as_they_were(tmp_path):
    options = ImportanceOptions(sensitivity="mixed", betas=(0.5, 0.6), weights="before")
    train(tiny.lora_llama(), tmp_path, ImportanceCallback(options), max_steps=1)
    details = json.loads((tmp_path / "importance" / "importance.json").read_text())
    assert details["options"] == {
        "sensitivity": "mixed",
        "score": "product",
        "weights": "before",
        "betas": [0.5, 0.6],
        "accumulator_dtype": "float32",
        "accumulator_device": "parameters",
    }


@pytest.mark.parametrize("weights", ["after", "before"])
def test_nonfinite_gradient_is_left_out_and_counted(tmp_path, weights):
    model = tiny.lora_llama()
    tiny.spoil_gradient(model, next(iter(tiny.trained(model))), 4, math.nan)
    callback = ImportanceCallback(ImportanceOptions(weights=weights))
    snapshot = train(model, tmp_path, callback, max_steps=4)
    assert (snapshot.details["steps"], snapshot.details["skipped_steps"]) == (3, 1)
    assert all(scores.isfinite().all() for _, scores in snapshot.scores())


@pytest.mark.parametrize("weights", ["after", "before"])
def test_nonfinite_gradient_may_end_the_training_and_is_named(tmp_path, weights):
    model = tiny.lora_llama()
    culprit = list(tiny.trained(model))[-1]
    tiny.spoil_gradient(model, culprit, 2, math.inf)
    callback = ImportanceCallback(ImportanceOptions(weights=weights), nonfinite="raise")
    with pytest.raises(TrainingError, match="optimizer step 2 is not finite") as caught:
        train(model, tmp_path, callback)
    assert culprit in str(caught.value)
    assert not (tmp_path / "importance").exists()


def test_importance_of_a_recurrent_training_is_that_of_its_inner_steps(tmp_path):
    callback = ImportanceCallback()
    trainer = tiny.trainer(
        tiny.lora_llama(), tmp_path, memory=tiny.rows(4, seed=1), callbacks=(callback,), max_steps=8
    )
    trainer.train()
    assert len(trainer.rounds) == 1
    assert read_snapshot(tmp_path / "importance").details["steps"] == 8


def test_model_that_is_frozen_whole_is_refused(tmp_path):
    callback = ImportanceCallback()
    with pytest.raises(TrainingError, match="every one is frozen"):
        callback.on_train_begin(
            tiny.arguments(tmp_path), None, None, model=tiny.llama().requires_grad_(False)
        )


def test_optimizer_that_leaves_no_gradients_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="lomo"):
        ImportanceCallback().on_train_begin(
            tiny.arguments(tmp_path, optim="lomo"), None, None, model=tiny.llama()
        )
