#!/usr/bin/env bash
# Measure on Debian 13's Python and OpenSSL (3.5) while the machine runs something else: perf/debian13.sh [ARGUMENT...]
# The arguments are those of `python -m perf`. All samples come back as .cache/debian13.json; with --docs they are drawn
# into docs/performance.md, beside what was measured elsewhere.
#
# A Debian 13 system is made once in .cache/debian13, from the mirror that this machine's apt uses. This checkout is copied
# into it and prepared there. The benchmark then runs in it, with namespaces of mounts and of processes of its own: when
# this script ends, however it ends, the kernel ends what ran in there, and with it go all mounts and network namespaces.
# Inside, the machine's own files are below /machine, so that --peer, --against and --tree work.

source "$(dirname "${BASH_SOURCE[0]}")/../.ci/common.sh"

SUITE=trixie
PACKAGES=ca-certificates,gcc,libc6-dev,python3,python3-venv,util-linux
ROOT=.cache/debian13
INSIDE=/checkout
RESULTS=.cache/debian13.json

debian_mirror() { # the first Debian archive that this machine's apt knows (its security archive is another)
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1
}

make_root() {
  local mirror
  [ ! -e "$ROOT/.complete" ] || return 0
  command -v debootstrap >/dev/null || give_up "needs debootstrap. Try: apt-get install debootstrap"
  mirror=$(debian_mirror)
  [ -n "$mirror" ] || give_up "apt knows no Debian archive on this machine. Try: apt-get update"
  rm -rf "$ROOT"
  mkdir -p "$ROOT"
  quietly "making a Debian 13 system in $ROOT" \
    debootstrap --variant=minbase --include="$PACKAGES" "$SUITE" "$ROOT" "$mirror"
  touch "$ROOT/.complete"
}

share_the_net() { # how this machine finds names, trusts and installs is how the system inside does
  local file
  for file in /etc/resolv.conf /etc/hosts /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
    [ ! -e "$file" ] || cp --dereference "$file" "$ROOT$file"
  done
}

copy_checkout() { # what was prepared inside stays, unless what it needs has changed (prepare.sh sees to that)
  mkdir -p "$ROOT$INSIDE" "$ROOT/machine"
  find "$ROOT$INSIDE" -mindepth 1 -maxdepth 1 ! -name .venv ! -name .peers -exec rm -rf {} +
  tar --create --exclude-vcs --exclude='./.*' --exclude=__pycache__ . | tar --extract --directory "$ROOT$INSIDE"
  tar --create .ci | tar --extract --directory "$ROOT$INSIDE"
}

enter() { # enter COMMAND...: inside, as the first process there; killed when this script is
  # shellcheck disable=SC2016 # the inner shell expands these
  setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --propagation private bash -euc '
    root=$1 inside=$2
    shift 2
    mount --types proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount --types tmpfs tmpfs "$root/tmp"
    mount --rbind / "$root/machine"
    cd "$root"
    exec chroot . env --chdir="$inside" --unset=VIRTUAL_ENV --unset=PYTHONPATH \
      PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp "$@"
  ' debian13 "$ROOT" "$INSIDE" "$@"
}

words=() # the arguments, with paths as they are inside
translate_arguments() { # translate_arguments ARGUMENT...
  local word before=
  for word in "$@"; do
    case $before in --peer | --against | --tree) word=/machine$(realpath "$word") || give_up "there is no $word" ;; esac
    words+=("$word")
    before=$word
  done
}

need_root "perf/debian13.sh" "it makes a Debian system and builds network namespaces"
translate_arguments "$@"
make_root
share_the_net
quietly "copying this checkout into it" copy_checkout
enter .ci/prepare.sh bench
rm -f "$RESULTS"
enter .venv/bin/python -m perf "${words[@]}" --json results.json
cp "$ROOT$INSIDE/results.json" "$RESULTS"
case " $* " in *" --docs "*)
  cp --recursive "$ROOT$INSIDE/docs/performance" docs/
  .ci/prepare.sh run
  .venv/bin/python -m perf --redraw
  ;;
esac
say "verdict: measured on Debian 13; all samples are in $RESULTS"
