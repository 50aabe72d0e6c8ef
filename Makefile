# Every target does its own set-up: python3 (3.11 or newer) with venv and pip is all it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: help demo serve test lint bench plots docs clean
help:
	@echo "make demo   money moves while tasks are cancelled: psycopg beside aiopgsafe"
	@echo "make serve  a FastAPI service with a live page, on http://127.0.0.1:8000"
	@echo "make test   the test suite, on a PostgreSQL that it starts itself"
	@echo "make lint   ruff and mypy"
	@echo "make docs   the documentation as pages, in site/"
	@echo "make bench  speed beside psycopg and asyncpg"

# One stamp for each set of extras: a checkout installs what a target needs, once.
$(BIN)/.installed-%: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[$*]'
	@touch $@

demo: $(BIN)/.installed-demo
	$(BIN)/aiopgsafe demo $(ARGS)

serve: $(BIN)/.installed-serve
	PYTHONPATH=examples $(BIN)/python -m transfers.serve $(ARGS)

test: $(BIN)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

lint: $(BIN)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BIN)/.installed-bench
	$(BIN)/python -m benchmarks $(ARGS)

plots: $(BIN)/.installed-plots
	$(BIN)/python -m benchmarks --plots docs/benchmarks $(ARGS)

docs: $(BIN)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --site-dir site $(ARGS)

clean:
	rm -rf site $(VENV) .mypy_cache .pytest_cache .ruff_cache dist
