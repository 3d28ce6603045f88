# Everything a fresh machine with Python 3.11, make, git and g++ needs. `make demo` and `make test` start from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install demo test test-slow lint bench clean
.DEFAULT_GOAL := install

# The stamp makes installing again a matter of seconds: it is older than neither the dependencies nor their pins.
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "raycloud needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) --editable '.[cluster,dev]'
	$(PIP) --no-build-isolation $$(grep '^deepspeed==' constraints.txt)
	touch $@

demo: install
	$(BIN)/raycloud distill --recipe jobs/recipes/demo.yaml --overwrite

test: install
	$(BIN)/pytest --numprocesses 2 --dist loadscope

test-slow: install
	$(BIN)/pytest -m 'slow or cluster' --timeout 900 --numprocesses 2 --dist loadscope

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/raycloud bench distill-step

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
