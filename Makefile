# Two commands do everything on a fresh machine: `make demo` and `make test`. Both work in .venv in this folder.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test checks clean

# Stamps: installing again only where pyproject.toml changed.
.venv/run.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/test.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ .venv/run.stamp

demo: .venv/run.stamp
	out=runs/demo; n=2; while [ -e $$out ]; do out=runs/demo-$$n; n=$$((n + 1)); done; $(BIN)/batchless demo --out $$out

test: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow" src tests
	$(BIN)/python tests/check_wheel.py

clean:
	rm -rf .venv dist build
