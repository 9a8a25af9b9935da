# Everything runs in .venv. The first target creates it; later targets update it only if their inputs changed.
PYTHON ?= python3
# The folders kernels/, engine/, bench/ must not be importable by their bare names.
export PYTHONSAFEPATH = 1

PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CSRC = $(wildcard csrc/*/*)

.PHONY: run test test-all test-native test-neon sanitize bench bench-all lint aot wheel

run: .venv/.run
	.venv/bin/peakgpt quickstart

# One worker per core. Their OpenMP threads wait without spinning, because spinning threads take cores from the others.
test test-all: export OMP_WAIT_POLICY = passive
test: .venv/.test
	.venv/bin/python -m pytest -n logical

# All tests with the slow ones, then the tests without the slow ones under the oldest supported Triton.
test-all: .venv/.test .venv-triton36/.ready
	.venv/bin/python -m pytest -n logical -m "slow or not slow"
	.venv-triton36/bin/python -m pytest -n logical

# The C++ kernels without Python, once per instruction set, and with random delays where threads meet. Needs a C++
# compiler only.
test-native:
	$(MAKE) -C tests/native check delays

# The same tests cross-compiled for aarch64. Needs the packages g++-aarch64-linux-gnu and qemu-user.
test-neon:
	$(MAKE) -C tests/native check FLAVOUR=neon

# The same tests under AddressSanitizer with UBSan, then under ThreadSanitizer. Needs the packages clang and libomp-dev.
sanitize:
	$(MAKE) -C tests/native check FLAVOUR=asan
	$(MAKE) -C tests/native check FLAVOUR=tsan

# The README's cases, in about 16 minutes on 2 cores. Writes to bench/results; a second call continues a run that was stopped.
bench: .venv/.run
	.venv/bin/peakgpt bench suite --readme

# Every case: about 2 hours on 2 cores.
bench-all: .venv/.run
	.venv/bin/peakgpt bench suite

aot: .venv/.run
	.venv/bin/peakgpt aot

lint: .venv/.dev
	.venv/bin/ruff check .

# Builds the wheel from the sdist, so a file that the sdist lacks makes it fail.
wheel: .venv/.dev
	rm -rf dist
	.venv/bin/python -m build --no-isolation

# The build tools stay in .venv: build isolation would put pybind11's headers in a new folder and recompile all files.
.venv/.tools: constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) setuptools pybind11 ninja
	touch $@

.venv/.run: .venv/.tools setup.py pyproject.toml api $(CSRC)
	$(PIP) --no-build-isolation -e .
	touch $@

.venv/.test .venv/.dev: .venv/.%: pyproject.toml constraints.txt | .venv/.run
	$(PIP) --no-build-isolation -e '.[$*]'
	touch $@

# Another Triton on top of the packages of .venv, with their .pth files (the editable peakgpt is one of them).
# The interpreter of Triton 3.6 fails with numpy 2.4 (range over a tensor bound).
.venv-triton36/.ready: Makefile constraints.txt | .venv/.test
	.venv/bin/python -m venv --clear --without-pip .venv-triton36
	echo "import site; site.addsitedir('$$(echo $(CURDIR)/.venv/lib/python*/site-packages)')" \
	  >$$(echo .venv-triton36/lib/python*/site-packages)/base.pth
	.venv-triton36/bin/python -m pip install --quiet --no-deps triton==3.6.0 'numpy<2.4'
	touch $@
