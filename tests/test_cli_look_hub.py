"""inspect, diff, verify and group of what is on the Hub."""

from __future__ import annotations

import json

import merges
import pytest
import safetensors.torch
from typer.testing import CliRunner

from kifmerge.cli import app

SHAPES = {"h.0.w": (8, 6), "h.1.w": (6, 4), "b": (5,)}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def served(hub, tmp_path):
    """The inputs of a merge, in folders and under org/ on the Hub."""
    merges.Files(tmp_path).write(shapes=SHAPES)
    for path in tmp_path.iterdir():
        hub.add_repo(f"org/{path.name}", path)
    return tmp_path


def pulled_files(hub):
    return sorted(row.file for row in hub.log if row.is_content and row.listener == "cdn")


class TestInspect:
    @pytest.mark.parametrize("name", ["base", "new-importance"])
    def test_says_what_it_says_of_the_folder(self, hub, served, name):
        result = invoke("inspect", f"org/{name}", "--json")
        assert result.exit_code == 0, result.stderr
        found, expected = (
            json.loads(text)
            for text in (result.stdout, invoke("inspect", served / name, "--json").stdout)
        )
        assert found.pop("reference") == f"org/{name}@{hub.head(f'org/{name}')}"
        expected.pop("reference")
        assert found == expected

    def test_of_a_checkpoint_only_the_header_comes(self, hub, served):
        assert invoke("inspect", "org/base").exit_code == 0
        assert pulled_files(hub) == ["model.safetensors"]  # its first bytes
        assert invoke("inspect", "org/base", "--fetch", "download").exit_code == 0
        assert pulled_files(hub) == ["model.safetensors"] * 2

    def test_nothing_of_that_name(self, hub, served):
        result = invoke("inspect", "org/nothing")
        assert result.exit_code == 3
        assert result.stderr.startswith("kifmerge: org/nothing: no such folder here; on the Hub, ")
        assert "no such repository" in result.stderr
        assert result.stderr.count("\n") == 1


class TestDiff:
    @pytest.mark.parametrize("fetch", ["auto", "download", "stream"])
    def test_finds_what_it_finds_between_folders(self, hub, served, fetch):
        result = invoke("diff", "org/base", served / "new", "--fetch", fetch, "--json")
        assert result.exit_code == 0, result.stderr
        expected = json.loads(invoke("diff", served / "base", served / "new", "--json").stdout)
        found = json.loads(result.stdout)
        assert found["first"] == f"org/base@{hub.head('org/base')}"
        assert {**found, "first": expected["first"]} == expected
        assert found["total"]["num_changed"] > 0


class TestVerify:
    def test_sound(self, hub, served):
        result = invoke("verify", "org/base", "--json")
        assert result.exit_code == 0, result.stderr
        (file,) = json.loads(result.stdout)["files"]
        assert (file["file"], file["num_nonfinite"]) == ("model.safetensors", 0)

    def test_not_a_number(self, hub, served):
        tensors = safetensors.torch.load_file(served / "new/model.safetensors")
        tensors["b"][2] = float("nan")
        safetensors.torch.save_file(tensors, served / "new/model.safetensors", {"format": "pt"})
        hub.add_repo("org/new", served / "new")
        result = invoke("verify", "org/new")
        assert result.exit_code == 3
        assert "b: 1 NaN from element 2 on, of 5" in result.stderr


class TestGroup:
    def test_units_are_those_of_the_folder(self, hub, served, tmp_path):
        for reference, out in (
            ("org/new-importance", tmp_path / "hub-units"),
            (served / "new-importance", tmp_path / "units"),
        ):
            result = invoke("group", "--importance", reference, "--unit", "tensor", "--out", out)
            assert result.exit_code == 0, result.stderr
        found, expected = (
            json.loads((tmp_path / name / "units.json").read_text())
            for name in ("hub-units", "units")
        )
        assert found["units"] == expected["units"]
        parent, local = (c["made_by"]["parents"]["importance"] for c in (found, expected))
        assert parent["reference"] == f"org/new-importance@{hub.head('org/new-importance')}"
        assert parent["digest"] == local["digest"]


class TestPrune:
    @pytest.mark.parametrize("fetch", ["auto", "stream"])
    def test_mask_and_checkpoint_are_those_of_folders(self, hub, served, tmp_path, fetch):
        names = {"--importance": "new-importance", "--model": "new", "--base": "base"}
        of_hub = [word for flag, name in names.items() for word in (flag, f"org/{name}")]
        local = [word for flag, name in names.items() for word in (flag, served / name)]
        result = invoke("prune", *of_hub, "--fetch", fetch, "--out", tmp_path / "hub")
        assert result.exit_code == 0, result.stderr
        assert invoke("prune", *local, "--out", tmp_path / "local").exit_code == 0
        for path in ("mask.safetensors", "checkpoint/model.safetensors"):
            assert (tmp_path / "hub" / path).read_bytes() == (
                tmp_path / "local" / path
            ).read_bytes()
        hub.clear_log()
        again = invoke("prune", *of_hub, "--fetch", fetch, "--out", tmp_path / "hub")
        assert again.exit_code == 0
        assert "already made" in again.stderr
        assert sum(row.sent_bytes for row in hub.log if row.kind == "cdn") <= 3 * (1 << 16)
