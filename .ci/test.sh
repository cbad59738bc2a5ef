#!/usr/bin/env bash
# Prepare, then run the whole suite: first what needs no kernel, then namespaces and real peers.
# A test that cannot run fails (ZTUNNEL_TESTS_STRICT): a missing program must never look like success.

source "$(dirname "$0")/common.sh"

need_root "make test" "it builds network namespaces"
say "make test: prepares .venv and the test peers, then runs every test of the suite."
.ci/prepare.sh test
mkdir -p .cache
export ZTUNNEL_TESTS_STRICT=1
broken=()

run_part() { # run_part NAME MARKS
  say "-- $1"
  # No test may need the terminal; worksteal because a few tests take a hundred times as long as most.
  if ! .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m "$2" tests \
    </dev/null 2>&1 | tee ".cache/test-${1%% *}.log"; then
    broken+=("$1")
  fi
}

count() { # count OUTCOME: over the closing lines of both parts
  tail -qn 1 .cache/test-unit.log .cache/test-netns.log | grep -Eo "[0-9]+ $1" | awk '{ n += $1 } END { print n + 0 }'
}

run_part "unit and flow tests" "not netns and not interop"
run_part "netns and interop tests" "netns or interop"

passed=$(count passed || true)
failed=$(($(count failed || true) + $(count error || true)))
say "$passed passed, $failed failed"
if [ ${#broken[@]} -gt 0 ]; then
  say "verdict: FAILED: $(IFS=,; echo "${broken[*]}") ($failed of $((passed + failed))) after $SECONDS s"
  exit 1
fi
say "verdict: all $passed tests passed in $SECONDS s"
