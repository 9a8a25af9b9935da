# Everything runs in .venv, which the first target makes and later ones bring up to date only when their inputs changed.
PYTHON ?= python3
# The folders kernels/, engine/, bench/ must not be importable by their bare names.
export PYTHONSAFEPATH = 1

PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CSRC = $(wildcard csrc/*/*)

.PHONY: run test test-all test-native test-neon sanitize bench lint aot wheel

run: .venv/.run
	.venv/bin/peakgpt quickstart

# A worker per core; their OpenMP teams wait without spinning, or they would take the cores from each other.
test test-all: export OMP_WAIT_POLICY = passive
test: .venv/.test
	.venv/bin/python -m pytest -n logical

# Slow tests too, then the usual ones with the other Triton that the kernels are built for.
test-all: .venv/.test .venv-triton36/.ready
	.venv/bin/python -m pytest -n logical -m "slow or not slow"
	.venv-triton36/bin/python -m pytest -n logical

# The kernels without Python, once per instruction set; needs a C++ compiler only.
test-native:
	$(MAKE) -C tests/native check

# The same cross-compiled for aarch64; needs the packages g++-aarch64-linux-gnu and qemu-user.
test-neon:
	$(MAKE) -C tests/native check FLAVOUR=neon

# The same under AddressSanitizer with UBSan, then under ThreadSanitizer; needs the packages clang and libomp-dev.
sanitize:
	$(MAKE) -C tests/native check FLAVOUR=asan
	$(MAKE) -C tests/native check FLAVOUR=tsan

# Takes a while: torch.compile is a contender. The results land in bench/results.
bench: .venv/.run
	.venv/bin/peakgpt bench ops
	.venv/bin/peakgpt bench train

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

.venv/.test .venv/.dev: .venv/.%: pyproject.toml constraints.txt | .venv/.run
	$(PIP) --no-build-isolation -e '.[$*]'
	touch $@

# Its own Triton over .venv's packages, with their .pth files (the editable peakgpt is one).
# numpy: the interpreter of Triton 3.6 breaks with 2.4 (range over a tensor bound).
.venv-triton36/.ready: Makefile constraints.txt | .venv/.test
	.venv/bin/python -m venv --clear --without-pip .venv-triton36
	echo "import site; site.addsitedir('$$(echo $(CURDIR)/.venv/lib/python*/site-packages)')" \
	  >$$(echo .venv-triton36/lib/python*/site-packages)/base.pth
	.venv-triton36/bin/python -m pip install --quiet --no-deps triton==3.6.0 'numpy<2.4'
	touch $@
