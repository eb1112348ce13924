# make demo       train a small language model, prefill, decode: prints tokens/s, writes examples/out/loss.png
# make test       the test suite (GPU tests run where there is a GPU)
# make fuzz       many more drawn cases: 2,000 on a CPU, and where there is a GPU 500 there, with another seed each time
# make soak       replays, threads, memory: minutes on a GPU, less on a CPU
# make lint       ruff, mypy, clang-format, and whether the tables of the docs are those of the results
# make wheel      a wheel in dist/ for PYTHON, with the CUDA kernels where nvcc is found
#
# PYTHON=python3.12   which Python (3.10 or newer)
# SYSTEM=1            use PYTHON's own packages as they are: nothing is installed, no index is needed

PYTHON ?= python3
DEMO_ARGS ?=
TEST_ARGS ?= -n 2

CUDA_SOURCES := $(shell find csrc -type f)

ifdef SYSTEM
  RUN := $(PYTHON)
  READY :=
  # An installed flashkda_ops comes before this tree, since it may hold the kernels.
  export PYTHONPATH := $(shell cd / && $(PYTHON) -c "import flashkda_ops" 2>/dev/null || echo $(CURDIR):)$(PYTHONPATH)
else
  RUN := .venv/bin/python
  READY := .venv/ready
endif

.PHONY: demo test fuzz soak lint wheel clean

demo: $(READY)
	$(RUN) examples/train_and_generate.py $(DEMO_ARGS)

test: $(READY)
	PYTHONSAFEPATH=1 $(RUN) -m pytest $(TEST_ARGS)

fuzz: $(READY)
	PYTHONSAFEPATH=1 $(RUN) -m pytest -m "fuzz and not gpu" --hypothesis-profile=fuzz $(TEST_ARGS) tests
	PYTHONSAFEPATH=1 $(RUN) -m pytest -m "fuzz and gpu" --hypothesis-profile=fuzz-gpu tests

soak: $(READY)
	PYTHONSAFEPATH=1 $(RUN) -m pytest tests/test_soak.py

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) benchmarks/tables.py --check
	$(RUN) -c "import clang_format; clang_format.clang_format()" --dry-run -Werror $(CUDA_SOURCES)

wheel:
	$(PYTHON) -m pip wheel . --no-deps -w dist

clean:
	rm -rf .venv build dist *.egg-info examples/out

.venv/ready: requirements-dev.txt pyproject.toml setup.py $(CUDA_SOURCES)
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'flashkda_ops needs Python 3.10 or newer')"
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -r requirements-dev.txt
	.venv/bin/python -m pip install --no-deps -e .
	touch $@
