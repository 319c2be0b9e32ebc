# make run    quickstart: from nothing to a compressed modifier and a report
# make serve  serve what `make run` made, on http://127.0.0.1:8000
# make test   all tests            make check  format, lint, types, the import rule
# make docs   writes docs/reference/ from the code
PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed
QUICKSTART := configs/quickstart.yaml

.PHONY: install run serve test test-fast test-integration check docs clean
.DEFAULT_GOAL := run

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable ".[dev]"
	@touch $@

run: $(INSTALLED)
	$(BIN)/cascade run $(QUICKSTART)

serve: $(INSTALLED)
	$(BIN)/python -m serve $(QUICKSTART)

test: test-fast test-integration

test-fast: $(INSTALLED)  # one thread for each of the two workers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not integration" --ignore=tests/integration

test-integration: $(INSTALLED)  # in a worker: after many Rays in one process, their threads may crash it as it exits
	PYTHONFAULTHANDLER=1 $(BIN)/python -m pytest -q -n 1 --dist loadfile tests/integration

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv out
