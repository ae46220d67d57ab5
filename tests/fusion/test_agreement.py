"""Which adapters have a common basis, for any number of them."""

from __future__ import annotations

import itertools

import folders
import pytest

from kifmerge.errors import CheckpointError
from kifmerge.fusion.agreement import open_checkpoint, refuse_independent

SHAPES = {"q.lora_A.weight": (2, 3), "q.lora_B.weight": (3, 2)}


class Adapters:
    """Adapters in a folder, and who is recorded to come from whom."""

    def __init__(self, folder):
        self.folder = folder

    def make(self, name, command=None, *, stem="adapter_model", **parents):
        made = None
        if command is not None:
            made = folders.made_by(command, **{r: self.folder / p for r, p in parents.items()})
        number = sum(1 for _ in self.folder.iterdir())
        tensors = folders.random_tensors(number, SHAPES)
        folders.save(self.folder / name, tensors, stem=stem, provenance=made)

    def open(self, *names):
        return [open_checkpoint(name, self.folder / name) for name in names]

    def agree(self, base, *names):
        refuse_independent(*(self.open(base) if base else [None]), self.open(*names))

    def refused(self, base, *names):
        with pytest.raises(CheckpointError, match="factors of independent adapters") as caught:
            self.agree(base, *names)
        return str(caught.value)


@pytest.fixture
def adapters(tmp_path):
    """A whole model; a line a, b, c of adapters, each trained from the one before; a stranger."""
    made = Adapters(tmp_path)
    made.make("model", stem="model")
    made.make("a", "train", model="model")
    made.make("b", "train", model="model", adapter="a")
    made.make("c", "replay", model="model", adapter="b")
    made.make("stranger", "train", model="model")
    made.make("published")
    return made


@pytest.mark.parametrize("base", [None, "model", "published"])
@pytest.mark.parametrize("order", itertools.permutations("abc"), ids="".join)
def test_one_line_of_training_has_one_basis(adapters, base, order):
    adapters.agree(base, *order)


def test_branches_of_one_tree(adapters):
    adapters.make("d", "train", model="model", adapter="a")
    adapters.agree(None, "d", "c", "a", "b")


@pytest.mark.parametrize("names", ["a stranger", "a b stranger", "stranger a b c", "a published"])
def test_a_stranger_has_another(adapters, names):
    message = adapters.refused("model", *names.split())
    assert f"base {adapters.folder / 'model'} is a whole model" in message
    for name in names.split():
        assert f"{name} {adapters.folder / name}" in message
    assert "--space factor" in message


def test_a_line_with_a_gap_is_not_known_to_be_one(adapters):
    message = adapters.refused(None, "a", "c")
    assert "are adapters, no base: " in message
    assert "Give the adapter that both were trained from as --base" in message
    assert "that all were trained from" in adapters.refused(None, "a", "c", "published")


def test_giving_a_base_declares_that_all_come_from_it(adapters):
    adapters.make("elsewhere")
    adapters.agree("a", "published", "elsewhere", "b")


def test_record_of_a_fresh_start_counts_more(adapters):
    message = adapters.refused("a", "published", "b", "stranger")
    assert f"stranger {adapters.folder / 'stranger'} was trained from a fresh adapter" in message


def test_parent_that_has_changed_is_a_parent_no_more(adapters):
    folders.save(adapters.folder / "a", folders.random_tensors(99, SHAPES), stem="adapter_model")
    adapters.refused(None, "a", "b")


def test_line_of_whole_models_says_nothing_of_adapters(adapters):
    """A parent in another role than that of the adapter is none."""
    adapters.make("odd", "train", model="a")
    adapters.refused(None, "a", "odd")
