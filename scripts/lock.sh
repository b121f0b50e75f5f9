#!/usr/bin/env bash
# Writes requirements/*.lock anew: what pip resolves today from pyproject.toml, pinned.  No index is named in them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

freeze() { # LOCK REQUIREMENT...
  local lock=$1
  shift
  rm -rf "$work/venv"
  "$python" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -qq "$@"
  {
    printf '# Written by scripts/lock.sh (make lock) on Python %s; do not edit.\n' "$("$python" -c 'import platform; print(platform.python_version())')"
    "$work/venv/bin/python" -m pip freeze --exclude podflare --exclude setuptools
  } >"$work/lock"
  cp "$work/lock" "requirements/$lock"
}

freeze dev.lock '.[dev]'
freeze real-client.lock 'podflare==0.0.22' 'anthropic==0.125.0' # a version of before 1.0, with another HTTP library
printf 'podflare==0.0.22\n' >>requirements/real-client.lock
