"""Promise: a REPL that does not behave while it calls tools hurts itself alone."""

from __future__ import annotations

from podflare.wire import frames
from podflare.wire.messages import DIED, Exec, Exit, ToolCall, ToolCancel, ToolResult, from_guest


def begin(guest, code: str) -> int:
    channel = guest.new_channel()
    guest.send(channel, Exec(code, name=f"<cell {channel}>", tools={"query": ()}))
    return channel


def next_call(guest, channel: int) -> int:
    """The number of the next call; calls that were given up are passed over."""
    while True:
        message = from_guest(guest.next_frame(channel).payload)
        if isinstance(message, ToolCall):
            return message.call
        assert isinstance(message, ToolCancel), message


def test_answers_that_nobody_reads_do_not_pile_up(guest):
    """A REPL that calls and never reads is ended once too much waits for it, and a new one serves the next cell."""
    channel = begin(
        guest,
        "import asyncio\n"
        "async def flood():\n"
        "    while True:\n"
        "        call = query()\n"
        "        call.send(None)\n"
        "        call.close()\n"
        "await flood()",
    )
    for _ in range(40):
        guest.send(channel, ToolResult(next_call(guest, channel), value="x" * 2**20))
    stderr, exit_message = b"", None
    while exit_message is None:
        frame = guest.next_frame(channel)
        if frame.kind == frames.STDERR:
            stderr += frame.payload
        elif isinstance(message := from_guest(frame.payload), Exit):
            exit_message = message
    assert b"did not take the answers" in stderr
    assert (exit_message.reason, exit_message.restarted) == (DIED, True)
    assert guest.run("1 + 1").value == "2"


def test_an_answer_that_comes_too_late_disturbs_no_later_cell(guest):
    """Answers to calls of a cell that has ended are dropped, before, in and after the next cell."""
    channel = begin(guest, "import asyncio\ntask = asyncio.ensure_future(query())\nawait asyncio.sleep(0)\n'over'")
    call = next_call(guest, channel)
    assert guest.finish(channel).value == "'over'"
    guest.send(channel, ToolResult(call, value="late"))
    channel = begin(guest, "await query()")
    second = next_call(guest, channel)
    assert second != call
    guest.send(channel, ToolResult(call, value="late"))
    guest.send(channel, ToolResult(999, value="never asked"))
    guest.send(channel, ToolResult(second, value="mine"))
    assert guest.finish(channel).value == "'mine'"
    assert guest.run("task.cancelled()").value == "True"


def test_a_large_answer_arrives_whole_in_small_pieces(guest):
    """An answer that fills the socket many times over is put together while the code waits."""
    channel = begin(guest, "len(await query())")
    call = next_call(guest, channel)
    guest.send(channel, ToolResult(call, value="ü" * 1_000_000))
    assert guest.finish(channel).value == "1000000"
