# StreamForge lakehouse. `make help` lists what a newcomer needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help properties setup demo test check format bench mutants clean lock render kafka kafka-jars kafka-test chaos

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## make .venv with the pinned dependencies (done by the others by themselves)

$(STAMP): requirements.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 not found; install it, or say where it is: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up $(VENV): about 170 pinned packages, a minute or two" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --progress-bar on --disable-pip-version-check --require-hashes --no-deps -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## play a company into the lake and compare with the truth (a minute or two)
	@$(BIN)/lakehouse demo

test: $(STAMP) ## all tests (on Apache Kafka too, where Java is there and Maven reaches a repository)
	@$(BIN)/python -m lakehouse.local.kafka --jars-only --fetch-seconds 90 || echo "going on without Apache Kafka" >&2
	@$(BIN)/python -m pytest -n 2 --dist worksteal

kafka: $(STAMP) ## run one node of Apache Kafka until Ctrl-C (PORT=9092 DIR=folder: keep its log); fetches it with Maven once
	@$(BIN)/python -m lakehouse.local.kafka $(if $(PORT),--port $(PORT)) $(if $(DIR),--dir $(DIR))

kafka-jars: $(STAMP) ## fetch Apache Kafka with Maven, and no more
	@$(BIN)/python -m lakehouse.local.kafka --jars-only

kafka-test: kafka-jars ## the tests that run on Apache Kafka, and no others
	@$(BIN)/python -m pytest -m kafka

check: $(STAMP) ## format, lint, types, import rules
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

properties: $(STAMP) ## the long suite: billing on the full path, 500 random histories in random batches
	@PROPERTY_EXAMPLES=500 $(BIN)/python -m pytest -n 2 --dist worksteal tests/properties/test_billing.py

chaos: $(STAMP) kafka-jars ## rounds of faults on three catalogs (ROUNDS=3 SEED=1 CATALOG=sqlite,rest,glue; replay one: ONLY=17)
	@$(BIN)/python -m tests.chaos --folder .chaos/last --report .chaos/report.json \
	  $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SEED),--seed $(SEED)) $(if $(CATALOG),--catalog $(CATALOG)) $(if $(ONLY),--only $(ONLY))

bench: $(STAMP) ## time the whole road, three times
	@$(BIN)/lakehouse bench road

mutants: $(STAMP) ## sabotage the pipeline one way at a time and see each caught
	@$(BIN)/python -m tests.mutants

render: $(STAMP) ## write docs/data-dictionary.md and docs/data-model.md from the declarations
	@$(BIN)/lakehouse render dictionary --to docs
	@$(BIN)/lakehouse render model --to docs

lock: $(STAMP) ## pin the dependencies again, with hashes (needs uv)
	uv pip compile pyproject.toml --all-extras --generate-hashes --python-version 3.11 --no-header -o requirements.txt

clean: ## remove what the demo left (the lake, the world)
	@if [ -x $(BIN)/lakehouse ]; then $(BIN)/lakehouse clean --yes; else rm -rf .lakehouse; fi
