#!/usr/bin/env bash
# Every test that virtual machines run in, on Firecracker and on QEMU, where KVM works; elsewhere what can be tried of
# Firecracker without it.  Says what was left out and why.  Arguments: for pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
export PYTHONPATH=$PWD/src
# What is skipped pytest itself says (-rs).
run() { echo "== $1"; shift; timeout 3600 "$python" -m pytest -m "not soak" -rs "$@"; }

problem=$("$python" -c 'from podflare.engines.microvm import accelerator; print(accelerator.problem_with_kvm())') || exit 1
if [ -n "$problem" ]; then
  echo "== KVM cannot be used: $problem"
  echo "== left out: all tests of virtual machines on Firecracker, and on QEMU with KVM; make test-microvm runs those on QEMU without"
  run "the real Firecracker, as far as it goes without a guest that answers" \
    tests/integration/microvm/test_firecracker.py tests/integration/microvm/test_firecracker_guest.py \
    tests/unit/engines/test_microvm_firecracker_api.py tests/unit/engines/test_microvm_choice.py "$@"
  exit
fi
failed=0
run "the drivers" tests/integration/microvm/test_firecracker.py tests/integration/microvm/test_firecracker_guest.py \
  tests/unit/engines "$@" || failed=1
for vmm in firecracker qemu; do
  run "every test of virtual machines on $vmm with KVM" --microvm --vmm "$vmm" tests "$@" || failed=1
done
exit $failed
