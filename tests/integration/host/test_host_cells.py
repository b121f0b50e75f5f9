"""Cells: order, timeouts, interrupts, clients that leave or stall, output caps, and what is said about deaths."""

from __future__ import annotations

import anyio
import pytest

from hosting import STEP_S, events, peak_kib, text, wait_until
from podflare.engines.base import Usage
from podflare.wire import frames
from podflare.wire.messages import DIED, Exit, Interrupt, Kill, Result
from scripted_guest import ScriptedGuest

pytestmark = pytest.mark.anyio

MIB = 2**20


async def test_state_persists_and_languages_share_files(host):
    """Python keeps its variables from cell to cell; bash sees the same files."""
    async with host() as h:
        sandbox = await h.create()
        await h.exec(sandbox, "x = 41; open('f', 'w').write('from python')")
        assert text(await h.exec(sandbox, "print(x + 1)")) == "42"
        assert text(await h.exec(sandbox, "cat ~/f", language="bash")) == "from python"


async def test_input_is_at_its_end(host):
    """A cell that reads its input gets EOFError at once instead of hanging."""
    async with host() as h:
        sandbox = await h.create()
        cell = await h.exec(sandbox, "input()", timeout_seconds=10)
        assert "EOFError" in text(cell, "stderr") and cell[-1]["data"] == 1


async def test_timeout_keeps_state_if_the_interrupt_suffices(host):
    """A cell over its time ends with 124 and a stderr line, and the variables are there afterwards."""
    async with host() as h:
        sandbox = await h.create()
        await h.exec(sandbox, "x = 1")
        cell = await h.exec(sandbox, "while True: pass", timeout_seconds=0.3)
        last = cell[-1]
        assert (last["data"], last["reason"], last["restarted"]) == (124, "timed_out", False)
        assert "cell timed out after 0.3 s; variables are kept" in text(cell, "stderr")
        assert text(await h.exec(sandbox, "print(x)")) == "1"


async def test_timeout_kills_what_ignores_the_interrupt(host):
    """A cell that ignores the interrupt is killed after the grace time, and the loss of state is told."""
    async with host(interrupt_grace_s=0.3) as h:
        sandbox = await h.create()
        code = "import itertools; sum(itertools.repeat(1))"  # one C call that looks at no signal
        cell = await h.exec(sandbox, code, timeout_seconds=0.3)
        last = cell[-1]
        assert (last["data"], last["reason"], last["restarted"]) == (124, "timed_out", True)
        assert "its variables are lost" in text(cell, "stderr")
        assert text(await h.exec(sandbox, "print('fresh')")) == "fresh"


async def test_timeout_ends_the_processes_that_a_cell_started(host, tmp_path):
    """After a timeout no process of the cell lives on."""
    async with host() as h:
        sandbox = await h.create()
        pid = tmp_path / "pid"
        await h.exec(sandbox, f"sleep 1000 & echo $! > {pid}; wait", language="bash", timeout_seconds=0.5)
        code = f"import os\ntry: os.kill({int(pid.read_text())}, 0)\nexcept ProcessLookupError: print('gone')"
        assert text(await h.exec(sandbox, code)) == "gone"


async def test_interrupt_ends_the_running_cell(host):
    """POST interrupt ends the cell as Ctrl-C would; with nothing running it says so."""
    async with host() as h:
        sandbox = await h.create()
        assert (await h.client.post(f"/v1/sandboxes/{sandbox}/interrupt")).json()["interrupted"] is False
        answer_events = []
        async with h.client.stream(
            "POST", f"/v1/sandboxes/{sandbox}/exec", json={"code": "print('on', flush=True)\nwhile True: pass"}
        ) as answer:
            async for line in answer.aiter_lines():
                answer_events += events(line.encode())
                if len(answer_events) == 1:
                    told = (await h.client.post(f"/v1/sandboxes/{sandbox}/interrupt")).json()
                    assert told == {"interrupted": True, "cell_id": answer.headers["x-podflare-cell-id"]}
        last = answer_events[-1]
        assert (last["data"], last["reason"], last["restarted"]) == (130, "interrupted", False)


async def test_cells_run_in_order_of_arrival(scripted):
    """Ten cells at once on one sandbox run one after the other, each with its own output."""
    order = []

    async def one_by_one(guest: ScriptedGuest) -> None:
        await guest.ready()
        while True:
            channel, cell = await guest.next_exec()
            assert not guest._frames, "two cells at a time"
            order.append(cell.code)
            await anyio.sleep(0.005)
            await guest.output(channel, cell.code.encode())
            await guest.say(channel, Exit(0))

    async with scripted(one_by_one) as h:
        sandbox = await h.create()
        seen = {}

        async def run(code: str) -> None:
            seen[code] = text(await h.exec(sandbox, code))

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(run, str(number))
        assert seen == {str(n): str(n) for n in range(10)} and sorted(order) == sorted(seen)


async def hold(guest: ScriptedGuest) -> None:
    """Runs every cell until it is interrupted."""
    await guest.ready()
    while True:
        channel, _ = await guest.next_exec()
        while True:
            other, message = await guest.next_message()
            if isinstance(message, Interrupt) and other == channel:
                await guest.say(channel, Exit(130, "interrupted"))
                break


async def test_queue_has_an_end(scripted):
    """A cell beyond the queue's length is refused with 429, and the others are not disturbed."""
    async with scripted(hold, max_waiting_cells=2) as h:
        sandbox = await h.create()
        codes = []

        async def run(number: int) -> None:
            answer = await h.client.post(f"/v1/sandboxes/{sandbox}/exec", json={"code": str(number)})
            codes.append(answer.status_code)

        async with anyio.create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(run, number)
            await wait_until(lambda: bool(codes))
            assert codes == [429]
            for _ in range(3):
                while not (await h.client.post(f"/v1/sandboxes/{sandbox}/interrupt")).json()["interrupted"]:
                    await anyio.sleep(0.01)
        assert sorted(codes) == [200, 200, 200, 429]


@pytest.mark.parametrize("when", ["waiting for headers", "after the first event"])
async def test_client_that_leaves_frees_the_sandbox(host, when):
    """A client that disconnects interrupts its cell, so the next call finds an idle REPL with its state."""
    async with host() as h:
        sandbox = await h.create()
        await h.exec(sandbox, "x = 7")
        reader, writer = await h.connect()
        body = b'{"code": "print(1, flush=True)\\nwhile True: pass"}'
        head = f"POST /v1/sandboxes/{sandbox}/exec HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        if when == "after the first event":
            with anyio.fail_after(STEP_S):
                await reader.readuntil(b'"stdout"')
        else:
            await anyio.sleep(0.05)
        writer.transport.abort()
        with anyio.fail_after(20):
            assert text(await h.exec(sandbox, "print(x)")) == "7"


async def test_client_that_leaves_the_queue_never_runs(scripted):
    """A waiting cell whose client disconnects is not run."""
    ran = []
    go = anyio.Event()

    async def script(guest: ScriptedGuest) -> None:
        await guest.ready()
        while True:
            channel, cell = await guest.next_exec()
            ran.append(cell.code)
            await go.wait()
            await guest.say(channel, Exit(0))

    async with scripted(script) as h:
        sandbox = await h.create()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(h.exec, sandbox, "first")
            await wait_until(lambda: ran == ["first"])
            async with h.client.stream("POST", f"/v1/sandboxes/{sandbox}/exec", json={"code": "second"}):
                pass
            tasks.start_soon(h.exec, sandbox, "third")
            await anyio.sleep(0.1)
            go.set()
        assert ran == ["first", "third"]


async def test_client_that_takes_nothing_costs_bounded_memory(scripted):
    """An endless cell with a client that does not read ends by its timeout; what waits for the client stays bounded."""
    ended = anyio.Event()

    async def flood(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        sent = 0
        while sent < 64 * MIB:
            await guest.output(channel, b"y\n" * 65536)
            sent += 2 * 65536
        await guest.say(channel, Exit(0))
        ended.set()
        await guest.serve_cells()

    async with scripted(flood) as h:
        sandbox = await h.create()
        _, writer = await h.connect()
        body = b'{"code": "..."}'
        head = f"POST /v1/sandboxes/{sandbox}/exec HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.transport.pause_reading()
        before = peak_kib()
        writer.write(head.encode() + body)
        with anyio.fail_after(STEP_S):
            await ended.wait()
        # The cell is over although nobody read it, and the sandbox serves others.
        assert peak_kib() - before < 48 * 1024
        assert text(await h.exec(sandbox, "next")) == "next"
        writer.transport.abort()


async def test_output_past_the_cap_keeps_head_and_tail_and_the_whole_is_fetchable(host):
    """Of a large output the client gets the first and last bytes and a count; the whole of it can be read."""
    settings = {"stream_head_bytes": 10_000, "stream_tail_bytes": 10_000}
    async with host(**settings) as h:
        sandbox = await h.create()
        cell = await h.exec(sandbox, "for i in range(100_000): print(i)")
        lines = text(cell).splitlines()
        last = cell[-1]
        whole = "".join(f"{i}\n" for i in range(100_000)).encode()
        assert lines[0] == "0" and lines[-1] == "99999"
        assert len(lines) < 5000 and last["stdout_dropped_bytes"] > 500_000
        # Every byte is either streamed or counted as dropped (a cut line's newline is in neither).
        streamed = sum(len(event["data"]) + 1 for event in cell if event["type"] == "stdout")
        assert abs(streamed + last["stdout_dropped_bytes"] - len(whole)) <= 1
        marker = text(cell, "stderr")
        assert str(last["stdout_dropped_bytes"]) in marker
        answer = await h.client.get(marker.split()[-1])
        assert answer.content == whole and answer.headers["x-podflare-cut"] == "0"


async def test_kept_output_is_capped_and_says_so(host):
    """Past the cap of kept output the beginning stays fetchable and the answer says it is cut."""
    settings = {"stream_head_bytes": 1000, "stream_tail_bytes": 1000, "keep_cell_bytes": 300_000}
    async with host(**settings) as h:
        sandbox = await h.create()
        cell = await h.exec(sandbox, "print('x' * 1_000_000)")
        answer = await h.client.get(f"/v1/sandboxes/{sandbox}/cells/{cell[-1]['cell_id']}/output")
        assert len(answer.content) == 300_000 and answer.headers["x-podflare-cut"] == "1"
        assert "its first 300000 bytes" in text(cell, "stderr")


async def test_only_the_latest_cells_are_kept(scripted):
    """Kept outputs of older cells are gone, with an answer that says so."""

    async def echo(guest: ScriptedGuest) -> None:
        await guest.ready()
        await guest.serve_cells()

    async with scripted(echo, keep_cells=2) as h:
        sandbox = await h.create()
        ids = [(await h.exec(sandbox, f"{n}"))[-1]["cell_id"] for n in range(4)]
        answers = [await h.client.get(f"/v1/sandboxes/{sandbox}/cells/{one}/output") for one in ids]
        assert [answer.status_code for answer in answers] == [404, 404, 200, 200]
        assert answers[0].json()["code"] == "cell_not_found" and answers[3].content == b"3"
        bad = await h.client.get(f"/v1/sandboxes/{sandbox}/cells/{ids[3]}/output?stream=stdin")
        assert bad.status_code == 400


async def test_disk_that_lags_behind_a_finished_cell(host, monkeypatch):
    """A cell that ends while its output is still being written does not leave the sandbox's channel stopped."""
    monkeypatch.setattr("podflare.host.kept.BACKLOG_BYTES", 1)
    async with host() as h:
        sandbox = await h.create()
        for turn in range(5):
            await h.exec(sandbox, "print('x' * 500_000)", timeout_seconds=15)
            assert text(await h.exec(sandbox, f"print({turn})", timeout_seconds=15)) == str(turn)


async def test_very_chatty_child_does_not_block(host):
    """A subprocess that floods both streams through C-level output runs to its end."""
    async with host() as h:
        sandbox = await h.create()
        code = "import subprocess\nsubprocess.run('seq 300000; seq 300000 >&2', shell=True)\nprint('end')"
        cell = await h.exec(sandbox, code, timeout_seconds=60)
        assert cell[-1]["data"] == 0 and text(cell).endswith("end")


async def test_large_rich_results_pass_whole_up_to_their_cap(scripted):
    """Rich results arrive unsplit; those past a cell's cap are dropped and counted."""

    async def show(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        for _ in range(4):
            await guest.say(channel, Result({"text/html": "<b>" * MIB}))
        await guest.say(channel, Exit(0))

    async with scripted(show, max_result_bytes=10 * MIB) as h:
        sandbox = await h.create()
        cell = await h.exec(sandbox, "1")
        assert [len(e["data"]["text/html"]) for e in cell if e["type"] == "result"] == [3 * MIB] * 3
        assert "1 rich results were dropped" in text(cell, "stderr")


async def test_replay_is_the_latest_thousand_events(host):
    """Replay gives at most 1000 events, oldest first, cell by cell."""
    async with host() as h:
        sandbox = await h.create()
        await h.exec(sandbox, "for i in range(900): print(i)")
        await h.exec(sandbox, "for i in range(300): print(i)")
        got = events((await h.client.get(f"/v1/sandboxes/{sandbox}/replay")).content)
        assert len(got) == 1000
        assert [event["type"] for event in got].count("exit") == 2
        assert [event["data"] for event in got[-3:-1]] == ["298", "299"]


async def test_death_for_memory_names_the_limit(scripted):
    """A REPL that the kernel killed for memory ends its cell with 137, reason out_of_memory and the limit."""

    async def burst(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        guest.machine.current_usage = Usage(oom_kills=1)
        await guest.say(channel, Exit(137, DIED, restarted=True, signal=9))
        channel, _ = await guest.next_exec()
        await guest.say(channel, Exit(137, DIED, restarted=True, signal=9))

    async with scripted(burst) as h:
        sandbox = await h.create(ram_mib=512)
        last = (cell := await h.exec(sandbox, "bytearray(2**40)"))[-1]
        assert (last["data"], last["reason"], last["restarted"]) == (137, "out_of_memory", True)
        assert "out of memory: this sandbox may use 512 MiB (ram_mib); the Python process was killed" in text(
            cell, "stderr"
        )
        # The next death is not for memory: the counter did not move.
        assert (await h.exec(sandbox, "os.kill(os.getpid(), 9)"))[-1]["reason"] == "died"


async def test_subprocess_killed_for_memory_is_told(scripted):
    """Memory taken by a child process of the cell is told although the REPL survives."""

    async def burst(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        guest.machine.current_usage = Usage(oom_kills=3)
        await guest.say(channel, Exit(137))

    async with scripted(burst) as h:
        cell = await h.exec(await h.create(), "make -j", language="bash")
        assert (cell[-1]["data"], cell[-1]["reason"]) == (137, "out_of_memory")
        assert "a process in it was killed" in text(cell, "stderr")


@pytest.mark.parametrize("out_of_memory", [False, True])
async def test_machine_that_dies_mid_stream_ends_the_stream_properly(scripted, out_of_memory):
    """When the machine dies, its cells end with a stderr line, exit 137 and the cause; later calls say it, too."""

    async def die(guest: ScriptedGuest) -> None:
        await guest.ready()
        channel, _ = await guest.next_exec()
        await guest.output(channel, b"before\nunfin")
        await anyio.sleep(0.05)
        guest.machine.die("the kernel ended it", out_of_memory=out_of_memory)

    async with scripted(die) as h:
        sandbox = await h.create()
        cell = await h.exec(sandbox, "1")
        assert text(cell) == "before\nunfin"
        assert "the kernel ended it" in text(cell, "stderr")
        assert (cell[-1]["data"], cell[-1]["reason"]) == (137, "out_of_memory" if out_of_memory else "sandbox_failed")
        gone = await h.client.post(f"/v1/sandboxes/{sandbox}/exec", json={"code": "1"})
        assert gone.status_code == 404 and "the kernel ended it" in gone.json()["error"]
        assert (await h.client.delete(f"/v1/sandboxes/{sandbox}")).status_code == 204


async def test_what_begins_before_a_machine_says_why_it_died_is_told_the_cause(scripted, monkeypatch):
    """Between the end of a machine's channel and its cause of death every call waits for the cause, and tells it."""
    monkeypatch.setattr("podflare.host.sandbox.CAUSE_WAIT_S", STEP_S)

    async def lose(guest: ScriptedGuest) -> None:
        await guest.ready()
        await guest.next_message()
        guest.writer.transport.abort()

    async with scripted(lose) as h:
        url = f"/v1/sandboxes/{await h.create()}"
        file = f"{url}/files?path=f"
        assert "closed its channel" in (await h.client.put(file, content=b"1")).json()["error"]
        calls = [
            ("POST", f"{url}/exec", {"json": {"code": "1"}}),
            ("PUT", file, {"content": b"1"}),
            ("GET", file, {}),
            ("POST", f"{url}/fork", {"json": {}}),
        ]
        answers = []

        async def call(method: str, address: str, body: dict[str, object]) -> None:
            answers.append(await h.client.request(method, address, **body))

        async with anyio.create_task_group() as tasks:
            for one in calls:
                tasks.start_soon(call, *one)
            for _ in calls:
                assert (await h.client.get(url)).status_code == 200
            h.engine.machines[0].die("the kernel ended it")
        assert [answer.status_code for answer in answers] == [404] * len(calls)
        assert all("its machine died: the kernel ended it" in answer.json()["error"] for answer in answers)


async def test_guest_that_ignores_interrupt_and_kill_loses_its_machine(scripted):
    """If even the kill brings no exit, the machine is closed and the cell's stream ends with the cause."""
    asked = []

    async def deaf(guest: ScriptedGuest) -> None:
        await guest.ready()
        await guest.next_exec()
        while True:
            asked.append(type((await guest.next_message())[1]))

    async with scripted(deaf, interrupt_grace_s=0.05, kill_grace_s=0.05) as h:
        sandbox = await h.create()
        cell = await h.exec(sandbox, "1", timeout_seconds=0.05)
        assert asked == [Interrupt, Kill]
        assert (cell[-1]["data"], cell[-1]["reason"]) == (137, "sandbox_failed")
        assert h.engine.machines[0].closed


async def test_deleting_a_busy_sandbox_ends_its_streams(scripted):
    """DELETE while a cell runs and another waits ends both streams with the cause."""
    async with scripted(hold) as h:
        sandbox = await h.create()
        ends = []

        async def run() -> None:
            ends.append((await h.exec(sandbox, "1"))[-1])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            tasks.start_soon(run)
            await wait_until(lambda: h.engine.machines[0].closed is False)
            await anyio.sleep(0.1)
            assert (await h.client.delete(f"/v1/sandboxes/{sandbox}")).status_code == 204
        assert [end["data"] for end in ends] == [137, 137]


async def test_interleaved_sandboxes_keep_their_outputs_apart(scripted):
    """Fifty sandboxes running cells at once each give their own output, in order."""

    async def count(guest: ScriptedGuest) -> None:
        await guest.ready()
        while True:
            channel, cell = await guest.next_exec()
            for number in range(20):
                kind = frames.STDERR if number % 2 else frames.STDOUT
                await guest.output(channel, f"{cell.code} {number}\n".encode(), kind)
                await anyio.sleep(0)
            await guest.say(channel, Exit(0))

    async with scripted(count) as h:
        ids = [await h.create() for _ in range(50)]

        async def run(sandbox: str) -> None:
            for turn in range(3):
                name = f"{sandbox} {turn}"
                cell = await h.exec(sandbox, name)
                assert text(cell).splitlines() == [f"{name} {n}" for n in range(0, 20, 2)]
                assert text(cell, "stderr").splitlines() == [f"{name} {n}" for n in range(1, 20, 2)]

        async with anyio.create_task_group() as tasks:
            for sandbox in ids:
                tasks.start_soon(run, sandbox)
