# Sourced by the scripts beside it: where we are, how we speak, how we fail.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 022

# A root shell made by `su` may lack the sbin folders, where ip, nft and conntrack live.
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
log=.cache/prepare.$$.log
trap 'rm -f "$log"' EXIT

say() { printf '%s\n' "$*"; }

give_up() {
  say "verdict: FAILED: $*"
  exit 1
}

need_root() { # need_root COMMAND WHY
  if [ "$(id -u)" -ne 0 ]; then
    say "verdict: NOT RUN: '$1' needs root, because $2. Try: sudo $1"
    exit 1
  fi
}

quietly() { # quietly WHAT COMMAND...: one line if it works, all its output if it does not
  local what=$1 started=$SECONDS
  shift
  mkdir -p .cache
  printf '  %-60s' "$what"
  if "$@" >"$log" 2>&1 </dev/null; then
    say "done ($((SECONDS - started)) s)"
  else
    say "FAILED"
    cat "$log"
    give_up "$what"
  fi
}
