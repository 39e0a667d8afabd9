# make demo    set up, fetch the default model, answer a question
# make test    set up with the tests' tools, run the tests
# make lint    check the style
#
# PYTHON: any Python 3.10 or later.  TORCH: what pip installs as torch; `make demo TORCH=torch` takes the newest.

PYTHON ?= $(shell command -v python3 || command -v python)
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
TESTS ?= tests
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/fusec pull smollm2
	$(RUN) -m fusec.run --prompt "What is a GPU? Answer in two sentences."

# One thread a worker: the tests' tensors are small, and two workers share the cores.
test: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 $(TESTS)

lint: $(VENV)/.tested
	$(RUN) -m ruff check .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fusec needs Python 3.10 or later: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# The stamps are as new as pyproject.toml: a change there installs anew.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing fusec into $(VENV) (minutes the first time)"
	$(PIP) "$(TORCH)"
	@case "$$(uname -s)" in Linux) $(PIP) "$(TRITON)";; esac
	$(PIP) -e .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed pyproject.toml
	$(PIP) -e ".[test,hub]"
	-$(VENV)/bin/fusec pull smollm2  # without it the tests on real weights are skipped
	@touch $@

clean:
	rm -rf build $(VENV)
