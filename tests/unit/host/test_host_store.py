"""What is remembered of ids, and whose directories are removed."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from podflare.errors import BadRequest
from podflare.host.recover import open_instance
from podflare.host.registry import new_sandbox_id
from podflare.host.store import MemoryStore, SqliteStore

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["memory", "sqlite"])
async def store(request, tmp_path):
    """Every store keeps the same promises."""
    made = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "s.sqlite", "i1")
    yield made
    await made.aclose()
    await made.aclose()


async def test_store_remembers_owner_and_cause(store):
    """A read sees every write before it; an id never issued is unknown."""
    one, two = new_sandbox_id(), new_sandbox_id()
    store.issued(one, "ann")
    store.issued(two, "bob")
    store.ended(one, "idle for 3 s")
    found = await store.find(one)
    assert (found.owner, found.cause) == ("ann", "idle for 3 s")
    assert (await store.find(two)).cause == ""
    assert await store.find(new_sandbox_id()) is None
    assert await store.find("x' OR '1'='1") is None
    store.ended("never issued", "x")


async def test_memory_store_forgets_the_oldest():
    """The memory store has an end."""
    store = MemoryStore(rows=2)
    for name in "abc":
        store.issued(name, "o")
    assert await store.find("a") is None and await store.find("c") is not None


async def test_sqlite_store_survives_and_marks_what_was_lost(tmp_path):
    """After a restart ids are known; those of dead instances are over, those of living ones are not."""
    path = tmp_path / "s.sqlite"
    for instance in ("dead", "living"):
        store = SqliteStore(path, instance, ("dead", "living"))
        store.issued(f"of {instance}", "o")
        await store.aclose()
    store = SqliteStore(path, "new", ("living",))
    assert (await store.find("of dead")).cause == "the daemon that ran it has ended"
    assert (await store.find("of living")).cause == ""
    await store.aclose()


async def test_sqlite_write_that_fails_is_survived(tmp_path, caplog):
    """A store that cannot write is logged; the daemon goes on."""
    store = SqliteStore(tmp_path / "s.sqlite", "i")
    store.issued("a", "o")
    store.issued("a", "o")
    assert (await store.find("a")).owner == "o"
    assert "store write failed" in caplog.text
    await store.aclose()


async def test_file_that_is_no_database_is_an_error(tmp_path):
    """A damaged file is refused, not overwritten."""
    (tmp_path / "s.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        SqliteStore(tmp_path / "s.sqlite", "i")
    assert (tmp_path / "s.sqlite").read_bytes().startswith(b"not a database")


# Instances.


def nothing(directory: Path, name: str) -> None:
    return None


def test_instance_directory_is_private_and_goes_at_the_end(tmp_path):
    """A daemon has a directory of its own that others cannot read, and leaves none."""
    instance = open_instance(tmp_path / "data", nothing)
    assert instance.outputs.is_dir() and (tmp_path / "data").stat().st_mode & 0o066 == 0
    instance.close()
    instance.close()
    assert os.listdir(tmp_path / "data" / "instances") == []


LIVING = """
import sys
from pathlib import Path
from podflare.host.recover import open_instance
instance = open_instance(Path(sys.argv[1]), lambda directory, name: None)
(instance.directory / "file").write_text("mine")
print("ready", flush=True)
sys.stdin.read()
"""


def test_only_dead_instances_are_reaped(tmp_path):
    """A living daemon's directory is left alone; once it is dead the next start reaps it, engine first."""
    command = [sys.executable, "-c", LIVING, str(tmp_path / "data")]
    living = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert living.stdout.readline() == b"ready\n"
    reaped: list[str] = []

    def reap(directory: Path, name: str) -> None:
        assert (directory / "file").read_text() == "mine"
        reaped.append(name)

    mine = open_instance(tmp_path / "data", reap)
    assert reaped == [] and len(mine.living) == 1
    mine.close()
    living.kill()
    living.communicate()
    mine = open_instance(tmp_path / "data", reap)
    mine.finish_reaping()
    assert len(reaped) == 1 and mine.living == ()
    assert os.listdir(tmp_path / "data" / "instances") == [mine.name]
    mine.close()


def test_directory_that_the_engine_cannot_reap_stays(tmp_path, caplog):
    """If the engine fails to reap, the directory is kept for the next try and the start goes on."""
    left = tmp_path / "data" / "instances" / "idead"
    left.mkdir(parents=True, mode=0o700)

    def resist(directory: Path, name: str) -> None:
        raise OSError("a process resists")

    mine = open_instance(tmp_path / "data", resist)
    mine.finish_reaping()
    assert left.is_dir() and "could not reap" in caplog.text
    mine.close()


def test_read_only_trees_are_removed(tmp_path):
    """Directories whose write permission user code took away do not stop the reaping."""
    left = tmp_path / "data" / "instances" / "idead"
    (left / "a" / "b").mkdir(parents=True)
    (left / "a" / "b" / "f").write_text("x")
    (left / "a" / "b").chmod(0)
    (left / "a").chmod(0o500)
    open_instance(tmp_path / "data", nothing).close()
    assert not left.exists()


def test_link_in_the_tree_is_not_followed(tmp_path):
    """Reaping removes a link, never what it points to."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "f").write_text("x")
    left = tmp_path / "data" / "instances" / "idead"
    left.mkdir(parents=True)
    (left / "link").symlink_to(precious)
    open_instance(tmp_path / "data", nothing).close()
    assert (precious / "f").exists() and not left.exists()


def test_mounted_directory_is_not_removed(tmp_path, monkeypatch):
    """A directory in which something is mounted is left alone: removing would reach through the mount."""
    from podflare.host import recover

    left = tmp_path / "data" / "instances" / "idead"
    left.mkdir(parents=True)
    monkeypatch.setattr(
        recover, "_mounts_below", lambda directory: [f"{directory}/m"] if "idead" in str(directory) else []
    )
    open_instance(tmp_path / "data", nothing).close()
    assert left.is_dir()


def test_mounts_are_seen(tmp_path):
    """The look at the mount table finds what is mounted below a directory."""
    from podflare.host.recover import _mounts_below

    assert "/proc" in _mounts_below(Path("/proc")) and _mounts_below(tmp_path) == []


def test_directory_of_others_is_refused(tmp_path):
    """A data directory that others may write to is an error that says what to do."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o777)
    with pytest.raises(BadRequest, match="chmod go-w"):
        open_instance(tmp_path / "data", nothing)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="--data-dir"):
        open_instance(tmp_path / "file" / "data", nothing)
