"""The recurrent loop inside TRL's SFTTrainer, which prepares its datasets itself."""

import pytest
import tiny
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kifmerge.errors import TrainingError
from kifmerge.training.presets import RecurrentOptions
from kifmerge.training.trainer import RecurrentMixin

pytestmark = pytest.mark.slow  # whole trainings

trl = pytest.importorskip("trl")

SHORT = RecurrentOptions(inner_steps=3, outer_steps=2)
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
METRICS = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")


class RecurrentSFTTrainer(RecurrentMixin, trl.SFTTrainer):
    pass


@pytest.fixture(autouse=True)
def quiet():
    disable_progress_bars()


@pytest.fixture
def tokenizer():
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, tiny.VOCABULARY))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def sentences(num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_rows):
        length = int(torch.randint(4, 9, (), generator=generator))
        numbers = torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist()
        yield [f"w{number}" for number in numbers]


def pairs(num_rows, seed=0):
    return [
        {"prompt": " ".join(words[:3]), "completion": " " + " ".join(words[3:])}
        for words in sentences(num_rows, seed)
    ]


def texts(num_rows, seed=0):
    return [{"text": " ".join(words)} for words in sentences(num_rows, seed)]


FORMS = pytest.mark.parametrize("form", [pairs, texts], ids=["prompt and completion", "text"])


def make(tokenizer, output_dir, form=pairs, memory=None, options=SHORT, max_length=32, **changes):
    arguments = trl.SFTConfig(
        **{
            **tiny.arguments(output_dir, max_steps=7).to_dict(),
            "bf16": False,
            "gradient_checkpointing": None,
            "activation_checkpointing": False,
            "max_length": max_length,
            "include_num_input_tokens_seen": "all",
            **changes,
        }
    )
    torch.manual_seed(0)
    trainer_class, more = trl.SFTTrainer, {}
    if memory is not None:
        trainer_class, more = RecurrentSFTTrainer, {"memory": memory, "recurrent": options}
    return trainer_class(
        tiny.llama(),
        arguments,
        train_dataset=Dataset.from_list(form(20)),
        processing_class=tokenizer,
        peft_config=LoraConfig(init_lora_weights=False, **LORA),
        **more,
    )


@FORMS
@pytest.mark.parametrize("as_dataset", [True, False])
def test_memory_is_prepared_as_the_training_set_is(tokenizer, tmp_path, form, as_dataset):
    rows = form(8, seed=1)
    trainer = make(tokenizer, tmp_path, form, Dataset.from_list(rows) if as_dataset else rows)
    found = [trainer.memory[number] for number in range(len(trainer.memory))]
    for row, words in zip(found, sentences(8, 1), strict=True):
        assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == [*words, "</s>"]
        hidden = 3 if form is pairs else 0
        assert row["labels"] == [-100] * hidden + row["input_ids"][hidden:]
    assert set(found[0]) == set(trainer.train_dataset[0])


@FORMS
def test_rounds_are_fused_and_only_the_adapter_learns(tokenizer, tmp_path, form):
    trainer = make(tokenizer, tmp_path, form, form(8, seed=1))
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert [(done.inner_steps, done.outer_steps) for done in trainer.rounds] == [
        (3, 2), (3, 2), (1, 2),
    ]  # fmt: skip
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, start[name]) != ("lora_" in name)
        assert parameter.isfinite().all()


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_memory_batches_stay_out_of_the_logged_metrics(tokenizer, tmp_path, logging_steps):
    """Nothing differs up to the first fusion; what only counts rows never does."""
    logs = {}
    for name, memory in [("plain", None), ("recurrent", pairs(8, seed=1))]:
        trainer = make(tokenizer, tmp_path / name, memory=memory, logging_steps=logging_steps)
        trainer.train()
        logs[name] = trainer.state.log_history
        counts = (trainer.state.total_flos, trainer.state.num_input_tokens_seen)
        logs[f"{name} counts"] = counts
        assert min(counts) > 0
    assert logs["plain counts"] == logs["recurrent counts"]
    assert len(logs["plain"]) == len(logs["recurrent"]) > 2
    for plain, recurrent in zip(logs["plain"][:-1], logs["recurrent"][:-1], strict=True):
        for key in ("num_tokens", "num_input_tokens_seen"):
            assert recurrent[key] == plain[key]
        if plain["step"] <= SHORT.inner_steps:
            assert {key: recurrent[key] for key in METRICS} == {key: plain[key] for key in METRICS}
        else:
            assert recurrent["loss"] != plain["loss"]


def test_resumed_training_ends_at_the_same_bits(tokenizer, tmp_path):
    settings = {"memory": pairs(8, seed=1), "save_strategy": "steps", "save_steps": 3}
    straight = make(tokenizer, tmp_path / "straight", **settings)
    straight.train()
    resumed = make(tokenizer, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert tiny.same(tiny.trained(resumed.model), tiny.trained(straight.model))
    assert resumed.rounds[-2:] == straight.rounds[1:]


def test_memory_of_which_preparation_leaves_nothing_is_refused(tokenizer, tmp_path):
    rows = [{"prompt": "w3 " * 10, "completion": " w4"}] * 4
    with pytest.raises(TrainingError, match="none of the 4 rows of memory"):
        make(tokenizer, tmp_path, memory=rows, max_length=9)


def test_memory_prepared_beforehand_is_taken_as_it_is(tokenizer, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 4
    trainer = make(tokenizer, tmp_path, memory=rows)
    assert trainer.memory[0] == rows[0]
