# Every target works as the first command typed on a fresh machine with Python 3.11 or newer, `make gpu` aside.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready
RUN := $(VENV)/bin/python

.PHONY: setup demo test test-oldest test-oldest-transformers test-newest reproduction bench families gpu gpu-rehearsal lint docs dist

setup: $(READY)

define environment
$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
$(PYTHON) -m venv $(1)
endef

$(READY): pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(RUN) -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(RUN) examples/tiny/demo.py

# One worker a core, one thread a worker: many small tests, none of which two threads would speed up.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

# The whole suite with the oldest versions that pyproject.toml promises, and with the newest that there are. From PyPI
# each brings CUDA libraries of about 3 GB.
test-oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal

test-newest: .venv-newest/ready
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist worksteal

# CI's part of it: the oldest transformers with the PyTorch of `make setup`, and the tests that use most of its classes.
test-oldest-transformers: $(READY)
	$(RUN) -m pip install --quiet --upgrade --target build/oldest -c oldest.txt transformers
	PYTHONPATH=build/oldest OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m 'not slow' tests/shared_prefix tests/train/models tests/train/test_parity.py tests/train/test_trainer.py tests/train/command/test_run.py

.venv-oldest/ready: pyproject.toml oldest.txt
	$(call environment,.venv-oldest)
	.venv-oldest/bin/python -m pip install --quiet -r oldest.txt -e '.[test]'
	touch $@

# Newest when it is made: `rm -r .venv-newest` for what has appeared since.
.venv-newest/ready: pyproject.toml
	$(call environment,.venv-newest)
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[test]'
	touch $@

# What is there already, of an interrupted reproduction, is not made again.
reproduction: $(READY)
	$(RUN) examples/reproduction/reproduce.py

bench: $(READY)
	$(RUN) -m pytest benchmarks --results benchmarks/results

# Every family of causal language models against itself, one sequence at a time: about ten minutes. Some of them alone:
# python -m benchmarks.families llama gpt_oss
families: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.families

# On a machine with a GPU, from the source tree, with the PyTorch that is there: installs nothing. Where the tree has no
# git history, name what it is a copy of: make gpu COMMIT=...
gpu:
	$(PYTHON) -m benchmarks.gpu

# What `make gpu` runs, on the CPU at tiny sizes by Triton's interpreter, with the versions of a GPU machine and without
# the project installed. Its PyTorch brings CUDA libraries of about 3 GB.
gpu-rehearsal: .venv-rehearsal/ready
	.venv-rehearsal/bin/python -m benchmarks.gpu --rehearsal

.venv-rehearsal/ready: pyproject.toml oldest.txt
	$(call environment,.venv-rehearsal)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["peers"], sep="\n")' >.venv-rehearsal/peers.txt
	.venv-rehearsal/bin/python -m pip install --quiet -r oldest.txt -r .venv-rehearsal/peers.txt peft jinja2 pytest pytest-benchmark pytest-timeout pytest-xdist
	touch $@

# The site, into build/site; `mkdocs serve` shows it while it is written. A link that leads nowhere is an error, and so
# is a docstring of parameters that are not there.
docs: $(READY)
	$(RUN) -m mkdocs build --strict

# Wheel and source distribution, into build/dist, and whether they are whole.
dist: $(READY)
	rm -rf build/dist build/installed
	$(RUN) -m build --outdir build/dist
	$(RUN) -m pip install --quiet --no-deps --target build/installed build/dist/*.whl
	$(RUN) tests/check_wheel.py build/dist build/installed

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
