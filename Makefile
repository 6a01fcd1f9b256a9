# Thin: the work is in lab/bootstrap.sh and the `lab` command.

PROFILE ?= quick
REPRODUCE_ARGS ?=
PYTHON := .venv/bin/python
PYTEST_ARGS ?=
SANITIZER ?= address
SANITIZE_ARGS ?=
QTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup build reproduce test test-all unit lint slow sanitize qtest lab notebooks doctor clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## install what is missing: Debian packages (as root), .venv/
	@sh lab/bootstrap.sh

build: setup ## build QEMU, patched and unpatched, and the guests
	@$(PYTHON) -m lab build

reproduce: setup ## measure every method on this machine; PROFILE=quick (default) or full; REPRODUCE_ARGS
	@$(PYTHON) -m lab reproduce --profile $(PROFILE) $(REPRODUCE_ARGS)

test: build lint ## lint, types and the quick tests: some minutes
	@$(PYTHON) -m pytest -m "not slow and not thorough" $(PYTEST_ARGS)

test-all: build lint ## everything that must be green
	@$(PYTHON) -m pytest -m "not slow" $(PYTEST_ARGS)

unit: setup ## the tests that need no guest
	@$(PYTHON) -m pytest tests/unit $(PYTEST_ARGS)

lint: setup ## ruff and mypy
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

slow: build ## the tests that take many minutes, among them a build after every patch
	@$(PYTHON) -m pytest -m slow $(PYTEST_ARGS)

sanitize: setup ## the quick tests of guests on a QEMU with sanitizers; SANITIZER=address or thread
	@$(PYTHON) -m tests.support.sanitize $(SANITIZER) $(SANITIZE_ARGS)

qtest: build ## QEMU's own migration tests, with and without the patches (QTEST_ARGS)
	@$(PYTHON) -m lab qtest $(QTEST_ARGS)

lab: ## JupyterLab on notebooks/; shows recorded data without QEMU
	@sh lab/bootstrap.sh --packages-optional
	@$(PYTHON) -m jupyterlab --notebook-dir=notebooks

notebooks: build ## execute the notebooks as the tests do
	@$(PYTHON) -m pytest -m notebook $(PYTEST_ARGS)

doctor: setup ## what this machine can do
	@$(PYTHON) -m lab doctor

clean: ## remove .venv/ and caches of the checkout; builds in the user's cache stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
