# `make demo` and `make test` do all their own set-up: they need Python and nothing else.
# PYTHON=python3.12 picks another interpreter, VENV=... another place for the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench bench-small gpu-check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-ocm ## Train a small model on real digits and compare covariances (8 minutes with set-up)
	$(BIN)/ocm demo --out runs/demo

test: $(VENV)/.installed-test ## Run the tests (5 minutes with set-up; GPU tests where there is a GPU)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

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

bench: $(VENV)/.installed-test ## Every benchmark suite at small sizes, and a report (10 minutes)
	$(BIN)/python benchmarks/run.py --quick

bench-small: $(VENV)/.installed-test ## The cases of pytest-benchmark, beside the other results (1 minute)
	mkdir -p runs/benchmarks
	$(BIN)/pytest --quiet --benchmark-json=runs/benchmarks/small.json benchmarks

gpu-check: $(VENV)/.installed-test ## On a GPU machine: GPU tests, memory checker and the kernel suite (at most 8 minutes)
	$(BIN)/pytest -m gpu tests/gpu
	@if command -v compute-sanitizer >/dev/null; then \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 $(BIN)/python -m \
			pytest -m gpu tests/gpu -k 'against_float64 or those_of_the_cpu_bit'; \
	else echo "compute-sanitizer is not installed: memory accesses are not checked"; fi
	$(BIN)/python benchmarks/run.py --suite kernels --device cuda

clean: ## Remove the environment, caches and results
	rm -rf $(VENV) .cache build dist runs *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of requirements, made again when the requirements change.
$(VENV)/.installed-%: pyproject.toml constraints.txt benchmarks/peers.txt | $(BIN)/python
	@echo "Installing hessdiag[$*] into $(VENV) ..."
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[$*]'
	$(if $(filter test dev,$*),$(INSTALL) --no-deps --requirement benchmarks/peers.txt)
	@touch $@
