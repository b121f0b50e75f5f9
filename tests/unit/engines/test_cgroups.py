"""engines/linux/cgroups.py: what is left of a dead daemon's groups goes, or it is told that it does not."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from podflare.engines.linux import cgroups
from podflare.engines.linux.cgroups import PREFIX, Cgroup, Cgroups, detect


@pytest.fixture
def groups() -> Cgroups:
    """Control groups of this machine."""
    found = detect()
    if not found.version:
        pytest.skip(f"no control groups for this user: {found.detail}")
    return found


def fill(groups: Cgroups, instance: str, count: int) -> list[subprocess.Popen[bytes]]:
    """Machines' groups of a dead daemon, each with a living process."""
    living = []
    for number in range(count):
        paths = {name: parent / f"{PREFIX}{instance}" / f"m{number}" for name, parent in groups.parents.items()}
        for path in paths.values():
            path.mkdir(parents=True, exist_ok=True)
        living.append(subprocess.Popen(["sleep", "1000"]))
        Cgroup(groups.version, paths).move(living[-1].pid)
    return living


def test_what_is_left_of_a_daemon_goes(groups: Cgroups) -> None:
    """All groups of a daemon life are removed, with the processes in them, and a second time there is nothing to do."""
    instance = f"gone{os.getpid()}"
    living = fill(groups, instance, 4)
    assert groups.remove_instance(instance)
    assert [one.wait(5) for one in living] == [-9] * 4
    assert not any((parent / f"{PREFIX}{instance}").exists() for parent in groups.parents.values())
    assert groups.remove_instance(instance)


def test_groups_that_stay_are_told(groups: Cgroups, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that cannot be removed in time makes the removal say so, so that a later start tries again."""
    monkeypatch.setattr(cgroups, "INSTANCE_TIMEOUT_S", 0.1)
    instance = f"stays{os.getpid()}"
    (living,) = fill(groups, instance, 1)
    inner = next(iter(groups.parents.values())) / f"{PREFIX}{instance}" / "m0" / "inner"
    inner.mkdir()  # a group with a group in it cannot be removed
    begin = time.monotonic()
    assert not groups.remove_instance(instance)
    assert time.monotonic() - begin < 5
    living.wait(5)
    inner.rmdir()
    assert groups.remove_instance(instance)
