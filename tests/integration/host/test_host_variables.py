"""Who changed a variable since the fork, values from one sandbox to another, and how guests cannot hinder the host."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import pytest

from hosting import Host, text
from machines import LIMITS
from podflare.engines.base import EngineOptions, Machine, MachineSpec
from podflare.engines.process.engine import ProcessEngine
from podflare.errors import Conflict, DeadlineExceeded, TooLarge
from podflare.host.config import Config
from podflare.host.guest_link import GuestLink
from podflare.host.variables import Unimportable, staged, table_of
from podflare.host.verdicts import Pair, Verdict, compare, settle
from podflare.wire import frames
from podflare.wire.messages import ENDED, Exec, Exit, Interrupt, Kill, from_guest
from podflare.wire.variables import Variable, VariablesSurvey, VariablesTable
from scripted_guest import ScriptedGuest

pytestmark = pytest.mark.anyio

TIMEOUT_S = 20.0


class Branch:
    """A machine and the host's link to its guest, without a daemon."""

    def __init__(self, machine: Machine, link: GuestLink, stack: AsyncExitStack) -> None:
        self.id = machine.id
        self.config = Config(interrupt_grace_s=1.0)
        self.machine = machine
        self.link = link
        self.stack = stack
        self.given_up = ""
        self._out = b""
        self._exit: Exit | None = None
        self._over = anyio.Event()

    @classmethod
    async def of(cls, machine: Machine, stack: AsyncExitStack) -> Branch:
        stack.push_async_callback(machine.aclose)
        link = await GuestLink.open(machine, timeout_s=TIMEOUT_S)
        stack.callback(link.close)
        return cls(machine, link, stack)

    def give_up(self, cause: str) -> None:
        self.given_up = cause
        self.link.close(cause)

    def on_frame(self, frame: frames.Frame) -> None:
        if frame.kind == frames.STDOUT:
            self._out += frame.payload
        elif frame.kind == frames.MESSAGE and isinstance(message := from_guest(frame.payload), Exit):
            self._exit = message
            self._over.set()

    def on_down(self, cause: str) -> None:
        self._over.set()

    async def run(self, code: str) -> str:
        """The output of a cell."""
        self._out, self._exit, self._over = b"", None, anyio.Event()
        channel = self.link.attach(self)
        self.link.say(channel, Exec(code, name=f"<cell {channel}>"))
        with anyio.fail_after(TIMEOUT_S):
            await self._over.wait()
        self.link.detach(channel)
        assert self._exit is not None and self._exit.reason == ENDED and self._exit.code == 0, (self._exit, self._out)
        return self._out.decode()

    async def fork(self, count: int = 1) -> list[Branch]:
        machines = await self.machine.fork(count, reseed=True, timeout_s=TIMEOUT_S)
        return [await Branch.of(machine, self.stack) for machine in machines]


@pytest.fixture
async def root(data_dir: Path) -> AsyncIterator[Branch]:
    """A sandbox without a daemon; it and all its forks are closed at the end."""
    folder = data_dir / "engine"
    folder.mkdir(mode=0o711)
    engine = ProcessEngine(EngineOptions(data_dir=str(folder), instance=f"t{data_dir.name}"))
    await engine.start()
    try:
        async with AsyncExitStack() as stack:
            yield await Branch.of(await engine.create(MachineSpec("default", LIMITS), timeout_s=TIMEOUT_S), stack)
    finally:
        await engine.aclose()
    assert os.listdir(folder / "machines") == []


async def verdicts(ours: Branch, theirs: Branch) -> dict[str, str]:
    """Those that are not the same."""
    pair = await compare(ours, theirs, timeout_s=TIMEOUT_S)
    told = {name: pair.judge(name).verdict for name in pair.names()}
    return {name: verdict.value for name, verdict in told.items() if verdict is not Verdict.SAME}


@asynccontextmanager
async def merging(ours: Branch, theirs: Branch) -> AsyncIterator[tuple[Pair, list[str]]]:
    """The pair and what is theirs to bring; within the block nothing has happened yet."""
    pair = await compare(ours, theirs, timeout_s=TIMEOUT_S)
    yield pair, [name for name in pair.names() if pair.judge(name).verdict is Verdict.THEIRS]


async def merge(ours: Branch, theirs: Branch) -> dict[str, str]:
    """Bring everything that only theirs changed.  Returns what was refused."""
    async with merging(ours, theirs) as (pair, names):
        take = tuple(name for name in names if name in pair.theirs.variables)
        drop = tuple(name for name in names if name not in pair.theirs.variables)
        async with staged(theirs, ours, take, timeout_s=TIMEOUT_S) as values:
            settled = [name for name in pair.names() if name not in values.refused]
            await settle(values, theirs, pair, drop=drop, settled=settled, timeout_s=TIMEOUT_S)
            return dict(values.refused)


# Who changed what.


async def test_each_side_is_told_apart(root: Branch) -> None:
    """Changed, added and removed variables are told by the side that did it; both is both; nothing is nothing."""
    await root.run("a, b, c, d, same, gone, lost = [1], [2], [3], [4], [5], 6, 7")
    one, two = await root.fork(2)
    await one.run("a.append(1); c.append(1); d.append(1); same.append(0); mine = 1; del gone")
    await two.run("b.append(2); c.append(2); d.append(1); same.append(0); yours = 1; del lost")
    assert await verdicts(one, two) == {
        "a": "ours", "b": "theirs", "c": "both", "gone": "ours", "lost": "theirs", "mine": "ours", "yours": "theirs",
    }  # fmt: skip
    assert await verdicts(root, two) == dict.fromkeys(("b", "c", "d", "lost", "same", "yours"), "theirs")
    assert await verdicts(one, root) == dict.fromkeys(("a", "c", "d", "gone", "mine", "same"), "ours")


async def test_a_large_value_is_known_where_one_side_is_the_base(root: Branch) -> None:
    """As long as one side ran no cell it says what was there, however large; else it is not guessed."""
    await root.run("large = [[n] for n in range(60_000)]; other = [[n] for n in range(60_000)]; x = 1")
    one, two = await root.fork(2)
    await one.run("large[0].append(1)")
    assert await verdicts(root, one) == {"large": "theirs"}
    await two.run("x = 2")
    pair = await compare(one, two, timeout_s=TIMEOUT_S)
    assert pair.judge("x").verdict is Verdict.THEIRS and pair.judge("other").verdict is Verdict.SAME
    assert pair.judge("large").verdict is Verdict.UNTOLD
    assert pair.judge("large").why == "too large to tell which side changed it"
    await root.run("x = 3")
    assert await verdicts(root, one) == {"large": "theirs", "x": "ours"}  # what was surveyed above is remembered


async def test_the_latest_moment_in_common_counts(root: Branch) -> None:
    """Between forks of forks it is the fork that both descend from; a REPL without a past knows none."""
    await root.run("a = [1]; b = [1]")
    (child,) = await root.fork()
    await child.run("a.append('child')")
    one, two = await child.fork(2)
    await one.run("b.append('one')")
    await two.run("c = 1")
    assert await verdicts(one, two) == {"b": "ours", "c": "theirs"}
    assert await verdicts(root, one) == {"a": "theirs", "b": "theirs"}
    await root.run("a = 0")
    assert await verdicts(root, two) == {"a": "both", "c": "theirs"}
    (last,) = await root.fork()
    assert await verdicts(last, root) == {}


async def test_threads_of_the_parent_do_not_pass_for_the_base(root: Branch) -> None:
    """What a background thread of the parent changes after the fork is the parent's change."""
    await root.run(
        "import threading\nx = 1; go, done = threading.Event(), threading.Event()\n"
        "def work():\n  global x\n  go.wait(); x = 2; done.set()\nthreading.Thread(target=work, daemon=True).start()"
    )
    (child,) = await root.fork()
    await root.run("go.set(); done.wait()")
    assert (await verdicts(root, child))["x"] == "ours"


async def test_two_strangers_have_no_base(root: Branch) -> None:
    """After its REPL was started anew a sandbox knows no moment in common: what differs is untold, not guessed."""
    await root.run("x = 1; y = 1")
    (child,) = await root.fork()
    killed = child.link.attach(child)
    child.link.say(killed, Exec("import time; time.sleep(60)"))
    child._over = anyio.Event()
    child.link.say(killed, Kill())
    with anyio.fail_after(TIMEOUT_S):
        await child._over.wait()
    await child.run("x = 1; y = 2")
    pair = await compare(root, child, timeout_s=TIMEOUT_S)
    assert pair.judge("x").verdict is Verdict.SAME
    assert (pair.judge("y").verdict, pair.base) == (Verdict.UNTOLD, None) and "no moment" in pair.judge("y").why


# Merging.


async def test_a_second_merge_changes_nothing_and_a_later_one_only_what_is_new(root: Branch) -> None:
    """After a merge the pair's base has moved on, in both directions."""
    await root.run("a, b, c = [1], [1], [1]")
    (child,) = await root.fork()
    await child.run("a.append('child'); del b; new = {'a': a}")
    await root.run("c.append('root')")
    assert await merge(root, child) == {}
    assert await root.run("print(a, c, new['a'] is a, 'b' in globals())") == "[1, 'child'] [1, 'root'] True False\n"
    assert await verdicts(root, child) == {"c": "ours"}
    await child.run("a.append('again')")
    assert await verdicts(root, child) == {"a": "theirs", "new": "theirs", "c": "ours"}
    assert await merge(root, child) == {} and await merge(child, root) == {}
    assert await verdicts(root, child) == {}
    assert await child.run("print(a, c)") == "[1, 'child', 'again'] [1, 'root']\n"
    await child.run("c = 0")
    await root.run("c = 1")
    assert await verdicts(root, child) == {"c": "both"}


async def test_several_branches_are_merged_one_after_another(root: Branch) -> None:
    """What an earlier merge brought counts as this side's change for the next branch; large values are known, too."""
    await root.run("a, b, c = [[n] for n in range(100_000)], [2], [3]; untouched = list(range(100_000))")
    one, two, three = await root.fork(3)
    await one.run("a[0].append('one')")
    await two.run("b.append('two'); a[1].append('two')")
    await three.run("c.append('three')")
    assert await merge(root, one) == {}
    assert await verdicts(root, two) == {"a": "both", "b": "theirs"}
    assert await merge(root, three) == {} and await merge(root, two) == {}
    assert await root.run("print(a[0], a[1], b, c)") == "[0, 'one'] [1] [2, 'two'] [3, 'three']\n"


async def test_what_was_refused_is_found_again(root: Branch) -> None:
    """A value that could not travel stays theirs for the next merge; a lock that was only replaced is noticed."""
    await root.run("import threading; lock = threading.Lock(); kept = threading.Lock()")
    (child,) = await root.fork()
    await child.run("lock = threading.Lock(); gen = (n for n in [1]); x = 1")
    for _ in range(2):
        assert sorted(await merge(root, child)) == ["gen", "lock"]
        assert await verdicts(root, child) == {"gen": "theirs", "lock": "theirs"}
    assert await root.run("print(x, 'gen' in globals())") == "1 False\n"


async def test_a_fork_after_a_merge_inherits_its_base(root: Branch) -> None:
    """A fork of the merged sandbox, compared with the branch that was merged, differs by what came later."""
    await root.run("a = [1]")
    (child,) = await root.fork()
    await child.run("a.append(2)")
    await merge(root, child)
    (late,) = await root.fork()
    await late.run("b = 1")
    await child.run("a.append(3)")
    assert await verdicts(late, child) == {"a": "theirs", "b": "ours"}


# Refusals.


async def test_a_value_that_cannot_be_rebuilt_changes_nothing(root: Branch) -> None:
    """The receiver stays as it was, the error names variable and reason, and both go on."""
    await root.run("x = 1")
    (child,) = await root.fork()
    await child.run("class A:\n  def __setstate__(self, s): raise ValueError('never')\na = A(); a.n = 1; x = 2")
    with pytest.raises(Unimportable, match="ValueError: never") as failure:
        await merge(root, child)
    assert failure.value.name == "a"
    assert await root.run("print(x, 'A' in globals())") == "1 False\n" and await child.run("print(x)") == "2\n"


async def test_too_much_is_refused(root: Branch) -> None:
    """Values above the limit are not carried, and nothing is bound."""
    await root.run("x = b'a' * 3_000_000")
    (child,) = await root.fork()
    with pytest.raises(TooLarge, match="'x'"):
        async with staged(root, child, ("x",), timeout_s=TIMEOUT_S, limit_bytes=2_000_000):
            pass
    assert await child.run("print(len(x))") == await root.run("print(len(x))") == "3000000\n"


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(60)"])
async def test_an_object_that_hangs_costs_the_operation_alone(root: Branch, body: str) -> None:
    """Reading ends at its limit with DeadlineExceeded; variables stay, and the next operation works."""
    await root.run(f"class Hang:\n  def __reduce__(self):\n    {body}\nh = Hang(); x = 1")
    with pytest.raises(DeadlineExceeded, match="nothing was changed"):
        await table_of(root, timeout_s=0.5)
    await root.run("del h")
    assert (await table_of(root, timeout_s=TIMEOUT_S)).variables["x"].fingerprint and root.given_up == ""


async def test_an_object_that_cannot_be_stopped_costs_its_python_process(root: Branch) -> None:
    """What ignores the interrupt is killed, and the error says that the variables are lost."""
    await root.run(
        "import time\nclass Deaf:\n  def __reduce__(self):\n    while True:\n      try: time.sleep(60)\n"
        "      except BaseException: pass\nh = Deaf()"
    )
    with pytest.raises(DeadlineExceeded, match="they are lost"):
        await table_of(root, timeout_s=0.5)
    assert await root.run("print('h' in globals())") == "False\n"


async def test_a_caller_that_is_cancelled_leaves_the_repl_free(root: Branch) -> None:
    """Cancellation amid a survey or a transfer interrupts it; the next cell runs at once."""
    await root.run("import time\nclass Slow:\n  def __reduce__(self): time.sleep(60)\nh = Slow(); x = 1")
    for _ in range(2):
        with anyio.move_on_after(0.2) as scope:
            await table_of(root, timeout_s=TIMEOUT_S)
        assert scope.cancelled_caught
        assert await root.run("print(x)") == "1\n"


async def test_a_large_value_goes_through_without_being_held(root: Branch) -> None:
    """100 MB go from one sandbox to another while this process grows by a few."""
    await root.run("x = 0")
    (child,) = await root.fork()
    await child.run("x = bytes(range(256)) * (100 * 2**20 // 256)")
    before = peak_kib()
    assert await merge(root, child) == {}
    assert peak_kib() - before < 40 * 1024
    assert await root.run("print(len(x), x[-1])") == f"{100 * 2**20} 255\n"


def peak_kib() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# diff over HTTP.


async def test_diff_tells_variables(walled: Callable[..., object]) -> None:
    """Added, removed and changed variables by type, size and fingerprint; a running cell is waited for."""
    async with walled() as h:  # type: ignore[attr-defined]
        parent = await h.create()
        await h.exec(parent, "a = 1; b = [1]; gone = 'x'; deep = []\nfor _ in range(5000): deep = [deep]")
        (child,) = await h.fork(parent)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(h.exec, child, "import time; time.sleep(0.3); a = 2.5; del gone; new = {}")
            await anyio.sleep(0.1)
            told = await h.diff(parent, child, variables="true")
        variables = told["variables"]
        assert (list(variables["added"]), list(variables["removed"])) == (["new", "time"], ["gone"])
        (change,) = variables["changed"].values()
        assert (change["type_before"], change["type_after"]) == ("int", "float")
        assert change["fingerprint_before"] != change["fingerprint_after"] and change["size_after"] > 0
        assert set(variables["added"]["new"]) == {"type", "size", "fingerprint"}
        assert variables["unread"] == {"deep": "it is nested too deeply"}
        assert "variables" not in await h.diff(parent, child)
        assert (await h.diff(parent, parent, variables="true"))["variables"]["changed"] == {}
        refused = await h.client.get(f"/v1/sandboxes/{parent}/diff/{child}", params={"variables": "yes"})
        assert refused.status_code == 400 and "variables" in refused.json()["error"]


# Guests that follow no rule.


async def hostile_diff(h: Host) -> tuple[int, str]:
    one = await h.create()
    answer = await h.client.get(f"/v1/sandboxes/{one}/diff/{one}", params={"variables": "true"}, timeout=40)
    return answer.status_code, answer.text


GOOD = VariablesTable({"x": Variable("int", 1, "0" * 32)})
ENDINGS = {
    "the end without a table": lambda guest, channel: guest.say(channel, Exit(0)),
    "two tables": lambda guest, channel: _say_all(guest, channel, GOOD, GOOD, Exit(0)),
    "a table too large": lambda guest, channel: guest.raw(
        frames.encode(frames.MESSAGE, channel, b'{"op":"variables_table","variables":{' + b" " * 5_000_000 + b"}}")
    ),
    "output": lambda guest, channel: guest.output(channel, b"text"),
    "garbage": lambda guest, channel: guest.raw(frames.encode(frames.MESSAGE, channel, b"{}")),
    "values": lambda guest, channel: guest.output(channel, b"x" * 1000, frames.DATA),
    "the end of the guest": lambda guest, channel: _close(guest),
}


async def _say_all(guest: ScriptedGuest, channel: int, *messages: object) -> None:
    for message in messages:
        await guest.say(channel, message)  # type: ignore[arg-type]


async def _close(guest: ScriptedGuest) -> None:
    guest.writer.close()


@pytest.mark.parametrize("what", ENDINGS)
async def test_a_guest_that_breaks_the_rules(scripted: Callable[..., object], what: str) -> None:
    """Whatever comes instead of a table, the caller gets an error and the daemon goes on."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        while True:
            channel, message = await guest.next_message()
            if isinstance(message, VariablesSurvey):
                await ENDINGS[what](guest, channel)

    async with scripted(script) as h:  # type: ignore[operator]
        status, said = await hostile_diff(h)
        assert status >= 400, said
        assert (await h.client.get("/v1/healthz")).status_code == 200


async def test_a_guest_that_is_silent(scripted: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that answers nothing is interrupted, killed and given up; values that it floods with are not kept."""
    monkeypatch.setattr("podflare.host.branches.DIFF_TIMEOUT_S", 0.3)
    heard: list[str] = []

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        while True:
            channel, message = await guest.next_message()
            heard.append(message.op)
            if isinstance(message, Interrupt):
                for _ in range(200):
                    await guest.output(channel, b"x" * frames.MAX_DATA_BYTES, frames.DATA)

    async with scripted(script, interrupt_grace_s=0.3, kill_grace_s=0.3) as h:  # type: ignore[operator]
        status, said = await hostile_diff(h)
        assert status == 504 or status == 404, said
        assert heard[:3] == ["variables_survey", "interrupt", "kill"]


async def test_the_python_process_may_die_in_a_diff(walled: Callable[..., object]) -> None:
    """Then the answer is a conflict that says what is lost, and the sandbox goes on."""
    async with walled() as h:  # type: ignore[attr-defined]
        parent = await h.create()
        (child,) = await h.fork(parent)
        await h.exec(parent, "import os\nclass Quit:\n  def __reduce__(self): os._exit(3)\nq = Quit()")
        answer = await h.client.get(f"/v1/sandboxes/{parent}/diff/{child}", params={"variables": "true"})
        assert answer.status_code == Conflict.status and "they are lost" in answer.text
        assert text(await h.exec(parent, "print(1)")) == "1"
