# Every target makes or repairs .venv first, so each of them runs on a bare machine.
#
# Which torch: constraints.txt pins the version, and pip takes the build its index offers, which on Linux is the
# CUDA one, several GB. On a machine without a GPU, point PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS at the CPU build.

PYTHON ?= python3
SHELL := bash
STAMP := .venv/.installed

# Two tiers: tiny models in this process; and what takes longer, such as real models, kills and other environments.
# `.venv/bin/pytest` alone runs both, and the tests that need a GPU where there is one.
DEFAULT_TIER := not slow and not real_model and not gpu
SLOW_TIER := (slow or real_model) and not gpu
WORKERS ?= 2

# .venv can be kept when its python runs and is new enough, and when it was made for this folder:
# after a move its scripts and the editable install still point at the old place.
USABLE := $(shell .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& test "$$(cat $(STAMP) 2>/dev/null || echo '$(CURDIR)')" = '$(CURDIR)' && echo yes)

# $(call install,EXTRA): pip's output reduced to one line a package; errors and warnings pass through.
install = set -o pipefail; .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off \
	-c constraints.txt -e '.[$(1)]' | awk ' \
	/^ *(Downloading|Using cached|Processing) / && !/\.metadata/ { sub(/^ */, "  "); print substr($$0, 1, 100) } \
	/^Installing collected/ { print "  installing " NF - 3 " packages" } { fflush() }'

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check bench gpu clean venv

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s  %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## run the main job end to end
	.venv/bin/python scripts/demo.py

test: $(STAMP)  ## run the default tier of tests
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "$(DEFAULT_TIER)"

test-slow: $(STAMP)  ## run the slow tier: real models, kills, other environments
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadscope -m "$(SLOW_TIER)"

check: $(STAMP)  ## check format, lint and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

bench: .venv/.installed-bench  ## measure side by side with peers
	.venv/bin/python benchmarks/run.py

gpu: .venv/.installed-bench  ## measure training on this machine's GPU; SECTIONS="card modes" for some of it
	.venv/bin/python benchmarks/gpu.py $(SECTIONS)

clean:  ## remove .venv, caches and everything built; runs/ stays
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

ifneq ($(USABLE),yes)
$(STAMP): venv
endif

venv:
	@command -v '$(PYTHON)' >/dev/null || { echo "error: no '$(PYTHON)' on PATH" >&2; \
		echo "  fix: install Python 3.11 or newer, or say where it is: make PYTHON=/path/to/python3" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is $$('$(PYTHON)' --version 2>&1), and the tested versions in constraints.txt need 3.11 or newer" >&2; \
		echo "  fix: make PYTHON=/path/to/a/newer/python3" >&2; exit 1; }
	@echo "making .venv with $$('$(PYTHON)' --version)"
	@rm -rf .venv
	@'$(PYTHON)' -m venv .venv

$(STAMP): pyproject.toml constraints.txt
	@echo "installing lora and its development tools into .venv"
	@$(call install,dev)
	@echo '$(CURDIR)' > $@

.venv/.installed-bench: $(STAMP)
	@echo "installing the peers that the benchmarks compare with"
	@$(call install,bench)
	@touch $@
