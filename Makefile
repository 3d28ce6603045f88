# Everything a fresh machine with Python 3.11, make, git and g++ needs. `make demo` and `make test` start from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install demo test test-slow coverage lint docs bench clean
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

# A stamp of its own: neither the demo nor the tests need what the docs do.
$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	touch $@

demo: install
	$(BIN)/raycloud distill --recipe jobs/recipes/demo.yaml --overwrite

test: install
	$(BIN)/pytest --numprocesses 2 --dist loadscope

test-slow: install
	$(BIN)/pytest -m 'slow or cluster' --timeout 900 --numprocesses 2 --dist loadscope

# Of the fast tier; what Ray's workers and other processes run is not counted.
coverage: install
	$(BIN)/pytest --numprocesses 2 --dist loadscope --cov --cov-report term

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: install
	$(BIN)/raycloud bench distill-step

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
