#!/usr/bin/env bash
# Prepare, then run the guided tour.

source "$(dirname "$0")/common.sh"

need_root "make demo" "it builds network namespaces"
say "make demo: prepares .venv, then runs a mesh of two nodes on this machine and shows what it does."
.ci/prepare.sh run
code=0
.venv/bin/ztunnel demo || code=$?
[ $code -eq 0 ] || say "verdict: FAILED: the demo ended with exit code $code"
exit $code
