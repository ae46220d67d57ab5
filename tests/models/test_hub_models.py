"""Models, adapters and tokenizers from the Hub: what is pulled, loaded and recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from huggingface_hub import constants
from loopback import Fault

from kifmerge.errors import CheckpointError, TryAgainError
from kifmerge.hub import client
from kifmerge.models import origin
from kifmerge.phases.measure import checkpoint_files, open_at_rest
from kifmerge.models.model import (
    LoraOptions,
    ModelOptions,
    known_labels,
    load_model,
    pinned_options,
)
from kifmerge.models.opening import bring, open_model, parted, pinned_parts, saved_section
from kifmerge.models.origin import local_copy, opened, pinned
from kifmerge.models.scratch import make_base
from kifmerge.models.tokenizer import TokenizerOptions
from kifmerge.training.train import TrainingOptions

TEXTS = ["the red fox runs", "a blue bird sings"]
LLAMA = ModelOptions(
    kind="causal-lm",
    config={
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    tokenizer=TokenizerOptions(kind="bytes", vocabulary_size=280),
)
BERT = ModelOptions(
    kind="classifier",
    config={
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    },
    pooling="mean",
    dropout=0.0,
)
LORA = LoraOptions(targets=["q_proj", "v_proj"], rank=2, alpha=4, dropout=0.0)
CPU = TrainingOptions(device="cpu")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A causal language model from scratch."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    make_base(LLAMA, TEXTS, folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    make_base(BERT, TEXTS, folder, seed=0)
    return folder


@pytest.fixture
def new_process(monkeypatch):
    """Forget what this process has opened, as the next command would not know it."""
    return lambda: monkeypatch.setattr(origin, "_opened", {})


def causal(reference, **changes) -> ModelOptions:
    return ModelOptions(kind="causal-lm", reference=str(reference), **changes)


def weights(loaded) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in loaded.model.state_dict().items()}


def spoil(loaded) -> None:
    """Move every trainable weight away from where it was loaded."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)


def files_pulled(hub) -> list[str]:
    return sorted(row.file for row in hub.log if row.is_content)


def contents(folder: Path) -> dict[str, bytes]:
    """Path in a folder -> bytes of the files in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def in_shards(folder: Path, out: Path) -> Path:
    """The same model in two shards."""
    shutil.copytree(folder, out)
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:3], names[3:]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        saved = {name: tensors[name] for name in part}
        safetensors.torch.save_file(saved, out / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


class TestPinned:
    @pytest.mark.parametrize("name", ["gpt2", "runs/base", "/nowhere/base"])
    def test_what_is_no_reference_stays(self, hub, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs/base").mkdir(parents=True)
        assert pinned(name) == name
        assert hub.log == []

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("org/base", "org/base@{main}"),
            ("org/base@main", "org/base@{main}"),
            ("org/base@v1", "org/base@{v1}"),
            ("hf://org/base@v1", "org/base@{v1}"),
            ("hf://models/org/base/sub/folder", "hf://org/base@{main}/sub/folder"),
            ("hf://org/base@v1/sub/folder", "hf://org/base@{v1}/sub/folder"),
        ],
    )
    def test_is_the_commit_of_this_moment(self, hub, given, expected):
        files = {"config.json": b"{}", "sub/folder/config.json": b"{}"}
        commits = {
            "v1": hub.add_repo("org/base", files, branch="v1"),
            "main": hub.add_repo("org/base", {**files, "more.txt": b"more"}),
        }
        assert pinned(given) == expected.format(**commits)

    def test_pinned_one_needs_no_network(self, hub):
        name = f"org/base@{'0' * 40}"
        assert pinned(name) == name
        assert hub.log == []

    def test_options(self, hub):
        commits = [hub.add_repo(name, {"config.json": b"{}"}) for name in ("org/base", "org/words")]
        options = causal("org/base", tokenizer="org/words")
        found = pinned_options(options)
        assert (found.reference, found.tokenizer) == (
            f"org/base@{commits[0]}",
            f"org/words@{commits[1]}",
        )
        assert pinned_options(LLAMA) == LLAMA

    @pytest.mark.parametrize("name", ["org/other", "org/base@other", "hf://org/base/other"])
    def test_what_is_not_there(self, hub, name):
        hub.add_repo("org/base", {"config.json": b"{}"})
        with pytest.raises(CheckpointError, match="no such") as caught:
            pinned(name)
        assert len(str(caught.value).splitlines()) == 1


class TestLocalCopy:
    def test_brings_what_a_model_is_made_of_and_nothing_else(self, hub, base_dir, tmp_path):
        folder = tmp_path / "base"
        shutil.copytree(base_dir, folder)
        wanted = sorted(path.name for path in folder.iterdir())
        wanted += ["additional_chat_templates/tool.jinja", "chat_template.jinja", "merges.txt"]
        wanted += ["special_tokens_map.json", "tokenizer.model", "vocab.json"]
        unwanted = ["pytorch_model.bin", "model.fp16.safetensors", "consolidated.safetensors"]
        unwanted += ["modeling_own.py", "training_args.bin", "README.md", "rows.jsonl", "tf.h5"]
        unwanted += ["importance/importance.safetensors", "state/state.json", "onnx/config.json"]
        for name in [*wanted, *unwanted]:
            (folder / name).parent.mkdir(exist_ok=True)
            if not (folder / name).exists():
                (folder / name).write_text(json.dumps({"name": name}))
        hub.add_repo("org/base", folder)
        found = Path(local_copy("org/base"))
        assert sorted(contents(found)) == sorted(wanted) == files_pulled(hub)
        assert contents(found) == {name: (folder / name).read_bytes() for name in wanted}

    def test_tokenizer_comes_alone(self, hub, base_dir):
        hub.add_repo("org/base", base_dir)
        local_copy("org/base", with_weights=False)
        assert "tokenizer.json" in files_pulled(hub)
        assert hub.pulled_bytes("*.safetensors") == 0

    def test_everything_comes_once(self, hub, base_dir, new_process):
        commit = hub.add_repo("org/base", base_dir)
        said = []
        first = local_copy("org/base", say=said.append)
        num_bytes = sum(len(content) for content in contents(base_dir).values())
        assert hub.pulled_bytes() == num_bytes
        assert said == [f"fetching org/base@{commit}: {num_bytes:,} bytes"]
        hub.clear_log()
        assert local_copy(f"org/base@{commit}") == first
        assert hub.log == []
        new_process()
        assert local_copy("org/base", say=said.append) == first
        assert hub.pulled_bytes() == 0
        assert len(said) == 1

    def test_shards(self, hub, base_dir, tmp_path):
        folder = in_shards(base_dir, tmp_path / "shards")
        hub.add_repo("org/base", folder)
        said = []
        assert contents(Path(local_copy("org/base", say=said.append))) == contents(folder)
        assert said[1:] == [
            f"fetching model-0000{number}-of-00002.safetensors, {number} of 2" for number in (1, 2)
        ]

    def test_folder_in_a_repository(self, hub, base_dir):
        files = {f"sub/folder/{name}": content for name, content in contents(base_dir).items()}
        hub.add_repo("org/many", {**files, "config.json": b"other", "model.safetensors": b"other"})
        assert contents(Path(local_copy("hf://org/many/sub/folder"))) == contents(base_dir)
        assert all(name.startswith("sub/folder/") for name in files_pulled(hub))

    @pytest.mark.parametrize("kind", ["model", "adapter"])
    def test_pickles_only(self, hub, kind):
        config = {"model": "config.json", "adapter": "adapter_config.json"}[kind]
        pickle = {"model": "pytorch_model.bin", "adapter": "adapter_model.bin"}[kind]
        commit = hub.add_repo("org/old", {config: b"{}", pickle: b"pickle"})
        words = (
            rf"org/old@{commit}: expected .*, found pickles only \({pickle}\), which may run code"
        )
        with pytest.raises(CheckpointError, match=words):
            local_copy("org/old")
        assert hub.pulled_bytes("*.bin") == 0

    def test_nothing_to_load(self, hub):
        hub.add_repo("org/none", {"README.md": b"none"})
        with pytest.raises(CheckpointError, match=r"org/none@\w+ holds no weights: expected model"):
            local_copy("org/none")
        with pytest.raises(CheckpointError, match="holds no model, adapter or tokenizer"):
            local_copy("org/none", with_weights=False)

    @pytest.mark.parametrize(
        ("shard", "words"),
        [
            ("model-9.safetensors", "names shards that are missing"),
            ("../model.safetensors", "is no file name of a shard"),
            (7, "is no file name of a shard"),
        ],
    )
    def test_index_that_cannot_be_followed(self, hub, base_dir, tmp_path, shard, words):
        folder = in_shards(base_dir, tmp_path / "shards")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = shard
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        hub.add_repo("org/base", folder)
        with pytest.raises(CheckpointError, match=words):
            local_copy("org/base")
        assert hub.pulled_bytes("*.safetensors") == 0

    def test_index_that_disagrees_with_its_shards(self, hub, base_dir, tmp_path):
        folder = in_shards(base_dir, tmp_path / "shards")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        hub.add_repo("org/base", folder)
        with pytest.raises(CheckpointError, match="and its shards disagree") as caught:
            local_copy("org/base")
        assert "org/base@" in str(caught.value)

    def test_damaged_on_the_way(self, hub, base_dir):
        hub.add_repo("org/base", base_dir)
        hub.fail(Fault(match="*.safetensors", kind="cdn", corrupt_at=5000, times=None))
        with pytest.raises(TryAgainError, match="not those of the repository"):
            local_copy("org/base")
        hub.mend()
        hub.fail(Fault(match="*.safetensors", kind="cdn", corrupt_at=5000, times=1))
        assert contents(Path(local_copy("org/base"))) == contents(base_dir)

    def test_private(self, hub, base_dir, monkeypatch, new_process):
        hub.add_repo("org/base", base_dir, private=True)
        token = hub.env["HF_TOKEN"]
        for other in (None, "loopback-token-of-someone-else", "hf_wrong"):
            if other is None:
                monkeypatch.delenv("HF_TOKEN")
            else:
                monkeypatch.setenv("HF_TOKEN", other)
            with pytest.raises(CheckpointError, match=r"log in with|not accepted") as caught:
                local_copy("org/base")
            assert "token" in str(caught.value)
            assert str(other) not in str(caught.value)
        monkeypatch.setenv("HF_TOKEN", token)
        assert contents(Path(local_copy("org/base"))) == contents(base_dir)

    def test_offline(self, hub, base_dir, monkeypatch, new_process):
        commit = hub.add_repo("org/base", base_dir)
        first = local_copy("org/base")
        hub.clear_log()
        new_process()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        for name in ("org/base", f"org/base@{commit}"):
            assert pinned(name) == f"org/base@{commit}"
            assert local_copy(name) == first
        assert hub.log == []

    def test_offline_with_a_part_of_it_in_the_cache(self, hub, base_dir, monkeypatch, new_process):
        commit = hub.add_repo("org/base", base_dir)
        local_copy("org/base", with_weights=False)
        new_process()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match=r"holds no weights.*HF_HUB_OFFLINE is set"):
            local_copy(f"org/base@{commit}")

    def test_hub_that_is_gone(self, hub, base_dir, monkeypatch, new_process):
        commit = hub.add_repo("org/base", base_dir)
        first = local_copy("org/base")
        new_process()
        hub.fail(Fault(status=503, times=None))
        monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.001)
        said = []
        assert local_copy(f"org/base@{commit}", say=said.append) == first
        assert "taking what the cache holds" in said[-1]
        with pytest.raises(TryAgainError, match="HTTP 503"):
            local_copy("org/other")


class TestLoading:
    def test_same_weights_as_from_a_folder(self, hub, base_dir):
        commit = hub.add_repo("org/base", base_dir)
        loaded = load_model(causal("org/base"), [], seed=0)
        assert tiny.same(weights(loaded), weights(load_model(causal(base_dir), [], seed=0)))
        assert loaded.options.reference == f"org/base@{commit}"
        assert loaded.model.name_or_path == "org/base"

    def test_commit_stays_where_it_was(self, hub, base_dir, tmp_path):
        hub.add_repo("org/base", base_dir)
        options = pinned_options(causal("org/base"))
        other = make_base(LLAMA, TEXTS, tmp_path / "other", seed=1).reference
        hub.add_repo("org/base", Path(other))
        hub.clear_log()
        expected = weights(load_model(causal(base_dir), [], seed=0))
        for _ in range(2):
            assert tiny.same(weights(open_model(options)), expected)
        assert hub.pulled_bytes("*.safetensors") == (base_dir / "model.safetensors").stat().st_size
        assert tiny.same(
            weights(open_model(pinned_options(causal("org/base")))),
            weights(load_model(causal(other), [], seed=0)),
        )

    @pytest.mark.parametrize("from_scratch", [False, True])
    def test_tokenizer_of_another_repository(self, hub, base_dir, tmp_path, from_scratch):
        hub.add_repo("org/base", base_dir)
        other = make_base(LLAMA, ["zebra " * 20], tmp_path / "other", seed=0).reference
        hub.add_repo("org/words", Path(other))
        hub.clear_log()
        options = causal("org/base", tokenizer="org/words")
        if from_scratch:
            options = ModelOptions(kind="causal-lm", config=LLAMA.config, tokenizer="org/words")
            options = make_base(options, [], tmp_path / "made", seed=0)
        loaded = load_model(options, [], seed=0)
        assert loaded.tokenizer.tokenize("zebra") == ["zebra"]
        assert hub.pulled_bytes("org/words/*.safetensors") == 0

    def test_saved_model_has_no_trace_of_the_cache(self, hub, encoder_dir, base_dir, tmp_path):
        hub.add_repo("org/encoder", encoder_dir)
        hub.add_repo("org/base", base_dir)
        for number, options in enumerate(
            (
                ModelOptions(kind="classifier", reference="org/encoder", pooling="mean"),
                ModelOptions(kind="classifier", reference="org/encoder"),
                causal("org/base"),
                causal("org/base", lora=LORA),
            )
        ):
            load_model(options, ["a", "b"], seed=0).save(tmp_path / f"{number}")
            for name, content in contents(tmp_path / f"{number}").items():
                assert str(hub.store_dir).encode() not in content, name

    def test_saves_the_same_files_as_from_a_folder(self, hub, base_dir, tmp_path):
        hub.add_repo("org/base", base_dir)
        for name, reference in (("hub", "org/base"), ("folder", base_dir)):
            load_model(causal(reference), [], seed=0).save(tmp_path / name)
        found, expected = contents(tmp_path / "hub"), contents(tmp_path / "folder")
        assert found.pop("kifmerge.json") != expected.pop("kifmerge.json")
        assert found == expected

    def test_code_in_a_repository_does_not_run(self, hub, base_dir, tmp_path):
        folder = tmp_path / "base"
        shutil.copytree(base_dir, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
        (folder / "config.json").write_text(json.dumps(config))
        marker = tmp_path / "has-run"
        (folder / "configuration_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
        hub.add_repo("org/own", folder)
        with pytest.raises(CheckpointError, match=r"cannot load the model org/own.*custom code"):
            load_model(causal("org/own"), [], seed=0)
        assert hub.pulled_bytes("*.py") == 0
        assert not marker.exists()

    def test_files_whose_names_importance_takes(self, hub, base_dir, tmp_path):
        hub.add_repo("org/base", in_shards(base_dir, tmp_path / "shards"))
        options = pinned_options(causal("org/base"))
        bring(options, None, lambda text: None)
        hub.clear_log()
        files = checkpoint_files(options, None)
        assert files.where("lm_head.weight").endswith("/model-00001-of-00002.safetensors")
        assert hub.log == []
        assert checkpoint_files(causal("gpt2"), None) is None


class TestProduct:
    """A checkpoint of ours that was pushed."""

    def test_classifier_comes_back_with_its_head(self, hub, encoder_dir, tmp_path):
        options = ModelOptions(kind="classifier", reference=str(encoder_dir), pooling="mean")
        made = load_model(options, ["x", "y", "z"], seed=1)
        spoil(made)
        made.save(tmp_path / "made")
        shutil.rmtree(encoder_dir.with_name("moved"), ignore_errors=True)
        commit = hub.add_repo("org/made", tmp_path / "made")
        assert known_labels(opened("org/made")) == ["x", "y", "z"]
        section = saved_section(*pinned_parts("org/made", None))
        assert section["reference"] == f"org/made@{commit}"
        assert (section["kind"], section["pooling"]) == ("classifier", "mean")
        loaded = open_at_rest(ModelOptions(**section), None, CPU)
        assert loaded.labels == ["x", "y", "z"]
        assert tiny.same(weights(loaded), weights(made))

    def test_brings_its_own_tokenizer(self, hub, base_dir, tmp_path):
        """The one that it was made with may be on another machine."""
        shutil.copytree(base_dir, tmp_path / "words")
        options = causal(base_dir, tokenizer=str(tmp_path / "words"))
        load_model(options, [], seed=0).save(tmp_path / "made")
        hub.add_repo("org/made", tmp_path / "made")
        shutil.rmtree(tmp_path / "words")
        section = saved_section(*pinned_parts("org/made", None))
        loaded = open_model(ModelOptions(**{**section, "lora": LORA}))
        assert len(loaded.tokenizer) == 280

    def test_stock_classifier_keeps_its_head(self, hub, encoder_dir, tmp_path):
        model = tiny.bert()
        model.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
        model.save_pretrained(tmp_path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(encoder_dir / name, tmp_path / name)
        hub.add_repo("org/stock", tmp_path)
        section = saved_section(*pinned_parts("org/stock", None))
        loaded = open_model(ModelOptions(**section))
        assert loaded.labels == ["no", "maybe", "yes"]
        assert torch.equal(loaded.model.classifier.weight, model.classifier.weight)


class TestAdapter:
    @pytest.fixture
    def commit(self, hub, base_dir):
        """Of the base, which main leaves again."""
        return hub.add_repo("org/base", base_dir)

    @pytest.fixture
    def adapter(self, hub, commit, tmp_path):
        """Made on a base on the Hub: a folder, and its weights."""
        loaded = load_model(causal("org/base", lora=LORA), [], seed=3)
        spoil(loaded)
        loaded.save(tmp_path / "adapter")
        # Wherever main goes, the adapter's base is where it was.
        hub.add_repo("org/base", {"config.json": b"{}"})
        return tmp_path / "adapter", weights(loaded)

    def test_names_its_base(self, adapter, commit):
        config = json.loads((adapter[0] / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
        card = (adapter[0] / "README.md").read_text()
        assert "base_model: org/base\n" in card
        assert "base_model:adapter:org/base\n" in card

    def test_saving_asks_the_network_for_nothing(self, hub, adapter, commit, tmp_path):
        options = causal(f"org/base@{commit}", lora=LORA)
        for loaded in (
            load_model(options, [], seed=0),
            load_model(options, [], seed=0, checkpoint=adapter[0]),
        ):
            hub.clear_log()
            loaded.save(tmp_path / "again")
            assert hub.log == []
            config = json.loads((tmp_path / "again/adapter_config.json").read_text())
            assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)

    @pytest.mark.parametrize("place", ["folder", "hub"])
    @pytest.mark.parametrize("maker", ["ours", "PEFT"])
    def test_opens_again(self, hub, adapter, commit, place, maker):
        folder, expected = adapter
        if maker == "PEFT":
            for name in ("kifmerge.json", "tokenizer.json", "tokenizer_config.json"):
                (folder / name).unlink()
        given = str(folder)
        if place == "hub":
            given = f"org/adapter@{hub.add_repo('org/adapter', folder)}"
        base, named = pinned_parts(given.partition("@")[0], None)
        assert (base, named) == (f"org/base@{commit}", given)
        section = saved_section(base, named)
        assert (section["kind"], section["lora"]["rank"]) == ("causal-lm", 2)
        loaded = open_at_rest(ModelOptions(**section), named, CPU)
        assert tiny.same(weights(loaded), expected)

    def test_base_without_a_revision_is_where_main_is(self, hub, adapter, base_dir):
        (adapter[0] / "kifmerge.json").unlink()
        path = adapter[0] / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "revision": None}))
        commit = hub.add_repo("org/base", base_dir)
        assert pinned_parts(str(adapter[0]), None)[0] == f"org/base@{commit}"

    def test_on_a_base_in_a_folder_of_a_repository(self, hub, base_dir, tmp_path):
        files = {f"sub/{name}": content for name, content in contents(base_dir).items()}
        commit = hub.add_repo("org/many", files)
        loaded = load_model(causal("hf://org/many/sub", lora=LORA), [], seed=3)
        loaded.save(tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/many", commit)
        assert parted(str(tmp_path / "adapter"), None)[0] == f"hf://org/many@{commit}/sub"

    def test_on_another_base_names_that_one(self, adapter, base_dir, tmp_path):
        loaded = load_model(causal(base_dir, lora=LORA), [], seed=0, checkpoint=adapter[0])
        loaded.save(tmp_path / "again")
        config = json.loads((tmp_path / "again/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base_dir)
        assert config["revision"] is None

    def test_on_an_adapter(self, hub, adapter):
        hub.add_repo("org/adapter", adapter[0])
        with pytest.raises(CheckpointError, match=r"org/adapter@\w+ is an adapter itself"):
            pinned_parts("org/adapter", "other")

    def test_that_is_none(self, hub, commit):
        with pytest.raises(CheckpointError, match=r"org/base@\w+ is no adapter"):
            saved_section(f"org/base@{commit}", f"org/base@{commit}")

    def test_brings_itself_and_its_base(self, hub, adapter, commit, new_process):
        hub.add_repo("org/adapter", adapter[0])
        base, named = pinned_parts("org/adapter", None)
        options = ModelOptions(**saved_section(base, named))
        shutil.rmtree(hub.env["HF_HUB_CACHE"])
        new_process()
        hub.clear_log()
        said = []
        bring(options, named, said.append)
        assert [text.partition(":")[0] for text in said] == [
            f"fetching {base}",
            f"fetching {named}",
        ]
        pulled = [name for name in files_pulled(hub) if name.endswith(".safetensors")]
        assert pulled == ["adapter_model.safetensors", "model.safetensors"]
        hub.clear_log()
        open_model(options, named)
        assert hub.log == []
