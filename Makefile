# From a clone to a running demo or a full test run, in one command each.
#
#   make demo      train a character model with fused_rnn and with torch.nn; then the quick benchmark
#   make test      the whole test suite                        make test ARGS="-k lstm"
#   make build     make the environment, compile, install in place
#   make bench     the quick benchmark                         make bench ARGS="--suite core --out run.json"
#   make lint      style of Python and C++                     make format   mends it
#   make gpu-check [OUT=dir]   on a machine with a GPU: build, tests, sanitizers and benchmark, in eight minutes
#   make accuracy  sigmoid and tanh of every float32, on each instruction set: takes a while
#   make asan      the op tests on a build with AddressSanitizer and UBSan
#   make clean     forget everything that was built            (.venv stays)
#
#   TORCH="torch==2.14.1"   another torch in .venv              PYTHON=python3.12   another Python for .venv
#   VENV=path               an environment of your own, with its own torch (2.11 or newer): nothing is installed
#                           there but this package, in place
#
# FUSED_RNN_CUDA, TORCH_CUDA_ARCH_LIST and MAX_JOBS are obeyed as setup.py describes.

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

ifdef VENV
ENV := $(abspath $(VENV))
else
ENV := $(CURDIR)/.venv
endif
BIN := $(ENV)/bin
RUN := $(BIN)/python
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Stamps carry a checksum of what they depend on besides files, so that a changed wish is a missing stamp.
checksum = $(firstword $(shell printf '%s' '$(1)' | cksum))
CSRC := $(sort $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.inc'))
OTHER_CPP := $(sort $(shell find tests examples -name '*.cpp' -o -name '*.cu' -o -name '*.h'))
BUILD_INPUTS := $(CSRC) setup.py pyproject.toml tools/cuda_toolkit.py fused_rnn/_version.py
WISHES := $(ENV) $(TORCH) $(FUSED_RNN_CUDA) $(TORCH_CUDA_ARCH_LIST) $(CUDA_HOME) $(CC) $(CXX) $(CFLAGS) $(CXXFLAGS)
BUILT := build/stamps/built-$(call checksum,$(WISHES) $(BUILD_INPUTS))
ifdef VENV
READY := checked-environment
else
READY := .venv/.ready-$(call checksum,$(TORCH) $(PYTHON))
endif

.PHONY: help demo test build bench lint format accuracy asan gpu-check clean checked-environment
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   \(make .*\)/  \1/p' Makefile

build: $(BUILT)

demo: $(BUILT)
	$(RUN) examples/char_lm.py --out out
	$(BIN)/fused-rnn-bench run --suite quick

# All tests in two processes, on any machine: they use torch's threads, and several start processes of their own.
test: $(BUILT)
	$(RUN) -m pytest $(or $(ARGS),$(if $(VENV),,-n 2 --dist worksteal) tests)

bench: $(BUILT)
	$(BIN)/fused-rnn-bench run $(or $(ARGS),--suite quick)

lint: | $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(OTHER_CPP)

format: | $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(BIN)/clang-format -i $(CSRC) $(OTHER_CPP)

accuracy: $(BUILT)
	$(RUN) tests/test_activations.py

# A build apart, in build/asan, so that the normal one is left alone. The runtime of ASan must come first in the
# process, and Python does not link it: hence the preload, with libstdc++ so that it can watch C++ exceptions.
# Leaks are not looked for: Python and torch leave too much to the end of the process on purpose. Everything runs in
# build/asan, because Python puts the current folder first on its path and the normal build is in this one.
ASAN_TESTS ?= tests/test_ops.py tests/test_ops_derivatives.py tests/test_cpu_kernels.py tests/test_cell_at_once.py \
  tests/test_layer_at_once.py tests/test_activations.py tests/test_kept_panels.py tests/test_reset.py
ASAN_RUN = cd build/asan && LD_PRELOAD="$$(c++ -print-file-name=libasan.so):$$(c++ -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/build/asan/lib $(RUN)

asan: | $(READY)
	FUSED_RNN_SANITIZE=address,undefined FUSED_RNN_CUDA=0 \
	  $(RUN) setup.py -q build --build-base build/asan --build-lib build/asan/lib
	$(ASAN_RUN) -c \
	  'import fused_rnn._extension as e; path = e.load().__file__; print("testing", path); assert "asan" in path'
	$(ASAN_RUN) -m pytest -c $(CURDIR)/pyproject.toml -p no:cacheprovider $(ARGS) $(abspath $(ASAN_TESTS))

# By the Python that holds the machine's torch: PYTHON, or that of VENV. Nothing is installed. COMMIT names the commit
# of a tree that came without its .git.
gpu-check:
	$(if $(VENV),$(RUN),$(PYTHON)) tools/gpu_check.py $(if $(OUT),--out '$(OUT)') $(if $(COMMIT),--commit '$(COMMIT)')

clean:
	rm -rf build dist out fused_rnn.egg-info fused_rnn/_C*.so

.venv/.ready-%: requirements.txt requirements-models.txt
	$(PYTHON) tools/doctor.py machine
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -r requirements.txt '$(TORCH)'
	$(RUN) -m pip install --no-deps -r requirements-models.txt
	rm -rf .venv/.ready-* build/stamps
	touch $@

checked-environment:
	@test -x $(RUN) || { echo "VENV=$(VENV): there is no bin/python in it" >&2; exit 1; }
	@$(RUN) tools/doctor.py environment

# The other stamps go: every configuration installs to the same place, and only the last one is there.
build/stamps/built-%: $(BUILD_INPUTS) | $(READY)
	@echo "Compiling fused_rnn: some minutes the first time, only what changed after that."
	@start=$$(date +%s); set -x; $(RUN) -m pip install --quiet --no-deps --no-build-isolation -e . || exit; \
	  { set +x; } 2>/dev/null; echo "Compiled in $$(($$(date +%s) - start)) s on $$(nproc) cores."
	cd / && $(RUN) -m fused_rnn
	rm -rf build/stamps && mkdir -p build/stamps && touch $@
