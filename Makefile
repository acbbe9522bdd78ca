# make demo     install into .venv and run the demo on a real model
# make test     install with the test modules, then the C++ tests (sanitized and as shipped) and pytest
# make lint     formatters and type checkers;  make bench  the benchmarks;  make build  only install
#
# PYTHON is the interpreter the virtual environment is made with, VENV its folder, ARGS are passed to
# the program a target ends with: make demo ARGS=--quick, make test ARGS='-m "not slow"'.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TORCH ?= 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
STAMPS := $(VENV)/.openwork
SANITIZED := build/sanitize
# cmake and ninja of the environment, and not what else is installed.
export PATH := $(abspath $(BIN)):$(PATH)

SOURCES := pyproject.toml CMakeLists.txt LICENSE README.md \
  $(shell find csrc python tests/cpp -type f -not -name '*.so' -not -path '*/__pycache__/*')
INSTALL := $(PIP) install --no-build-isolation
TESTING := -C cmake.define.OPENWORK_TESTING=ON

.PHONY: demo test build bench lint cpp-test clean
.DELETE_ON_ERROR:

demo: build
	$(BIN)/openwork demo $(ARGS)

test: cpp-test $(STAMPS)/testing
	$(BIN)/ctest --test-dir $$(ls -td build/cp*/ | head -n 1) --output-on-failure
	OPENWORK_BUILD_DIR=$$(ls -td build/cp*/ | head -n 1) $(BIN)/python -m pytest $(ARGS)

build: $(STAMPS)/package

bench: $(STAMPS)/bench
	$(BIN)/python -m bench $(or $(ARGS),run)

lint: $(STAMPS)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' | \
	  xargs $(BIN)/clang-format --dry-run -Werror

# The kernels alone: a sanitized library cannot be loaded into an ordinary Python. -O1: at -O2 gcc
# takes minutes for a sanitized kernel that is one large function.
cpp-test: $(STAMPS)/requirements
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -DNDEBUG" \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DOPENWORK_TESTING=ON -DOPENWORK_SANITIZE=ON \
	  -DOPENWORK_WERROR=ON
	$(BIN)/cmake --build $(SANITIZED)
	$(BIN)/ctest --test-dir $(SANITIZED) --output-on-failure

clean:
	rm -rf build $(STAMPS)

$(STAMPS)/environment:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# A CPU build if there is one to be had: what else is called torch $(TORCH) brings gigabytes of CUDA.
$(STAMPS)/torch: $(STAMPS)/environment
	$(BIN)/python -c "import torch; assert torch.__version__ >= (2, 10)" 2>/dev/null || \
	  $(PIP) install "torch==$(TORCH)+cpu" || \
	  $(PIP) install "torch==$(TORCH)+cpu" --index-url $(TORCH_INDEX) || \
	  $(PIP) install "torch==$(TORCH)"
	touch $@

$(STAMPS)/requirements: $(STAMPS)/torch
	$(PIP) install "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.24" ninja
	touch $@

# The flavours below differ in what else they install. Each also serves the plainer ones, so that
# demo after test installs nothing.
$(STAMPS)/package: $(STAMPS)/requirements $(SOURCES)
	$(INSTALL) .
	touch $@

# Headers that a test compares tables with; what the wheel depends on is not needed for them.
CUTE := $(PIP) install --no-deps nvidia-cutlass==4.2.0.0

$(STAMPS)/testing: $(STAMPS)/requirements $(SOURCES)
	$(INSTALL) $(TESTING) '.[test,hf]'
	$(CUTE)
	touch $(STAMPS)/package $@

$(STAMPS)/bench: $(STAMPS)/requirements $(SOURCES)
	$(INSTALL) $(TESTING) '.[bench]'
	touch $(STAMPS)/package $@

$(STAMPS)/dev: $(STAMPS)/requirements $(SOURCES)
	$(INSTALL) $(TESTING) '.[test,hf,dev]'
	$(CUTE)
	touch $(STAMPS)/package $(STAMPS)/testing $@
