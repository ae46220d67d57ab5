# make test         everything CI runs: format, lint, types, all tests
# make test-fast    the tests that take no more than a few seconds each
# make bench-merge  what merges cost beside other tools, which it installs; 45 GB in $TMPDIR
PYTHON ?= .venv/bin/python

# A process per processor, up to eight: each of them holds about 1 GB, most of it torch and
# transformers. Each is given a run of neighbouring tests, which share what their file has made.
PARALLEL = --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: setup demo test test-fast lint format bench bench-merge

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt kifmerge/tensor/native.c
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet --constraint constraints.txt torch
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	.venv/bin/kifmerge demo

test: setup lint
	$(PYTHON) -m pytest $(PARALLEL)

test-fast: setup
	$(PYTHON) -m pytest $(PARALLEL) -m 'not slow'

lint: setup
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

format: setup
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

bench: bench-merge
	$(PYTHON) tests/bench/training_cost.py
	$(PYTHON) tests/bench/chain_cost.py
	$(PYTHON) tests/bench/importance_memory.py
	$(PYTHON) tests/bench/hub_cost.py

bench-merge: setup
	$(PYTHON) tests/bench/merge_cost.py --peers
	$(PYTHON) tests/bench/growth_cost.py --remove
	$(PYTHON) tests/bench/busy_cost.py
	$(PYTHON) tests/bench/selection_cost.py
	$(PYTHON) tests/bench/prune_cost.py
	$(PYTHON) tests/bench/start_cost.py
