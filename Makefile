# `make demo` and `make test` do all their own set-up: they need Python and nothing else.
# PYTHON=python3.12 picks another interpreter, VENV=... another place for the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

# What spreads the tests over two processes.
SPREAD := --numprocesses 2 --dist loadfile

GPU_PYTHON ?= python3
# What `make gpu-suites` measures, the shortest first.
GPU_SUITES ?= host attention overhead sampling products estimators
# Files of wheels to install beside the project, where the machine lacks diffusers say.
GPU_WHEELS ?=
GPU_INSTALL ?= PIP_BREAK_SYSTEM_PACKAGES=1 $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps \
	--no-build-isolation $(GPU_WHEELS) --editable .
# PYTHONSAFEPATH keeps the repository's root, with its folder kernels, off the import path.
GPU_PYTEST = $(GPU_PYTHON) -m pytest -m gpu
GPU_LIMIT ?= timeout 540

.DEFAULT_GOAL := help
.PHONY: help demo test coverage soak mutation test-portable test-lowest lint types docs docs-look bench bench-small
.PHONY: clean
.PHONY: gpu-install gpu-check gpu-tests gpu-memory gpu-kernels gpu-suites

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-ocm ## Train a small model on real digits and compare covariances (9 minutes with set-up)
	$(BIN)/python examples/demo.py --out runs/demo

test: $(VENV)/.installed-test ## Run the tests (8 minutes with set-up; GPU tests where there is a GPU)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SPREAD)

coverage: $(VENV)/.installed-test ## Which lines and branches the tests run, 95% at least (15 minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SPREAD) --cov --cov-report=term

# The emulated kernels run as compiled by the oldest Triton too.
soak: $(VENV)/.installed-test .cache/triton-3.6/.installed ## The tests that take many minutes (12 minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SPREAD) -m soak
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SPREAD) --hypothesis-profile=thorough tests/properties

mutation: $(VENV)/.installed-test ## Plant faults in a copy, and see the tests notice each (10 minutes)
	$(BIN)/python tests/mutation

# See CONTRIBUTING.md. A forced ATEN_CPU_CAPABILITY breaks the C++ code that torch.compile writes,
# and a dispatch mode, which --vary-rounding is, cannot be compiled through.
test-portable: $(VENV)/.installed-test ## The tests as other processors may round (40 minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SPREAD) --vary-rounding -k 'not compile'
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default $(BIN)/pytest $(SPREAD) -k 'not compile'
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 $(BIN)/pytest $(SPREAD) -k 'not compile'
	OMP_NUM_THREADS=1 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(BIN)/pytest $(SPREAD)
	OMP_NUM_THREADS=1 MKL_ENABLE_INSTRUCTIONS=AVX2 $(BIN)/pytest $(SPREAD)
	OMP_NUM_THREADS=1 MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/pytest $(SPREAD)
	OMP_NUM_THREADS=2 $(BIN)/pytest

test-lowest: ## The tests with the lowest versions that pyproject.toml names (Python 3.10 to 3.12)
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

lint: $(VENV)/.installed-dev ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

# The source tree does not show type checkers that kernels/ is hessdiag.kernels; the wheel does.
types: $(VENV)/.installed-dev
	rm -rf .cache/wheel build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir .cache/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --target .cache/wheel/site .cache/wheel/*.whl
	rm -rf build
	cd .cache/wheel && MYPYPATH=site $(abspath $(BIN))/mypy --config-file ../../pyproject.toml \
		--cache-dir ../mypy -p hessdiag -p ocm

# A name that no page documents, a link that leads nowhere and an example that fails are errors.
docs: $(VENV)/.installed-docs ## Build the site and run its gallery into docs/_build/html (15 minutes)
	OMP_NUM_THREADS=2 $(BIN)/python -m sphinx --fail-on-warning --keep-going -b html docs docs/_build/html

docs-look: $(VENV)/.installed-docs ## Check the built site's links, and look at it in headless Chromium (1 minute)
	$(BIN)/python docs/look.py

bench: $(VENV)/.installed-test ## Every benchmark suite at small sizes, and a report (10 minutes)
	$(BIN)/python benchmarks/run.py --quick

bench-small: $(VENV)/.installed-test ## The cases of pytest-benchmark, beside the other results (1 minute)
	mkdir -p runs/benchmarks
	$(BIN)/pytest --quiet --benchmark-json=runs/benchmarks/small.json benchmarks

# These run in the Python that a GPU machine has, and download nothing: see CONTRIBUTING.md.
gpu-install:
	@$(GPU_PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('no CUDA device')"
	$(GPU_INSTALL)

gpu-check: ## On a GPU machine: the three checks below, each in at most 9 minutes
	$(MAKE) gpu-tests
	$(MAKE) gpu-memory
	$(MAKE) gpu-kernels

gpu-tests: gpu-install ## The tests that need a GPU
	PYTHONSAFEPATH=1 $(GPU_LIMIT) $(GPU_PYTEST) tests/gpu

gpu-memory: gpu-install ## The kernels under CUDA's memory checker
	@if command -v compute-sanitizer >/dev/null; then \
		PYTHONSAFEPATH=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
		$(GPU_LIMIT) compute-sanitizer --error-exitcode 1 $(GPU_PYTEST) \
			tests/gpu/test_kernels.py tests/gpu/test_attention.py \
			-k 'against_float64 or those_of_the_cpu_bit'; \
	else echo "compute-sanitizer is not installed: memory accesses are not checked"; fi

gpu-kernels: gpu-install ## The benchmark suite of the kernels
	$(GPU_LIMIT) $(GPU_PYTHON) benchmarks/run.py --suite kernels --device cuda

gpu-suites: gpu-install ## Further benchmark suites on a GPU, each in at most 9 minutes
	for suite in $(GPU_SUITES); do \
		$(GPU_LIMIT) $(GPU_PYTHON) benchmarks/run.py --suite $$suite --device cuda || exit 1; \
	done

clean: ## Remove the environment, caches and results
	rm -rf $(VENV) .venv-lowest .cache build dist runs *.egg-info docs/_build docs/api/generated docs/gallery \
		docs/results examples/*.png

.cache/triton-3.6/.installed: | $(BIN)/python
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==3.6.0
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of requirements, made again when the requirements change.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) benchmarks/peers.txt | $(BIN)/python
	@echo "Installing hessdiag[$*] into $(VENV) ..."
	$(INSTALL) 'setuptools>=77'
	$(INSTALL) --no-build-isolation --editable '.[$*]'
	$(if $(filter test dev,$*),$(INSTALL) --no-deps --requirement benchmarks/peers.txt)
	@touch $@
