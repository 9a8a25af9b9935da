# Everything runs in .venv, which the first target makes and later ones bring up to date only when their inputs changed.
PYTHON ?= python3
# The folders kernels/, engine/, bench/ must not be importable by their bare names.
export PYTHONSAFEPATH = 1

PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CSRC = $(wildcard csrc/*)

.PHONY: run test test-all bench lint aot wheel

run: .venv/.run
	.venv/bin/peakgpt quickstart

test: .venv/.test
	.venv/bin/python -m pytest

test-all: .venv/.test
	.venv/bin/python -m pytest -m "slow or not slow"

bench: .venv/.run
	.venv/bin/peakgpt bench

aot: .venv/.run
	.venv/bin/peakgpt aot

lint: .venv/.dev
	.venv/bin/ruff check .

# The wheel is built from the sdist, so a file missing there fails here.
wheel: .venv/.dev
	rm -rf dist
	.venv/bin/python -m build --no-isolation

# The build tools stay in .venv: build isolation would move pybind11's headers each time and so recompile everything.
.venv/.tools: constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) setuptools pybind11 ninja
	touch $@

.venv/.run: .venv/.tools setup.py pyproject.toml $(CSRC)
	$(PIP) --no-build-isolation -e .
	touch $@

.venv/.test .venv/.dev: .venv/.%: .venv/.run
	$(PIP) --no-build-isolation -e '.[$*]'
	touch $@
