SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install models serve test test-ray test-triton check bench chaos load fuzz clients gpu-check lock clean

PYTHON ?= python3
CONFIG ?= serve_config.yaml

BIN := .venv/bin
# One line per sizeable download, instead of silence or pip's six hundred lines.
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
BRIEFLY = | sed -nE 's/^ *Downloading (.*[MG]B\))/  \1/p'

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | column -t -s $$'\t'

install: .venv/base.stamp ## make .venv with the pinned dependencies (PYTHON=python3)

models: install ## download the embedded models
	$(BIN)/rapid models pull

serve: install ## serve CONFIG=serve_config.yaml on this machine
	$(BIN)/rapid serve $(CONFIG)

test: .venv/dev.stamp ## run the tests that start no Ray
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not ray"

test-ray: .venv/dev.stamp ## run the tests that start Ray
	$(BIN)/python -m pytest -m ray tests/deployments

test-triton: .venv-triton/stamp ## hold the Triton kernels to float64 on a CPU, and compile them for GPUs
	TRITON_INTERPRET=1 timeout 900 .venv-triton/bin/python -m pytest \
		tests/rapid/kernels/test_paged_split.py tests/rapid/kernels/test_low_bit.py tests/rapid/kernels/test_fused.py \
		tests/rapid/kernels/test_triton_compiled.py

bench: .venv/bench.stamp ## measure steps, decoding, peers and serving (about fifteen minutes)
	$(BIN)/python -m benchmarks.steps
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.decode --prompt-tokens 450 --without-peers
	$(BIN)/python -m benchmarks.serving

chaos: .venv/bench.stamp ## kill processes, remove a node, scale, all under load (about forty minutes)
	$(BIN)/python -m benchmarks.chaos

load: .venv/bench.stamp ## clients, ten minutes at capacity, a burst (about twenty minutes)
	$(BIN)/python -m benchmarks.load

fuzz: .venv/bench.stamp ## malformed requests and schemathesis against the HTTP API (about five minutes)
	$(BIN)/python -m benchmarks.fuzz

clients: install ## popular clients at pinned versions against a server of the embedded models (about five minutes)
	$(BIN)/python -m benchmarks.clients

# Without .venv: a GPU machine may have torch, transformers and triton, and no way to install anything.
gpu-check: ## measure everything on this machine's GPU (ten minutes; PYTHON=python3)
	$(PYTHON) -m benchmarks.gpu_check

check: .venv/dev.stamp ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Resolves from nothing, so that no version lingers only because it was pinned before.
lock: install ## pin every dependency anew in constraints.txt
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report=.venv/report.json '.[dev,bench]'
	{ grep '^#' constraints.txt; $(BIN)/python -c "$$PINS"; } > .venv/constraints.txt
	mv .venv/constraints.txt constraints.txt

clean: ## remove .venv, .venv-triton, .venv-clients and what the tools cached (the models stay)
	rm -rf .venv .venv-triton .venv-clients build *.egg-info .mypy_cache .pytest_cache .ruff_cache

.venv/base.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make install PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "Installing into .venv; a first time takes minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP_INSTALL) -e . $(BRIEFLY)
	@touch $@

.venv/dev.stamp: .venv/base.stamp
	@$(PIP_INSTALL) -e '.[dev]' $(BRIEFLY)
	@touch $@

.venv/bench.stamp: .venv/base.stamp
	@$(PIP_INSTALL) -e '.[bench]' $(BRIEFLY)
	@touch $@

# Triton is 200 MB that a CPU's PyTorch does not need; the rest, PyTorch included, is that of .venv.
.venv-triton/stamp: .venv/dev.stamp
	@rm -rf .venv-triton && $(BIN)/python -m venv .venv-triton
	@.venv-triton/bin/python -m pip install --disable-pip-version-check --no-deps "$$(grep '^triton==' constraints.txt)" $(BRIEFLY)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.venv-triton/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@touch $@

# A local version such as torch's "+cpu" names one build; the pin must hold for all of them.
define PINS
import json
for package in sorted(json.load(open(".venv/report.json"))["install"], key=lambda p: p["metadata"]["name"].lower()):
    if "dir_info" not in package["download_info"]:
        print(package["metadata"]["name"].lower() + "==" + package["metadata"]["version"].split("+")[0])
endef
export PINS
