# Every target works as the first command typed on a fresh machine with Python 3.11 or newer, `make gpu` aside.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready
RUN := $(VENV)/bin/python

.PHONY: setup demo test reproduction bench gpu lint

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(RUN) examples/tiny/demo.py

# One worker a core, one thread a worker: many small tests, none of which two threads would speed up.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

# What is there already, of an interrupted reproduction, is not made again.
reproduction: $(READY)
	$(RUN) examples/reproduction/reproduce.py

bench: $(READY)
	$(RUN) -m pytest benchmarks --results benchmarks/results

# On a machine with a GPU, from the source tree, with the PyTorch that is there: installs nothing.
gpu:
	$(PYTHON) -m pytest -m gpu tests/*/test_gpu.py
	$(PYTHON) -m pytest benchmarks --results benchmarks/results

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
