# `make demo` and `make test` are all that a fresh machine with Python and a C++ compiler needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: demo test bench docs lint format sanitize clean

demo: $(VENV)/train
	$(BIN)/python train/run.py

# A process a core: the tensors are small, and one thread each is fastest (python_tests/conftest.py). Not in pyproject.toml,
# so that a plain `pytest` needs no plugin and starts at once.
test: $(VENV)/all
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

# Alone on the machine, or the ratios mean nothing.
bench: $(VENV)/all
	$(BIN)/python benchmarks/bench_loss.py
	$(BIN)/python -m pytest benchmarks/test_bench_loss.py --benchmark-only

# The API, the mathematics and the tutorials, from docstrings and examples: build/docs/index.html.
docs: $(VENV)/all
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

lint: $(VENV)/all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The C++ code and its Python tests under AddressSanitizer and UndefinedBehaviorSanitizer, built beside the checkout's own.
sanitize: $(VENV)/all
	PATH="$(abspath $(BIN)):$$PATH" bash python_tests/sanitize.sh

clean:
	rm -rf build dist *.egg-info sortkd_kernels/*.so $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

$(VENV)/torch: | $(VENV)/bin/python
	$(BIN)/pip install -q torch torchvision setuptools wheel pybind11 ninja numpy
	touch $@

$(VENV)/train: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[train]'
	touch $@

$(VENV)/all: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[train,bench,dev,docs,examples]'
	touch $@
