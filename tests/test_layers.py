"""The folder listing is the architecture: who may import whom, and how long a module may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kifmerge

PACKAGE = Path(kifmerge.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 400

LAYERS = (
    "errors", "tensor", "hub", "checkpoint", "fusion", "models", "training", "phases", "recipe",
    "trials", "run", "demo", "shell",
)  # fmt: skip
SHELL = ("cli", "display", "__main__")  # parsing and printing
FACADE = "__init__"  # may name anything: it loads when asked

ALLOWED_OUTSIDE = {
    "errors": set(),
    "tensor": {"torch", "numpy"},
    "hub": {"huggingface_hub", "xxhash"},
    "checkpoint": {"torch", "numpy", "safetensors", "huggingface_hub", "filelock", "xxhash"},
}
HEAVY = {"torch", "transformers", "numpy", "pydantic", "safetensors", "yaml", "rich"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def layer_of(module: str) -> str:
    """The layer of ``kifmerge.MODULE``, given without the package's own name."""
    first = module.partition(".")[0]
    return "shell" if first in SHELL else first


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import statement, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            if module == "kifmerge":
                yield from ((node.lineno, f"kifmerge.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def outside(tree: ast.AST) -> set[str]:
    """Third-party packages that a module imports."""
    first = {module.partition(".")[0] for _, module in imported(tree)}
    return first - sys.stdlib_module_names - {"kifmerge"}


@pytest.fixture(params=MODULES, ids=name_of)
def module(request):
    path = request.param
    return name_of(path), ast.parse(path.read_text(encoding="utf-8"))


def test_every_module_has_a_layer():
    found = {layer_of(name_of(path)) for path in MODULES} - {FACADE}
    assert found == set(LAYERS)


def test_imports_point_down(module):
    name, tree = module
    if name == FACADE:
        return
    own = LAYERS.index(layer_of(name))
    for line, target in imported(tree):
        if target.startswith("kifmerge."):
            layer = layer_of(target.removeprefix("kifmerge."))
            assert LAYERS.index(layer) <= own, f"{name}:{line} imports {target} from above"


def test_lower_layers_know_few_libraries(module):
    name, tree = module
    allowed = ALLOWED_OUTSIDE.get(layer_of(name))
    if allowed is not None:
        assert outside(tree) <= allowed


def test_typer_carries_its_own_click(module):
    _, tree = module
    assert "click" not in outside(tree)


def test_command_line_is_light(module):
    name, tree = module
    if name not in ("__main__", "errors", FACADE) and not name.startswith("cli."):
        return
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not outside(ast.Module(top, [])) & HEAVY
    ours = {target for _, target in imported(ast.Module(top, [])) if target.startswith("kifmerge.")}
    assert all(target == "kifmerge.errors" or "kifmerge.cli" in target for target in ours)


def test_private_names_stay_at_home(module):
    name, tree = module
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kifmerge"):
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            assert not private, f"{name}:{node.lineno} imports {private} of {node.module}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_is_one_idea(path):
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MOST_LINES


def test_no_vague_names():
    vague = {"utils", "util", "helpers", "manager", "common", "misc"}
    assert not vague & {part for path in MODULES for part in name_of(path).split(".")}


def test_every_library_is_declared(module):
    project = PACKAGE.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("an installed package carries no pyproject.toml")
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    _, tree = module
    content = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = content["optional-dependencies"]
    lines = [*content["dependencies"], *extras["train"], *extras["plot"]]
    declared = {line.partition(">")[0].replace("-", "_").lower() for line in lines}
    imports = {"pyyaml": "yaml", "rouge_score": "rouge_score"}
    declared = {imports.get(package, package) for package in declared}
    # transformers brings tokenizers, in the one version that it works with.
    assert outside(tree) <= declared | {"tokenizers"}
