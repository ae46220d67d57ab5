"""Merging LoRA adapters, factor by factor: only where their factors have a common basis."""

import json

import folders
import merges
import pytest
import safetensors.torch
import tiny
import torch
import yaml
from merges import Files
from peft import PeftModel

from kifmerge.fusion.rules import FusionOptions
from kifmerge.fusion.unit_scores import GroupOptions
from kifmerge.phases.group import Group

KIF = FusionOptions()
AVERAGE = FusionOptions(rule="average")
LINEAR = FusionOptions(rule="linear")


def write(tmp_path, roles=merges.TWO, *, num_layers=1, **configs):
    """Adapters of one base: a base adapter, and one for each role."""
    for seed, role in enumerate(("base", *roles)):
        adapter = tiny.with_lora(tiny.llama(num_hidden_layers=num_layers), seed)
        adapter.save_pretrained(tmp_path / role)
        path = tmp_path / role / "adapter_config.json"
        changed = {**json.loads(path.read_text()), "base_model_name_or_path": "org/base"}
        path.write_text(json.dumps({**changed, **configs.get(role, {})}))
    kept = safetensors.torch.load_file(tmp_path / "base/adapter_model.safetensors")
    for seed, role in enumerate(roles):
        folders.snapshot(tmp_path / f"{role}-importance", seed, kept)
    return Files(tmp_path, roles)


def record(files, role, command, **parents):
    path = files.folder / role / "kifmerge.json"
    header = {"format": "kifmerge.checkpoint", "version": 1}
    path.write_text(json.dumps({**header, **folders.made_by(command, **parents)}))


def on_a_whole_model(files):
    """Put a model in place of the base adapter."""
    tiny.llama().save_pretrained(files.folder / "model")
    (files.folder / "base").rename(files.folder / "elsewhere")
    (files.folder / "model").rename(files.folder / "base")
    return files


def test_adapter_loads_on_its_base(tmp_path):
    files = write(tmp_path)
    files.merge(KIF)
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")
    expected = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora" in n}
    assert len(expected) == 4
    assert merges.same_bits(files.merged(), {n: expected[n].detach() for n in files.merged()})
    card = (tmp_path / "out/README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["library_name"]) == (["org/base"], "peft")


class TestSettings:
    @pytest.mark.parametrize(
        "change",
        [{"r": 4}, {"lora_alpha": 99}, {"target_modules": ["q_proj"]}, {"use_rslora": True},
         {"base_model_name_or_path": "org/other"}, {"fan_in_fan_out": True}],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("role", ["base", "new", "historical"])
    def test_other_settings_or_bases(self, tmp_path, role, change):
        files = write(tmp_path, **{role: change})
        files.refused("these are different models", f"{next(iter(change))}: base ")
        key = "adapter-base" if "base_model_name_or_path" in change else "adapter"
        files.merge(KIF, allowed=(key,))

    def test_what_does_not_change_the_meaning(self, tmp_path):
        new = {"inference_mode": False, "lora_dropout": 0.5, "peft_version": "0.1",
               "target_modules": ["v_proj", "q_proj"]}  # fmt: skip
        write(tmp_path, base={"target_modules": ["q_proj", "v_proj"]}, new=new).merge(KIF)

    def test_same_base_folder_by_two_paths(self, tmp_path):
        (tmp_path / "model").mkdir()
        twice = {"base_model_name_or_path": str(tmp_path / "new" / ".." / "model")}
        once = {"base_model_name_or_path": str(tmp_path / "model")}
        write(tmp_path, base=once, new=twice, historical=once).merge(KIF)

    def test_adapter_beside_a_whole_model(self, tmp_path):
        files = write(tmp_path)
        (tmp_path / "new/adapter_config.json").unlink()
        (tmp_path / "new/adapter_model.safetensors").rename(tmp_path / "new/model.safetensors")
        files.refused("base is an adapter, new a whole model")

    def test_adapter_of_another_folder_than_the_base(self, tmp_path):
        (tmp_path / "other").mkdir()
        config = {"base_model_name_or_path": str(tmp_path / "other")}
        files = write(tmp_path, new=config, historical=config)
        (tmp_path / "base/adapter_config.json").unlink()
        (tmp_path / "base/adapter_model.safetensors").rename(tmp_path / "base/model.safetensors")
        files.refused("is an adapter of .*other, not of .*base", space="factor")


class TestIndependent:
    """Adapters of which nothing says that their factors have a common basis."""

    @pytest.mark.parametrize("roles", [merges.TWO, merges.roles_of(3)])
    def test_on_a_whole_model_they_are_refused(self, tmp_path, roles):
        files = on_a_whole_model(write(tmp_path, roles))
        for role in roles:
            files.refused(
                "factors of independent adapters have no common basis", "--space factor",
                f"{role} {tmp_path / role}", rule=AVERAGE,
            )  # fmt: skip

    @pytest.mark.parametrize("roles", [merges.TWO, merges.roles_of(3)])
    def test_without_a_base_they_are_refused(self, tmp_path, roles):
        files = write(tmp_path, roles)
        files.refused("are adapters, no base: .* --space factor", rule=LINEAR, base=False)

    @pytest.mark.parametrize("roles", [merges.TWO, merges.roles_of(4)])
    def test_by_insistence_they_start_at_zero(self, tmp_path, roles):
        """The base has no factors: task vectors are the adapters themselves."""
        files = on_a_whole_model(write(tmp_path, roles))
        figures, _ = files.merge(AVERAGE, space="factor", num_workers=2)
        states = [folders.load(tmp_path / role) for role in roles]
        for name, value in files.merged().items():
            expected = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
        assert figures["num_tensors"] == 4
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")

    @pytest.mark.parametrize("base", [False, True])
    def test_linear_by_insistence(self, tmp_path, base):
        files = write(tmp_path, merges.roles_of(3))
        rule = FusionOptions(rule="linear", weights=(1.0, 2.0, 1.0))
        files.merge(rule, space="factor", base=base)
        states = [folders.load(tmp_path / role) for role in files.roles]
        for name, value in files.merged().items():
            first, second, third = (state[name].double() for state in states)
            expected = (first + 2 * second + third) / 4
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)

    def test_importance_by_insistence(self, tmp_path):
        files = on_a_whole_model(write(tmp_path))
        figures, _ = files.merge(KIF, space="factor")
        assert figures["both"] + figures["new_only"] == pytest.approx(0.2, abs=0.02)
        new = folders.load(tmp_path / "new")
        assert any((files.merged()[name] == new[name]).any() for name in new)


class TestFamilies:
    """Adapters of which one comes from another."""

    def test_one_trained_from_the_other_needs_no_insistence(self, tmp_path):
        files = on_a_whole_model(write(tmp_path))
        record(files, "historical", "replay", adapter=tmp_path / "new")
        assert files.open(KIF).historical_parent == "new"

    def test_chain_of_three_needs_no_insistence(self, tmp_path):
        """The third from the first, the second from the third."""
        files = on_a_whole_model(write(tmp_path, merges.roles_of(3)))
        record(files, "model_3", "train", adapter=tmp_path / "model_1")
        files.refused("independent adapters", rule=AVERAGE)
        record(files, "model_2", "train", adapter=tmp_path / "model_3")
        files.merge(AVERAGE)

    def test_all_from_the_adapter_that_is_the_base(self, tmp_path):
        files = write(tmp_path, merges.roles_of(3))
        files.merge(FusionOptions(rule="ties", scope="tensor"))
        states = [folders.load(tmp_path / role) for role in ("base", *files.roles)]
        for name, value in files.merged().items():
            low, high = (torch.stack([s[name] for s in states]).aminmax(dim=0)[k] for k in (0, 1))
            assert ((low - 1e-6 <= value) & (value <= high + 1e-6)).all()
            assert not torch.equal(value, states[0][name])

    @pytest.mark.parametrize("role", ["new", "historical"])
    def test_adapter_known_to_be_trained_afresh(self, tmp_path, role):
        """Giving a base declares that both come from it; a record that says otherwise counts."""
        files = write(tmp_path)
        record(files, role, "train", model=tmp_path)
        files.refused(f"{role} .* was trained from a fresh adapter", "--space factor")
        files.merge(KIF, space="factor")

    @pytest.mark.parametrize("command", ["train", "merge"])
    def test_adapter_trained_from_some_adapter_is_believed(self, tmp_path, command):
        files = write(tmp_path)
        record(files, "new", command, adapter=tmp_path / "base")
        files.merge(KIF)


@pytest.mark.parametrize("unit", ["tensor", "lora-rank", "layer"])
@pytest.mark.parametrize("name", ["kif", "kif-adaptive"])
def test_snapshots_are_grouped_on_the_way(tmp_path, name, unit):
    """As by the command group, for a first task, whose cumulative scores are its own."""
    files = write(tmp_path, num_layers=3)
    for role in files.roles:
        group = Group(tmp_path / f"{role}-importance", GroupOptions(unit=unit))
        group.run(tmp_path / f"{role}-units")
    files.merge(FusionOptions(rule=name, unit=unit), out="on-the-way")
    files.merge(FusionOptions(rule=name), out="before", evidence="units")
    assert merges.same_bits(files.merged("on-the-way"), files.merged("before"))
    new, historical = (folders.load(tmp_path / role) for role in files.roles)
    masks = [files.merged("before")[n] == side[n] for side in (new, historical) for n in side]
    if unit == "lora-rank" and name == "kif":
        assert any(mask.any() and not mask.all() for mask in masks)  # row by row
