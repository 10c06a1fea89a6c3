# Two commands on a fresh machine with Python >= 3.11: `make demo` and `make test`.
# Each creates the environment in .venv if there is none yet; both can be run again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The reference that results are compared with. On Linux PyPI's wheel brings CUDA; to do
# without it in the demo: make demo TORCH=
TORCH ?= torch==2.13.0
# Upper bounds of what is installed. To try the newest of everything, in a clean clone:
# make test CONSTRAINTS=/dev/null
CONSTRAINTS ?= constraints.txt
INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/python $(INSTALL) --constraint $(CONSTRAINTS)
# A file of tests stays on one worker, which then compiles its programs once. Files are
# run in the order of tests/conftest.py, the longest first.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile \
	--no-loadscope-reorder --durations 15
# `make check` tests what differs from this commit: make check BASE=main
BASE ?= HEAD

# The lowest versions that pyproject.toml allows, as pip's requirements.
FLOOR := .venv-floor
LOWEST = import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*(x.replace(">=", "==") for x in p["dependencies"] + \
	p["optional-dependencies"]["flax"]))

.PHONY: demo test test-slow test-all test-floor check lint docs notebooks clean

# Train five optimizers on real data, tune each, and draw the comparison (2 minutes).
demo: $(VENV)/demo.stamp
	$(BIN)/python -m train.compare

# The quick tier: every test that is not marked slow, a few examples a property.
test: $(VENV)/test.stamp
	$(PYTEST) -m "not slow"

# What `make test` leaves out: slow tests, and properties with all of their examples.
test-slow: $(VENV)/test.stamp
	$(PYTEST) -m "slow or hypothesis" --hypothesis-profile full

# Everything, in one run.
test-all: $(VENV)/test.stamp
	$(PYTEST) --hypothesis-profile full

# The library's quick tests with the lowest versions of jax, Optax, NumPy and Flax, in an
# environment of its own; for Python 3.11 or 3.12, as NumPy 2.0.
test-floor: $(FLOOR)/stamp
	$(FLOOR)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile \
		-m "not slow" adamw_jax tests/adamw_jax

# The loop of the day, under a minute: lint, types, and the tests of what changed.
check: lint
	tests="$$($(BIN)/python tests/changed.py $(BASE))" && \
	{ test -z "$$tests" || $(BIN)/python -m pytest -m "not slow" $$tests; }

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# Copy the result pages into the documentation pages that include them.
docs: $(VENV)/bin/python
	$(BIN)/python docs/include.py

# The notebooks from end to end, with a tiny network and random images.
notebooks: $(VENV)/test.stamp
	ADAMW_JAX_TINY=1 $(BIN)/python -m pytest --nbmake colab/*.ipynb

clean:
	rm -rf $(VENV) $(FLOOR) .cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	"Python >= 3.11 is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'

$(VENV)/demo.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(if $(TORCH),$(PIP) $(TORCH))
	$(PIP) --editable '.[train]'
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) --group test --group lint
	touch $@

$(FLOOR)/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python $(INSTALL) --upgrade 'pip>=25.1'
	$(FLOOR)/bin/python -c '$(LOWEST)' > $(FLOOR)/lowest.txt
	$(if $(TORCH),$(FLOOR)/bin/python $(INSTALL) $(TORCH))
	$(FLOOR)/bin/python $(INSTALL) --constraint constraints.txt --editable '.[flax]' \
		--group test matplotlib $$(cat $(FLOOR)/lowest.txt)
	touch $@
