#!/usr/bin/env bash
# Run the tests that differ by user id once more as an ordinary user.  For root: an ordinary user's `make test`
# is that already.  The checkout may lie where nobody else can read it, so the user gets a copy of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "$(id -u)" != 0 ]; then echo "not root: make test has run as an ordinary user"; exit 0; fi
uid=65534
as_user() { setpriv --reuid=$uid --regid=$uid --clear-groups env -i PATH="$PATH" HOME="$home" TMPDIR="$home" LANG=C.UTF-8 \
  PYTHONDONTWRITEBYTECODE=1 "$@"; }
home=$(mktemp -d /tmp/pfu-XXXXXX)
trap 'rm -rf "$home"' EXIT
chown $uid:$uid "$home"
venv=$PWD/.venv
if ! as_user "$venv/bin/python" -c pass 2>/dev/null; then
  cp -a .venv "$home/.venv" && chown -h $uid:$uid "$home/.venv"
  venv=$home/.venv
fi
if ! as_user "$venv/bin/python" -c pass; then
  echo "another user cannot run the interpreter of .venv; make it anew: make clean setup PYTHON=/usr/bin/python3"
  exit 1
fi
git ls-files -z --cached --others --exclude-standard -- src tests scripts benchmarks pyproject.toml README.md docs examples | tar --null -T - -c | tar -x -C "$home"
cd "$home"
"$venv/bin/python" -m compileall -q src # which each of the many processes would do, for the user may not write there
# The editable install names the checkout; the copy comes first on the path.
as_user PYTHONPATH="$home/src" "$venv/bin/python" -m pytest -p no:cacheprovider -m "not soak" "$@"
