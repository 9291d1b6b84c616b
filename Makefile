# `make` lists the targets; the README and CONTRIBUTING.md say when to use which.

# PYTHON chooses the interpreter; the environment is then named after its version.
ifdef PYTHON
PYTHON_VERSION := $(shell "$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&-)
VENV ?= .venv-$(PYTHON_VERSION)
endif
VENV ?= .venv
DIST ?= dist
# Neighbouring tests share a worker, and with it what their modules fit and compile once.
PYTEST_ARGS ?= -n auto --maxprocesses=4 --dist worksteal

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
WHEEL := $(DIST)/pymc_streaming-$(VERSION)-py3-none-any.whl
INSTALLED := $(VENV)/installed
DOCS_INSTALLED := $(VENV)/installed-docs
BENCH_INSTALLED := $(VENV)/installed-bench
PACKAGE := pymc/variational
# The directory is listed for the files that leave it.
SOURCES := pyproject.toml $(wildcard $(PACKAGE)/*.py) $(PACKAGE)/_streaming \
    $(shell find $(PACKAGE)/_streaming -name "*.py")

# Everything runs on the installed wheel, also what imports the tests, which else add the checkout.
export TEST_INSTALLED := 1
RUN := $(VENV)/bin/python -m
PIP := $(RUN) pip --quiet --disable-pip-version-check
ASV := cd benchmarks && ASV_PYTHONPATH="$(CURDIR)" "$(abspath $(VENV))/bin/python" -m asv

.DELETE_ON_ERROR:
.PHONY: help demo results reproduce test matrix lint format wheel docs bench pymc clean

help:  ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile

demo: $(INSTALLED)  ## Ordered rows go wrong, shuffled ones right, on a synthetic order book (DATA=dir FEATURES="a b" LABEL=c: on your rows)
	$(RUN) benchmarks.orderbook.demo $(if $(DATA),--data "$(DATA)") \
	    $(if $(FEATURES),--features "$(FEATURES)") $(if $(LABEL),--label "$(LABEL)")

results: $(INSTALLED)  ## Run the demo and put its table and figure into the README and the docs
	$(RUN) benchmarks.orderbook.demo --results docs/source/results --readme README.md

reproduce: $(INSTALLED)  ## The experiment at 121.8 million and a billion rows, in under 2 hours (DATA=dir: and your captures)
	$(RUN) benchmarks.orderbook.reproduce --results docs/source/results --page docs/source/evidence.md \
	    $(if $(DATA),--captures "$(DATA)")

# Each process of the tests has a core; threads of the linear algebra would wait for each other.
test pymc: export OPENBLAS_NUM_THREADS ?= 1

test: $(INSTALLED)  ## Run the test suite on the built wheel (PYTEST_ARGS, PYTHON)
	$(RUN) pytest $(PYTEST_ARGS)

matrix:  ## Run the tests on each Python that is here, with the oldest and the newest pyarrow (PYTEST_ARGS)
	scripts/matrix.sh $(if $(filter command% environment%,$(origin PYTEST_ARGS)),$(PYTEST_ARGS))

lint: $(INSTALLED)  ## Check style and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: $(INSTALLED)  ## Put the code in PyMC's style
	$(RUN) ruff check --fix --exit-zero .
	$(RUN) ruff format .

docs: $(DOCS_INSTALLED)  ## Build the documentation in build/docs; warnings are errors
	$(RUN) sphinx -W --keep-going -n -q -d build/doctrees docs/source build/docs

bench: $(BENCH_INSTALLED)  ## Run the ASV suites on the built wheel (BENCH_ARGS)
	test -e ~/.asv-machine.json || ($(ASV) machine --yes > /dev/null)
	$(ASV) run --python=same --show-stderr $(BENCH_ARGS)

pymc: $(INSTALLED)  ## Put streaming into PyMC's own source, commit by commit, and run PyMC's gates (PYMC_ARGS="--quick --checkout DIR", PYTEST_ARGS)
	$(RUN) upstream.check $(PYMC_ARGS) -- $(PYTEST_ARGS)

wheel: $(WHEEL)  ## Build the wheel

clean:  ## Remove environments, wheels and caches
	rm -rf .venv .venv-* build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@python=$$(scripts/find-python.sh "$(PYTHON)") && \
	echo "Making $(VENV) with $$python" && \
	"$$python" -m venv "$(VENV)"

$(WHEEL): $(SOURCES) | $(VENV)/pyvenv.cfg
	$(PIP) wheel --no-deps --wheel-dir "$(DIST)" .

# Leaving bytecode to the first import halves the time of the installation.
$(INSTALLED): $(WHEEL) | $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV); the first time takes a minute"
	$(PIP) install --no-compile --force-reinstall --no-deps "$(WHEEL)"
	$(PIP) install --no-compile "$(WHEEL)[dev]" $(if $(filter-out newest,$(PYARROW)),"pyarrow==$(PYARROW)")
	@touch "$@"

$(DOCS_INSTALLED): $(INSTALLED)
	$(PIP) install --no-compile "$(WHEEL)[docs]"
	@touch "$@"

$(BENCH_INSTALLED): $(INSTALLED)
	$(PIP) install --no-compile "$(WHEEL)[bench]"
	@touch "$@"
