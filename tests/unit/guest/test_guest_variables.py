"""Promise: the guest tells, gives and takes variables between cells, whatever objects do, and the REPL lives on."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from guest_driver import TIMEOUT_S, Guest

from podflare.wire import frames
from podflare.wire.messages import (
    DIED,
    ENDED,
    INTERRUPTED,
    WINDOW_BYTES,
    Ack,
    Cancel,
    DataEnd,
    Exit,
    GuestMessage,
    HostMessage,
    from_guest,
)
from podflare.wire.variables import (
    BAD_VALUE,
    NO_BASE,
    TOO_LARGE,
    VariablesBase,
    VariablesCommit,
    VariablesExport,
    VariablesFailed,
    VariablesImport,
    VariablesOrder,
    VariablesParcel,
    VariablesRecall,
    VariablesRemember,
    VariablesStaged,
    VariablesSurvey,
    VariablesTable,
)

LARGE = 2**30


@dataclass
class Operation:
    """What one operation gave back."""

    answers: list[GuestMessage] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    exit: Exit = field(default_factory=Exit)


def start(guest: Guest, order: VariablesOrder) -> int:
    channel = guest.new_channel()
    guest.send(channel, order)
    return channel


def finish(guest: Guest, channel: int, timeout_s: float = TIMEOUT_S) -> Operation:
    done = Operation()
    while True:
        frame = guest.next_frame(channel, timeout_s)
        if frame.kind == frames.DATA:
            done.data.append(frame.payload)
            continue
        assert frame.kind == frames.MESSAGE, frame
        message = from_guest(frame.payload)
        if isinstance(message, Exit):
            done.exit = message
            return done
        if not isinstance(message, Ack):
            done.answers.append(message)


def run(guest: Guest, order: VariablesOrder) -> Operation:
    return finish(guest, start(guest, order))


def survey(guest: Guest, budget_ms: int = 20_000) -> VariablesTable:
    done = run(guest, VariablesSurvey(budget_ms))
    (table,) = done.answers
    assert isinstance(table, VariablesTable) and done.exit.reason == ENDED
    return table


def export(guest: Guest, *names: str) -> tuple[VariablesParcel, bytes]:
    done = run(guest, VariablesExport(names, LARGE))
    (parcel,) = done.answers
    assert isinstance(parcel, VariablesParcel) and done.exit.reason == ENDED
    return parcel, b"".join(done.data)


def send_values(guest: Guest, channel: int, data: bytes) -> GuestMessage:
    """Send the values of an import within the window; the answer to them."""
    sent = acknowledged = 0
    answer: GuestMessage | None = None

    def take() -> None:
        nonlocal acknowledged, answer
        message = from_guest(guest.next_frame(channel).payload)
        if isinstance(message, Ack):
            acknowledged += message.bytes
        else:
            answer = message

    for at in range(0, len(data), frames.MAX_DATA_BYTES):
        piece = data[at : at + frames.MAX_DATA_BYTES]
        while answer is None and sent - acknowledged + len(piece) > WINDOW_BYTES:
            take()
        guest.send_frame(frames.DATA, channel, piece)
        sent += len(piece)
    guest.send(channel, DataEnd())
    while answer is None:
        take()
    return answer


def bring(guest: Guest, data: bytes, last: HostMessage) -> Operation:
    """An import of `data` that `last` ends."""
    channel = start(guest, VariablesImport())
    assert send_values(guest, channel, data) == VariablesStaged()
    guest.send(channel, last)
    return finish(guest, channel)


@pytest.fixture
def other(guest: Guest, start_guest) -> Guest:
    """Another guest."""
    second = start_guest()
    second.wait_ready()
    return second


def test_a_survey_tells_the_users_variables(guest):
    """Type, size, fingerprint, obstacle; not what Python itself puts into the namespace, nor names that are none."""
    guest.run(
        "import math, threading\nx = 5\nlock = threading.Lock()\n_y = [1] * 1000\nglobals()['a b'] = 1\nclass A: pass"
    )
    table = survey(guest)
    assert sorted(table.variables) == ["A", "_y", "lock", "math", "threading", "x"] and table.left_out == 1
    told = table.variables
    assert (told["x"].type, told["A"].type, told["math"].type) == ("int", "type", "module")
    assert told["_y"].size > 1000 > told["x"].size and "cannot pickle" in told["lock"].obstacle
    assert len({one.fingerprint for one in told.values()}) == len(told) and (table.bases, table.present) == ((), ())


def test_values_travel_from_one_repl_to_another(guest, other):
    """Exported values are bound by the commit, under their names and with what they share; dropped names are gone."""
    guest.run("part = [1]\na = {'p': part}\ndef f(): return a['p'] is part")
    other.run("a = 'old'; gone = 1; kept = 2")
    parcel, data = export(guest, "part", "a", "f")
    assert parcel == VariablesParcel(("part", "a", "f"), {})
    done = bring(other, data, VariablesCommit(("gone", "never"), "b1", {"a": ""}))
    assert (done.exit.reason, done.answers) == (ENDED, [])
    assert other.run("f(), kept, 'gone' in globals()").value == "(True, 2, False)"
    (base,) = run(other, VariablesRecall("b1")).answers
    assert base == VariablesBase({"a": ""}, (), True)
    assert guest.run("a, part").value == "({'p': [1]}, [1])"


def test_nothing_is_bound_without_a_commit(guest, other):
    """Staged values that the host cancels, or whose operation is interrupted, leave the namespace as it was."""
    guest.run("a = 1")
    _, data = export(guest, "a")
    assert bring(other, data, Cancel()).exit.reason == ENDED
    channel = start(other, VariablesImport())
    assert send_values(other, channel, data) == VariablesStaged()
    other.interrupt(channel)
    assert finish(other, channel).exit.reason == INTERRUPTED
    channel = start(other, VariablesImport())
    other.send_frame(frames.DATA, channel, data[:10])
    other.interrupt(channel)
    assert finish(other, channel).exit.reason == INTERRUPTED
    assert other.run("'a' in globals()").value == "False"


def test_what_cannot_travel_is_told_before_the_values(guest, other):
    """Refused values come with their reasons, the others travel."""
    guest.run("import threading\nlock = threading.Lock(); a = [lock]; b = 1; g = (n for n in [1])")
    parcel, data = export(guest, "lock", "a", "b", "g", "none")
    assert parcel.names == ("b",) and sorted(parcel.refused) == ["a", "g", "lock", "none"]
    assert parcel.refused["none"] == "there is no such variable" and "generator" in parcel.refused["g"]
    bring(other, data, VariablesCommit((), "b1", {}))
    assert other.run("b").value == "1"


def test_too_much_is_refused(guest):
    """Values above the limit of one transfer end the export; one variable that is too large alone is named."""
    guest.run("a = b'x' * 6000; b = b'y' * 6000")
    done = run(guest, VariablesExport(("a", "b"), 5000))
    assert done.answers == [VariablesFailed(TOO_LARGE, "more bytes than one transfer may have", "a")] and not done.data
    done = run(guest, VariablesExport(("a", "b"), 8000))
    assert isinstance(done.answers[-1], VariablesFailed) and done.answers[-1].reason == TOO_LARGE
    assert sum(map(len, done.data)) <= 8000 and guest.run("len(a)").value == "6000"


def test_a_hundred_megabytes(guest, other):
    """An array of 100 MB arrives as it was, through a window of 4 MiB and an agent that keeps none of it."""
    guest.run("import numpy\na = numpy.arange(100 * 2**17); shared = [a, a]")
    parcel, data = export(guest, "a", "shared")
    assert parcel.refused == {} and len(data) > 100 * 2**20
    bring(other, data, VariablesCommit((), "b1", {}))
    assert other.run("int(a.sum()) == len(a) * (len(a) - 1) // 2, shared[0] is a").value == "(True, True)"
    assert survey(guest).variables["a"] == survey(other).variables["a"]


def test_a_base_that_is_not_known(guest):
    """Recalling it fails by name; one that was agreed on is told as it was given."""
    assert run(guest, VariablesRecall("none")).answers == [VariablesFailed(NO_BASE, "that base is not remembered")]
    assert run(guest, VariablesRemember("b1", {"x": ""})).answers == []
    assert survey(guest).bases == ("b1",)


HOSTILE = """
import os, sys, threading, time
class Hostile:
    def __init__(self, how): self.how = how
    def __reduce_ex__(self, protocol):
        print('reducing', self.how)
        if self.how == 'exit': sys.exit(3)
        if self.how == 'interrupt': raise KeyboardInterrupt
        if self.how == 'self': return type(self), (self,)
        if self.how == 'deep': return self.__reduce_ex__(protocol)
        if self.how == 'garbage': return 1, 2, 3
        if self.how == 'stdout': sys.stdout.close(); os.close(1); return int, ()
        if self.how == 'main': del sys.modules['__main__']; return int, ()
        if self.how == 'pickle': sys.modules['pickle'] = sys.modules['copyreg'] = None; return int, ()
        if self.how == 'clear': globals().clear(); return int, ()
    def __repr__(self): raise ValueError
    def __getattr__(self, name): raise SystemExit
    def __eq__(self, other): raise ValueError
    def __hash__(self): return 1
    def __sizeof__(self): return -5
class Meta(type):
    def __getattribute__(cls, name): raise ValueError(name)
class Odd(metaclass=Meta): pass
deep = []
for _ in range(100000): deep = [deep]
loop = []; loop.append(loop)
name = type('T' * 10000, (), {})()
"""


@pytest.mark.parametrize("how", ["exit", "interrupt", "self", "deep", "garbage", "stdout", "main", "pickle"])
def test_hostile_objects_do_no_harm(guest, how):
    """Objects that raise, lie or break things when they are read are told, refused or carried; the rest stays."""
    guest.run(HOSTILE + f"h = Hostile('{how}'); x = 5")
    table = survey(guest)
    assert {"h", "x", "Odd", "deep", "loop", "name"} <= set(table.variables)
    assert table.variables["x"].fingerprint and table.variables["deep"].unread
    done = run(guest, VariablesExport(("h", "x", "deep", "loop", "Odd"), LARGE))
    assert done.exit.reason in (ENDED, INTERRUPTED)
    assert guest.run("x").value == "5"
    assert survey(guest).variables["x"] == table.variables["x"]


def test_what_objects_print_belongs_to_the_next_cell(guest):
    """An operation sends no output; what was written meanwhile is not lost."""
    guest.run(HOSTILE + "h = Hostile('garbage')")
    survey(guest)
    cell = guest.run("print('cell')")
    assert "reducing garbage" in cell.out and cell.out.endswith("cell\n")


def test_an_object_that_clears_the_namespace(guest):
    """The table tells what was there when the survey began."""
    guest.run(HOSTILE + "h = Hostile('clear'); x = 5")
    assert "x" in survey(guest).variables
    assert guest.run("len(globals()) < 3").value == "True"


@pytest.mark.parametrize("order", [VariablesSurvey(60_000), VariablesExport(("x", "h"), LARGE)], ids=lambda o: o.op)
@pytest.mark.parametrize(
    "body", ["while True: pass", "import time; time.sleep(60)", "import threading; threading.Event().wait()"]
)
def test_an_object_that_hangs_can_be_interrupted(guest, order, body):
    """The host's interrupt ends an operation as it ends a cell; variables are kept."""
    guest.run(f"class Hang:\n  def __reduce__(self):\n    open('began', 'w').close()\n    {body}\nx = 1; h = Hang()")
    channel = start(guest, order)
    wait_for(guest.home / "began")
    guest.interrupt(channel)
    assert finish(guest, channel, timeout_s=5).exit == Exit(130, INTERRUPTED)
    assert guest.run("x").value == "1"


def test_an_object_that_ignores_the_interrupt_is_killed(guest):
    """Kill ends the REPL; the next cell is told that its variables are lost."""
    guest.run(
        "import time\nclass Deaf:\n  def __reduce__(self):\n    open('began', 'w').close()\n    while True:\n"
        "      try: time.sleep(60)\n      except BaseException: pass\nh = Deaf()"
    )
    channel = start(guest, VariablesSurvey(60_000))
    wait_for(guest.home / "began")
    guest.interrupt(channel)
    guest.kill(channel)
    assert finish(guest, channel).exit.reason == DIED
    cell = guest.run("'h' in globals()")
    assert (cell.value, cell.exit.restarted) == ("False", True) and "variables are lost" in cell.stderr


def test_an_object_that_ends_the_process(guest):
    """A REPL that ends amid an operation is told as in a cell, and a new one serves the next one."""
    guest.run("import os\nclass Quit:\n  def __reduce__(self): os._exit(3)\nq = Quit()")
    done = run(guest, VariablesSurvey(1000))
    assert (done.exit.reason, done.exit.code, done.exit.restarted) == (DIED, 3, True)
    assert survey(guest).variables == {}
    assert guest.run("1").exit.restarted


def test_a_budget_that_is_over(guest):
    """Variables that the time did not suffice for are told as unread."""
    guest.run("x = 5; large = [[n] for n in range(300_000)]")
    table = survey(guest, budget_ms=20)
    assert table.variables["x"].fingerprint and "too long" in table.variables["large"].unread


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        (
            "class A:\n  def __setstate__(self, s): raise ValueError('never')\n  n = 1\na = A(); a.n = 2",
            "ValueError: never",
        ),
        ("class A:\n  def __setstate__(self, s): raise SystemExit(4)\na = A(); a.n = 2", "SystemExit: 4"),
        ("import sys, types\nsys.modules['m'] = a = types.ModuleType('m')", "No module named 'm'"),
    ],
)
def test_a_value_that_cannot_be_rebuilt(guest, other, cell, why):
    """An import fails by name and reason, and nothing of it is bound; the rest of the values is ignored."""
    guest.run(cell + "\nb = b'x' * 10_000_000")
    names = ("A", "a", "b") if "class" in cell else ("a", "b")
    _, data = export(guest, *names)
    channel = start(other, VariablesImport())
    failed = send_values(other, channel, data)
    assert isinstance(failed, VariablesFailed) and (failed.reason, failed.name) == (BAD_VALUE, "a")
    assert why in failed.message and finish(other, channel).exit.reason == ENDED
    assert other.run("[n for n in ('A', 'a', 'b') if n in globals()]").value == "[]"


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x05.", bytes(5_000_000)])
def test_bytes_that_are_no_values(guest, data):
    """A stream that is no parcel is refused; the REPL lives on."""
    guest.run("x = 1")
    channel = start(guest, VariablesImport())
    assert isinstance(send_values(guest, channel, data), VariablesFailed)
    assert finish(guest, channel).exit.reason == ENDED and guest.run("x").value == "1"


def test_frames_of_an_operation_that_is_over_are_ignored(guest):
    """Values, ends and commits that come late change nothing and break nothing."""
    channel = start(guest, VariablesImport())
    guest.interrupt(channel)
    assert finish(guest, channel).exit.reason == INTERRUPTED
    guest.send_frame(frames.DATA, channel, b"late")
    for message in (DataEnd(), VariablesCommit(("x",), "b1", {}), Cancel()):
        guest.send(channel, message)
    guest.run("x = 1")
    guest.send(channel, VariablesCommit(("x",), "b1", {}))
    assert guest.run("x").value == "1" and survey(guest).bases == ()


def test_interrupts_between_operations_do_nothing(guest):
    """An interrupt for an operation that has ended hits neither the next one nor a cell."""
    guest.run("x = 1")
    for _ in range(50):
        channel = start(guest, VariablesSurvey(1000))
        finish(guest, channel)
        guest.interrupt(channel)
        assert survey(guest).variables["x"].fingerprint
    assert guest.run("x").value == "1"


def test_a_cell_cannot_pose_as_an_operation(guest):
    """A REPL that sends a table within a cell has broken the protocol and is replaced."""
    payload = b'{"op":"variables_staged"}'
    cell = guest.run(f"""
import os, struct, time
for fd in range(3, 2000):
    try:
        if os.readlink(f'/proc/self/fd/{{fd}}').startswith('socket'):
            for channel in range(1, 9):
                os.write(fd, struct.pack('>IBI', {len(payload)}, 1, channel) + {payload!r})
    except OSError:
        pass
time.sleep(60)
""")
    assert cell.exit.reason == DIED and "broke the protocol" in cell.stderr


def wait_for(path) -> None:
    from guest_driver import wait_until

    wait_until(path.exists, str(path))
