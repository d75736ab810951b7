# Two commands are enough: `make demo` and `make test`. Both set up what they need first; doing it again is quick.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2
ENGINES ?= engines
# where a Python of another version would be noticed: texts, files, dataclasses, processes, arrays, a whole training;
# not the networks, losses and long runs, which compute long and depend on torch alone
PYTHON_TESTS ?= tests/config tests/data tests/metric tests/ops tests/published tests/runs tests/hydra_plugins/test_ledger.py \
	$(patsubst %,tests/test_%.py,cli fitting main terminal train values wheel writing)

# real photographs for the tests that need some; without them those tests are skipped, and say so
ifneq ($(wildcard ../shared/data),)
export DETR_EXP_TEST_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help setup demo test test-all test-engines test-pythons fix lint check docs bench proof ui

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(VENV)/.run ## make the virtual environment and install the package into it

demo: $(VENV)/.run ## train a small RT-DETRv2 on drawn shapes (minutes), log it to MLflow
	$(BIN)/python -m detr_exp.train experiment=demo

test: $(VENV)/.test ## the tests, without the slow ones
	$(BIN)/python -m pytest -n $(WORKERS)

test-all: $(VENV)/.test ## all tests; takes long
	$(BIN)/python -m pytest -n $(WORKERS) -m "not engines"

test-engines: $(VENV)/.engines ## the tests with real schedulers, stores and machines; they skip what is not installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "$(ENGINES)" -rs tests/engines

test-pythons: ## the tests that depend on Python, by each version from 3.10 to 3.13 that is here
	@for version in 3.10 3.11 3.12 3.13; do \
		python$$version -c '' 2>/dev/null || { echo "there is no python$$version here"; continue; }; \
		$(MAKE) --no-print-directory .venv-$$version/.test PYTHON=python$$version VENV=.venv-$$version && \
		.venv-$$version/bin/python -m pytest -n $(WORKERS) $(PYTHON_TESTS) || exit 1; \
	done

fix: $(VENV)/.test ## mend formatting and what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.test ## linter, formatter, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint ## the same, and the tests of the rules of the house
	$(BIN)/python -m pytest tests/test_house.py tests/conf

docs: $(VENV)/.docs ## the pages of docs/ as a site in outputs/site; needs Python 3.11
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(VENV)/.bench ## our speed beside others'; exit status 1 when a gate is missed
	@failed=0; for script in scripts/bench_*.py; do $(BIN)/python $$script || failed=1; done; exit $$failed

proof: $(VENV)/.proof ## ours and others on small real sets; takes hours, resumes, and writes docs/proof.md
	$(BIN)/python -m detr_exp.proof

ui: $(VENV)/.run ## the MLflow page, on this machine only
	$(BIN)/mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db --host 127.0.0.1 --port 5000

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than 3.10; name a newer one: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

# each resolves all packages, which takes minutes; so one contains the others instead of following them
$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); minutes the first time"
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), with what the tests need; minutes the first time"
	$(PIP_INSTALL) -e ".[test]"
	@touch $(VENV)/.run $@

$(VENV)/.engines: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), with what the tests of engines need; minutes the first time"
	$(PIP_INSTALL) -e ".[engines]"
	@touch $(VENV)/.run $(VENV)/.test $@

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.run
	@echo "installing what the site needs"
	$(PIP_INSTALL) -e ".[docs]"
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@echo "installing what ours is timed beside"
	$(PIP_INSTALL) -e ".[bench]"
	@touch $@

$(VENV)/.proof: $(VENV)/.test
	@echo "installing the programs that ours is compared with"
	$(PIP_INSTALL) -e ".[proof]"
	@touch $@
