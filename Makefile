# make setup   .venv with rasd in it (editable), pinned by constraints.txt
# make demo    the main job on examples/prompts.jsonl; a second run finds everything done
# make check   lint, format, types
# make test    the tests
# make gpu-check PROMPTS=... [MODEL=...] [RECORDING=...]   equality and speed on a GPU
# make check and make test are what CI runs.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
EXTRA ?= $(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu)
BIN := .venv/bin
comma := ,
INSTALLED := .venv/installed-$(EXTRA)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
PACKAGES := pipeline actors datastore jobs

.PHONY: setup demo test check gpu-check

setup: $(INSTALLED)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; name one: make setup PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# Setuptools comes first because the build is not isolated: so the constraints pin it too.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing rasd[$(EXTRA),dev] into .venv; the first time takes some minutes."
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) --no-build-isolation --editable '.[$(EXTRA),dev$(if $(filter cpu,$(EXTRA)),$(comma)interpreter)]'
	@touch $@

demo: setup
	$(BIN)/python -m pipeline.models fetch smollm2-135m
	$(BIN)/rasd generate --model smollm2-135m --prompts examples/prompts.jsonl --output outputs/demo --max-new-tokens 96

# In lanes side by side, a core and a Ray each; then what measures times.
LANES ?= 2
test: setup
	$(BIN)/pytest -n $(LANES) -m "not alone"
	$(BIN)/pytest -m alone

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(PACKAGES)

# On a machine with a GPU and the little that benchmarks.gpu_check names, without `make setup`; 8 minutes at most.
MODEL ?= smollm2-135m
gpu-check:
	@test -n "$(PROMPTS)" || { echo 'make: name files of prompts: make gpu-check PROMPTS="a.jsonl b.jsonl"' >&2; exit 1; }
	$(PYTHON) -m benchmarks.gpu_check --model $(MODEL) --prompts $(PROMPTS) \
		$(if $(RECORDING),--recording $(RECORDING)) --output benchmarks/results/gpu_check.json
