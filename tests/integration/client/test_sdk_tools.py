"""`run_code(..., tools=...)`: code in real sandboxes calls functions of this process."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from daemons import ServedDaemon
from podflare import (
    AsyncSandbox,
    BadRequest,
    CallNotFound,
    CellNotFound,
    Conflict,
    Sandbox,
    ToolCallEvent,
)

pytestmark = pytest.mark.timeout(90)


def add(a: int, b: int = 10) -> int:
    return a + b


@pytest.fixture(scope="module")
def shared(sdk_daemon: ServedDaemon) -> Iterator[Sandbox]:
    """One sandbox for the tests that leave nothing behind in it."""
    with Sandbox(host=sdk_daemon.url) as sandbox:
        yield sandbox


def out(sandbox: Sandbox, code: str, **tools: Any) -> str:
    result = sandbox.run_code(code, tools=tools)
    assert result.ok, result.stderr
    return result.stdout


def test_arguments_by_position_by_name_and_in_a_dict(shared: Sandbox) -> None:
    """A function is called with the arguments that the code gave, however it gave them."""
    code = "print(await add(1), await add(1, 2), await add(b=3, a=1), await add({'a': 5, 'b': 5}), await add(1, b=0))"
    assert out(shared, code, add=add) == "11 3 4 10 1"
    assert out(shared, "print(await size([1, 2]), await size({'x': 1}))", size=len) == "2 1"
    assert out(shared, "print(await f(x=[{}]), await f({}), await f())", f=lambda **more: more) == "{'x': [{}]} {} {}"


def test_wrong_arguments_raise_in_the_code(shared: Sandbox) -> None:
    """What Python would refuse is a TypeError at the call, with the function's name."""
    code = """
for call in ("add(1, 2, 3)", "add(1, a=2)", "add()", "add(nope=1)", "free(1)"):
    try:
        await eval(call)
    except TypeError as exc:
        print(str(exc)[:12])
"""
    lines = out(shared, code, add=add, free=lambda **more: 1).splitlines()
    assert lines == ["add() takes ", "add() got mu", "add() missin", "add() got an", "free() takes"]


def test_values_are_json(shared: Sandbox) -> None:
    """Every JSON value comes back as it is; what is none raises TypeError in the code, not here."""
    value = {"a": [1, 2.5, None, True, "ü\u2028\ud800"], "": {"deep": []}}
    assert out(shared, f"print((await f()) == {value!r})", f=lambda: value) == "True"
    code = "try:\n    await f()\nexcept TypeError as exc:\n    print(exc)"
    assert "is not JSON" in out(shared, code, f=lambda: object())
    assert "is not JSON" in out(shared, code, f=lambda: float("nan"))


def test_errors_keep_their_name_and_text(shared: Sandbox) -> None:
    """A built-in exception is that exception in the code, any other one of its name."""

    class NoSuchTable(Exception):
        pass

    def fail(kind: str) -> None:
        raise {"value": ValueError("bad"), "key": KeyError("k"), "own": NoSuchTable("t")}[kind]

    code = """
for kind in ("value", "key", "own"):
    try:
        await fail(kind)
    except (ValueError, KeyError) as exc:
        print(repr(exc))
    except Exception as exc:
        print(type(exc).__name__, exc)
"""
    assert out(shared, code, fail=fail).splitlines() == ["ValueError('bad')", "KeyError('k')", "NoSuchTable t"]
    broken = shared.run_code("await fail('own')", tools={"fail": fail})
    assert broken.error is not None and (broken.error.name, broken.error.value) == ("NoSuchTable", "t")
    assert "podflare" not in broken.stderr


def test_functions_exist_only_in_their_cell(shared: Sandbox) -> None:
    """What a tool replaced comes back, a name that was new goes, one that the code took stays the code's."""
    shared.run_code("def add(a): return 'mine'\nkept = None")
    assert out(shared, "kept = add\ntaken = 'by the code'\nprint(await add(1))", add=add, taken=add, fresh=add) == "11"
    assert shared.run_code("print(add(1), taken, 'fresh' in globals())").stdout == "mine by the code False"
    late = shared.run_code("await kept(1)", tools={"other": add})
    assert late.error is not None and "the cell that it was given to is over" in late.error.value
    shared.run_code("del add, taken, kept")


def test_calls_from_other_loops_and_functions(shared: Sandbox) -> None:
    """Calls work in helper functions, in asyncio.run of plain code, and in threads with loops of their own."""
    code = """
import asyncio, threading
async def helper(n):
    return await add(n)
print(asyncio.run(helper(1)))
found = []
threads = [threading.Thread(target=lambda n=n: found.append(asyncio.run(helper(n)))) for n in range(5)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sorted(found))
"""
    assert out(shared, code, add=add) == "11\n[10, 11, 12, 13, 14]"
    assert out(shared, "print(await asyncio.gather(*map(helper, range(5))))", add=add) == "[10, 11, 12, 13, 14]"


def test_a_call_that_outlived_its_cell_holds_up_nobody(shared: Sandbox) -> None:
    """What waits when its cell ends is cancelled; later cells, threads and forks call as if it had not been."""
    code = """
import asyncio, threading
task = asyncio.ensure_future(add(1))
async def stay():
    waiting = asyncio.ensure_future(add(2))
    await asyncio.sleep(0)
    begun.set()
    while not done.is_set():
        await asyncio.sleep(0.001)
    return waiting
begun, done = threading.Event(), threading.Event()
thread = threading.Thread(target=lambda: found.append(asyncio.run(stay())))
found = []
thread.start()
begun.wait()
await asyncio.sleep(0)
"""
    types = [event.type for event in shared.run_code_stream(code, tools={"add": ["a"]})]
    assert types == ["tool_call", "tool_call", "exit"]
    with shared.fork()[0] as child:
        later = child.run_code("print(await add(5))\nprint(task.cancelled())", tools={"add": add}, tool_timeout=10)
        assert later.stdout == "15\nTrue", later.stderr
    assert out(shared, "print(await add(5), task.cancelled())", add=add) == "15 True"
    code = "done.set()\nthread.join()\nprint(found[0].cancelled())"
    assert shared.run_code(code).stdout == "True"


def test_a_process_that_the_code_forks_cannot_call(shared: Sandbox) -> None:
    """A call from another process raises there and disturbs nobody."""
    code = """
import asyncio, os
pid = os.fork()
if not pid:
    try: asyncio.run(add(1))
    except RuntimeError as exc: os.write(1, str(exc).encode() + b"\\n")
    os._exit(0)
os.waitpid(pid, 0)
print(await add(1))
"""
    assert out(shared, code, add=add) == "add() can only be called by the process of the cell itself\n11"


def test_functions_run_in_the_callers_thread(shared: Sandbox) -> None:
    """A Sandbox calls functions where run_code was called, so that what is bound to a thread can be used."""
    table = sqlite3.connect(":memory:")
    try:
        table.execute("create table t (n)")

        def query(sql: str) -> list[Any]:
            assert threading.current_thread() is threading.main_thread()
            return table.execute(sql).fetchall()

        code = "import asyncio\nawait asyncio.gather(*[query(f'insert into t values ({i})') for i in range(9)])"
        assert out(shared, code + "\nprint(await query('select sum(n) from t'))", query=query) == "[[36]]"
    finally:
        table.close()


def test_output_and_state_are_those_of_any_cell(shared: Sandbox) -> None:
    """A cell with tools has stdout, results and variables as one without."""
    result = shared.run_code("n = await add(1)\nprint('out')\nn * 2", tools={"add": add})
    assert (result.stdout, result.results[0].text, result.exit_code) == ("out", "22", 0)
    assert shared.run_code("print(n)").stdout == "11"


def test_a_function_that_is_interrupted_interrupts_the_cell(shared: Sandbox) -> None:
    """Ctrl-C in a function ends run_code and the cell, and the sandbox is free."""

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared.run_code("await stop()\nwhile True: pass", tools={"stop": stop})
    assert shared.run_code("print('free')").stdout == "free"


def test_what_cannot_be_a_tool_is_refused_before_the_cell(shared: Sandbox) -> None:
    """Coroutine functions in a Sandbox, names that Python cannot call and things that cannot be called raise here."""

    async def coroutine() -> None:
        return None

    with pytest.raises(TypeError, match="AsyncSandbox"):
        shared.run_code("1", tools={"f": coroutine})
    with pytest.raises(TypeError, match="function"):
        shared.run_code("1", tools={"f": 1})  # type: ignore[dict-item]  # the point of the test
    with pytest.raises(TypeError, match="mapping"):
        shared.run_code("1", tools=["f"])  # type: ignore[arg-type]  # likewise
    with pytest.raises(BadRequest, match="'no name'"):
        shared.run_code("1", tools={"no name": add})
    with pytest.raises(BadRequest, match="Python"):
        shared.run_code("1", "bash", tools={"f": add})


def test_time_limits(shared: Sandbox) -> None:
    """A function's time does not count as the cell's; tool_timeout bounds one call."""
    assert shared.run_code("print(await wait())", tools={"wait": lambda: _slept(0.6)}, timeout=0.4).stdout == "done"
    slow = shared.run_code("await wait()", tools={"wait": lambda: _slept(0.3)}, tool_timeout=0.1)
    assert slow.error is not None and slow.error.name == "TimeoutError"


def _slept(seconds: float) -> str:
    threading.Event().wait(seconds)
    return "done"


def test_a_held_stream_is_answered_by_hand(shared: Sandbox) -> None:
    """Whoever has the sandbox's id answers the calls of a stream, each once."""
    found = []
    other = Sandbox.connect(shared.id, client=shared._maybe_client)
    for event in shared.run_code_stream("await query('select 1')", tools={"query": ["sql"]}):
        if isinstance(event, ToolCallEvent):
            assert (event.name, event.input) == ("query", {"sql": "select 1"})
            with pytest.raises(CallNotFound):
                other.answer_tool_call(event.cell_id, "call_x", result=1)
            with pytest.raises(CellNotFound):
                other.answer_tool_call("cell_x", event.call_id, result=1)
            with pytest.raises(BadRequest, match="not JSON"):
                other.answer_tool_call(event.cell_id, event.call_id, result={1, 2})
            other.answer_tool_call(event.cell_id, event.call_id, error={"type": "Odd Name", "message": "why"})
            with pytest.raises(Conflict):
                other.answer_tool_call(event.cell_id, event.call_id, result=2)
        found.append(event)
    assert [event.type for event in found if event.type != "stderr"] == ["tool_call", "error", "exit"]
    assert [event.data["name"] for event in found if event.type == "error"] == ["ToolError"]


@pytest.mark.anyio
async def test_async_functions_run_side_by_side(sdk_daemon: ServedDaemon) -> None:
    """An AsyncSandbox has many calls under way at a time, of coroutine functions and of others."""
    together = 0
    most = 0
    all_here = asyncio.Event()

    async def slow(n: int) -> int:
        nonlocal together, most
        together += 1
        most = max(most, together)
        if together == 20:
            all_here.set()
        await asyncio.wait_for(all_here.wait(), 20)
        together -= 1
        return n

    barrier = threading.Barrier(3, timeout=20)
    async with AsyncSandbox(host=sdk_daemon.url) as sandbox:
        code = "import asyncio\nprint(sum(await asyncio.gather(*[slow(i) for i in range(20)])))"
        assert (await sandbox.run_code(code, tools={"slow": slow})).stdout == "190"
        code = "print(len(await asyncio.gather(meet(), meet(), meet())))"
        assert (await sandbox.run_code(code, tools={"meet": barrier.wait})).stdout == "3"
    assert most == 20


@pytest.mark.anyio
async def test_a_cell_that_ends_cancels_its_functions(sdk_daemon: ServedDaemon) -> None:
    """Functions that nobody waits for are cancelled with the end of their cell, and so is the cell with its caller."""
    cancelled = asyncio.Event()
    begun = asyncio.Event()

    async def forever() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with AsyncSandbox(host=sdk_daemon.url) as sandbox:
        code = "import asyncio\ntask = asyncio.ensure_future(forever())\nawait asyncio.sleep(0.1)\nprint('over')"
        assert (await sandbox.run_code(code, tools={"forever": forever})).stdout == "over"
        assert begun.is_set() and cancelled.is_set()
        begun.clear()
        cancelled.clear()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: sandbox.run_code("await forever()", tools={"forever": forever}))
            with anyio.fail_after(20):
                await begun.wait()
            tasks.cancel_scope.cancel()
        assert cancelled.is_set()
        with anyio.fail_after(20):
            assert (await sandbox.run_code("print('free')")).stdout == "free"
