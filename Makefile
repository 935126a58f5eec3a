# `make demo` and `make test` do everything from a fresh clone: virtual environment, torch, build, run.
# The rest is for development; `make help` lists it.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
OUT    ?= out/gpu-report

BIN     := $(VENV)/bin
# Tools and child processes find the environment's programs first, activated or not.
export PATH := $(abspath $(BIN)):$(PATH)

SETUP := $(VENV)/.set-up
BUILT := $(VENV)/.built
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# The sanitized package is installed beside the other and found before it. The C++ library is preloaded too:
# AddressSanitizer looks for __cxa_throw when the process starts. What Python never frees is no leak of ours.
ASAN := build/asan
ASAN_LIBS = $$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)
# Tests of time, and those that take minutes under the sanitizers.
ASAN_TESTS = not seventy_thousand and not obeyed and not forked and not other_python_threads and not busy
ASAN_ENV  = PYTHONSAFEPATH=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

.PHONY: demo attention-map test asan benchmark gpu-report docs lint format build clean help

demo: $(BUILT)  ## train a character language model with torch.nn and with fastseq
	$(BIN)/python examples/char_lm.py $(ARGS)

attention-map: $(BUILT)  ## train a small vision transformer with both, draw what it looks at
	$(BIN)/python examples/attention_map.py $(ARGS)

test: $(BUILT)  ## the whole suite; ARGS goes to pytest
	$(BIN)/pytest $(ARGS)

asan: $(BUILT)  ## the suite under AddressSanitizer and UBSan, on every ISA of this machine
	FASTSEQ_SANITIZE=1 FASTSEQ_CUDA=off $(BIN)/pip install -q --no-build-isolation --no-deps --upgrade \
	  --target $(ASAN) .
	@set -e; export PYTHONPATH=$(abspath $(ASAN)) $(ASAN_ENV); \
	list='import torch, fastseq._C as c; print(*c.cpu_info()["isas"])'; \
	for isa in $$(LD_PRELOAD="$(ASAN_LIBS)" $(BIN)/python -c "$$list"); do \
	  echo "== $$isa"; \
	  FASTSEQ_ISA=$$isa LD_PRELOAD="$(ASAN_LIBS)" $(BIN)/pytest --capture=sys -m "not slow" -k "$(ASAN_TESTS)" $(ARGS); \
	done

benchmark: $(BUILT)  ## the paired grid against torch, JSON and figures
	$(BIN)/python benchmarks/run.py $(ARGS)

# With what is installed, not with .venv's torch: that need not be one for CUDA, and there may be no network.
gpu-report:  ## on a machine with a GPU: build, test and time in under nine minutes, into OUT
	PYTHON=$(PYTHON) scripts/gpu_report.sh $(OUT) $(ARGS)

# Material for MkDocs tells at each build what will follow it one day.
docs: $(BUILT)  ## the documentation's site, into build/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

lint: $(SETUP)  ## what the pre-commit hooks check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(SETUP)  ## lay out all code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

build: $(BUILT)  ## the environment and the compiled module, nothing run

clean:  ## everything that make made, the environment too
	rm -rf $(VENV) build dist *.egg-info fastseq/_C*.so

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# The environment. The three checks say what a bare machine lacks, before pip or CMake says it in many lines.
$(SETUP): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "found $$($(PYTHON) --version 2>&1)"; \
	  echo "fastseq needs Python >= 3.10"; \
	  echo "install one and call: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments (module venv or ensurepip is missing)"; \
	  echo "make needs one, to install torch and the build tools into"; \
	  echo "on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo "no C++ compiler: $${CXX:-c++} was not found"; \
	  echo "fastseq needs one that knows C++17 and OpenMP, such as g++ >= 9"; \
	  echo "on Debian and Ubuntu: apt install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -r requirements-dev.txt
	@touch $@

# Editable, and with the environment's own build tools: their paths stay, so ninja compiles only what changed.
$(BUILT): $(SETUP) $(SOURCES)
	$(BIN)/pip install --no-build-isolation --no-deps -e .
	@touch $@
