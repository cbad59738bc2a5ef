#!/usr/bin/env bash
# Prepare, then run every check that is not a test; the list of them is in noxfile.py.

source "$(dirname "$0")/common.sh"

say "make lint: prepares .venv, then runs the checks of noxfile.py."
.ci/prepare.sh lint
if ! .venv/bin/nox --tags check </dev/null; then
  say "verdict: FAILED: lint"
  exit 1
fi
say "verdict: lint is clean"
