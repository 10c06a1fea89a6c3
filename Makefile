# Two commands on a fresh machine with Python >= 3.11: `make demo` and `make test`.
# Each makes the environment in .venv if it is not there yet; both can be run again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The reference that results are compared with. On Linux PyPI's wheel brings CUDA; to do
# without it in the demo: make demo TORCH=
TORCH ?= torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint notebooks clean

# Train five optimizers on real data, tune each, and draw the comparison (2 minutes).
demo: $(VENV)/demo.stamp
	$(BIN)/python -m train.compare

# Everything that must hold: doctests, library against PyTorch, scripts on tiny data.
test: $(VENV)/test.stamp
	$(BIN)/python -m pytest --numprocesses auto

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# The notebooks from end to end, with a tiny network and random images.
notebooks: $(VENV)/test.stamp
	ADAMW_JAX_TINY=1 $(BIN)/python -m pytest --nbmake colab/*.ipynb

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	"Python >= 3.11 is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'

$(VENV)/demo.stamp: $(VENV)/bin/python pyproject.toml
	$(if $(TORCH),$(PIP) $(TORCH))
	$(PIP) --editable '.[train]'
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) --group test --group lint
	touch $@
