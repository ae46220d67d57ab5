"""Recipes: what is refused, and how all mistakes are told at once; what is resolved to what."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import synthetic
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kifmerge.errors import RecipeError, RunError
from kifmerge.models.tokenizer import TokenizerOptions
from kifmerge.recipe import load_recipe, parse_recipe
from kifmerge.training.presets import PRESETS, KifOptions
from kifmerge.training.train import TrainingOptions

MINIMAL = {
    "name": "one",
    "model": {"kind": "causal-lm", "reference": "org/name"},
    "tasks": [{"name": "first", "train": "train.jsonl", "test": "test.jsonl"}],
}


@pytest.fixture
def load(tmp_path):
    """Write a recipe with the given changes and load it."""

    def write_and_load(changes=None, settings=(), **more):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **(changes or {}), **more}))
        return load_recipe(path, settings)

    return write_and_load


@pytest.fixture
def problems(load):
    """The problems that a recipe with the given changes is refused for, one per entry."""

    def refuse(changes=None, settings=(), **more):
        with pytest.raises(RecipeError) as caught:
            load(changes, settings, **more)
        heading, *lines = str(caught.value).splitlines()
        assert heading.endswith("recipe.yaml cannot be used:")
        return [line.removeprefix("  - ") for line in lines]

    return refuse


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


class TestMistakes:
    def test_all_at_once_with_the_nearest_key(self, problems):
        found = problems(
            trainig={"epochs": 1},
            training={"epoch": 2, "batch_size": "many"},
            model={"kind": "causal-ml", "reference": "org/name", "lora": {"target": "q"}},
            recurrent={"preset": "papre"},
            kif={"units": "layer"},
            tasks=[{"name": "a", "train": "a.jsonl", "tset": "b.jsonl"}],
        )
        text = "\n".join(found)
        for expected in (
            "trainig: unknown key: did you mean training?",
            "training.epoch: unknown key: did you mean epochs?",
            "training.batch_size: ",
            "model.kind: ",
            "model.lora.target: unknown key: did you mean targets?",
            "model.lora.targets: missing",
            "recurrent.preset: 'papre' is none of kifmerge, released, paper",
            "kif.units: unknown key: did you mean unit?",
            "tasks[0].tset: unknown key: did you mean test?",
            "tasks.0.test: missing",
        ):
            assert expected in text, expected
        assert len(found) == 10

    def test_key_without_a_near_one_lists_the_known(self, problems):
        (found,) = problems(memory={"zzz": 1})
        assert found == "memory.zzz: unknown key: known are fraction"

    def test_preset_is_known_in_its_own_section_only(self, problems):
        (found,) = problems(preset="paper")
        assert found.startswith("preset: unknown key")

    def test_free_form_sections_take_any_key(self, load):
        model = {"kind": "causal-lm", "config": {"model_type": "llama", "odd_option": 3}}
        assert load(model=model).model.config["odd_option"] == 3
        tasks = [{**MINIMAL["tasks"][0], "columns": {"text": "{title}", "label": "{label}"}}]
        assert load(tasks=tasks).tasks[0].columns["text"] == "{title}"

    @pytest.mark.parametrize(
        ("changes", "place"),
        [
            ({"training": {"epochs": "three"}}, "training.epochs"),
            ({"training": {"batch_size": 2.5}}, "training.batch_size"),
            ({"training": 3}, "training"),
            ({"tasks": {"name": "a"}}, "tasks"),
            ({"tasks": ["a"]}, "tasks.0"),
            ({"seeds": ["zero"]}, "seeds.0"),
            ({"methods": ["sequental"]}, "methods.0"),
            ({"model": None}, "model"),
            ({"name": None}, "name"),
            ({"recurrent": "paper"}, "recurrent"),
            ({"recurrent": ["preset", "paper"]}, "recurrent"),
            ({"recurrent": {"preset": ["paper"]}}, "recurrent.preset"),
            ({"recurrent": {"rule": "ties"}}, "recurrent.rule"),
            ({"kif": "lora-rank"}, "kif"),
            ({"kif": {"unit": "head"}}, "kif.unit"),
            ({"kif": {"orthogonality": "much"}}, "kif.orthogonality"),
            ({"recurrent": {"shared_weights": [1.0]}}, "recurrent.shared_weights"),
        ],
    )
    def test_wrong_types_name_their_place(self, problems, changes, place):
        found = problems(changes)
        assert any(line.startswith(f"{place}") for line in found), found

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"memory": {"fraction": 1.5}}, "memory.fraction: expected 0 to 1, found 1.5"),
            ({"memory": {"fraction": -0.1}}, "memory.fraction: expected 0 to 1, found -0.1"),
            ({"recurrent": {"inner_steps": 0}}, "inner_steps must be at least 1, found 0"),
            ({"recurrent": {"important_fraction": 2}}, "important_fraction must lie in"),
            ({"recurrent": {"temperature": 0}}, "temperature must be positive"),
            ({"recurrent": {"new_betas": [1.5, 0.5]}}, "beta"),
            ({"kif": {"betas": [1.5, 0.5]}}, "beta"),
            ({"kif": {"shared_weights": [1, 1]}}, "shared_weights of kif must add up to 1"),
            ({"kif": {"memory_steps": 0}}, "memory_steps must be at least 1, found 0"),
            ({"seeds": []}, "seeds: expected at least one"),
            ({"seeds": [1, 1]}, "seeds: expected at least one, each once"),
            ({"methods": ["sequential", "sequential"]}, "methods: expected at least one, each"),
            ({"tasks": []}, "tasks: expected at least one"),
            ({"tasks": MINIMAL["tasks"] * 2}, "tasks: two are named 'first'"),
            ({"model": {"kind": "causal-lm"}}, "model: expected either reference"),
            (
                {"model": {"kind": "causal-lm", "reference": "a/b", "config": {}}},
                "model: expected either reference",
            ),
        ],
    )
    def test_out_of_range(self, problems, changes, words):
        found = problems(changes)
        assert len(found) == 1
        assert words in found[0]

    @pytest.mark.parametrize(
        ("section", "option", "value"),
        [
            ("training", "epochs", -1),
            ("training", "batch_size", 0),
            ("training", "accumulation", 0),
            ("training", "learning_rate", -1.0),
            ("training", "max_steps", 0),
            ("training", "schedule", "linaer"),
            ("training", "optimizer", "adamw_trch"),
            ("evaluation", "batch_size", 0),
        ],
    )
    def test_training_that_cannot_be_is_refused_before_it_begins(
        self, problems, section, option, value
    ):
        assert option in " ".join(problems({section: {option: value}}))

    @pytest.mark.parametrize("option", ["max_tokens", "max_output_tokens"])
    def test_model_sizes_are_positive(self, problems, option):
        assert option in " ".join(problems(model={**MINIMAL["model"], option: 0}))

    @pytest.mark.parametrize("name", ["", ".hidden", "a/b", ".."])
    def test_task_names_are_folder_names(self, problems, name):
        (found,) = problems(tasks=[{**MINIMAL["tasks"][0], "name": name}])
        assert found == f"tasks: {name!r} cannot name a folder"

    def test_missing_sections_are_named_together(self, tmp_path):
        with pytest.raises(RecipeError) as caught:
            load_recipe(written(tmp_path, "seeds: [0]\n"))
        for section in ("name", "model", "tasks"):
            assert f"  - {section}: missing" in str(caught.value)


class TestFile:
    def test_missing(self, tmp_path):
        with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yaml: No such file"):
            load_recipe(tmp_path / "none.yaml")

    def test_folder(self, tmp_path):
        with pytest.raises(RecipeError, match="cannot read the recipe"):
            load_recipe(tmp_path)

    @pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
    def test_no_mapping(self, tmp_path, text):
        with pytest.raises(RecipeError, match="expected a mapping of options"):
            load_recipe(written(tmp_path, text))

    @pytest.mark.parametrize(
        "text",
        ["name: [unclosed\n", "name: {{project}}\n", "? [a, b]\n: c\n", "name: !!python/x y\n"],
    )
    def test_no_yaml(self, tmp_path, text):
        with pytest.raises(RecipeError, match=r"recipe\.yaml is not valid YAML"):
            load_recipe(written(tmp_path, text))

    def test_not_utf8(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(b"name: caf\xe9\n")
        with pytest.raises(RecipeError, match=r"recipe\.yaml"):
            load_recipe(path)

    @pytest.mark.parametrize(
        "text",
        [
            "name: a\nname: b\n",
            "name: a\ntraining:\n  epochs: 1\n  epochs: 2\n",
            "name: a\ntasks:\n  - {name: x, train: y, name: z}\n",
        ],
    )
    def test_key_given_twice(self, tmp_path, text):
        with pytest.raises(RecipeError, match=r"(name|epochs)' is given twice"):
            load_recipe(written(tmp_path, text))

    def test_anchors_and_merges_work(self, tmp_path):
        text = yaml.safe_dump({**MINIMAL, "tasks": []}).replace("tasks: []\n", "") + (
            "tasks:\n  - &a {name: x, train: t.jsonl, test: s.jsonl}\n  - {<<: *a, name: y}\n"
        )
        recipe = load_recipe(written(tmp_path, text))
        assert [task.name for task in recipe.tasks] == ["x", "y"]
        assert recipe.tasks[0].train == recipe.tasks[1].train


class TestSettings:
    def test_replace_and_add(self, load):
        recipe = load(
            training={"epochs": 1},
            settings=[
                "training.epochs=2",
                "training.batch_size=16",
                "memory.fraction=0.1",
                "name=other=name",
            ],
        )
        assert (recipe.training.epochs, recipe.training.batch_size) == (2, 16)
        assert recipe.memory.fraction == 0.1
        assert recipe.name == "other=name"

    def test_lists_whole_and_by_number(self, load):
        recipe = load(
            settings=["seeds=[3, 4]", "methods=[multitask]", "tasks.0.train_rows=5"],
        )
        assert (recipe.seeds, recipe.methods) == ([3, 4], ["multitask"])
        assert recipe.tasks[0].train_rows == 5

    def test_later_ones_win(self, load):
        assert load(settings=["seeds=[1]", "seeds.0=2"]).seeds == [2]

    def test_null_removes(self, load):
        tasks = [{**MINIMAL["tasks"][0], "train_rows": 5}]
        assert load(tasks=tasks, settings=["tasks.0.train_rows=null"]).tasks[0].train_rows is None

    def test_preset_then_option(self, load):
        recipe = load(settings=["recurrent.preset=paper", "recurrent.inner_steps=3"])
        assert recipe.recurrent == dataclasses.replace(PRESETS["paper"], inner_steps=3)

    def test_unknown_keys_are_found_like_all_others(self, problems):
        found = problems(settings=["training.epocs=2", "mmory.fraction=0.1"])
        assert sorted(found) == [
            "mmory: unknown key: did you mean memory?",
            "training.epocs: unknown key: did you mean epochs?",
        ]

    @pytest.mark.parametrize(
        "setting", ["training", "tasks.7.name=x", "tasks.first.name=x", "name.first=x"]
    )
    def test_no_such_place(self, load, setting):
        with pytest.raises(RecipeError, match=f"--set {setting}: "):
            load(settings=[setting])

    @pytest.mark.parametrize("setting", ["seeds=[0", "name={a", 'name="x'])
    def test_value_that_is_no_yaml(self, load, setting):
        with pytest.raises(RecipeError, match=r"--set (seeds|name)="):
            load(settings=[setting])


LORA_MODEL = {**MINIMAL["model"], "lora": {"targets": ["q_proj"]}}


class TestKif:
    def test_default(self, load):
        assert load().kif == KifOptions()
        assert load(kif={}, methods=["kif", "kif-adaptive", "kif-m"]).kif == KifOptions()

    def test_options(self, load):
        section = {"unit": "lora-rank", "shared_weights": [0.1, 0.9], "memory_steps": 9}
        kif = load(model=LORA_MODEL, kif=section, settings=["kif.sensitivity=first"]).kif
        assert kif == KifOptions(
            unit="lora-rank", shared_weights=(0.1, 0.9), memory_steps=9, sensitivity="first"
        )
        assert load(model=LORA_MODEL, kif=section).sequence().kif.unit == "lora-rank"

    @pytest.mark.parametrize(
        ("section", "found"),
        [
            ({"unit": "lora-rank"}, "kif.unit: lora-rank needs an adapter: expected model.lora"),
            ({"orthogonality": 0.2}, "kif.orthogonality: expected model.lora"),
        ],
    )
    def test_ranks_need_an_adapter(self, load, problems, section, found):
        (line,) = problems(kif=section)
        assert line.startswith(found)
        assert load(kif=section, model=LORA_MODEL).kif.orthogonality_weight > 0
        assert load(kif={"unit": "layer", "orthogonality": 0}).kif.unit == "layer"


class TestPresets:
    @pytest.mark.parametrize("name", sorted(PRESETS))
    def test_named(self, load, name):
        assert load(recurrent={"preset": name}).recurrent == PRESETS[name]

    def test_default(self, load):
        assert load().recurrent == PRESETS["kifmerge"]
        assert load(recurrent={}).recurrent == PRESETS["kifmerge"]

    def test_options_override(self, load):
        recurrent = load(
            recurrent={"preset": "released", "outer_steps": 7, "shared_weights": [0.5, 0.5]}
        ).recurrent
        assert recurrent == dataclasses.replace(
            PRESETS["released"], outer_steps=7, shared_weights=(0.5, 0.5)
        )

    def test_nothing_else_is_changed(self, load):
        recipe = load()
        assert recipe.training == TrainingOptions()
        assert (recipe.methods, recipe.seeds) == (["sequential", "recurrent-kif"], [0])
        assert recipe.memory.fraction == 0.02


def tasks_named(*names):
    return [{"name": n, "train": f"{n}.jsonl", "test": f"{n}-test.jsonl"} for n in names]


def names(recipe):
    return [task.name for task in recipe.tasks]


ABC = {"tasks": tasks_named("a", "b", "c")}
ORDERS = {"1": ["c", "a", "b"], "reverse": ["c", "b", "a"]}


class TestOrders:
    def test_one_is_chosen(self, load, tmp_path):
        recipe = load(ABC, orders=ORDERS, order="1")
        assert names(recipe) == ["c", "a", "b"]
        # Each task with its own sources.
        assert [Path(task.test).name for task in recipe.tasks] == [
            "c-test.jsonl",
            "a-test.jsonl",
            "b-test.jsonl",
        ]

    def test_command_chooses_another(self, load):
        recipe = load(ABC, orders=ORDERS, order="1", settings=["order=reverse"])
        assert names(recipe) == ["c", "b", "a"]

    @pytest.mark.parametrize("key", [1, "1"])
    @pytest.mark.parametrize("chosen", [1, "1"])
    def test_numbers_are_names_quoted_or_not(self, load, key, chosen):
        recipe = load(ABC, orders={key: ["b", "c", "a"]}, order=chosen)
        assert names(recipe) == ["b", "c", "a"]

    def test_command_may_give_one(self, load):
        settings = ["orders.mine=[b, a, c]", "order=mine"]
        recipe = load(ABC, orders=ORDERS, order="1", settings=settings)
        assert names(recipe) == ["b", "a", "c"]

    @pytest.mark.parametrize("order", [{}, {"order": None}])
    def test_none_chosen_leaves_the_tasks_as_listed(self, load, order):
        assert names(load(ABC, orders=ORDERS, **order)) == ["a", "b", "c"]
        assert names(load(ABC, orders=None, **order)) == ["a", "b", "c"]

    def test_what_is_resolved_keeps_tasks_in_order_and_round_trips(self, load):
        recipe = load(ABC, orders=ORDERS, order="1")
        kept = recipe.as_dict()
        assert [task["name"] for task in kept["tasks"]] == ["c", "a", "b"]
        assert "order" not in kept
        assert "orders" not in kept
        again = parse_recipe(yaml.safe_load(yaml.safe_dump(kept)), "again")
        assert again.as_dict() == kept

    @given(st.permutations(["a", "b", "c", "d", "e"]))
    def test_any_permutation(self, order):
        content = {**MINIMAL, "tasks": tasks_named(*"abcde"), "orders": {"x": order}, "order": "x"}
        assert names(parse_recipe(content, "given")) == order

    def test_all_mistakes_at_once_with_all_others(self, problems):
        found = problems(
            ABC,
            orders={
                "1": ["a", "b", "c"],
                "2": ["a", "b", "a"],
                "3": ["a", "b", "c", "task-c"],
                "first": "a b c",
                "second": ["a", {"name": "b"}, "c"],
            },
            order="frist",
            ordr="1",
            seeds=["zero"],
        )
        assert found[:7] == [
            "ordr: unknown key: did you mean order?",
            "order: 'frist' is unknown: did you mean first?",
            "orders.2: 'a' is named twice",
            "orders.2: leaves out 'c'",
            "orders.3: 'task-c' is no task: known are a, b, c",
            "orders.first: expected a list of tasks' names, found 'a b c'",
            "orders.second: expected a list of tasks' names, found ['a', {'name': 'b'}, 'c']",
        ]
        assert len(found) == 8
        assert found[7].startswith("seeds.0: ")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"orders": {"1": ["a", "b"]}}, "orders.1: leaves out 'c'"),
            ({"orders": {"1": []}}, "orders.1: leaves out 'a', 'b', 'c'"),
            ({"orders": {"1": None}}, "orders.1: expected a list of tasks' names, found None"),
            ({"orders": {"1": ["a", "b", 3]}}, "orders.1: expected a list of tasks' names"),
            ({"orders": [["a", "b", "c"]]}, "orders: expected a name for each list of tasks"),
            ({"orders": []}, "orders: expected a name for each list of tasks, found []"),
            ({"orders": {1: [*"abc"], "1": [*"cba"]}}, "orders: two are named '1'"),
            ({"orders": {"1": [*"abc"]}, "order": 7}, "order: '7' is unknown: known are 1"),
            ({"orders": {"1": [*"abc"]}, "order": ["1"]}, "order: \"['1']\" is unknown"),
            ({"order": 1}, "order: '1' is unknown: the recipe has no orders"),
            ({"order": 1, "orders": {}}, "order: '1' is unknown: the recipe has no orders"),
        ],
    )
    def test_mistakes(self, problems, changes, words):
        (found,) = problems({**ABC, **changes})
        assert words in found

    def test_misspelt_task_has_a_nearest_one(self, problems):
        tasks = tasks_named("dbpedia", "amazon")
        found = problems(tasks=tasks, orders={"1": ["dbpedia", "amzon"]}, order="1")
        assert found == [
            "orders.1: 'amzon' is no task: did you mean amazon?",
            "orders.1: leaves out 'amazon'",
        ]

    @pytest.mark.parametrize(
        ("tasks", "place"),
        [
            ([], "tasks: expected at least one"),
            (None, "tasks: "),
            ({"name": "a"}, "tasks: "),
            (["a"], "tasks.0: "),
            ([{"train": "t", "test": "s"}], "tasks.0.name: missing"),
            (tasks_named("a", "a"), "tasks: two are named 'a'"),
        ],
    )
    def test_mistakes_in_the_tasks_are_told_of_them_alone(self, problems, tasks, place):
        found = problems(tasks=tasks, orders={"1": ["a"]}, order="1")
        assert len(found) == 1
        assert found[0].startswith(place)

    @pytest.mark.slow
    def test_run_follows_the_order_and_goes_on_in_it_alone(self, tmp_path):
        more = {"orders": {"1": ["colours", "sizes"], "2": ["sizes", "colours"]}}
        path = synthetic.write_recipe(tmp_path, methods=["sequential"], order=1, **more)
        out = tmp_path / "run"
        report = synthetic.run(path, out, ["order=2"])
        assert report.task_names == ["sizes", "colours"]
        assert (out / "start/seed-0/01-sizes").is_dir()
        assert (out / "sequential/seed-0/02-colours").is_dir()
        kept = yaml.safe_load((out / "recipe.yaml").read_text())
        assert [task["name"] for task in kept["tasks"]] == ["sizes", "colours"]

        before = synthetic.files(out / "sequential")
        with pytest.raises(RunError, match="tasks: finished ones may only be followed by further"):
            synthetic.run(path, out, resume=True)
        assert synthetic.run(path, out, ["order=2"], resume=True).task_names == ["sizes", "colours"]
        assert synthetic.files(out / "sequential") == before

        extended = {"3": ["sizes", "colours", "sounds"], "4": ["sounds", "sizes", "colours"]}
        tasks = ("colours", "sizes", "sounds")
        path = synthetic.write_recipe(tmp_path, tasks, methods=["sequential"], orders=extended)
        with pytest.raises(RunError, match="tasks: finished ones may only be followed by further"):
            synthetic.run(path, out, ["order=4"], resume=True)
        report = synthetic.run(path, out, ["order=3"], resume=True)
        assert report.task_names == ["sizes", "colours", "sounds"]
        assert (out / "sequential/seed-0/03-sounds").is_dir()


class TestSources:
    def test_are_relative_to_the_recipe(self, load, tmp_path):
        task = load().tasks[0]
        assert (task.train, task.test) == (
            str(tmp_path / "train.jsonl"),
            str(tmp_path / "test.jsonl"),
        )

    def test_data_dir_of_the_recipe_is_relative_to_it(self, load, tmp_path):
        assert load(data_dir="data").tasks[0].train == str(tmp_path / "data/train.jsonl")

    def test_data_dir_of_the_command_is_relative_to_the_shell(self, load, tmp_path, monkeypatch):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        task = load(data_dir="data", settings=["data_dir=mine"]).tasks[0]
        assert task.train == str(tmp_path / "elsewhere/mine/train.jsonl")

    def test_absolute_and_hub_ones_stay(self, load):
        tasks = [{"name": "a", "train": "hf://datasets/org/name:train", "test": "/data/test.csv"}]
        task = load(tasks=tasks, data_dir="elsewhere").tasks[0]
        assert (task.train, task.test) == ("hf://datasets/org/name:train", "/data/test.csv")

    def test_model_folder_becomes_absolute_and_hub_name_stays(self, load, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "models").mkdir()
        model = {"kind": "causal-lm", "reference": "models", "tokenizer": "org/tokenizer"}
        options = load(model=model).model
        assert (options.reference, options.tokenizer) == (str(tmp_path / "models"), "org/tokenizer")


class TestAsDict:
    def test_round_trip_through_yaml(self, load):
        recipe = load(
            model={
                "kind": "classifier",
                "config": {"model_type": "bert"},
                "tokenizer": {"kind": "bytes", "vocabulary_size": 300},
                "lora": {"targets": ["query"], "rank": 4},
            },
            recurrent={"preset": "paper", "shared_weights": [0.25, 0.75]},
            tasks=[{**MINIMAL["tasks"][0], "labels": ["a", "b"], "columns": {"text": "{t}"}}],
            seeds=[3],
        )
        assert recipe.model.tokenizer == TokenizerOptions(kind="bytes", vocabulary_size=300)
        text = yaml.safe_dump(recipe.as_dict())
        assert parse_recipe(yaml.safe_load(text), "again") == recipe

    @settings(max_examples=25)
    @given(
        st.fixed_dictionaries(
            {},
            optional={
                "epochs": st.integers(1, 9),
                "learning_rate": st.floats(1e-8, 1.0),
                "warmup_steps": st.integers(0, 100),
                "precision": st.sampled_from(["float32", "bf16", "fp16"]),
            },
        ),
        st.lists(st.integers(0, 2**31), min_size=1, max_size=4, unique=True),
        st.sampled_from(sorted(PRESETS)),
    )
    def test_any_options_round_trip(self, training, seeds, preset):
        content = {**MINIMAL, "training": training, "seeds": seeds, "recurrent": {"preset": preset}}
        recipe = parse_recipe(content, "first")
        again = yaml.safe_load(yaml.safe_dump(recipe.as_dict()))
        assert parse_recipe(again, "again").as_dict() == recipe.as_dict()
        assert {k: again["training"][k] for k in training} == training

    def test_every_option_has_its_value(self, load):
        kept = load().as_dict()
        assert kept["recurrent"].keys() == {
            field.name for field in dataclasses.fields(PRESETS["kifmerge"])
        }
        assert kept["training"]["learning_rate"] == TrainingOptions().learning_rate
