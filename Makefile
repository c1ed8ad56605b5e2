# make demo | test | test-slow | lint | docs | bench. The virtual environment is made on the first call and kept up to date.

BOOTSTRAP ?= python3
VENV      ?= .venv
PYTHON    := $(VENV)/bin/python
# A machine with an NVIDIA GPU takes the newest torch; any other the release that constraints/cpu.txt names. CONSTRAINTS= takes none.
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,constraints/cpu.txt)
PIP       := $(PYTHON) -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# Tests run in so many processes, a whole file in one of them: what its tests share is built once.
# Three for two cores: many tests wait for a process, a sandbox or a clock, and leave their core to others.
# One that dies ends the run: xdist would start another and may wait for ever (its files have nobody left).
WORKERS   ?= 3
# Tests of GPUs run at once, three for each GPU: most of their time is compiling, which takes a core and no GPU. Those
# that fill a GPU's memory, or measure how fast GPUs are, run afterwards.
GPUS      ?= $(shell nvidia-smi -L 2>/dev/null | wc -l)
GPU_TESTS ?= $(shell expr 3 \* $(GPUS))
# Where the tests of a GPU are: importing all the others takes each process ten seconds
GPU_FILES  = $(sort $(shell grep -rl --include='test_*.py' 'mark\.gpu' tests))
BENCH     ?=

# Compiled modules are kept, whatever the shell says: else each worker compiles all tests anew, and each new interpreter retool.
export PYTHONDONTWRITEBYTECODE :=
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install demo test test-slow test-gpu lint docs bench clean

help:
	@echo "make install    the package and what it needs, in $(VENV)"
	@echo "make demo       generate data and a tiny model, SFT, then DAPO: watch it call its tool"
	@echo "make test       the default tests · make test-slow: the long ones · make test-gpu: those for CUDA"
	@echo "make lint       ruff and basedpyright"
	@echo "make docs       the documents as a site, in build/docs; a dead link is an error"
	@echo "make bench      the headline's tables on these GPUs, in build/bench (TRL=, VERL=: Pythons that have them, to run beside)"
	@echo "                BENCH=benchmarks/….py ARGS=…: one benchmark in one process · ARGS=\"1 2\": other parts of run_all.sh"

# Stamps, so that only a changed pyproject.toml or constraint installs again.
$(VENV)/.created:
	@$(BOOTSTRAP) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "retool needs Python 3.10 or newer: make BOOTSTRAP=python3.12 …")'
	@test -x $(PYTHON) || $(BOOTSTRAP) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml $(CONSTRAINTS)
	@echo "installing retool into $(VENV)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "installing what builds the documents into $(VENV)"
	@$(PIP) --editable '.[docs]'
	@touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(PYTHON) examples/demo.py $(ARGS)

test: $(VENV)/.installed-dev
	$(PYTHON) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

test-slow: $(VENV)/.installed-dev
	$(PYTHON) -m pytest -q -m 'slow and not gpu' --timeout 1800 $(ARGS)

test-gpu: $(VENV)/.installed-dev
	TEST_GPUS=$(GPUS) $(PYTHON) -m pytest -v -m 'gpu and not alone' --timeout 600 -n $(GPU_TESTS) --dist loadscope --no-loadscope-reorder --max-worker-restart 0 $(or $(ARGS),$(GPU_FILES))
	$(PYTHON) -m pytest -v -m 'gpu and alone' --timeout 600 $(or $(ARGS),$(GPU_FILES))

lint: $(VENV)/.installed-dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check --quiet .
	$(VENV)/bin/basedpyright --level error

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet
	@echo "build/docs/index.html is there; to search in it: python3 -m http.server -d build/docs"

bench: $(VENV)/.installed
ifeq ($(BENCH),)
	PYTHON=$(abspath $(PYTHON)) bash benchmarks/run_all.sh build/bench $(or $(ARGS),0)
else
	@for script in $(BENCH); do echo "== $$script"; $(PYTHON) $$script $(ARGS) || exit 1; done
endif

clean:
	rm -rf $(VENV)/.installed $(VENV)/.installed-dev $(VENV)/.installed-docs build dist demo-run
