"""Promise: files go in and out whole, whatever lies at the path and whatever the REPL does meanwhile."""

from __future__ import annotations

import os
import socket
import stat

import pytest
from guest_driver import resident_kib, wait_until

from podflare.guest.files import MAX_TRANSFERS
from podflare.wire import frames
from podflare.wire.messages import (
    DENIED,
    MISSING,
    NO_SPACE,
    NOT_A_FILE,
    OTHER,
    WINDOW_BYTES,
    Ack,
    Cancel,
    DataEnd,
    FileDone,
    FileFailed,
    FileOpened,
    FileRead,
    FileWrite,
    from_guest,
)


@pytest.mark.parametrize("size", [0, 1, frames.MAX_DATA_BYTES, 3 * WINDOW_BYTES + 7])
def test_round_trip(guest, size):
    """What was written is read back, byte for byte, at any size."""
    data = os.urandom(size)
    assert guest.write_file("f", data) == FileDone(size)
    assert (guest.home / "f").read_bytes() == data
    assert guest.read_file("f") == data


def test_paths(guest):
    """Relative paths and ~ start at home, not where the REPL is; parents are made; odd names are taken as they are."""
    guest.run("import os; os.chdir('/')")
    for path, place in (
        ("a/b/c.txt", "a/b/c.txt"),
        ("~/d", "d"),
        (str(guest.home / "abs"), "abs"),
        ("a/../e", "e"),
        ("name with\nnewline ü \udcff", "name with\nnewline ü \udcff"),
        ("~user", "~user"),
        ("-rf", "-rf"),
    ):
        assert guest.write_file(path, b"x") == FileDone(1), path
        assert (guest.home / place).read_bytes() == b"x"
        assert guest.read_file(path) == b"x"


def test_existing_file_keeps_its_mode_and_a_new_one_is_readable(guest):
    """Overwriting keeps the permission bits; a new file gets 0644."""
    script = guest.home / "script"
    script.write_text("old")
    script.chmod(0o750)
    guest.write_file("script", b"new")
    assert stat.S_IMODE(script.stat().st_mode) == 0o750
    guest.write_file("fresh", b"")
    assert stat.S_IMODE((guest.home / "fresh").stat().st_mode) == 0o666 & ~_umask()


def test_links_are_followed(guest):
    """Writing to a symbolic link replaces what it points to and leaves the link."""
    (guest.home / "target").write_text("old")
    (guest.home / "link").symlink_to("target")
    guest.write_file("link", b"new")
    assert (guest.home / "link").is_symlink()
    assert (guest.home / "target").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["directory", "fifo", "socket", "device", "directory link"])
def test_what_is_no_file_is_refused(guest, kind):
    """Directories, FIFOs, sockets and devices are refused in both directions, at once and with their kind named."""
    path = guest.home / "thing"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory link":
        path.symlink_to("/")
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    for answer in (guest.read_file("thing"), guest.write_file("thing", b"x")):
        assert isinstance(answer, FileFailed)
        assert answer.reason == NOT_A_FILE
        assert answer.message.startswith("thing: it is a ")
    assert sorted(os.listdir(guest.home)) == ["thing"]


@pytest.mark.parametrize(
    ("path", "read", "write"),
    [
        ("missing", MISSING, None),
        ("no/such/dir", MISSING, None),
        ("file/below", NOT_A_FILE, NOT_A_FILE),
        ("file/", NOT_A_FILE, NOT_A_FILE),
        ("loop", OTHER, OTHER),
        ("x" * 300, OTHER, OTHER),
        ("/proc/1/nothing", MISSING, MISSING),
        ("\ud800", OTHER, OTHER),
        ("x/" * 2000 + "x", MISSING, OTHER),
    ],
)
def test_reasons(guest, path, read, write):
    """Each failure has its reason and a message that names the path."""
    (guest.home / "file").write_text("x")
    (guest.home / "loop").symlink_to("loop")
    answer = guest.read_file(path)
    assert isinstance(answer, FileFailed)
    assert answer.reason == read, answer
    assert path in answer.message
    if write is not None:
        answer = guest.write_file(path, b"x")
        assert isinstance(answer, FileFailed)
        assert answer.reason == write, answer


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything: needs an ordinary user")
def test_denied(guest):
    """A file without permission is denied."""
    secret = guest.home / "secret"
    secret.write_text("x")
    secret.chmod(0)
    answer = guest.read_file("secret")
    assert isinstance(answer, FileFailed)
    assert answer.reason == DENIED


def test_write_into_a_read_only_file_system_is_denied(guest):
    """A place that cannot be written at all is told as denied or missing, never silently."""
    answer = guest.write_file("/proc/sys/kernel/made-by-test", b"x")
    assert isinstance(answer, FileFailed)
    assert answer.reason in (DENIED, MISSING)


def test_no_space(guest):
    """A write past the room there is ends with NO_SPACE, and nothing of it is left."""
    cell = guest.run("import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))")
    assert cell.exit.code == 0, cell.stderr
    (guest.home / "f").write_text("old")
    answer = guest.write_file("f", bytes(2 << 20))
    assert isinstance(answer, FileFailed)
    assert answer.reason == NO_SPACE
    assert answer.message.startswith("f: ")
    assert os.listdir(guest.home) == ["f"]
    assert (guest.home / "f").read_text() == "old"


def test_file_appears_whole_or_not_at_all(guest):
    """Until the last byte is there, the old content stays under the name; a cancelled write leaves nothing."""
    (guest.home / "f").write_text("old")
    channel = guest.new_channel()
    guest.send(channel, FileWrite("f"))
    guest.send_frame(frames.DATA, channel, b"new")
    assert from_guest(guest.next_frame(channel).payload) == Ack(3)
    assert (guest.home / "f").read_text() == "old"
    guest.send(channel, Cancel())
    assert guest.read_file("f") == b"old"
    assert os.listdir(guest.home) == ["f"]


def test_cancelled_read_stops(guest):
    """After Cancel no more of a file is sent than was under way."""
    (guest.home / "big").write_bytes(bytes(8 * WINDOW_BYTES))
    channel = guest.new_channel()
    guest.send(channel, FileRead("big"))
    assert from_guest(guest.next_frame(channel).payload) == FileOpened(8 * WINDOW_BYTES)
    guest.send(channel, Cancel())
    assert guest.run("1").value == "1"


def test_reader_waits_for_acknowledgement(guest):
    """No more than the window is sent ahead of acknowledgements."""
    (guest.home / "big").write_bytes(bytes(2 * WINDOW_BYTES))
    channel = guest.new_channel()
    guest.send(channel, FileRead("big"))
    guest.next_frame(channel)
    received = 0
    while received < WINDOW_BYTES:
        received += len(guest.next_frame(channel).payload)
    assert received == WINDOW_BYTES
    assert guest.run("1").value == "1"
    with pytest.raises(TimeoutError):
        guest.next_frame(channel, timeout_s=0.2)
    guest.send(channel, Ack(1))
    assert len(guest.next_frame(channel).payload) == 1


def test_transfers_work_while_a_cell_computes(guest):
    """Files go in and out while the REPL is busy, and while its output is flowing."""
    busy = guest.start("while True: pass")
    assert guest.write_file("f", b"data") == FileDone(4)
    assert guest.read_file("f") == b"data"
    guest.interrupt(busy)
    guest.finish(busy)


def test_large_transfer_does_not_stall_a_cell(guest):
    """A cell's output flows while a large file is on its way, and both arrive whole.

    The reader takes half of the file and then nothing until the cell has ended, so the cell cannot come too late.
    """
    (guest.home / "big").write_bytes(b"b" * (64 << 20))
    transfer = guest.new_channel()
    guest.send(transfer, FileRead("big"))
    channel = guest.start("for i in range(1000): print(i)")
    received, out, done, owed = 0, b"", False, 0
    cell_ended_at = None
    while not done or cell_ended_at is None:
        if owed and (received < 32 << 20 or cell_ended_at is not None):
            guest.send(transfer, Ack(owed))
            owed = 0
        frame = guest.next_frame()
        if frame.channel == channel:
            if frame.kind == frames.STDOUT:
                out += frame.payload
            else:
                cell_ended_at = received
        elif frame.kind == frames.DATA:
            received += len(frame.payload)
            owed += len(frame.payload)
        else:
            done = isinstance(from_guest(frame.payload), FileDone)
    assert received == 64 << 20
    assert out.split() == [str(i).encode() for i in range(1000)]
    assert cell_ended_at < 64 << 20


def test_memory_stays_constant(guest):
    """A file of 256 MiB goes in and out in steps: the agent does not grow with it."""
    before = resident_kib(guest.process.pid)
    data = bytes(256 << 20)
    assert guest.write_file("big", data) == FileDone(len(data))
    assert guest.read_file("big") == data
    assert resident_kib(guest.process.pid) - before < 8 * 1024


def test_special_files_of_proc_can_be_read(guest):
    """Files that claim to be empty, as those of /proc, are read to their end."""
    answer = guest.read_file("/proc/self/status")
    assert isinstance(answer, bytes)
    assert b"VmRSS" in answer


def test_too_many_transfers(guest):
    """Transfers above the cap are refused with a reason; the others are not harmed."""
    channels = []
    for number in range(MAX_TRANSFERS):
        channels.append(guest.new_channel())
        guest.send(channels[-1], FileWrite(f"f{number}"))
    answer = guest.write_file("one more", b"x")
    assert isinstance(answer, FileFailed)
    assert answer.reason == OTHER
    for channel in channels:
        guest.send(channel, DataEnd())
        assert from_guest(guest.next_frame(channel).payload) == FileDone(0)


def test_messages_for_ended_transfers_are_ignored(guest):
    """Data, end, acknowledgement and cancel for a transfer that is over do nothing."""
    guest.write_file("f", b"x")
    for message in (Ack(5), DataEnd(), Cancel()):
        guest.send(1, message)
    guest.send_frame(frames.DATA, 1, b"late")
    assert guest.read_file("f") == b"x"


def test_channel_in_use_breaks_the_protocol(guest):
    """Opening a transfer on a channel in use is the host's error and ends the machine."""
    guest.send(5, FileWrite("a"))
    guest.send(5, FileWrite("b"))
    assert guest.process.wait(10) == 1


def test_unfinished_transfers_end_with_the_channel(guest):
    """A host that goes away in the middle of transfers leaves no agent behind."""
    (guest.home / "big").write_bytes(bytes(8 << 20))
    guest.send(guest.new_channel(), FileWrite("a"))
    guest.send(guest.new_channel(), FileRead("big"))
    guest.close()
    wait_until(lambda: guest.process.poll() is not None, "the agent to end")


def _umask() -> int:
    old = os.umask(0o022)
    os.umask(old)
    return old
