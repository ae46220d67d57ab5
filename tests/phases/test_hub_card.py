"""The card of a merge that goes straight into a repository."""

from __future__ import annotations

import merges
import pytest
import yaml
from typer.testing import CliRunner

from kifmerge.cli import app


@pytest.fixture
def publish(hub, tmp_path):
    """Serve two models with these licences in their cards."""
    merges.Files(tmp_path).write(shapes={"w": (4, 3)})

    def publish(*licences):
        for name, licence in zip(merges.TWO, licences, strict=True):
            card = f"---\nlicense: {licence}\n---\n" if licence else "no front matter"
            (tmp_path / name / "README.md").write_text(card)
            hub.add_repo(f"org/{name}", tmp_path / name)

    return publish


def merged_card(hub):
    """Front matter and text, and what was said."""
    models = [word for name in merges.TWO for word in ("--model", f"org/{name}")]
    command = ["merge", "--rule", "linear", *models, "--out", "hf://me/out"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    _, front, text = hub.read("me/out", "README.md").decode().split("---\n", 2)
    return yaml.safe_load(front), text, result.stderr


def test_licence_and_how_to_make_it_again(hub, publish):
    publish("mit", "mit")
    front, text, said = merged_card(hub)
    assert front["license"] == "mit"
    assert front["base_model"] == [f"org/{name}" for name in merges.TWO]
    assert "kifmerge pull me/out --out published" in text
    assert hub.head("org/new") in text
    assert "licence" not in said


def test_licences_that_differ(hub, publish):
    publish("mit", "apache-2.0")
    front, text, said = merged_card(hub)
    assert front["license"] == "other"
    assert "org/new: mit; org/historical: apache-2.0" in text
    assert "warning: The licences of the models that it derives from differ" in said


def test_no_licence(hub, publish):
    publish("", "")
    front, text, said = merged_card(hub)
    assert "license" not in front
    assert "The licence is not known" in text
    assert "The licence is not known" in said
