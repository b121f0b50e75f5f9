# Everything a developer or a newcomer runs.  Each target sets up what it needs; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Tests start hundreds of processes; each would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE
PY := .venv/bin/python
# As another user than the checkout's owner there is nowhere to keep pytest's cache.
PYTEST := $(PY) -m pytest $(shell test -w . || echo -p no:cacheprovider)
TESTS ?= tests
USER_TESTS ?= tests/contract tests/security tests/integration/process tests/integration/client tests/integration/egress \
  tests/chaos
# Tests share nothing but the machine, so they run side by side, and they wait more than they work; JOBS=0 runs them
# in one process (for a debugger).
JOBS ?= 4
ARGS ?=
FACTOR ?= 50

.PHONY: help setup demo test test-user test-microvm test-kvm test-unit check format docs bench soak chaos fuzz lock clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with every extra (quick when nothing changed)
	@scripts/setup.sh

demo: setup ## an agent works in a sandbox; a program for the hosted tool runs here unchanged
	@$(PY) -m podflare demo $(ARGS)

test: ## set up and run every test but the soak ones; as root, the user-dependent ones once more as nobody
	@scripts/setup.sh --microvm --real-client
	$(PYTEST) -n $(JOBS) -m "not soak" $(TESTS) $(ARGS)
	@if [ "$(TESTS)" = tests ] && [ "$$(id -u)" = 0 ]; then $(MAKE) test-user; fi

# Of virtual machines the contract is enough: what a user id changes is around the hypervisor, not in it.
test-user: setup ## as root: the tests that differ by user id, as an ordinary user
	scripts/test_as_user.sh -n $(JOBS) -k "not microvm or test_engine_contract" $(USER_TESTS) $(ARGS)

test-microvm: ## every test that any engine has to pass, on virtual machines (make test has a part of them)
	@scripts/setup.sh --microvm
	$(PYTEST) -n $(JOBS) --microvm -m "not soak" $(TESTS) $(ARGS)

test-kvm: ## the same on Firecracker and on QEMU with KVM, where that works; tells what was left out and why
	@scripts/setup.sh --microvm
	scripts/test_kvm.sh $(ARGS)

test-unit: setup ## the tests that need no kernel feature: unit and contract
	$(PYTEST) -m "not soak" tests/unit tests/contract $(ARGS)

check: setup ## format, lint, types, imports, stale files, links
	@$(PY) scripts/check.py

format: setup ## let ruff format and fix the code
	$(PY) -m ruff format src tests scripts benchmarks
	$(PY) -m ruff check --fix src tests scripts benchmarks

docs: setup ## write the generated pages anew (docs/cli.md, syscalls.md, engines.md)
	$(PY) scripts/cli_reference.py
	$(PY) scripts/syscalls_reference.py
	$(PY) scripts/engines_reference.py

bench: setup ## the numbers of SPEC.md: table and JSON (ARGS=--full for the long ones)
	$(PY) -m benchmarks.run $(ARGS)

soak: setup ## the long tests
	$(PYTEST) -m soak --timeout 3600 $(TESTS) $(ARGS)

fuzz: setup ## what fuzzes in make test, with FACTOR (50) times as many examples (TESTS=tests/fuzz/test_http.py for one)
	FUZZ_FACTOR=$(FACTOR) $(PYTEST) -n $(JOBS) --timeout 3600 $(if $(filter tests,$(TESTS)),tests/fuzz,$(TESTS)) $(ARGS)

chaos: setup ## kill our processes at random under load for ten minutes (ARGS="--seconds 60 --seed 1")
	PYTHONPATH=tests $(PY) -m chaos $(ARGS)

lock: setup ## pin the newest versions in requirements/*.lock
	scripts/lock.sh

clean: ## remove environments, caches and results
	rm -rf .venv .venv-client .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	rm -rf benchmarks/results dist build
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
