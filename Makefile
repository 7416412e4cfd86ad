# Two commands are enough: `make demo` and `make test`. Both install what they need; the rest is for developers.
SHELL := /bin/sh
PY := .venv/bin/python
# compiled modules are kept, but beside no source
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX = $(CURDIR)/.venv/pycache
.DEFAULT_GOAL := help

.PHONY: help setup demo demo-down test test-unit test-property test-simulation test-integration test-e2e test-chaos test-mutation bench-failover soak soak-simulation lint format crds requirements images cluster-up cluster-down clean

help: ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

setup: ## .venv with everything (other targets call it)
	@PYTHON="$(PYTHON)" sh scripts/setup.sh

demo: setup ## A real cluster on this machine trains a small StarCoder, loses a node and goes on
	@$(PY) -m examples.demo

demo-down: setup ## Remove what `make demo` made (caches stay)
	@$(PY) -m examples.demo --down

test: setup lint ## Everything: lint, unit, property, simulation, integration, e2e
	$(PY) -m pytest --durations=25 tests/unit tests/property tests/simulation tests/integration tests/e2e

test-unit: setup ## Under a minute: no cluster, no server
	$(PY) -m pytest tests/unit -m "not slow"

test-property: setup ## Properties, by hypothesis
	$(PY) -m pytest tests/property

test-simulation: setup ## Schedules of faults against operator and agents in memory; SCHEDULES=n, 10000 by default
	$(PY) -m pytest tests/simulation

soak-simulation: setup ## The same without an end in sight, from a new seed each time; SCHEDULES=n, 200000 by default
	$(PY) -m tests.support.simulation.search --processes 2 --schedules $(or $(SCHEDULES),200000)

test-integration: setup ## Against a real API server, etcd and S3 server
	$(PY) -m pytest tests/integration

test-e2e: setup ## On the dev cluster (root, Linux)
	$(PY) -m pytest tests/e2e

test-chaos: setup ## On the dev cluster, what takes too long for each change: the operator killed at its writes; LIVES=n, 5 by default
	$(PY) -m pytest tests/chaos

test-mutation: setup ## On the dev cluster: each mechanism is switched off in a copy, and its end-to-end tests must fail; hours
	$(PY) -m pytest -rA tests/mutation

bench-failover: setup ## Seconds from a fault to training again, beside a plain Job under torchrun; JSON lines
	@$(PY) -m bench.failover $(if $(TRIALS),--trials $(TRIALS)) $(ARGS)

soak: setup ## Random faults against a run for MINUTES (30), and a verdict at the end
	@$(PY) -m bench.soak $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

lint: setup ## ruff, mypy --strict, import-linter, generated files up to date
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	$(PY) -m starcoder_operator.api.crdgen --check

format: setup ## Format the sources
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

crds: setup ## Regenerate crds/, the chart's copy and docs/reference/
	$(PY) -m starcoder_operator.api.crdgen

requirements: setup ## Pin dependencies again after a change of pyproject.toml
	sh scripts/requirements.sh

images: setup ## Operator and trainer images, without a Docker daemon
	$(PY) -m images.build operator trainer

cluster-up: setup ## The dev cluster alone
	$(PY) -m devcluster up

cluster-down: setup ## Remove the dev cluster
	$(PY) -m devcluster down

clean: ## What builds and tests left in this folder
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
