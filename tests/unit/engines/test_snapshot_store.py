"""Snapshots on disk are there as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from podflare.engines.base import Limits, MachineSpec
from podflare.engines.snapshots import SnapshotStore
from podflare.errors import BadRequest, Conflict, MachineFailed

SPEC = MachineSpec("default", Limits(memory_bytes=1 << 30, disk_bytes=4 << 30, cpus=1.5), "host")


def store(folder: Path, life: str = "life") -> SnapshotStore:
    (folder / life).mkdir(exist_ok=True)
    return SnapshotStore(str(folder / "kept"), folder / life)


def keep(where: SnapshotStore, name: str) -> None:
    with where.keeping(name) as keeping:
        (keeping.folder / "memory").write_bytes(b"m" * 10_000)
        keeping.publish(SPEC, {"owner": "me"}, {"key": "k"})


def test_what_is_kept_is_read_by_the_next_life(tmp_path):
    """Files, spec, note and size come back as they were; a name is taken once; what is removed is gone."""
    keep(store(tmp_path), "one")
    later = store(tmp_path, "later")
    kept = later.get("one")
    assert (kept.about.spec, kept.about.note, kept.more) == (SPEC, {"owner": "me"}, {"key": "k"})
    assert (kept.folder / "memory").read_bytes() == b"m" * 10_000 and 10_000 <= kept.about.size_bytes < 100_000
    with pytest.raises(Conflict, match="'one'"):
        keep(later, "one")
    later.remove("one")
    assert later.names == () and [*tmp_path.rglob("memory")] == []
    with pytest.raises(BadRequest, match="no snapshot 'one'"):
        later.get("one")


def test_a_failure_leaves_nothing(tmp_path):
    """Whatever fails while one is made, before or after it is there, nothing of it is left, and the name is free."""
    where = store(tmp_path)
    for after in (False, True):
        with pytest.raises(KeyboardInterrupt), where.keeping("one") as keeping:
            (keeping.folder / "memory").write_bytes(b"m")
            if after:
                keeping.publish(SPEC, {}, {})
            raise KeyboardInterrupt
        assert where.names == () and [*tmp_path.rglob("memory")] == []
    with pytest.raises(Conflict), where.keeping("one") as keeping:
        keep(where, "one")  # another one was quicker
        keeping.publish(SPEC, {"owner": "late"}, {})
    assert where.get("one").about.note == {"owner": "me"}


def test_a_killed_daemon_leaves_no_half_one(tmp_path):
    """What a process that was killed had made so far has no name, and lies where its life's files are cleared."""
    pid = os.fork()
    if pid == 0:
        with store(tmp_path).keeping("one") as keeping:
            (keeping.folder / "memory").write_bytes(b"m")
            os._exit(9)
    os.waitpid(pid, 0)
    assert store(tmp_path, "later").names == ()
    [half] = tmp_path.rglob("memory")
    assert half.is_relative_to(tmp_path / "life")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}', '{"format": 2, "spec": {"template": 1}}'])
def test_one_that_is_damaged(tmp_path, text):
    """It is told as such when it is used, and can be removed."""
    where = store(tmp_path)
    keep(where, "one")
    (tmp_path / "kept" / "one" / "about.json").write_text(text)
    with pytest.raises(MachineFailed, match="'one' cannot be used"):
        where.get("one")
    where.remove("one")
    assert where.names == ()


def test_where_none_can_be_kept(tmp_path):
    """Names that lead elsewhere, and a store without a directory, are refused."""
    for name in ("", "..", "../x", ".x", "-x", "a/b", "a\0", "a\n", "x" * 65):
        with pytest.raises(BadRequest), store(tmp_path).keeping(name):
            pass
    with pytest.raises(BadRequest, match="keeps no snapshots"), SnapshotStore("", tmp_path).keeping("one"):
        pass
    assert SnapshotStore("", tmp_path).names == ()
