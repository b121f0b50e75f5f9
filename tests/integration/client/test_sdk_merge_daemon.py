"""merge on a real daemon and real sandboxes: what a user of the SDK sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack

import pytest

from daemons import ServedDaemon
from podflare import AsyncSandbox, Conflict, ConflictInfo, MergeConflict, Sandbox, SandboxNotFound

pytestmark = [pytest.mark.any_engine, pytest.mark.timeout(90)]


@pytest.fixture
def pair(sdk_daemon: ServedDaemon) -> Iterator[tuple[Sandbox, Sandbox]]:
    """Two forks of one sandbox with x = [1], and the file f."""
    with Sandbox(host=sdk_daemon.url) as parent, ExitStack() as stack:
        parent.run_code("x = [1]\nopen('/root/f', 'w').write('start\\n')")
        first, second = (stack.enter_context(child) for child in parent.fork(2))
        first.diff(second, variables=True)  # all that they have is known as it was, however busy the computer is
        yield first, second


def out(sandbox: Sandbox, expression: str) -> str:
    return sandbox.run_code(f"print({expression})").stdout


def test_objects_keep_their_connections(pair: tuple[Sandbox, Sandbox]) -> None:
    """Variables that share an object share it afterwards; functions and classes of cells work where they come to."""
    one, two = pair
    two.run_code(
        "class Point:\n    def __init__(self, x): self.x = x\n    def double(self): return scale * self.x\n"
        "scale = 2\nboth = [1]; left, right = {'v': both}, {'v': both}; point = Point(21)\n"
        "def tell(p): return p.double()"
    )
    report = one.merge(two)
    assert {"Point", "scale", "both", "left", "right", "point", "tell"} == set(report.variables)
    one.run_code("left['v'].append(2)")
    assert out(one, "right['v'], both, tell(point), isinstance(point, Point)") == "[1, 2] [1, 2] 42 True"


def test_a_rule_decides(pair: tuple[Sandbox, Sandbox]) -> None:
    """A function is asked about each conflict and sees both sides; without one the report is in the error."""
    one, two = pair
    one.run_code("x = 'one'; open('/root/f', 'w').write('first\\n')")
    two.run_code("x = [1, 2]; open('/root/f', 'w').write('second, longer\\n')")
    with pytest.raises(MergeConflict, match="2 conflicts, nothing has changed") as caught:
        one.merge(two)
    assert not caught.value.report.applied and isinstance(caught.value, Conflict)
    seen: list[ConflictInfo] = []

    def larger(item: ConflictInfo) -> str:
        seen.append(item)
        assert item.ours is not None and item.theirs is not None
        return "theirs" if (item.theirs.size or 0) > (item.ours.size or 0) else "ours"

    report = one.merge(two, on_conflict=larger)
    assert [(item.kind, item.name) for item in seen] == [("file", "/root/f"), ("variable", "x")]
    assert seen[1].ours is not None and (seen[1].ours.type, seen[1].theirs.type) == ("str", "list")
    assert report.conflicts[0].resolution == "theirs"
    assert out(one, "open('/root/f').read()") == "second, longer\n"


def test_what_fails_changes_nothing(pair: tuple[Sandbox, Sandbox]) -> None:
    """A rule that raises, a sandbox that is gone, a variable that cannot come: all is as it was."""
    one, two = pair
    one.run_code("x = 2")
    two.run_code("g = (n for n in x); x = 3; y = 1; open('/root/new', 'w').close()")
    with pytest.raises(ZeroDivisionError):
        one.merge(two, on_conflict=lambda item: 1 // 0)
    with pytest.raises(Conflict, match="'g' cannot be merged"):
        one.merge(two, variables=["g", "y"])
    two.close()
    with pytest.raises(SandboxNotFound):
        one.merge(two)
    assert out(one, "x, 'y' in globals(), __import__('glob').glob('*')") == "2 False ['f']"


@pytest.mark.anyio
async def test_the_asynchronous_sandbox(sdk_daemon: ServedDaemon) -> None:
    """merge and a coroutine function as its rule."""
    async with AsyncSandbox(host=sdk_daemon.url) as parent, AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(child) for child in await parent.fork(2)]
        await one.run_code("x = 1")
        await two.run_code("x = 2; y = 3")

        async def rule(item: ConflictInfo) -> str:
            return "ours"

        report = await one.merge(two, on_conflict=rule)
        assert report.variables == ("y",) and (await one.run_code("print(x, y)")).stdout == "1 3"
