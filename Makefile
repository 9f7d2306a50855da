# Graft. `make` alone prints what there is.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0   # what pip installs as torch; a CUDA machine's default wheel brings CUDA with it
VENV := .venv
BIN := $(VENV)/bin
PINS := -c deploy/constraints/all.txt
OURS := -e ./shared -e ./services/api -e './services/worker[train]' -e ./client -e ./services/local
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore

.DEFAULT_GOAL := help
.PHONY: help setup run demo check test test-unit format clean

help: ## print this
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## build .venv with everything that Graft needs (Python 3.11 and make are enough)

run: $(VENV)/.ready ## start the whole service on http://127.0.0.1:8000, state under .graft/; Ctrl-C stops it
	@$(BIN)/graft up

demo: $(VENV)/.ready ## make a small base model, fine-tune it through the service, and show what it learnt
	@$(BIN)/python demo/run.py

check: $(VENV)/.ready-dev ## format, lint, types and the contracts between the rooms
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --config pyproject.toml

test: $(VENV)/.ready-dev ## every test; starts its own PostgreSQL, Redis and S3 server, all from pip
	@$(BIN)/python -m pytest

test-unit: $(VENV)/.ready-dev ## the fast tests
	@$(BIN)/python -m pytest tests/unit

format: $(VENV)/.ready-dev ## let ruff format and fix
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

clean: ## remove .venv and every cache; .graft/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.ready: deploy/constraints/all.txt $(wildcard */pyproject.toml services/*/pyproject.toml)
	@echo "setting up $(VENV) (a minute or two, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(PINS) $(TORCH) hatchling editables
	@$(PIP) $(PINS) --no-build-isolation $(OURS)
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready tests/requirements.txt
	@$(PIP) $(PINS) -r tests/requirements.txt
	@touch $@
