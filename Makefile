# make demo   install into .venv and run the main job on the embedded data
# make test   install with the development extra, then lint, types and the whole test suite

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Without an NVIDIA GPU there is no use for a CUDA build of torch.
PINS   := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c constraints/cpu.txt)
JOBS   ?= 2

# Tests need no network, and one thread per process is fastest for small models.
export OMP_NUM_THREADS ?= 1

.PHONY: demo digits test lint types check install dev clean

demo: install
	$(BIN)/fedspan run

digits: install
	$(BIN)/fedspan run --set data.task=builtin:digits

test: dev lint types check

lint: dev
	$(BIN)/ruff check .

types: dev
	$(BIN)/mypy

check: dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

install: $(VENV)/.installed
dev: $(VENV)/.dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedspan needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e .
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
