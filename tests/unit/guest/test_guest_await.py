"""Promise: `await` works at top level, on one event loop for all cells."""

from __future__ import annotations

import signal

from podflare.wire.messages import INTERRUPTED


def test_top_level_await_gives_a_value(guest):
    """A cell may await, and the awaited value is its result."""
    cell = guest.run("import asyncio\nawait asyncio.sleep(0, 'done')")
    assert cell.value == "'done'", cell.stderr


def test_async_statements_at_top_level(guest):
    """async for, async with and comprehensions work outside of functions."""
    cell = guest.run("""
import asyncio, contextlib
async def count():
    for i in range(3):
        await asyncio.sleep(0)
        yield i
@contextlib.asynccontextmanager
async def around():
    print("in"); yield; print("out")
async with around():
    async for i in count(): print(i)
print([i async for i in count()])
""")
    assert cell.out == "in\n0\n1\n2\nout\n[0, 1, 2]\n", cell.stderr


def test_one_loop_for_all_cells(guest):
    """A task that one cell starts goes on when a later cell awaits."""
    guest.run("""
import asyncio
async def work():
    for i in range(3): await asyncio.sleep(0)
    return "finished"
async def begin(): return asyncio.ensure_future(work())
task = await begin()
""")
    assert guest.run("await task").value == "'finished'"


def test_asyncio_run_works_beside_it(guest):
    """asyncio.run() in a cell works, before and after top-level awaits."""
    code = "import asyncio\nasync def f(): return 5\nprint(asyncio.run(f()))"
    assert guest.run(code).out == "5\n"
    assert guest.run("await f()").value == "5"
    assert guest.run(code).out == "5\n"
    assert guest.run("await f()").value == "5"


def test_traceback_of_an_awaited_failure_starts_in_the_cell(guest):
    """An exception below an await shows the cell's line first and nothing of the event loop."""
    cell = guest.run("async def f():\n    raise ValueError('inside')\nawait f()")
    assert "base_events" not in cell.stderr
    assert cell.stderr.splitlines()[1] == '  File "<cell 1>", line 3, in <module>'
    assert "await f()" in cell.stderr


def test_interrupted_await_runs_its_clean_up(guest):
    """An interrupt cancels what is awaited: finally blocks run, the traceback names the line, the loop stays usable."""
    channel = guest.start("""
import asyncio
async def wait():
    try:
        asyncio.get_running_loop().call_soon(print, "waiting")
        await asyncio.sleep(60)
    finally:
        print("cleaned")
await wait()
""")
    guest.wait_output(channel, b"waiting")
    guest.interrupt(channel)
    cell = guest.finish(channel)
    assert cell.exit.reason == INTERRUPTED
    assert cell.exit.code == 128 + signal.SIGINT
    assert cell.out.endswith("cleaned\n")
    assert "await asyncio.sleep(60)" in cell.stderr
    assert guest.run("await asyncio.sleep(0, 1)").value == "1"


def test_system_exit_in_a_coroutine(guest):
    """sys.exit() below an await is the exit code."""
    assert guest.run("import sys\nasync def f(): sys.exit(7)\nawait f()").exit.code == 7
    assert guest.run("import asyncio; await asyncio.sleep(0, 2)").value == "2"


def test_closed_loop_is_replaced(guest):
    """A loop that user code closed is replaced at the next await."""
    guest.run(
        "import asyncio\nawait asyncio.sleep(0)\nasync def me(): return asyncio.get_running_loop()\nl = await me()"
    )
    guest.run("l.close()")
    assert guest.run("await asyncio.sleep(0, 3)").value == "3"
