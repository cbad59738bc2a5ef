# Two commands need nothing but Debian 12 or 13, Python 3.11 or newer and root: `make demo` and `make test`.
# Each prepares what it needs first (see .ci/prepare.sh) and does that only once.

.DEFAULT_GOAL := help
.PHONY: help demo test bench bench-trixie lint protos clean

help: ## Show this list
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: ## Guided tour: a mesh of two nodes on this machine (needs root)
	@.ci/demo.sh

test: ## The whole test suite, with real namespaces and a real Envoy (needs root)
	@.ci/test.sh

bench: ## Measure beside Envoy, five rounds, and rewrite docs/performance.md (needs root; some twenty minutes)
	@.ci/prepare.sh bench
	@.venv/bin/python -m perf --docs --workers 2

bench-trixie: ## The same on Debian 13's Python and OpenSSL, in a system made for it (needs root and debootstrap)
	@perf/debian13.sh --docs

lint: ## Style, types, import floors, spelling, generated code
	@.ci/lint.sh

protos: ## Generate ztunnel/wire/pb again after editing a .proto
	@.ci/prepare.sh lint
	@.ci/protos.sh write

clean: ## Remove everything that was installed or built in this checkout
	@rm -rf .venv .peers .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .nox build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "verdict: clean"
