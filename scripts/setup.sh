#!/usr/bin/env bash
# Makes .venv in the checkout, with podflare (editable) and every extra.  Returns at once when nothing changed.
#
#   scripts/setup.sh                 the development environment
#   scripts/setup.sh --microvm       besides it the system's packages for virtual machines (as root; else it says which)
#   scripts/setup.sh --real-client   besides it .venv-client, holding published clients that tests drive: podflare's, and an old one of Anthropic's
#
# PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 022 # an environment made by root stays usable for everybody else on the machine

die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
makes_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

# The system's interpreter comes first: one that lives in a home directory is closed to other users,
# and a sandbox's root holds /usr anyway.
choose_python() {
  local candidate closed=""
  for candidate in ${PYTHON:-/usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
    candidate=$(command -v "$candidate") || continue
    new_enough "$candidate" || continue
    if makes_venv "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
    closed=${closed:-$candidate}
  done
  [ -n "$closed" ] || die "no Python 3.10 or newer found${PYTHON:+ at $PYTHON}; install one, or say PYTHON=/path/to/python3"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    printf 'setup: %s cannot make environments; installing python3-venv\n' "$closed" >&2
    apt_install python3-venv >&2
    makes_venv "$closed" && printf '%s\n' "$closed" && return
  fi
  die "$closed cannot make virtual environments; install ensurepip for it (Debian and Ubuntu: apt-get install python3-venv)"
}

apt_install() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y --no-install-recommends "$@" </dev/null ||
    { apt-get update </dev/null && apt-get install -y --no-install-recommends "$@" </dev/null; }
}

# System libraries that features load at run time.  Missing ones never stop the set-up: `podflare doctor` names them too.
system_packages() {
  local library package
  while read -r library package; do
    "$1" -c "import ctypes; ctypes.CDLL('$library')" 2>/dev/null && continue
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      printf 'setup: installing %s\n' "$package"
      apt_install "$package" || printf 'setup: %s could not be installed; the process engine needs it\n' "$package" >&2
    else
      printf 'setup: %s is missing and the process engine needs it (Debian and Ubuntu: apt-get install %s)\n' "$library" "$package" >&2
    fi
  done <<'PACKAGES'
libseccomp.so.2 libseccomp2
PACKAGES
}

# What building images and running virtual machines calls.  Never stops the set-up: tests of the rest need none of it.
microvm_packages() {
  local program package missing=()
  while read -r program package; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("$package")
  done <<'PROGRAMS'
qemu-system-x86_64 qemu-system-x86
sqfstar squashfs-tools
lz4 lz4
mkfs.ext4 e2fsprogs
ip iproute2
PROGRAMS
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    printf 'setup: installing %s for virtual machines\n' "${missing[*]}"
    apt_install "${missing[@]}" >/dev/null && return
  fi
  printf 'setup: virtual machines need %s, not installed: their tests will be skipped (as root: apt-get install %s)\n' \
    "${missing[*]}" "${missing[*]}" >&2
}

# environment STAMP_INPUTS: the path is part of it, because a moved environment has scripts that point elsewhere.
fingerprint() { { pwd -P && cat "$@"; } | sha256sum | cut -d' ' -f1; }

fresh_environment() { # DIRECTORY PYTHON: an environment that works, made anew when there is none or it broke
  if ! "$1/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    [ "$(cat "$1/.made-in" 2>/dev/null || true)" != "$(pwd -P)" ]; then
    "$2" -m venv --clear "$1"
    pwd -P >"$1/.made-in"
  fi
}

writable() { [ ! -e "$1" ] && [ -w . ] || [ -w "$1" ]; }

main_environment() {
  local stamp now python
  now=$(fingerprint pyproject.toml requirements/dev.lock scripts/setup.sh)
  stamp=.venv/.setup-stamp
  [ "$(cat $stamp 2>/dev/null || true)" = "$now" ] && [ -x .venv/bin/podflare ] && return
  [ ! -L .venv ] || die ".venv is a link to $(readlink .venv), and making it anew would empty that; run make setup there"
  writable .venv || die ".venv is out of date and belongs to another user; ask its owner to run make setup, or use a clone of your own"
  python=$(choose_python)
  system_packages "$python"
  printf 'setup: .venv with %s (%s)\n' "$python" "$("$python" -V)"
  fresh_environment .venv "$python"
  if .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    .venv/bin/python -m pip install -qq -r requirements/dev.lock
    .venv/bin/python -m pip install -qq --no-deps --no-build-isolation -e .
  else
    printf 'setup: the lock is for Python 3.11 and newer; installing by the ranges of pyproject.toml\n'
    .venv/bin/python -m pip install -qq -e '.[dev]'
  fi
  printf '%s\n' "$now" >$stamp
}

client_environment() {
  local stamp now
  now=$(fingerprint requirements/real-client.lock scripts/setup.sh)
  stamp=.venv-client/.setup-stamp
  [ "$(cat $stamp 2>/dev/null || true)" = "$now" ] && return
  writable .venv-client || return 0
  printf 'setup: .venv-client with the published clients\n'
  fresh_environment .venv-client "$(choose_python)"
  if .venv-client/bin/python -m pip install -qq -r requirements/real-client.lock; then
    printf '%s\n' "$now" >$stamp
  else
    printf 'setup: the published clients could not be installed; tests that drive them will be skipped\n' >&2
  fi
}

exec 9<. # two runs at a time in one checkout: the second waits, then finds the work done
flock 9
main_environment
for part in "$@"; do
  case $part in
    --real-client) client_environment ;;
    --microvm) microvm_packages ;;
    *) die "unknown option $part" ;;
  esac
done
