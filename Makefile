# Everything here works from nothing: the first target that needs it makes the virtual environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TYPING := build/typing/dynprobe

.PHONY: demo test check format docs samples clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(VENV)/installed  ## one command: a table, an HDF5 report and a figure of a real run
	$(BIN)/dynprobe landscape sample_checkpoints/mlp_digits/ --output demo-output/mlp_digits.h5

test: check  ## lint, types and every test
	$(BIN)/python -m pytest

check: $(VENV)/installed  ## ruff (style and docstrings) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(TYPING)
	@for part in cli analyzers io; do ln -sfn "$(CURDIR)/$$part" $(TYPING)/$$part; done
	@for part in _pkg/*; do ln -sfn "$(CURDIR)/$$part" $(TYPING)/; done
	@# not from here: mypy would take the folder io/ for the standard library's
	cd build/typing && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --package dynprobe --cache-dir ../mypy

format: $(VENV)/installed  ## put the code into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed  ## write docs/reference.md anew from --help
	$(BIN)/python docs/make_reference.py

samples: $(VENV)/installed  ## train sample_checkpoints/ anew (minutes)
	$(BIN)/python sample_checkpoints/make.py

clean:
	rm -rf $(VENV) build *.egg-info demo-output
