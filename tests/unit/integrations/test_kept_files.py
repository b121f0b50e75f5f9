"""The store of uploaded and made files: caps, owners, ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from podflare.errors import FileMissing, QuotaExceeded, TooLarge
from podflare.integrations.anthropic.containers import lease
from podflare.integrations.anthropic.containers.files import FileStore
from podflare.integrations.anthropic.containers.index import FileRow, Index
from podflare.integrations.anthropic.hosted.request import parse


class Clock:
    """A time that stands until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[FileStore]:
    """Ten bytes a file, twenty-five an owner."""
    index = Index(tmp_path / "index.sqlite")
    yield FileStore(tmp_path / "files", index, max_file_bytes=10, max_owner_bytes=25, now=clock)
    index.close()


def keep(store: FileStore, content: bytes, owner: str = "one", lifetime_s: float | None = None) -> FileRow:
    path = store.new_path()
    path.write_bytes(content)
    try:
        return store.keep(owner, path, "a.txt", downloadable=True, lifetime_s=lifetime_s)
    finally:
        path.unlink(missing_ok=True)


def test_caps_hold_for_a_file_and_for_its_owner(store: FileStore) -> None:
    """One byte too many is refused; deleting makes room; another owner has room of its own."""
    with pytest.raises(TooLarge):
        keep(store, b"x" * 11)
    kept = [keep(store, b"x" * 10) for _ in range(2)]
    with pytest.raises(QuotaExceeded):
        keep(store, b"x" * 6)
    keep(store, b"x" * 6, owner="other")
    store.delete("one", kept[0].id)
    keep(store, b"x" * 6)


def test_a_file_ends_with_its_lifetime(store: FileStore, clock: Clock, tmp_path: Path) -> None:
    """Afterwards it is not found, and its bytes are removed with the next look."""
    kept = keep(store, b"x", lifetime_s=60)
    clock.now += 59
    assert store.find("one", kept.id) == kept and kept.mime_type == "text/plain"
    clock.now += 2
    with pytest.raises(FileMissing):
        store.find("one", kept.id)
    assert store.page("one", limit=5) == ([], False)
    assert list((tmp_path / "files").iterdir()) == []


def test_what_a_killed_program_left_half_written_is_removed(store: FileStore, tmp_path: Path) -> None:
    """The next start clears it, and knows every kept file."""
    kept = keep(store, b"x")
    store.new_path().write_bytes(b"half")
    index = Index(tmp_path / "index.sqlite")
    again = FileStore(tmp_path / "files", index)
    assert [path.name for path in (tmp_path / "files").iterdir()] == [kept.id]
    assert again.content(again.find("one", kept.id)) == b"x"
    index.close()


def test_files_shown_in_one_request_have_a_cap_together(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files below the cap of one cannot fill the memory of the gateway."""
    kept = [keep(store, b"x" * 8) for _ in range(3)]
    blocks = [{"type": "document", "source": {"type": "file", "file_id": row.id}} for row in kept]
    parsed = parse({"messages": [{"role": "user", "content": blocks}]})
    assert len(lease.look_up_files(parsed, store, "one").contents) == 3
    assert lease.look_up_files(parsed, store, "other").contents == {}
    monkeypatch.setattr(lease, "MAX_INLINE_BYTES", 20)
    with pytest.raises(TooLarge, match="24 bytes"):
        lease.look_up_files(parsed, store, "one")
