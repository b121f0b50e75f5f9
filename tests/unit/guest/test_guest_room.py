"""guest/process/room.py: copies of trees that running code may change stop at what was measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from podflare.guest.process.capture import capture_layers
from podflare.guest.process.compare import Layer, resolve
from podflare.guest.process.room import Outgrown, Room
from podflare.guest.process.transplant import empty, transplant


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Seven entries, 30,000 bytes and a hole below root/upper."""
    upper = tmp_path / "machine" / "root" / "upper"
    (upper / "d" / "e").mkdir(parents=True)
    for number in range(3):
        (upper / "d" / f"{number}").write_bytes(b"x" * 10_000)
    (upper / "link").symlink_to("d")
    with (upper / "d" / "e" / "hole").open("wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "layer").mkdir()
    return tmp_path / "machine"


def test_a_capture_stops_where_its_room_ends(machine: Path) -> None:
    """With exactly the room for all it is a copy; with one entry less, or a byte where bytes are copied, it fails."""
    layer = machine.parent / "layer"
    for room, expected in ((Room(7, 31_000), ""), (Room(6, 31_000), "moved or made"), (Room(7, 100), "moved or wrote")):
        if expected.endswith("wrote") and _shares_blocks(machine.parent):
            continue  # a reflink takes no room
        if expected:
            with pytest.raises(Outgrown, match=expected):
                capture_layers(str(machine), str(layer), room)
        else:
            capture_layers(str(machine), str(layer), room)
            assert sorted(os.listdir(layer / "root" / "upper" / "d")) == ["0", "1", "2", "e"]
        empty(str(layer))
        assert os.listdir(layer) == []


def _shares_blocks(folder: Path) -> bool:
    from fcntl import ioctl

    with (folder / "a").open("wb+") as one, (folder / "b").open("wb") as two:
        one.write(bytes(4096))
        one.flush()
        try:
            ioctl(two, 0x40049409, one.fileno())
        except OSError:
            return False
    return True


@pytest.mark.parametrize(("entries", "size", "fits"), [(6, 30_000, True), (5, 30_000, False), (6, 29_000, False)])
def test_what_is_taken_over_stops_where_its_room_ends(machine: Path, entries: int, size: int, fits: bool) -> None:
    """A directory with all below it comes over where there is room for its entries and bytes; else it fails."""
    fds = [os.open(path, os.O_RDONLY) for path in (machine / "root" / "upper", machine.parent / "layer")]
    entry = resolve([Layer("m", fds[0], template=False)], "d")
    assert entry is not None
    try:
        if fits:
            transplant(entry, fds[1], "d", Room(entries, size), path="/d")
            assert (machine.parent / "layer" / "d" / "2").stat().st_size == 10_000
        else:
            with pytest.raises(Outgrown):
                transplant(entry, fds[1], "d", Room(entries, size), path="/d")
    finally:
        entry.close()
        for fd in fds:
            os.close(fd)
