"""Model cards: what programs read in front, what people read below, and whose card it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard

from kifmerge.fusion.rules import RULES, FusionOptions
from kifmerge.phases.card import (
    MARK,
    card,
    command_section,
    facts_section,
    hub_reference,
    is_ours,
    merge_section,
    model_card,
    parent_table,
    rebuild_section,
    score_section,
    title_of,
)
from kifmerge.phases.equations import EQUATIONS, equation
from kifmerge.phases.report import Report

SHA = "0123456789abcdef" * 2 + "01234567"
MADE_BY = {
    "command": "merge",
    "options": {"rule": "ties", "density": 0.2, "scope": "global", "weights": None, "scale": 1.0},
    "parents": {
        "base": {"reference": f"org/base@{SHA}", "digest": None},
        "model_1": {"reference": f"hf://org/tuned@{SHA}/sub/folder", "digest": "e" * 64},
        "model_2": {"reference": "runs/merged", "digest": "f" * 64},
        "model_1_importance": {"reference": f"org/importance@{SHA}", "digest": None},
    },
}
FIGURES = {"num_parameters": 3504, "both": 0.25}


def front_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


class TestEquations:
    def test_every_rule_has_one(self) -> None:
        assert EQUATIONS.keys() == RULES.keys()

    @pytest.mark.parametrize("rule", RULES)
    def test_it_names_every_option_of_the_rule(self, rule: str) -> None:
        text = equation({"rule": rule, "weights": None})
        if rule == "recurrent-kif":
            text += equation({"rule": rule, "weights": [1.0, 1.0]})
        assert [name for name in RULES[rule].options if name not in text] == []
        assert text.startswith("merged = ")

    @pytest.mark.parametrize("rule", RULES)
    def test_it_speaks_of_a_base_where_the_rule_takes_one(self, rule: str) -> None:
        assert ("base" in EQUATIONS[rule]) is RULES[rule].needs_base

    def test_the_form_follows_the_weights(self) -> None:
        two, many = (
            equation(FusionOptions(rule="recurrent-kif", weights=weights).recorded())
            for weights in (None, (1.0, 2.0, 3.0))
        )
        assert "shared_weights[0]" in two
        assert "shared_weights" not in many
        assert "weights[i] / (sum of weights[j]" in many


class TestFrontMatter:
    def test_of_a_merge(self) -> None:
        text = model_card(
            base_models=[
                f"org/base@{SHA}",
                f"hf://org/tuned@{SHA}/sub",
                f"hf://org/tuned@{SHA}/other",
                "/home/me/tuned",
                "org/named",
            ],
            library_name="transformers",
            made_by=MADE_BY,
            figures=FIGURES,
        )
        assert front_of(text) == {
            "base_model": ["org/base", "org/tuned", "org/named"],
            "base_model_relation": "merge",
            "library_name": "transformers",
            "tags": ["merge", "kifmerge"],
        }
        assert ModelCard(text).data.base_model == ["org/base", "org/tuned", "org/named"]
        assert "\n# Merged by ties\n" in text

    def test_paths_are_no_base_models(self, tmp_path: Path) -> None:
        text = model_card(
            base_models=[str(tmp_path), "./org/name"],
            library_name="transformers",
            made_by=MADE_BY,
            figures=FIGURES,
        )
        assert front_of(text).keys() == {"library_name", "tags"}

    def test_a_merged_adapter_is_an_adapter_of_its_base(self) -> None:
        text = model_card(
            base_models=["org/base"], library_name="peft", made_by=MADE_BY, figures=FIGURES
        )
        assert front_of(text)["base_model_relation"] == "adapter"

    def test_what_is_empty_is_left_out(self) -> None:
        text = card({"base_model": [], "license": None, "tags": ["a"]}, "Title", ["", "Text"])
        assert text == f"---\ntags:\n- a\n---\n{MARK}\n\n# Title\n\nText\n"

    def test_letters_of_any_alphabet(self) -> None:
        assert "license_name: żółw" in card({"license_name": "żółw"}, "Title", [])


def test_a_card_is_ours_until_its_line_is_removed() -> None:
    text = card({"license": "mit"}, "Title", ["Text"])
    assert is_ours(text)
    assert is_ours(text.replace("Text", "Text of mine"))
    assert not is_ours(text.replace(f"{MARK}\n", ""))
    assert not is_ours("# Title\n\nText\n")


def test_a_template_that_nobody_filled_in_is_nobodys(tmp_path: Path) -> None:
    tiny.lora_llama().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert is_ours(text)
    assert not is_ours(text.replace("for Model ID", "for My Adapter"))
    assert not is_ours(text.replace("[More Information Needed]", "me", 1))


class TestSections:
    def test_a_merge(self) -> None:
        text = merge_section(MADE_BY, FIGURES)
        models, importance = text.split("Importance comes from")
        assert f"| base | `org/base` | `{SHA}` |  |" in models
        assert f"| model 1 | `hf://org/tuned/sub/folder` | `{SHA}` | `{'e' * 12}` |" in models
        assert f"| model 2 | `runs/merged` |  | `{'f' * 12}` |" in models
        assert f"| model 1 importance | `org/importance` | `{SHA}` |  |" in importance
        assert "importance" not in models
        assert equation(MADE_BY["options"]) in text
        assert "density: 0.2" in text
        assert "num_parameters: 3504" in text

    def test_a_merge_without_importance(self) -> None:
        parents = {"base": MADE_BY["parents"]["base"]}
        assert "Importance comes from" not in merge_section({**MADE_BY, "parents": parents}, {})

    def test_another_command(self) -> None:
        made_by = {"command": "prune", "options": {"scope": "global"}, "parents": {}}
        text = command_section(made_by, "mask.json")
        assert "`kifmerge prune`" in text
        assert "scope: global" in text
        assert "`mask.json` holds" in text
        assert "| role |" not in text
        assert "| base |" in command_section({**made_by, "parents": MADE_BY["parents"]}, "x")
        assert title_of(made_by) == "Made by kifmerge prune"

    def test_facts(self) -> None:
        text = facts_section({"task": "qa", "none": None, "names": list("abc") * 10, "few": [1]})
        assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == {
            "task": "qa", "names": "30 in all", "few": [1],
        }  # fmt: skip
        assert facts_section({"none": None}) == ""

    def test_scores(self) -> None:
        matrix = [[0.5, 0.0], [0.9, 0.1], [0.7, 0.8]]
        report = Report("two tasks", ["a", "b"], {"score": {"kif": {0: matrix}}}, {"kif": 12})
        text = score_section(report)
        assert text.startswith("## Scores of two tasks\n\n### Metrics in %\n\n| method | seeds |")
        assert "| kif | 1 | 75.0 | -20.0 |" in text
        assert "| kif | 70.0 | 80.0 |" in text

    def test_the_same_again(self) -> None:
        text = rebuild_section("org/made@v2", MADE_BY)
        assert "kifmerge pull org/made@v2 --out published\nkifmerge merge published/" in text
        assert text.endswith("where it was made: `runs/merged`.")
        parents = {"base": MADE_BY["parents"]["base"]}
        assert "where it was made" not in rebuild_section("org/a", {**MADE_BY, "parents": parents})


@pytest.mark.parametrize(
    ("text", "repo_id"),
    [
        (f"org/name@{SHA}", "org/name"),
        ("hf://org/name", "org/name"),
        (f"hf://datasets/org/rows@{SHA}", "org/rows"),
        ("org/name", None),  # a path as well
        ("org/name@main", None),
        ("/home/org/name", None),
        ("hf://nothing", None),
    ],
)
def test_what_is_recorded_of_the_hub(text: str, repo_id: str | None) -> None:
    found = hub_reference({"reference": text})
    assert (found and found.repo_id) == repo_id
    assert f"`{text}`" in parent_table({"a": {"reference": text}}) or found is not None
