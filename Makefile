# `make run` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files side by side, one thread each: threads that outnumber the cores are far slower than one.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: run test test-slow check format bench bench-run bench-learning bench-star bench-q bench-gate bench-ppo bench-guard install clean

run: $(STAMP)
	$(BIN)/ippo run

test: $(STAMP)
	$(TEST)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(TEST)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-run bench-learning bench-ppo bench-guard bench-star bench-q bench-gate

bench-run: $(STAMP)
	$(BIN)/python -m benchmarks.run

bench-learning: $(STAMP)
	$(BIN)/python -m benchmarks.learning
	$(BIN)/python -m benchmarks.learning_plot

bench-ppo: $(STAMP)
	$(BIN)/python -m benchmarks.ppo

bench-guard: $(STAMP)
	$(BIN)/python -m benchmarks.guard

bench-star: $(STAMP)
	$(BIN)/python -m benchmarks.star

bench-q: $(STAMP)
	$(BIN)/python -m benchmarks.q

bench-gate: $(STAMP)
	$(BIN)/python -m benchmarks.gate

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
