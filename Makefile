# Every target sets up what it needs in .venv, with only Python 3.10 or newer and make on the machine.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	&& echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test clients sim attack chaos soak reliability style format bench bench-quick profile scale clean

help:
	@echo "make demo         a broker and two workers count words while one worker is killed (ROOT=DIR: of your files)"
	@echo "make test         style, types and all tests"
	@echo "make clients      scikit-learn, scipy, dask, black and others on achilles, and joblib's own tests"
	@echo "make sim          20,000 simulated clusters, some 6 minutes on two cores (SIM_SEEDS=N)"
	@echo "make attack       the attack table: what was tried, and what came of it"
	@echo "make chaos        real processes that are killed, stopped and cut off in every way, some 9 minutes"
	@echo "make soak         the same for hours, every nemesis with every load (ROUNDS=N, SECONDS=S)"
	@echo "make reliability  the table of promises in RELIABILITY.md, measured here, in under 30 minutes"
	@echo "make style        ruff, ruff format and mypy --strict only"
	@echo "make format       lay the code out, and repair what ruff can repair"
	@echo "make bench        speed against eight other systems, some 20 minutes (BENCH=--quick: some three)"
	@echo "make bench-quick  speed against ProcessPoolExecutor, in one run"
	@echo "make profile      flame graphs of client, broker, worker and runner, and where a round trip's time goes"
	@echo "make scale        what a broker costs with many sessions and long queues, and where one ends (SCALE=--docs)"
	@echo "make clean        remove .venv, builds and caches"

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py $(if $(ROOT),--root '$(ROOT)')

test: style
	$(BIN)/python -m pytest

clients: $(VENV)/.installed-clients
	$(BIN)/python -m pytest -o faulthandler_timeout=150 tests/clients

# The seeds of `make test` and many more; two processes, because the smallest machines have two cores.
SIM_SEEDS ?= 20000
sim: $(VENV)/.installed-dev
	$(BIN)/python -m tests.sim --count $(SIM_SEEDS) --jobs 2

attack: $(VENV)/.installed-dev
	$(BIN)/python -m tests.security

# Every nemesis once for 20 s; SEED=N for other schedules.
SEED ?= 0
chaos: $(VENV)/.installed-dev
	$(BIN)/python -m tests.chaos --rounds 1 --seed $(SEED) --keep-going
	$(BIN)/python -m tests.chaos --rounds 1 --seed $(SEED) --keep-going --near --seconds 8

# Seven rounds turn each nemesis through all loads.
ROUNDS ?= 7
SECONDS ?= 60
soak: $(VENV)/.installed-dev
	$(BIN)/python -m tests.chaos --rounds $(ROUNDS) --seed $(SEED) --seconds $(SECONDS) --keep-going

reliability: $(VENV)/.installed-dev
	$(BIN)/python -m tests.reliability --write

style: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The peers' environments are made in build/bench on first use, which takes some minutes more.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.compare $(BENCH)

bench-quick: $(VENV)/.installed
	$(BIN)/python -m benchmarks.quick

profile: $(VENV)/.installed-profile
	$(BIN)/python -m benchmarks.profile $(PROFILE)

scale: $(VENV)/.installed
	$(BIN)/python -m benchmarks.scale $(SCALE)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is younger than what it was made from, or the environment is made anew: also after an interrupted run.
$(VENV)/.installed: pyproject.toml
	@test -n '$(PYTHON)' || { echo 'Python 3.10 or newer is needed: make PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

$(VENV)/.installed-clients: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --group clients
	@touch $@

$(VENV)/.installed-profile: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group profile
	@touch $@
