"""The demo: small tasks of our own making, written as files, then run like any recipe."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

from kifmerge.checkpoint.atomic import write_text
from kifmerge.errors import RunError
from kifmerge.phases.report import Report
from kifmerge.recipe import load_recipe
from kifmerge.run import run_recipe
from kifmerge.trials import OnMoment

NUM_TRAIN_ROWS = 240
NUM_TEST_ROWS = 120

# task -> label -> words that give the label away
TASKS: dict[str, dict[str, str]] = {
    "animals": {
        "mammal": "otter badger whale hedgehog moose ferret beaver lynx walrus mole",
        "bird": "heron magpie finch owl puffin swallow stork raven wren pelican",
        "fish": "trout herring perch eel salmon cod pike tuna carp halibut",
        "insect": "beetle cricket moth hornet aphid firefly mantis termite ladybird midge",
    },
    "kitchen": {
        "fruit": "plum apricot quince melon cherry fig raspberry pear mango lychee",
        "vegetable": "leek turnip spinach carrot cabbage radish parsnip celery kale beetroot",
        "drink": "cocoa lemonade cider espresso milkshake tonic punch broth cordial nectar",
        "spice": "cumin saffron nutmeg clove paprika turmeric cardamom sumac anise pepper",
    },
    "journeys": {
        "rail": "engine carriage platform signalman sleeper tram timetable buffer siding viaduct",
        "sea": "harbour anchor ferry lighthouse sail captain tide schooner deck buoy",
        "air": "runway glider cockpit turbulence airship parachute hangar altitude propeller pilot",
        "road": "lorry roundabout motorway tyre scooter junction gravel caravan pavement toll",
    },
    "crafts": {
        "wood": "chisel plane oak dowel sawdust lathe veneer mallet plank joiner",
        "cloth": "loom thread velvet needle quilt bobbin seam dye wool tailor",
        "metal": "anvil solder rivet forge copper ingot welder tongs bronze foundry",
        "clay": "kiln glaze potter wheel slip porcelain terracotta pitcher tile mould",
    },
}
_FILLER = (
    "the a one this that we they she he it saw found kept left near under behind beside with "
    "without and but then later soon often never quite rather very old new small large quiet "
    "bright day night morning evening village story question letter friend window garden"
)
_CHANCE_OF_DECOY = 0.4


def run_demo(out: Path | None, *, seed: int = 0, on_moment: OnMoment) -> Report:
    """Write the tasks and the recipe, run it, and return the report.

    Args:
        out: folder to keep everything in; None uses a temporary one.
        seed: of tasks, weights and training.
        on_moment: told where the run is.

    Raises:
        RunError: ``out`` is not empty.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="kifmerge-demo-") as temporary:
            return _run_in(Path(temporary), seed, on_moment)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty: choose another folder for the demo")
    return _run_in(out, seed, on_moment)


def _run_in(directory: Path, seed: int, on_moment: OnMoment) -> Report:
    write_tasks(directory / "tasks", seed=seed)
    recipe_path = directory / "recipe.yaml"
    text = Path(__file__).with_name("demo.yaml").read_text(encoding="utf-8")
    write_text(recipe_path, f"{text}seeds: [{seed}]\n")
    recipe = load_recipe(recipe_path)
    return run_recipe(recipe, directory / "run", on_moment=on_moment)


def write_tasks(directory: Path, *, seed: int) -> None:
    """Write TASK-train.jsonl and TASK-test.jsonl for each task; the same seed, the same bytes."""
    generator = random.Random(seed)
    for task, labels in TASKS.items():
        for part, num_rows in (("train", NUM_TRAIN_ROWS), ("test", NUM_TEST_ROWS)):
            rows = [_row(labels, number, generator) for number in range(num_rows)]
            generator.shuffle(rows)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(directory / f"{task}-{part}.jsonl", text)


def _row(labels: dict[str, str], number: int, generator: random.Random) -> dict[str, str]:
    """A line of filler with two words of its label and, at times, a decoy of another label."""
    names = list(labels)
    label = names[number % len(names)]
    words = generator.choices(_FILLER.split(), k=generator.randint(5, 9))
    words += generator.sample(labels[label].split(), 2)
    if generator.random() < _CHANCE_OF_DECOY:
        other = generator.choice([name for name in names if name != label])
        words.append(generator.choice(labels[other].split()))
    generator.shuffle(words)
    return {"text": " ".join(words), "label": label}
