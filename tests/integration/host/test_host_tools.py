"""Tool calls over HTTP: events, answers in any order, limits, time, ends; and guests that lie about them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest

from hosting import STEP_S, Host, text, wait_until
from podflare.wire import frames
from podflare.wire.messages import Exit, Interrupt, ToolCall, ToolCancel, ToolResult
from podflare.wire.tools import MAX_DEPTH, MAX_INPUT_BYTES, MAX_PENDING_CALLS, MAX_RESULT_BYTES
from scripted_guest import ScriptedGuest

pytestmark = pytest.mark.anyio


class Stream:
    """The events of a cell under way."""

    def __init__(self, host: Host, sandbox: str, response: httpx.Response) -> None:
        self._host, self._sandbox = host, sandbox
        self._lines = response.aiter_lines()
        self.cell = response.headers["x-podflare-cell-id"]
        self.seen: list[dict[str, Any]] = []

    async def next(self, kind: str) -> dict[str, Any]:
        """The next event of this type."""
        with anyio.fail_after(STEP_S):
            async for line in self._lines:
                if line:
                    self.seen.append(json.loads(line))
                    if self.seen[-1]["type"] == kind:
                        return self.seen[-1]
        raise AssertionError(f"the stream ended without {kind}: {self.seen}")

    async def call(self) -> dict[str, Any]:
        """What the next call says."""
        return dict((await self.next("tool_call"))["data"])

    async def answer(self, call_id: str, **body: Any) -> httpx.Response:
        path = f"/v1/sandboxes/{self._sandbox}/cells/{self.cell}/tool_results"
        return await self._host.client.post(path, json={"call_id": call_id, **body})


@asynccontextmanager
async def streaming(h: Host, sandbox: str, code: str, **more: Any) -> AsyncIterator[Stream]:
    body = {"code": code, "tools": ["query"], **more}
    async with h.client.stream("POST", f"/v1/sandboxes/{sandbox}/exec", json=body) as response:
        assert response.status_code == 200, await response.aread()
        yield Stream(h, sandbox, response)


async def test_a_call_is_an_event_and_its_answer_the_value(host):
    """The code gets what the client answers, after the client saw everything that was printed before."""
    async with host() as h:
        sandbox = await h.create()
        async with streaming(h, sandbox, "print('first')\nprint(await query(sql='select 1', n=[1, None]))") as cell:
            event = await cell.next("tool_call")
            assert [seen["type"] for seen in cell.seen] == ["stdout", "tool_call"]
            call = event["data"]
            assert (call["name"], call["input"]) == ("query", {"sql": "select 1", "n": [1, None]})
            assert event["cell_id"] == cell.cell
            assert (await cell.answer(call["call_id"], result={"rows": ["ä\u2028"]})).status_code == 204
            assert (await cell.next("exit"))["data"] == 0
            assert text(cell.seen) == "first\n{'rows': ['ä\\u2028']}"


async def test_many_calls_are_answered_in_any_order(host):
    """Calls under way at a time have ids of their own, and each gets its own answer."""
    code = "import asyncio\nprint(await asyncio.gather(*[query(i=i) for i in range(20)]))"
    async with host() as h:
        sandbox = await h.create()
        async with streaming(h, sandbox, code) as cell:
            calls = [await cell.call() for _ in range(20)]
            assert len({call["call_id"] for call in calls}) == 20
            for call in reversed(calls):
                await cell.answer(call["call_id"], result=call["input"]["i"] ** 2)
            await cell.next("exit")
            assert text(cell.seen) == str([i**2 for i in range(20)])


async def test_calls_above_the_cap_wait_in_the_sandbox(host):
    """No more than 128 calls are open at a time, and all are made in the end."""
    count = MAX_PENDING_CALLS + 40
    code = f"import asyncio\nprint(len(await asyncio.gather(*[query() for _ in range({count})])))"
    async with host() as h:
        sandbox = await h.create()
        async with streaming(h, sandbox, code) as cell:
            calls = [await cell.call() for _ in range(MAX_PENDING_CALLS)]
            with anyio.move_on_after(0.2) as scope:
                await cell.next("tool_call")
            assert scope.cancelled_caught
        async with streaming(h, sandbox, code) as cell:
            for _ in range(count):
                calls = [await cell.call()]
                await cell.answer(calls[0]["call_id"], result=1)
            await cell.next("exit")
            assert text(cell.seen) == str(count)


async def test_every_call_has_one_answer(host):
    """A second answer is 409, an id that was never given 404, and neither reaches the code."""
    async with host() as h:
        sandbox = await h.create()
        async with streaming(h, sandbox, "[await query(), await query()]") as cell:
            first = await cell.call()
            assert (await cell.answer(first["call_id"], result=1)).status_code == 204
            again = await cell.answer(first["call_id"], result=2)
            assert (again.status_code, again.json()["code"]) == (409, "conflict")
            second = await cell.call()
            for wrong in ("", "call_1", second["call_id"] + "0", second["call_id"] + "\u0663", "call_" + "9" * 100):
                unknown = await cell.answer(wrong, result=3)
                assert (unknown.status_code, unknown.json()["code"]) == (404, "call_not_found"), wrong
            await cell.answer(second["call_id"], result=4)
            assert (await cell.next("result"))["data"]["text/plain"] == "[1, 4]"
            await cell.next("exit")
            assert (await cell.answer(second["call_id"], result=5)).status_code == 409
        gone = await h.client.post(f"/v1/sandboxes/{sandbox}/cells/cell_x/tool_results", json={"call_id": "call_1"})
        assert (gone.status_code, gone.json()["code"]) == (404, "cell_not_found")


async def test_a_call_without_answer_times_out(host):
    """After its time the call raises TimeoutError, the client is told, and a late answer is refused."""
    async with host() as h:
        sandbox = await h.create()
        code = "try:\n    await query()\nexcept TimeoutError as exc:\n    print(exc)"
        async with streaming(h, sandbox, code, tool_timeout_seconds=0.2) as cell:
            call = await cell.call()
            cancelled = await cell.next("tool_cancelled")
            assert cancelled["data"] == {"call_id": call["call_id"], "reason": "timed_out"}
            assert (await cell.answer(call["call_id"], result=1)).status_code == 409
            assert (await cell.next("exit"))["data"] == 0
            assert text(cell.seen) == "no answer to query() within 0.2 s"


async def test_code_can_give_a_call_up(host):
    """A cancelled await is told to the client, its late answer is refused, and the next call works."""
    code = """
import asyncio
try:
    await asyncio.wait_for(query(n=1), 0.1)
except asyncio.TimeoutError:
    print(await query(n=2))
"""
    async with host() as h:
        sandbox = await h.create()
        async with streaming(h, sandbox, code) as cell:
            first = await cell.call()
            assert (await cell.next("tool_cancelled"))["data"]["reason"] == "cancelled"
            assert (await cell.answer(first["call_id"], result="late")).status_code == 409
            await cell.answer((await cell.call())["call_id"], result="second")
            await cell.next("exit")
            assert text(cell.seen) == "second"


async def test_waiting_for_tools_does_not_count_as_running(host):
    """The cell's clock stands still while a call is open, and goes on afterwards."""
    async with host() as h:
        sandbox = await h.create()
        async with streaming(h, sandbox, "await query()\nprint('on')\nwhile True: pass", timeout_seconds=0.3) as cell:
            call = await cell.call()
            with anyio.move_on_after(0.6) as scope:
                await cell.next("exit")
            assert scope.cancelled_caught
        code = "await query()\nprint('on')\nwhile True: pass"
        async with streaming(h, sandbox, code, timeout_seconds=0.3) as cell:
            call = await cell.call()
            await cell.answer(call["call_id"], result=None)
            last = await cell.next("exit")
            assert (last["data"], last["reason"], text(cell.seen)) == (124, "timed_out", "on")


async def test_an_interrupt_ends_the_wait(host):
    """A cell that waits for a tool is interrupted as any other; its calls end with it, its names are gone."""
    async with host() as h:
        sandbox = await h.create()
        await h.exec(sandbox, "query = 'mine'")
        async with streaming(h, sandbox, "await query()") as cell:
            call = await cell.call()
            await h.client.post(f"/v1/sandboxes/{sandbox}/interrupt")
            last = await cell.next("exit")
            assert (last["data"], last["reason"], last["restarted"]) == (130, "interrupted", False)
            assert (await cell.answer(call["call_id"], result=1)).status_code == 409
        assert text(await h.exec(sandbox, "print(query)")) == "mine"


async def test_a_client_that_leaves_ends_the_wait(host):
    """Without its client a waiting cell is interrupted, and the sandbox is free with its state."""
    async with host() as h:
        sandbox = await h.create()
        await h.exec(sandbox, "x = 1")
        async with streaming(h, sandbox, "await query()") as cell:
            await cell.call()
        with anyio.fail_after(STEP_S):
            assert text(await h.exec(sandbox, "print(x)")) == "1"


BAD_TOOLS: list[dict[str, Any]] = [
    {"tools": "query"},
    {"tools": ["not a name"]},
    {"tools": ["for"]},
    {"tools": ["__import__"]},
    {"tools": ["ünicode"]},
    {"tools": [1]},
    {"tools": ["twice", "twice"]},
    {"tools": ["x" * 65]},
    {"tools": [f"t{i}" for i in range(129)]},
    {"tools": {"query": "sql"}},
    {"tools": {"query": ["a b"]}},
    {"tools": ["query"], "language": "bash"},
    {"tools": ["query"], "tool_timeout_seconds": 0},
]


async def test_tools_that_cannot_be_are_refused(host):
    """A request with a name that Python could not call, or with tools for bash, is 400."""
    async with host() as h:
        sandbox = await h.create()
        for body in BAD_TOOLS:
            answer = await h.client.post(f"/v1/sandboxes/{sandbox}/exec", json={"code": "1", **body})
            assert (answer.status_code, answer.json()["code"]) == (400, "bad_request"), body


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


async def test_answers_that_cannot_be_are_refused_and_the_call_waits_on(host):
    """What is no JSON, too large, too deep, or no answer at all is 400; a good answer then is taken, up to 8 MiB."""
    async with host() as h:
        sandbox = await h.create()
        async with streaming(h, sandbox, "len(await query())") as cell:
            call_id = (await cell.call())["call_id"]
            path = f"/v1/sandboxes/{sandbox}/cells/{cell.cell}/tool_results"
            for raw in (
                b'{"call_id": 1}',
                b'{"call_id": "%s", "result": NaN}' % call_id.encode(),
                b'{"call_id": "%s", "error": "no"}' % call_id.encode(),
                b'{"call_id": "%s", "error": {"type": 1}}' % call_id.encode(),
                b'{"call_id": "%s", "result": 1, "error": {"type": "E", "message": ""}}' % call_id.encode(),
                json.dumps({"call_id": call_id, "result": nested(MAX_DEPTH + 2)}).encode(),
                json.dumps({"call_id": call_id, "result": "x" * MAX_RESULT_BYTES}).encode(),
            ):
                answer = await h.client.post(path, content=raw)
                assert (answer.status_code, answer.json()["code"]) == (400, "bad_request"), raw[:80]
            size = MAX_RESULT_BYTES - 2
            assert (await cell.answer(call_id, result="x" * size)).status_code == 204
            assert (await cell.next("result"))["data"]["text/plain"] == str(size)


async def test_large_inputs_arrive_and_too_large_ones_raise(host):
    """An input of up to 1 MiB as JSON arrives whole; above it, or if it is no JSON, the call raises in the code."""
    code = f"""
for value in ("x" * {MAX_INPUT_BYTES}, float("nan"), object(), (lambda a: a.append(a) or a)([])):
    try:
        await query(v=value)
    except ValueError as exc:
        print(str(exc)[:25])
print(await query(v="x" * {MAX_INPUT_BYTES - 10}))
"""
    async with host() as h:
        sandbox = await h.create()
        async with streaming(h, sandbox, code) as cell:
            call = await cell.call()
            await cell.answer(call["call_id"], result=len(call["input"]["v"]))
            await cell.next("exit")
            lines = text(cell.seen).splitlines()
            assert lines[0] == "the input of query() has "
            assert lines[1:4] == ["the input of query() is n"] * 3
            assert lines[4] == str(MAX_INPUT_BYTES - 10)


# Guests that lie.

LIES = {
    "a tool that the cell does not have": [ToolCall(1, "other", {})],
    "one number twice": [ToolCall(1, "query", {}), ToolCall(1, "query", {})],
    "too deep": [ToolCall(1, "query", {"a": nested(MAX_DEPTH + 2)})],
    "too large": [ToolCall(1, "query", {"a": "x" * (MAX_INPUT_BYTES + 1)})],
    "far too large": [ToolCall(1, "query", {"a": "x" * (2 * MAX_INPUT_BYTES)})],
}


async def test_a_guest_that_lies_about_calls_loses_its_machine(scripted):
    """Calls that no real guest makes break the protocol: that sandbox ends with the reason."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, cell = await guest.next_exec()
        for message in LIES[cell.code]:
            await guest.say(channel, message)

    async with scripted(script) as h:
        for lie in LIES:
            cell = await h.exec(await h.create(), lie, tools=["query"])
            assert (cell[-1]["data"], cell[-1]["reason"]) == (137, "sandbox_failed"), lie
            assert "broke the protocol" in text(cell, "stderr"), lie


async def test_a_call_without_declared_tools_breaks_the_protocol(scripted):
    """A cell that was given no tools cannot make its client see a call."""

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        await guest.say(channel, ToolCall(1, "query", {}))

    async with scripted(script) as h:
        sandbox = await h.create()
        cell = await h.exec(sandbox, "1")
        assert [event["type"] for event in cell if event["type"] == "tool_call"] == []
        assert cell[-1]["reason"] == "sandbox_failed"


async def test_a_flood_of_calls_is_bounded(scripted):
    """Of more calls than may be open, the surplus is answered with an error by the host; cancels free their places."""
    answers: list[ToolResult] = []

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        for number in range(1, MAX_PENDING_CALLS + 2):
            await guest.say(channel, ToolCall(number, "query", {}))
        _, message = await guest.next_message()
        assert isinstance(message, ToolResult)
        answers.append(message)
        await guest.say(channel, ToolCancel(1))
        await guest.say(channel, ToolCancel(77_777))
        await guest.say(channel, ToolCall(1000, "query", {}))
        await guest.say(channel, Exit(0))

    async with scripted(script) as h:
        sandbox = await h.create()
        cell = await h.exec(sandbox, "1", tools=["query"])
        kinds = [event["type"] for event in cell]
        assert kinds.count("tool_call") == MAX_PENDING_CALLS + 1
        assert kinds.count("tool_cancelled") == 1
        assert (answers[0].call, answers[0].error) == (MAX_PENDING_CALLS + 1, "RuntimeError")


async def test_calls_that_the_client_does_not_take_are_bounded(scripted):
    """While the client reads nothing, calls are refused from a size on, also if each is given up at once."""
    refused: list[ToolResult] = []

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        for number in range(1, 100):
            await guest.say(channel, ToolCall(number, "query", {"a": "x" * (MAX_INPUT_BYTES - 100)}))
            await guest.say(channel, ToolCancel(number))
        _, message = await guest.next_message()
        assert isinstance(message, ToolResult)
        refused.append(message)

    async with scripted(script) as h:
        sandbox = await h.create()
        async with streaming(h, sandbox, "1"):
            await wait_until(lambda: bool(refused))
    assert (refused[0].error, refused[0].call < 60) == ("RuntimeError", True)
    assert "does not take the events" in refused[0].message


async def test_a_guest_that_ends_with_open_calls_leaves_none(scripted):
    """After the end of the cell no timer of a call is left that could speak for it."""
    heard: list[object] = []

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        await guest.say(channel, ToolCall(1, "query", {}))
        await guest.say(channel, Exit(0))
        channel, _ = await guest.next_exec()
        while True:
            _, message = await guest.next_message()
            heard.append(message)
            if isinstance(message, Interrupt):
                await guest.raw(frames.encode(frames.STDOUT, channel, b"told"))
                await guest.say(channel, Exit(130, "interrupted"))
                return

    async with scripted(script) as h:
        sandbox = await h.create()
        await h.exec(sandbox, "1", tools=["query"], tool_timeout_seconds=0.05)
        cell = await h.exec(sandbox, "2", timeout_seconds=0.3)
        assert text(cell) == "told"
        await wait_until(lambda: bool(heard))
        assert [type(message) for message in heard] == [Interrupt]
