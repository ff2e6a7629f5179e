# `make` alone shows what there is. PYTHON says which interpreter makes .venv (3.11 or later).
PYTHON ?= python3
VENV := .venv
DOCS_VENV := .venv-docs
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# The variable keeps an announcement of mkdocs-material's out of the output; the date of the last
# commit, and one time zone, make two builds of it equal.
MKDOCS = NO_MKDOCS_2_WARNING=1 TZ=UTC SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 0) \
	$(DOCS_VENV)/bin/python -m mkdocs
DEMO_ARGS := --nproc-per-node 4 --tee 3 examples/word_count.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-pages test-torch test-cluster chaos chaos-nodes bench docs docs-serve lint format \
	system-packages page-packages cluster-packages clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## install into .venv, then run four ranks with teed logs
	$(PY) -m asupervise $(DEMO_ARGS)

# Half of the time a test waits for others: four at once are as fast as two cores allow.
test: $(VENV)/.installed-test system-packages lint  ## lint, types and all tests that need no torch
	$(PY) -m pytest -n 4 --dist loadfile

test-pages: $(VENV)/.installed-test page-packages  ## pages in Chromium, the live view in tmux, all snippets of the documentation
	$(PY) -m pytest -n 2 --dist loadfile -m pages

test-torch: $(VENV)/.installed-torch  ## install torch, then run the tests that need it
	$(PY) -m pytest -m torch tests/torch

test-cluster: $(VENV)/.installed-torch cluster-packages  ## nodes as network namespaces, three etcd members, Slurm, torch over nodes
	$(PY) -m pytest -m cluster tests/cluster

chaos: $(VENV)/.installed-test  ## random groups, faults and endings (SEED=n, ROUNDS=300; random and shown)
	$(PY) tests/chaos/run.py $(if $(SEED),--seed $(SEED)) --rounds $(or $(ROUNDS),300)

chaos-nodes: $(VENV)/.installed-test cluster-packages  ## random faults on three nodes, their etcd and links (SEED=n, ROUNDS=200)
	$(PY) tests/chaos/nodes.py $(if $(SEED),--seed $(SEED)) --rounds $(or $(ROUNDS),200)

bench: $(VENV)/.installed  ## how fast it is, beside its peers and limits (BENCH_ARGS=--help)
	$(PIP) install --quiet -e '.[ui,otel,prometheus,etcd]'
	$(PY) -m benchmarks.install_peers
	$(PY) -m benchmarks $(BENCH_ARGS)

docs: $(DOCS_VENV)/.installed  ## build the documentation into site/; a warning is an error
	$(MKDOCS) build --strict
	@echo "site/index.html"

docs-serve: $(DOCS_VENV)/.installed  ## show it at http://127.0.0.1:8000, anew after each change
	$(MKDOCS) serve --strict

lint: $(VENV)/.installed-test  ## ruff and mypy --strict
	$(PY) -m ruff check --quiet
	$(PY) -m ruff format --check --quiet
	$(PY) -m mypy --strict

format: $(VENV)/.installed-test  ## mend what ruff can mend
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

# $(call have,PROGRAM PACKAGE ...): Debian packages of programs that are missing, installed by root.
define have
	@set -- $(1); missing=; \
	while [ $$# -gt 0 ]; do \
	    command -v $$1 >/dev/null || missing="$$missing $$2"; shift 2; \
	done; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing:$$missing"; \
	    apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null && \
	    exit 0; \
	fi; \
	echo "note: could not install$$missing here; the tests that run it will be skipped" >&2
endef

# Binding is applied by numactl, or by taskset (util-linux); nodes agree through etcd; pages are
# looked at in Chromium, the live view in tmux. The tests run them all for real.
system-packages:
	$(call have,numactl numactl taskset util-linux etcd etcd-server openssl openssl)

page-packages: system-packages
	$(call have,chromium chromium tmux tmux)

cluster-packages: system-packages
	$(call have,ip iproute2 slurmctld slurmctld slurmd slurmd srun slurm-client munged munge)

# A stamp is as new as the last install; pyproject.toml says what is to be installed.
$(VENV)/.installed: pyproject.toml | $(PY)
	$(PIP) install --quiet -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(PY)
	$(PIP) install --quiet -e '.[test,lint]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-torch: $(VENV)/.installed-test
	$(PIP) install --quiet torch==2.13.0 numpy
	@touch $@

# An environment of its own: what tests and mypy find must not depend on `make docs`.
$(DOCS_VENV)/.installed: pyproject.toml | $(DOCS_VENV)/bin/python
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -e '.[docs]'
	@touch $@

$(PY) $(DOCS_VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "asupervise needs Python 3.11 or later: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(dir $(@D))

clean:  ## remove .venv and everything built or cached
	rm -rf $(VENV) .venv-bench $(DOCS_VENV) site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
