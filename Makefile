# One command a line: `make help` lists them. ARGS reaches the program behind a target,
# e.g. make report ARGS="--problem mnist --data-dir ~/data".

VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
ARGS ?=
SEED ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS := $(VENV)/.installed-docs
DEVICE ?= sim
FAST := not slow and not gpu and not browser and not device

# What no seed of the tests' generators changes: `make test SEED=1` leaves it out, and runs
# every eighth case of the rest, for the types of everything are checked at run time.
UNSEEDED := tests/test_on_a_device.py tests/test_ranks.py tests/test_follow.py \
	tests/test_executors.py \
	tests/test_notebooks.py tests/test_report_*.py tests/test_reproduce_*.py \
	tests/test_plots*.py tests/test_lab.py tests/test_cli.py tests/test_package.py \
	tests/test_mutants.py tests/test_generators.py tests/test_follow_commands.py \
	tests/test_tune.py tests/other_peoples_bugs/test_*files.py \
	tests/other_peoples_bugs/test_processes.py tests/other_peoples_bugs/test_main_job.py \
	tests/test_problems*.py fisherlab/problems \
	fisherlab/plots fisherlab/report fisherlab/reproduce fisherlab/cli

# Tests start a hundred processes, each of which would compile everything anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install report reproduce-quick test verdicts test-all test-device gpu mutants lint types browser bench \
	peers lab docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make the environment with the pinned versions

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check \
		-c constraints.txt -e ".[test,lab]"
	touch $@

report: $(INSTALLED)  ## train, analyse and write a report into reports/
	$(BIN)/fisherlab report $(ARGS)

# Stored results are taken as they are: remove reproduced/all to begin anew.
reproduce-quick: $(INSTALLED)  ## judge the papers' claims at quick size
	OMP_NUM_THREADS=1 $(BIN)/fisherlab reproduce all --quick --jobs $(JOBS) --out reproduced/all $(ARGS)
	cp reproduced/all/REPRODUCTION.md docs/REPRODUCTION.md

# One thread per worker: the workers are the parallelism. The check of types at run time
# doubles the time: `pytest` itself has it, and so has the run under another seed.
test: $(INSTALLED)  ## run the fast tests (at most 5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "$(FAST)" \
		$(if $(SEED),--seed $(SEED) --every 8 $(addprefix --ignore=,$(wildcard $(UNSEEDED))),\
		--jaxtyping-packages=) $(ARGS)

verdicts: $(INSTALLED)  ## hold the cheap claims of the papers against known numbers (2 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m slow \
		--jaxtyping-packages= tests/test_reproduce_*.py $(ARGS)

test-all: $(INSTALLED)  ## run every test this machine can run
	$(BIN)/python -m pytest -q -m "not device" $(ARGS)
	$(BIN)/python -m pytest -q -m device tests/on_device $(ARGS)

# Tests of their own process: the simulated device is made known before all else.
test-device: $(INSTALLED)  ## compare the library on DEVICE (sim, cuda, ...) with the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m device tests/on_device \
		--device $(DEVICE) --jaxtyping-packages= $(ARGS)

# What a short loan of a card should bring home, also where a law fails on it;
# `make gpu DEVICE=sim ARGS=--tiny` rehearses it.
gpu: DEVICE = cuda
gpu: $(INSTALLED)  ## on a GPU: the laws above, then benchmarks; every part is written at once
	$(MAKE) test-device DEVICE=$(DEVICE) ARGS=; laws=$$?; \
	$(BIN)/python -m tests.benchmarks.accelerator --device $(DEVICE) $(ARGS) && exit $$laws

mutants: $(INSTALLED)  ## see whether the tests notice small mistakes in a copy
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(ARGS)

browser: $(INSTALLED)  ## test pages, and the site if it is built, in a headless Chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "browser and not slow" tests/test_*_in_browser.py $(ARGS)

lint: $(INSTALLED)  ## check style, format and the layers of the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(INSTALLED)  ## check types
	$(BIN)/mypy

bench: $(INSTALLED)  ## measure times and memory
	$(BIN)/python -m tests.benchmarks $(ARGS)

# Without their dependencies: two of them ask for a torchvision that breaks this torch.
peers: $(INSTALLED)  ## install the libraries that fisherlab is compared with
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps \
		nngeometry==0.4 curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 \
		asdfghjkl==0.1a5 singd==0.0.5 unfoldNd==0.2.3 einconv==0.1.0
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
		einops opt_einsum linear_operator

docs: $(DOCS)  ## build the site into build/docs; a warning is an error
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going docs build/docs $(ARGS)

$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check \
		-c constraints.txt -e ".[docs]"
	touch $@

lab: $(INSTALLED)  ## open JupyterLab on copies of the notebooks
	$(BIN)/fisherlab lab $(ARGS)

clean:  ## remove caches and build outputs (not the environment, not reports/)
	rm -rf build dist docs/generated .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache \
		.import_linter_cache
	find fisherlab tests -name __pycache__ -type d -prune -exec rm -rf {} +
