"""What is kept of virtual machines that were: counted, held under other names, gone with the last that needs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from podflare.engines.kinship import CountedFolders, Kinship
from podflare.engines.microvm.bygone import MAX_LISTS, MAX_REMEMBERED, Lists
from podflare.engines.microvm.diff import Entry
from podflare.engines.microvm.engine import MicrovmEngine
from podflare.engines.microvm.origins import Origin
from podflare.engines.microvm.past import Past
from podflare.engines.microvm.vmm import Shape
from podflare.errors import Conflict

pytestmark = pytest.mark.anyio
FILE = Entry("file", 0o644, 1, "m")


@dataclass
class Machine:
    """As far as kinship looks at one."""

    id: str
    is_closed: bool = False


def test_a_dead_daemons_leftovers_are_reaped(tmp_path: Path) -> None:
    """Saved states, what came over in merges, names of snapshots' roots: all go, and nothing else."""
    for name in ("machines/l1", "machines/m1", "roots", "boot-1", "consoles"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("x")
    MicrovmEngine.reap(tmp_path, "no-such-instance")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["consoles", "machines"]
    assert list((tmp_path / "machines").iterdir()) == []


async def test_what_a_snapshot_was_outlives_it(tmp_path: Path) -> None:
    """Two that go on from one snapshot share its files, which stay when it is removed, until one of the two is gone."""
    kept = tmp_path / "snapshot"
    kept.mkdir()
    for name in ("memory", "devices", "disk", "root"):
        (kept / name).write_text(name)
    machines = tmp_path / "machines"
    machines.mkdir()
    past = Past(machines, tmp_path / "roots")
    origin = Origin.within(kept, kept / "root", Shape(1, 1))
    root = past.hold_root(origin.root)
    one, two = Machine("one"), Machine("two")
    for machine in (one, two):
        moment = await past.hold_snapshot("s", origin)
        assert moment is not None
        past.kin.goes_on(moment, (machine,))
    past.snapshot_removed("s")
    for path in kept.iterdir():
        path.unlink()
    base, former = past.kin.base_of(one, two)
    assert former is None and (past.folders.path(base[0]) / "disk").read_text() == "disk"
    assert root.read_text() == "root"
    one.is_closed = True
    await past.kin.gone(one)
    await past.folders.release(base)
    assert list(machines.iterdir()) == []
    await past.aclose()
    assert not (tmp_path / "roots").exists()


async def test_a_snapshot_of_the_same_name_is_another_moment(tmp_path: Path) -> None:
    """What was made from a removed snapshot has nothing to do with what is made from a later one of its name."""
    (tmp_path / "machines").mkdir()
    past = Past(tmp_path / "machines", tmp_path / "roots")
    kept = Machine("kept")
    numbers = []
    for _ in range(2):
        past.snapshot_taken("s", kept)  # type: ignore[arg-type]  # no more of a machine is looked at
        numbers.append(past._snapshots["s"][0].number)
        past.snapshot_removed("s")
    assert numbers[0] != numbers[1]
    await past.aclose()


async def test_a_base_that_is_gone_is_a_conflict(tmp_path: Path) -> None:
    """Machines whose common moment nobody kept cannot be merged, and say so."""
    folders = CountedFolders(tmp_path)
    kin = Kinship(folders)
    parent, one, two = (Machine(name) for name in ("parent", "one", "two"))
    name = folders.new()
    folders.retain((name,))
    kin.born(parent, (one, two), (name,))
    assert kin.base_of(one, two) == ((name,), None)
    for _ in ("the merge", "the fork", "what is kept"):
        await folders.release((name,))
    with pytest.raises(Conflict, match="not kept any more"):
        kin.base_of(one, two)


def test_few_and_short_lists_are_remembered() -> None:
    """The oldest goes when there are too many, and long ones are asked for again."""
    lists = Lists()
    for number in range(MAX_LISTS + 1):
        lists.put((f"{number}", ("/root",)), {"/root/f": FILE})
    assert lists.get(("0", ("/root",))) is None
    assert lists.get((f"{MAX_LISTS}", ("/root",))) == {"/root/f": FILE}
    lists.put(("long", ("/root",)), {f"/root/{n}": FILE for n in range(MAX_REMEMBERED + 1)})
    assert lists.get(("long", ("/root",))) is None
