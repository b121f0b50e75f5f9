"""Promise: merging two virtual machines' files costs neither of them more than it has, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal

import vms
from forks import fork as fork
from forks import parent as parent
from forks import way as way
from machines import LIMITS, DrivenMachine
from merges import merge, sh
from podflare.engines.base import Engine, EngineOptions
from podflare.engines.microvm.birth import bear
from podflare.engines.microvm.diff import list_files
from podflare.engines.microvm.engine import MicrovmEngine
from podflare.engines.microvm.image.store import ImageStore
from podflare.engines.microvm.origins import Origin
from podflare.errors import MachineFailed, PodflareError, TooLarge

pytestmark = list(vms.MARKS)
Fork = Callable[..., list[DrivenMachine]]


def kept(engine: MicrovmEngine) -> set[str]:
    """Folders of machines, of what they were, and of what came over."""
    return set(os.listdir(Path(engine._options.data_dir) / "machines"))


def test_what_they_were_is_kept(engine: MicrovmEngine, new_machine: Callable[..., DrivenMachine], fork: Fork) -> None:
    """A fork keeps one folder for all children until no two of the family are left; a merge one until one of the pair
    ends; nothing is left at the end."""
    before = kept(engine)
    parent = new_machine()
    one, two = fork(parent, 2)
    machines = {one.machine.id, two.machine.id, parent.machine.id}
    (moment,) = kept(engine) - before - machines
    sh(two, "echo f > /root/f")
    assert merge(one, two).merged == ["/root/f"]
    assert len(kept(engine) - before - machines) == 2
    two.close()
    assert kept(engine) - before - machines == {moment}
    one.close()
    assert kept(engine) - before == {parent.machine.id}
    parent.close()
    assert kept(engine) <= before


def test_nothing_runs_on_where_the_base_is_read(engine: MicrovmEngine, parent: DrivenMachine, fork: Fork) -> None:
    """What ran in the parent at the fork stands still in the machine that says what both were."""
    before = kept(engine)
    parent.run(
        "import os, threading\n"
        "def write():\n"
        "    n = 0\n"
        "    while True:\n"
        "        n += 1\n"
        "        open('/root/count', 'w').write(str(n))\n"
        "threading.Thread(target=write, daemon=True).start()"
    )
    (one,) = fork(parent)
    (moment,) = kept(engine) - before - {one.machine.id}

    async def look() -> None:
        nursery, _ = engine._ready()
        origin = Origin.within(engine._past.folders.path(moment), one.machine.root, one.machine.shape)
        still = await bear(nursery, one.machine.spec, origin, reseed=False, timeout_s=60, still=True)
        try:
            lists = [await list_files(still.control, ["/root"], 60) for _ in range(3)]
            assert lists[0] == lists[1] == lists[2] and "/root/count" in lists[0]
        finally:
            await still.aclose()

    one.call(look)
    lists = [one.call(lambda: list_files(one.machine.control, ["/root"], 60)) for _ in range(2)]
    assert lists[0] != lists[1]  # in a fork it does run on


@pytest.mark.parametrize("which", ["ours", pytest.param("theirs", marks=pytest.mark.any_engine)])
def test_a_hypervisor_is_killed_amid_a_merge(parent: DrivenMachine, fork: Fork, which: str) -> None:
    """The merge fails at once, the other machine is as it was."""
    one, two = fork(parent, 2)
    sh(two, "echo f > /root/f")

    async def run() -> None:
        merging = await one.machine.merge_files(two.machine, ("/root",), timeout_s=60)
        try:
            victim = one if which == "ours" else two
            os.kill(victim.host_pid, signal.SIGKILL)
            await victim.machine.wait_dead()
            await merging.apply({}, timeout_s=60)
        finally:
            await merging.aclose()

    with pytest.raises(MachineFailed):
        one.call(run)
    left = two if which == "ours" else one
    assert sh(left, "ls -A / | grep podflare || true; ls /root") == ("f\n" if which == "ours" else "")


@pytest.mark.any_engine
def test_a_full_disk(parent: DrivenMachine, fork: Fork) -> None:
    """What does not fit is refused, with what to do; nothing of it is left, and with room it comes."""
    one, two = fork(parent, 2)
    sh(two, "head -c 3000000 /dev/urandom > /root/b; echo s > /root/a")
    sh(one, "fallocate -l $(( $(stat -f -c '%a * %S' /) - 2000000 )) /root/all")
    free = sh(one, "stat -f -c %a /")
    with pytest.raises(TooLarge, match="rootfs_gb"):
        merge(one, two)
    assert sh(one, "ls /root; stat -f -c %a /") == "all\n" + free
    sh(one, "rm /root/all")
    assert merge(one, two).merged == ["/root/a", "/root/b"]


@pytest.mark.any_engine
def test_a_merge_that_is_given_up_in_the_middle(parent: DrivenMachine, fork: Fork) -> None:
    """Whatever step its time ends at, nothing has changed and the next merge does all."""
    one, two = fork(parent, 2)
    sh(two, "cd /root; for n in $(seq 30); do head -c 100000 /dev/urandom > $n; done")
    for limit_s in (0.01, 0.3, 0.5, 0.8):
        try:
            merge(one, two, timeout_s=limit_s, keep=False)
        except PodflareError as exc:
            assert "within" in str(exc) or "too long" in str(exc)
        assert sh(one, "ls /root; ls -A / | grep podflare || true") == ""
    assert len(merge(one, two).merged) == 30
    assert sh(one, "cat /root/* | md5sum") == sh(two, "cat /root/* | md5sum")


@pytest.mark.any_engine
def test_what_goes_on_from_a_snapshot(
    portal: BlockingPortal, data_dir: Path, image_store: ImageStore, engine: Engine, fork: Fork
) -> None:
    """Two that go on from one, and the machine that was kept, have that moment as their base, also when the snapshot
    is gone; their forks likewise."""
    options = EngineOptions(str(data_dir / "e"), data_dir.name, snapshot_dir=str(data_dir / "s"))
    other = portal.call(vms.started_engine, options, image_store)
    try:
        first = DrivenMachine.create(portal, other, LIMITS)
        sh(first, "echo 1 > /root/a; echo 1 > /root/b; seq 9 > /root/list")
        first.snapshot("s")
        one, two = (DrivenMachine(portal, portal.call(lambda: other.restore("s", timeout_s=60))) for _ in range(2))
        portal.call(other._loop.run_in_executor, None, other.remove_snapshot, "s")
        sh(first, "rm /root/b")
        sh(one, "echo 2 > /root/a; sed -i s/1/one/ /root/list")
        sh(two, "sed -i s/9/nine/ /root/list; echo n > /root/n")
        assert merge(one, two).merged == ["/root/list", "/root/n"]
        assert merge(first, one).merged == ["/root/a", "/root/list", "/root/n"]
        assert sh(first, "cd /root; ls; cat a; head -n1 list; tail -n1 list") == "a\nlist\nn\n2\none\nnine\n"
    finally:
        portal.call(other.aclose)
    assert os.listdir(data_dir / "e" / "machines") == []
