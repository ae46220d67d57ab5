"""Whole models of four families: merged as files, loaded, and compared with a merge in memory."""

import copy

import folders
import merges
import oracles
import pytest
import safetensors.torch
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)
from typer.testing import CliRunner

from kifmerge.checkpoint.snapshot import write_snapshot
from kifmerge.cli import app
from kifmerge.tensor.baselines import ties
from kifmerge.tensor.fusion import recurrent_kif

ROLES = ("base", "new", "historical")
FRACTION = 0.3


def mixtral(seed=0):
    """A mixture of experts, which is kept in other tensors on disk than in memory."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    return MixtralForCausalLM(config)


FAMILIES = {
    "t5": (tiny.t5, AutoModelForSeq2SeqLM),
    "llama": (tiny.llama, AutoModelForCausalLM),
    "llama, tied": (lambda seed: tiny.llama(seed, tie_word_embeddings=True), AutoModelForCausalLM),
    "bert": (tiny.bert, AutoModelForSequenceClassification),
    "mixtral": (mixtral, AutoModelForCausalLM),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def parameters(model):
    """Each parameter once, though it may be tied to others."""
    return dict(model.named_parameters())


def with_values(model, values):
    """A model of the same family with other parameters."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in parameters(made).items():
            parameter.copy_(values[name])
    return made


def save(model, directory):
    model.save_pretrained(directory, max_shard_size="9KB")
    assert len(list(directory.glob("*.safetensors"))) > 1


def logits(model):
    tokens = torch.arange(3, 3 + 2 * 7).reshape(2, 7)
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=tokens, **more).logits


def merge(folder, rule, *more):
    words = ["merge", "--rule", rule, "--out", folder / "out", "--workers", "2", *more]
    for role in ROLES:
        words += [f"--{role}", folder / role]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert (result.exit_code, result.stderr) == (0, "")


def assert_is(folder, auto_class, expected):
    """What transformers loads without a word is the expected model, bit for bit."""
    loaded = merges.loaded_without_a_word(auto_class, folder / "out")
    assert type(loaded) is type(expected)
    assert merges.same_bits(dict(loaded.state_dict()), dict(expected.state_dict()))
    assert torch.equal(logits(loaded), logits(expected))


@pytest.fixture
def models(family, tmp_path):
    made = [family[0](seed) for seed in range(3)]
    for role, model in zip(ROLES, made, strict=True):
        save(model, tmp_path / role)
    return made


def test_recurrent_kif(family, models, tmp_path):
    base = models[0]
    scores, masks = [], []
    for number, role in enumerate(("new", "historical")):
        drawn = folders.random_tensors(
            10 + number, {n: p.shape for n, p in parameters(base).items()}
        )
        scores.append({name: value.abs() for name, value in drawn.items()})
        marked = oracles.masks(list(scores[-1].values()), str(FRACTION))
        masks.append(dict(zip(scores[-1], marked, strict=True)))
        # Scores in place of weights are saved under the names that weights have on disk.
        save(with_values(base, scores[-1]), tmp_path / f"{role}-scores")
        on_disk = folders.load(tmp_path / f"{role}-scores")
        kept = {f"score/{name}": value for name, value in on_disk.items()}
        write_snapshot(tmp_path / f"{role}-importance", kept, {"role": role})
    merge(
        tmp_path, "recurrent-kif", "--important-fraction", FRACTION,
        "--new-importance", tmp_path / "new-importance",
        "--historical-importance", tmp_path / "historical-importance",
    )  # fmt: skip
    states = [parameters(model) for model in models]
    expected = {}
    for name in states[0]:
        weights, new, historical = (state[name].detach() for state in states)
        expected[name] = recurrent_kif(
            weights, new - weights, historical - weights, masks[0][name], masks[1][name]
        )
    assert_is(tmp_path, family[1], with_values(base, expected))
    assert not torch.equal(logits(with_values(base, expected)), logits(base))


def test_ties(family, models, tmp_path):
    merge(tmp_path, "ties", "--density", FRACTION)
    base, *sides = ({n: p.detach() for n, p in parameters(model).items()} for model in models)
    vectors = [{n: side[n] - base[n] for n in base} for side in sides]
    kept = []
    for vector in vectors:
        sizes = torch.cat([value.abs().flatten() for value in vector.values()])
        num_kept = -int(-FRACTION * len(sizes) // 1)
        smallest = sizes.sort(descending=True).values[num_kept - 1]
        kept.append({name: value.abs() >= smallest for name, value in vector.items()})
    expected = {
        n: ties(base[n], [v[n] for v in vectors], [k[n] for k in kept], [1.0, 1.0]) for n in base
    }
    assert_is(tmp_path, family[1], with_values(models[0], expected))


def test_mixture_is_kept_otherwise_on_disk(tmp_path):
    """Or the test above says nothing of stacked experts."""
    model = mixtral()
    save(model, tmp_path)
    assert set(folders.load(tmp_path)) != set(model.state_dict())


def test_what_transformers_says_is_heard(tmp_path):
    """Or the tests above would not hear of a tensor that is missing."""
    tiny.llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(AssertionError, match=r"model\.norm\.weight.*MISSING"):
        merges.loaded_without_a_word(AutoModelForCausalLM, tmp_path)
