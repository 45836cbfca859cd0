# Every command sets up what it needs first: `make demo` and `make test` work in a fresh clone.
# Another Python than python3: make PYTHON=python3.12 ...

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Where the environment forbids bytecode, every start of Python would compile all that it imports.
ifneq ($(PYTHONDONTWRITEBYTECODE),)
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/pycache
endif
# Files of tests side by side; compiling, which is most of their time, takes one core each.
WORKERS ?= 2
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadfile
# Files of tests that compile little.
FAST = $(addprefix tests/,core/test_imports.py core/test_config.py core/test_options.py \
	core/test_log.py core/test_report.py core/test_tokenizer.py core/test_data_partition.py \
	core/test_data_text.py parallel/test_stop.py parallel/simulation/test_simulator.py)
SETUP = command -v $(PYTHON) > /dev/null || { \
	echo "jaxfm: there is no $(PYTHON) here: install Python 3.11 or newer, or name yours, as in \`make PYTHON=python3.12 ...\`." >&2; exit 1; }; \
	$(PYTHON) tools/bootstrap.py --venv $(VENV)

.DEFAULT_GOAL = help
.PHONY: help venv demo test test-long test-all test-fast smoke lint format types bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: venv  ## federate a model, cut a draft out of it, decode with both, write a report
	$(BIN)/python -m jaxfm.launch.demo $(ARGS)

venv:  ## the environment alone
	@$(SETUP)

test:  ## all but the long and the slow tests (ARGS="-k name" picks, WORKERS=1 takes less memory)
	@$(SETUP) --parity
	$(PYTEST) $(ARGS)

test-long:  ## those that take longer (tests/long.txt); CI runs them after `make test`
	@$(SETUP) --parity
	$(PYTEST) -m "long and not slow" $(ARGS)

test-all:  ## all tests
	@$(SETUP) --parity
	$(PYTEST) -m "" $(ARGS)

test-fast: venv  ## the inner loop: one small test of each part, and the files that compile little
	$(BIN)/pytest -n $(WORKERS) -m smoke $(ARGS)
	$(PYTEST) $(FAST) $(ARGS)

smoke: venv  ## one small test of each part
	$(BIN)/pytest -m smoke $(ARGS)

lint: venv  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The folders get their import names only when installed, so that is what mypy reads.
types: venv  ## mypy
	@rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/site .
	cd build/site && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p jaxfm

bench: venv  ## every benchmark, quickly; the last line of each is one JSON object
	@for file in $(wildcard benchmarks/*.py); do echo "$$file"; $(BIN)/python $$file --quick || exit 1; done

clean:  ## everything that the commands above made, but runs/
	rm -rf $(VENV) $(VENV).log build dist *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
