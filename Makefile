# make demo   install into .venv and run the quick start on the embedded data
# make test   install with the development extra, then lint, types, the whole test suite, and the command's tests with
#             the oldest and the newest typer (make test-typer)
# make test-slow     whole commands, the examples and guides as they are written, deployments between processes; minutes
# make demo-flower   four authenticated sites behind TLS and a proxy on this machine, under secure sums, with no data on
#                    the server; then their logs are compared and the adapter is audited
# make test-wheel    build the wheel, install it into an empty environment and run the quick start from there
# make test-faults   whole deployments with injected faults; takes minutes
# make test-families  every family of bases in docs/models.md; takes minutes
# make test-long      every arm of every benchmark, the memory of every method, more sizes and processes; takes minutes
# make test-mutants  seeded bugs, on each of which the tests must fail; takes minutes

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Without an NVIDIA GPU there is no use for a CUDA build of torch.
PINS   := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c constraints/cpu.txt)
JOBS   ?= 2

# Tests need no network, and one thread per process is fastest for small models.
export OMP_NUM_THREADS ?= 1

.PHONY: demo digits demo-flower test-wheel test-slow test-faults test-families test-long test-mutants test lint types check \
  test-typer test-oldest-typer test-newest-typer install dev clean

demo: install
	$(BIN)/fedspan run

digits: install
	$(BIN)/fedspan run --set data.task=builtin:digits

# The same federation twice: between real processes under secure sums, and in one process without masks.
TRIAL  ?= runs/flower-$(shell date +%Y%m%d-%H%M%S)
FEDERATION := --set method.name=glora_sums --set federation.num_clients=4 --set federation.participation=1.0 \
  --set 'federation.ranks=[2,4,8,16]' --set federation.rounds=4 --set local.steps=15 \
  --set evaluation.where=clients --set data.client_holdout=0.2 --set evaluation.max_examples=30

demo-flower: $(VENV)/.flower
	$(BIN)/fedspan flower up $(TRIAL) --sites 4 $(FEDERATION) --set privacy.secure_sums=true --run federation
	$(BIN)/fedspan run --out $(TRIAL)/here --engine sequential $(FEDERATION) --set privacy.fixed_point=true \
	  --set evaluation.local=false > $(TRIAL)/logs/here.log
	@cmp $(TRIAL)/here/adapter/adapter_model.safetensors \
	  $(TRIAL)/server/runs/federation/adapter/adapter_model.safetensors && \
	  echo "the adapter has the same bits as that of \`fedspan run\` in one process without masks"
	$(BIN)/fedspan log verify $(TRIAL)
	$(BIN)/fedspan audit $(TRIAL)/here --max-rows 200

# The wheel in an empty environment, away from the checkout: it must run the quick start by itself.
test-wheel: dev
	rm -rf build/wheel && $(BIN)/python -m build --outdir build/wheel --wheel . > build-wheel.log 2>&1 || \
	  { cat build-wheel.log >&2; exit 1; }
	rm -f build-wheel.log
	$(PYTHON) -m venv --clear build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check $(PINS) build/wheel/*.whl
	cd build/wheel && venv/bin/fedspan run --out run
	build/wheel/venv/bin/python -m pip check

test-faults: dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/faults -m faults

test-families: dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/families -m "families or not families" -n $(JOBS)

test-slow: dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests -m slow -n $(JOBS) --dist loadfile

test-long: dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests -m long -n $(JOBS)

test-mutants: dev
	$(BIN)/python tests/mutants/seeded.py

test: dev lint types check test-typer

lint: dev
	$(BIN)/ruff check .

types: dev
	$(BIN)/mypy

check: dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# The command's own tests with the oldest and the newest typer: what is on the main environment, behind another typer.
test-typer: test-oldest-typer test-newest-typer

test-oldest-typer test-newest-typer: test-%-typer: .venv-%/.ready
	PYTHONPATH=$(CURDIR)/src HF_HUB_OFFLINE=1 $(dir $<)bin/python -m pytest tests/cli --ignore tests/cli/test_whole_runs.py \
	  -k "not test_a_bad_input or command or runs:"

.venv-%/.ready: constraints/%-typer.txt $(VENV)/.dev
	rm -rf $(dir $@)
	$(BIN)/python -m venv --without-pip $(dir $@)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > "$$(echo $(dir $@)lib/python*/site-packages)/main.pth"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --ignore-installed \
	  --prefix $(dir $@) -r $<
	@touch $@

install: $(VENV)/.installed
dev: $(VENV)/.dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedspan needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e .
	@touch $@

$(VENV)/.flower: $(BIN)/python pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[flower]'
	@touch $@ $(VENV)/.installed

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.flower

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
