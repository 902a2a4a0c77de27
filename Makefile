# Five commands for a fresh machine with Python and make:
#   make demo     compare plain training with three methods on a stream of tasks
#   make test     linter, format, types, tests
#   make docs     the site, into build/docs: every reference and every link checked
#   make dist     wheel and source distribution, checked, and the wheel tried in an environment of its own
#   make torture  random cases, killed runs, mutated state, ranks, with a report in docs/torture.md: ten minutes, or
#                 TORTURE=hours; PARTS="soak mutation" for the parts that take longer
# Each makes the environment .venv once and uses it again until pyproject.toml changes.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs dist torture clean

demo: .venv/.installed
	$(BIN)/python examples/demo.py

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto

docs: .venv/.installed
	$(BIN)/python -m sphinx -W --keep-going -n -E -a -q -c docs . build/docs
	$(BIN)/python docs/links.py build/docs

dist: .venv/.installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/distribution.py dist

torture: .venv/.installed
	PYTHONPATH=tests $(BIN)/python -m torture $(PARTS)

# The stamp tells a finished environment from one whose installation was interrupted.
.venv/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Python 3.10 or newer is needed, which $(PYTHON) is not. Name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	    exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --editable ".[dev]"
	touch $@

# The environment is large and stays; `rm -rf .venv` removes it.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis lightning_logs checkpoints
	find lightning_plasticity tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
