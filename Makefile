# Two commands do everything: `make quickstart` (sets up, runs the main job) and `make test` (sets up, passes the tests).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

.PHONY: quickstart setup test test-real lint bench gpu clean
.DEFAULT_GOAL := quickstart

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
	PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh
	touch $(STAMP)

quickstart: setup
	$(BIN)/omni-fast quickstart

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint  # two workers of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-real: setup
	$(BIN)/python -m pytest --override-ini addopts="-q --strict-markers --import-mode=importlib" tests/real

bench: setup
	@for question in benchmarks/bench_*.py; do echo "== $$question"; $(BIN)/python $$question || exit 1; done

gpu:
	PYTHON="$(PYTHON)" bash scripts/gpu.sh

clean:
	rm -rf $(VENV) build dist
