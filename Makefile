# Thin on purpose: how things are checked is in pyproject.toml and .ci/run, what is shown in examples/.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,\
	$(shell command -v $(name) 2>/dev/null)))
BIN := .venv/bin
READY := .venv/.ready
LIBRARY := fpcompiler/native/libfpc.so
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# Tests at a time; each of them may take 2 GB.
JOBS ?= 2

# Threads that wait do not spin: two of them on a busy machine are up to 20 times slower otherwise.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint .venv
.DELETE_ON_ERROR:

demo: $(READY) $(LIBRARY)
	$(BIN)/python examples/quickstart.py

test: $(READY) $(LIBRARY)
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv: $(READY)

# Installing builds it, so that this runs after a change to its sources only.
$(LIBRARY): setup.py $(wildcard fpcompiler/native/csrc/*) | $(READY)
	$(BIN)/python setup.py --quiet build_ext --inplace

# torch comes first and alone: once it is there, nothing that follows asks for another build of it.
# nvidia-cutlass is used without what it depends on (CUDA for Python, SciPy, plots of graphs).
$(READY): pyproject.toml constraints.txt examples/requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 is needed")'
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps -r examples/requirements.txt
	$(PIP) --no-deps nvidia-cutlass nvidia-matmul-heuristics nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@
