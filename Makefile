# make demo | make test | make check | make bench | make results | make matrix | make ranks: each sets up .venv by itself where it is missing or out of date.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check bench results matrix ranks
.DELETE_ON_ERROR:

demo: $(READY)
	@$(BIN)/luthier demo

# One worker a core, one thread each: the models are tiny.
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_imports.py

bench: $(READY)
	@$(BIN)/python -m benchmarks

results: $(READY)
	@$(BIN)/python -m benchmarks.e2e

matrix: $(READY)
	@$(BIN)/python -m tests.matrix

ranks: $(READY)
	@$(BIN)/python -m tests.ranks
	@$(BIN)/python -m tests.ranks --elastic

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "luthier needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Say: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing luthier and what it needs into .venv (minutes, the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
