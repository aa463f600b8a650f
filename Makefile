# qlx: `make quickstart` shows everything, `make test` checks it. All of it runs inside .venv.

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-from-constraints
# Tests share the cores with their xdist neighbours, so each process keeps to one thread.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup quickstart test test-all check benchmarks peers clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## create .venv and install qlx with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@set -eu; \
	if [ ! -x $(BIN)/python ]; then \
	  found=; \
	  for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "qlx needs Python 3.11 or newer and none was found on PATH; name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  echo "creating $(VENV) with $$found ($$($$found --version))" >&2; \
	  if ! "$$found" -m venv $(VENV) 2>/dev/null && ! "$$found" -m virtualenv -q $(VENV) 2>/dev/null; then \
	    rm -rf $(VENV); \
	    echo "$$found can make no virtual environment (neither venv with ensurepip nor virtualenv works); install one of them, or name another: make setup PYTHON=…" >&2; exit 1; \
	  fi; \
	fi
	@echo "installing qlx and the versions of constraints.txt into $(VENV) (a minute or two, about 2 GB)" >&2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[all,dev]'
	@touch $(STAMP)

quickstart: $(STAMP) ## train, merge, pack, export, verify and serve two small models; report under quickstart-output/
	$(OFFLINE) $(BIN)/python examples/quickstart.py

test: $(STAMP) ## the default suite
	$(PYTEST)

test-all: $(STAMP) ## the default suite and the exhaustive one
	$(PYTEST) -m "exhaustive or not exhaustive"

check: $(STAMP) ## lint, format, types, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict qlx
	$(OFFLINE) $(BIN)/python -m pytest -q tests/test_house.py

# Not those that want a GPU, nor what the others import. packing.py measures what `make quickstart` leaves.
BENCHMARKS := $(filter-out $(patsubst %,benchmarks/%.py,cuda_parity training_gpu onnx_models generated), $(wildcard benchmarks/*.py))

benchmarks: quickstart ## measure what the docs state: hours
	@set -e; for script in $(BENCHMARKS); do echo "$$script" >&2; $(OFFLINE) $(BIN)/python "$$script"; done

# What it is compiled for: by default this machine. Where llama.cpp then ends with a signal, name less (docs/onnx-speed.md).
PEER_CMAKE ?= -DGGML_NATIVE=ON

peers: .venv-peers/bin/python ## .venv-peers with llama-cpp-python, compiled from its source: minutes, and a C++ compiler

.venv-peers/bin/python: $(STAMP)
	$(BIN)/python -m venv .venv-peers
	CMAKE_ARGS="$(PEER_CMAKE)" .venv-peers/bin/python -m pip install --quiet --no-binary llama-cpp-python llama-cpp-python==0.3.36 \
	  || { rm -rf .venv-peers; exit 1; }

clean: ## remove what the other targets made, .venv included
	rm -rf $(VENV) .venv-peers quickstart-output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
