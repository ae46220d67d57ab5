import subprocess
import sys

import kifmerge

PINNED = """
PRESETS ImportanceAccumulator ImportanceCallback ImportanceOptions KifmergeError Recipe
RecurrentMixin RecurrentOptions RecurrentRounds RecurrentTrainer Round Snapshot Threshold
collect_report continual_metrics importance_threshold kth_smallest load_recipe read_snapshot
recurrent_kif recurrent_kif_adaptive run_recipe select_memory trained_parameters write_accumulator
write_checkpoint
"""


def test_public_names_are_those_pinned_here():
    assert kifmerge.__all__ == PINNED.split()
    assert len(kifmerge.__all__) < 30


def test_every_public_name_is_there():
    for name in kifmerge.__all__:
        assert getattr(kifmerge, name).__doc__


def test_importing_the_package_imports_no_heavy_library():
    check = "import sys, kifmerge; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
