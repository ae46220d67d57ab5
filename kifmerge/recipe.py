"""Recipes: YAML to frozen options, all mistakes at once, the nearest key named."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import yaml

from kifmerge.errors import RecipeError, check_at_least, problem_list
from kifmerge.models.model import ModelOptions
from kifmerge.phases.stage import SequenceOptions
from kifmerge.phases.tasks import TaskOptions
from kifmerge.training.methods import MethodName
from kifmerge.training.presets import PRESETS, KifOptions, RecurrentOptions
from kifmerge.training.train import TrainingOptions

DEFAULT_PRESET = "kifmerge"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """The replay memory: the fraction of each task's training rows that is kept."""

    fraction: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """Evaluation: rows at once."""

    batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse empty batches."""
        check_at_least(self, batch_size=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole experiment: one model, a sequence of tasks, the methods and seeds to compare.

    Attributes:
        name: of the experiment, for its report.
        model: what is trained.
        tasks: in the order of learning; in YAML ``orders`` may name several, and ``order`` choose.
        methods: each run under every seed.
        seeds: of initialisation, row order and memory.
        training: optimization of each task.
        recurrent: the recurrent loop; in YAML a ``preset`` may be named, and options override it.
        kif: KIF, its adaptive variant, and KIF-M.
        memory: what is kept of finished tasks.
        evaluation: how predictions are made.
        data_dir: folder that local sources are relative to; the recipe's own if left out.
    """

    name: str
    model: ModelOptions
    tasks: list[TaskOptions]
    methods: list[MethodName] = field(default_factory=lambda: ["sequential", "recurrent-kif"])
    seeds: list[int] = field(default_factory=lambda: [0])
    training: TrainingOptions = field(default_factory=TrainingOptions)
    recurrent: RecurrentOptions = PRESETS[DEFAULT_PRESET]
    kif: KifOptions = field(default_factory=KifOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    data_dir: str | None = None

    def sequence(self) -> SequenceOptions:
        """What each method and seed of the recipe is run with."""
        return SequenceOptions(
            model=self.model,
            tasks=self.tasks,
            training=self.training,
            recurrent=self.recurrent,
            kif=self.kif,
            memory_fraction=self.memory.fraction,
            evaluation_batch_size=self.evaluation.batch_size,
        )

    def as_dict(self) -> dict[str, Any]:
        """Every option with its value, as plain YAML types."""
        plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_plain(dataclasses.asdict(self))))
        return plain


def load_recipe(path: Path | str, settings: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        settings: ``key.key=value`` each, replacing or adding a value; list entries by number.

    Raises:
        RecipeError: with all mistakes found, and the nearest key for each unknown one.
    """
    return parse_recipe(with_settings(read_content(Path(path)), settings), str(path))


def read_content(path: Path) -> dict[str, Any]:
    """The mapping that a recipe file holds, its ``data_dir`` relative to the file.

    Raises:
        RecipeError: the file cannot be read, or holds no YAML mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"cannot read the recipe {path}: not UTF-8 ({error})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a mapping of options")
    return {**content, "data_dir": str(path.parent / str(content.get("data_dir") or ""))}


def with_settings(content: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A recipe's content with ``key.key=value`` settings applied, the content itself unchanged."""
    changed = copy.deepcopy(dict(content))
    for setting in settings:
        _apply(changed, setting)
    return changed


def phase_recipe(
    path: Path | None,
    settings: Sequence[str],
    *,
    model: Mapping[str, Any],
    task: Mapping[str, Any],
    kept: Mapping[str, Any],
) -> Recipe:
    """The recipe of one phase: one model, one task's rows, and options from all that knows them.

    Args:
        path: recipe file whose sections are taken, its model's reference and its tasks excepted.
        settings: ``key.key=value`` each; they have the last word.
        model: ``model`` section that the checkpoint itself knows, with its reference.
        task: the one task.
        kept: sections that an earlier phase was run with: the first to be overruled.

    Raises:
        RecipeError: as :func:`load_recipe`.
    """
    content: dict[str, Any] = {"name": "phase"} if path is None else read_content(path)
    for key in ("tasks", "orders", "order", "methods", "seeds", "data_dir"):
        content.pop(key, None)
    own = dict(content.get("model") or {})
    for key in ("reference", "config", "tokenizer"):
        own.pop(key, None)
    if model.get("lora") is not None:
        own.pop("lora", None)
    sections = {**kept, **content, "model": {**model, **own}, "tasks": [task]}
    return parse_recipe(with_settings(sections, settings), str(path or "of this phase"))


def parse_recipe(content: Mapping[str, Any], origin: str) -> Recipe:
    """Check a recipe's content; see :func:`load_recipe`."""
    content = dict(content)
    more_keys = {"": {"orders", "order"}, "recurrent": {"preset"}}
    problems = list(_unknown_keys(content, Recipe, extra=more_keys))
    orders, order = content.pop("orders", None), content.pop("order", None)
    orders = {} if orders is None else orders
    problems += _order_problems(orders, order, content.get("tasks"))
    try:
        content["recurrent"] = _with_preset(content.get("recurrent"))
    except ValueError as error:
        problems.append(str(error))
        content.pop("recurrent")
    recipe: Recipe | None = None
    try:
        recipe = pydantic.TypeAdapter(Recipe).validate_python(content)
    except pydantic.ValidationError as error:
        problems += [_readable(detail) for detail in error.errors()]
    if recipe is not None:
        problems += _contradictions(recipe)
    if problems or recipe is None:
        raise RecipeError(problem_list(f"the recipe {origin} cannot be used", problems))
    return dataclasses.replace(
        recipe,
        tasks=[_located(task, recipe) for task in _in_order(recipe.tasks, orders, order)],
        model=_located_model(recipe.model),
    )


def _with_preset(section: Any) -> dict[str, Any]:
    if section is not None and not isinstance(section, Mapping):
        raise ValueError(f"recurrent: expected options, found {section!r}")
    section = dict(section or {})
    name = section.pop("preset", DEFAULT_PRESET)
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"recurrent.preset: {name!r} is none of {', '.join(PRESETS)}")
    return {**dataclasses.asdict(PRESETS[name]), **section}


def _order_problems(orders: Any, order: Any, tasks: Any) -> Iterator[str]:
    """What is wrong with the named orders, each of which takes every task once, and the choice."""
    if not isinstance(orders, Mapping):
        yield f"orders: expected a name for each list of tasks, found {orders!r}"
        return
    names = [str(name) for name in orders]  # a number is as good a name, quoted or not
    for name in _repeated(names):
        yield f"orders: two are named {name!r}"
    if order is not None and str(order) not in names:
        hint = _hint(order, names) if names else ": the recipe has no orders"
        yield f"order: {str(order)!r} is unknown{hint}"
    for name, listed in orders.items():
        if not isinstance(listed, list) or not all(isinstance(task, str) for task in listed):
            yield f"orders.{name}: expected a list of tasks' names, found {listed!r}"
            continue
        yield from (f"orders.{name}: {problem}" for problem in _list_problems(listed, tasks))


def _list_problems(listed: list[str], tasks: Any) -> Iterator[str]:
    for task in _repeated(listed):
        yield f"{task!r} is named twice"
    try:
        known = [str(task["name"]) for task in tasks]
    except (TypeError, KeyError):
        return  # what is wrong with the tasks is told of them
    for task in dict.fromkeys(listed):
        if known and task not in known:
            yield f"{task!r} is no task{_hint(task, known)}"
    missing = [repr(task) for task in known if task not in listed]
    if missing:
        yield f"leaves out {', '.join(missing)}"


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _in_order(tasks: list[TaskOptions], orders: Mapping[Any, Any], order: Any) -> list[TaskOptions]:
    """The tasks in the chosen order; as they are listed if none is chosen."""
    if order is None:
        return tasks
    by_name = {task.name: task for task in tasks}
    lists = {str(name): listed for name, listed in orders.items()}
    return [by_name[name] for name in lists[str(order)]]


def _located(task: TaskOptions, recipe: Recipe) -> TaskOptions:
    def locate(source: str) -> str:
        is_local = not source.startswith("hf://")
        return str(Path(recipe.data_dir or "", source).absolute()) if is_local else source

    return dataclasses.replace(task, train=locate(task.train), test=locate(task.test))


def _located_model(model: ModelOptions) -> ModelOptions:
    """Make paths absolute; whatever is no folder is a Hub name."""

    def locate(reference: Any) -> Any:
        is_folder = isinstance(reference, str) and Path(reference).is_dir()
        return str(Path(reference).absolute()) if is_folder else reference

    return dataclasses.replace(
        model, reference=locate(model.reference), tokenizer=locate(model.tokenizer)
    )


def _contradictions(recipe: Recipe) -> Iterator[str]:
    names = [task.name for task in recipe.tasks]
    if not names:
        yield "tasks: expected at least one"
    for name in _repeated(names):
        yield f"tasks: two are named {name!r}"
    for name in names:
        if not name or name.startswith(".") or "/" in name:
            yield f"tasks: {name!r} cannot name a folder"
    if (recipe.model.reference is None) == (recipe.model.config is None):
        yield "model: expected either reference (a base to load) or config (one from scratch)"
    if recipe.model.lora is None:
        yield from _without_lora(recipe.kif)
    if not 0.0 <= recipe.memory.fraction <= 1.0:
        yield f"memory.fraction: expected 0 to 1, found {recipe.memory.fraction}"
    for option in ("methods", "seeds"):
        values = getattr(recipe, option)
        if not values or len(set(values)) < len(values):
            yield f"{option}: expected at least one, each once"


def _without_lora(kif: KifOptions) -> Iterator[str]:
    if kif.unit == "lora-rank":
        yield "kif.unit: lora-rank needs an adapter: expected model.lora, or unit tensor or layer"
    elif kif.orthogonality_weight:
        yield "kif.orthogonality: expected model.lora, whose ranks it keeps orthogonal, or 0"


def _unknown_keys(
    section: Any, kind: Any, *, extra: Mapping[str, set[str]], place: str = ""
) -> Iterator[str]:
    """Walk a section beside the dataclass it becomes; yield what has no field to go to."""
    options_class = _dataclass_in(kind)
    if isinstance(section, list):
        for number, entry in enumerate(section):
            yield from _unknown_keys(entry, kind, extra=extra, place=f"{place}[{number}]")
    if options_class is None or not isinstance(section, Mapping):
        return
    hints = typing.get_type_hints(options_class)
    known = set(hints) | extra.get(place, set())
    for key, value in section.items():
        full = f"{place}.{key}" if place else str(key)
        if key in known:
            yield from _unknown_keys(value, hints.get(key), extra=extra, place=full)
        else:
            yield f"{full}: unknown key{_hint(key, known)}"


def _hint(name: Any, known: Collection[str]) -> str:
    """The nearest known name, or all of them."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else f": known are {', '.join(sorted(known))}"


def _dataclass_in(kind: Any) -> Any:
    """The dataclass a type stands for: itself, in a list, or one side of a union."""
    if dataclasses.is_dataclass(kind):
        return kind
    if typing.get_origin(kind) in (list, typing.Union, types.UnionType):
        found = (_dataclass_in(argument) for argument in typing.get_args(kind))
        return next((inner for inner in found if inner is not None), None)
    return None


def _readable(detail: Any) -> str:
    parts = [p for p in detail["loc"] if not (isinstance(p, str) and p[:1].isupper())]
    place = ".".join(str(part) for part in parts)
    if detail["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{place}: missing"
    message = detail["msg"].removeprefix("Value error, ")
    found = detail.get("input")
    shown = f", found {found!r}" if isinstance(found, (str, int, float, type(None))) else ""
    return f"{place}: {message[0].lower()}{message[1:]}{shown}"


def _apply(content: dict[str, Any], setting: str) -> None:
    """Put ``key.key=value`` into the content; new keys are checked like all others, later."""
    path, separator, text = setting.partition("=")
    if not separator:
        raise RecipeError(f"--set {setting}: expected key=value")
    *parents, last = path.split(".")
    place: Any = content
    try:
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[int(last) if isinstance(place, list) else last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {setting}: the value is not valid YAML") from error
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise RecipeError(f"--set {setting}: there is no such place in the recipe") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice in one mapping, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float)):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} cannot be a key", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
