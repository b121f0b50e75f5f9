"""Fork and merge in the queue of cells, with guests that follow a script: turns, ends, refusals."""

from __future__ import annotations

import anyio
import pytest

from hosting import Host, events, text, wait_until
from podflare.errors import Conflict, MachineFailed
from podflare.host import branches
from podflare.wire.messages import Exit
from scripted_guest import ScriptedGuest

pytestmark = pytest.mark.anyio


async def echo(guest: ScriptedGuest) -> None:
    await guest.ready()
    await guest.serve_cells()


class Gate:
    """A script whose cells end only when the gate is open; `begun` counts them."""

    def __init__(self) -> None:
        self.open = anyio.Event()
        self.begun: list[str] = []

    async def __call__(self, guest: ScriptedGuest) -> None:
        await guest.ready()
        while True:
            channel, cell = await guest.next_exec()
            self.begun.append(cell.code)
            await self.open.wait()
            await guest.output(channel, cell.name.encode())
            await guest.say(channel, Exit(0))


async def fork_status(h: Host, sandbox: str, into: list[object], **body: object) -> None:
    answer = await h.client.post(f"/v1/sandboxes/{sandbox}/fork", json=body)
    into.append((answer.status_code, answer.json()))


async def run(h: Host, sandbox: str, code: str, into: list[object]) -> None:
    into.append(await h.exec(sandbox, code))


async def test_cells_and_forks_take_turns_in_order_of_arrival(scripted):
    """A fork waits for the cell before it, and the cell behind it waits for the fork."""
    gate = Gate()
    async with scripted(gate) as h, anyio.create_task_group() as tasks:
        sandbox = await h.create()
        done: list[object] = []
        tasks.start_soon(run, h, sandbox, "before", done)
        await wait_until(lambda: gate.begun == ["before"])
        tasks.start_soon(fork_status, h, sandbox, done)
        await anyio.sleep(0.05)
        h.engine.may_create = anyio.Event()
        tasks.start_soon(run, h, sandbox, "behind", done)
        await anyio.sleep(0.05)
        assert not done and h.engine.asked == 1
        gate.open.set()
        await wait_until(lambda: h.engine.asked == 2)
        await anyio.sleep(0.05)
        assert gate.begun == ["before"] and len(done) == 1
        h.engine.may_create.set()
        await wait_until(lambda: len(done) == 3)
        assert gate.begun == ["before", "behind"]


async def test_a_fork_that_must_wait_too_long_is_504_and_changes_nothing(scripted):
    """The caller's time passes while a cell runs: no child is made, the cell and the queue go on."""
    gate = Gate()
    async with scripted(gate) as h, anyio.create_task_group() as tasks:
        sandbox = await h.create()
        done: list[object] = []
        tasks.start_soon(run, h, sandbox, "long", done)
        await wait_until(lambda: gate.begun == ["long"])
        answer = await h.client.post(f"/v1/sandboxes/{sandbox}/fork", json={"timeout_seconds": 0.1})
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
        assert "not forked" in answer.json()["error"] and h.engine.asked == 1 and not done
        gate.open.set()
        await wait_until(lambda: len(done) == 1)
        assert (await h.exec(sandbox, "next"))[-1]["data"] == 0


@pytest.mark.parametrize("body", [{"n": 0}, {"n": 33}, {"n": -1}, {"n": "2"}, {"n": 1.5}, {"n": True}, {"reseed": 1}])
async def test_wrong_fork_bodies_are_400(scripted, body):
    """Numbers out of range and wrong types are refused with the range or the type; nothing is made."""
    async with scripted(echo) as h:
        sandbox = await h.create()
        answer = await h.client.post(f"/v1/sandboxes/{sandbox}/fork", json=body)
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
        assert "n" not in body or "1 to 32" in answer.json()["error"]
        assert h.engine.asked == 1


async def test_one_bad_child_dooms_all_and_leaves_nothing(scripted):
    """If the guest of the third child breaks the protocol, all children's machines are closed and no id exists."""
    met: list[int] = []

    async def third_lies(guest: ScriptedGuest) -> None:
        met.append(1)
        if len(met) == 4:
            await guest.raw(b"what I say is no frame" * 10)
            return
        await echo(guest)

    async with scripted(third_lies) as h:
        sandbox = await h.create()
        answer = await h.client.post(f"/v1/sandboxes/{sandbox}/fork", json={"n": 3})
        assert answer.status_code == 500 and answer.json()["code"] == "machine_failed"
        assert [machine.closed for machine in h.engine.machines] == [False, True, True, True]
        assert [one["id"] for one in (await h.client.get("/v1/sandboxes")).json()["sandboxes"]] == [sandbox]
        assert text(await h.exec(sandbox, "as before")) == "as before"


@pytest.mark.parametrize(
    ("error", "status"), [(Conflict("too deep"), 409), (MachineFailed("no"), 500), (TimeoutError("x"), 500)]
)
async def test_an_engines_refusal_of_a_fork_is_told(scripted, error, status):
    """What the engine says reaches the caller; the sandbox, its queue and the daemon's room are as before."""
    async with scripted(echo, max_sandboxes=2) as h:
        sandbox = await h.create()
        h.engine.refuse = error
        assert (await h.client.post(f"/v1/sandboxes/{sandbox}/fork", json={})).status_code == status
        h.engine.refuse = None
        assert text(await h.exec(sandbox, "on")) == "on"
        assert len(await h.fork(sandbox)) == 1


async def test_room_is_counted_for_all_children_before_any_is_made(scripted):
    """A fork that would pass max_sandboxes is 503 and makes none; one that just fits is made; creates count with it."""
    async with scripted(echo, max_sandboxes=4) as h:
        sandbox = await h.create()
        answer = await h.client.post(f"/v1/sandboxes/{sandbox}/fork", json={"n": 4})
        assert (answer.status_code, answer.json()["code"]) == (503, "no_capacity") and h.engine.asked == 1
        assert len(await h.fork(sandbox, n=3)) == 3
        assert (await h.client.post("/v1/sandboxes")).status_code == 503


async def test_a_full_queue_refuses_forks_as_it_refuses_cells(scripted):
    """Beyond max_waiting_cells a fork is 429."""
    gate = Gate()
    async with scripted(gate, max_waiting_cells=1) as h, anyio.create_task_group() as tasks:
        sandbox = await h.create()
        done: list[object] = []
        tasks.start_soon(run, h, sandbox, "runs", done)
        await wait_until(lambda: len(gate.begun) == 1)
        tasks.start_soon(run, h, sandbox, "waits", done)
        await anyio.sleep(0.05)
        answer = await h.client.post(f"/v1/sandboxes/{sandbox}/fork", json={})
        assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded")
        gate.open.set()


async def test_client_that_leaves_a_waiting_fork_leaves_the_queue(scripted):
    """A fork whose client goes away before its turn is never made, and what waits behind it runs."""
    gate = Gate()
    async with scripted(gate) as h, anyio.create_task_group() as tasks:
        sandbox = await h.create()
        done: list[object] = []
        tasks.start_soon(run, h, sandbox, "runs", done)
        await wait_until(lambda: len(gate.begun) == 1)
        _, writer = await h.connect()
        request = f"POST /v1/sandboxes/{sandbox}/fork HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        writer.write(request.encode())
        await anyio.sleep(0.05)
        tasks.start_soon(run, h, sandbox, "behind", done)
        await anyio.sleep(0.05)
        writer.transport.abort()
        await anyio.sleep(0.05)
        gate.open.set()
        await wait_until(lambda: len(done) == 2)
        assert h.engine.asked == 1


async def test_a_sandbox_that_ends_ends_its_waiting_forks(scripted):
    """When the parent is deleted, a fork that waits in its queue answers 404 with the cause."""
    gate = Gate()
    async with scripted(gate) as h, anyio.create_task_group() as tasks:
        sandbox = await h.create()
        done: list[object] = []
        tasks.start_soon(run, h, sandbox, "runs", done)
        await wait_until(lambda: len(gate.begun) == 1)
        forks: list[object] = []
        tasks.start_soon(fork_status, h, sandbox, forks)
        await anyio.sleep(0.05)
        await h.client.delete(f"/v1/sandboxes/{sandbox}")
        await wait_until(lambda: len(forks) == 1)
        status, body = forks[0]
        assert status == 404 and "it was closed" in body["error"]


async def test_a_sandbox_that_ends_while_it_is_forked_takes_the_children_back(scripted):
    """A parent that expires in the middle of its fork: the fork is 404, no child is left, no room is lost."""
    async with scripted(echo, max_sandboxes=3) as h:
        sandbox = await h.create(timeout_seconds=1)
        h.engine.may_create = anyio.Event()
        answer = await h.client.post(f"/v1/sandboxes/{sandbox}/fork", json={"n": 2})
        assert answer.status_code == 404 and "lifetime" in answer.json()["error"]
        h.engine.may_create.set()
        for _ in range(3):
            await h.create()


async def test_names_of_cells_continue_in_forks_and_after_a_merge(scripted):
    """In one memory no two cells have the same name, through fork and merge, also for cells that waited for a merge."""
    gate = Gate()
    gate.open.set()
    async with scripted(gate) as h:
        sandbox = await h.create()
        names = [text(await h.exec(sandbox, "x")) for _ in range(2)]
        (child,) = await h.fork(sandbox)
        assert [*names, text(await h.exec(child, "x"))] == ["<cell 1>", "<cell 2>", "<cell 3>"]
        for _ in range(4):
            await h.exec(child, "x")
        gate.open = anyio.Event()
        done: list[object] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, h, sandbox, "held", done)
            await wait_until(lambda: gate.begun[-1] == "held")
            tasks.start_soon(h.merge, sandbox, child)
            await anyio.sleep(0.05)
            tasks.start_soon(run, h, sandbox, "waited", done)
            await anyio.sleep(0.05)
            gate.open.set()
        assert [text(cell) for cell in done] == ["<cell 3>", "<cell 8>"]


async def test_cells_waiting_in_a_merged_winner_end_with_the_cause(scripted):
    """What waits in the winner behind the merge ends clearly; what waits in the parent runs on the winner's machine."""
    gate = Gate()
    async with scripted(gate) as h, anyio.create_task_group() as tasks:
        parent = await h.create()
        (winner,) = await h.fork(parent)
        done: dict[str, list[object]] = {"parent": [], "winner": []}
        tasks.start_soon(run, h, winner, "runs", done["winner"])
        await wait_until(lambda: gate.begun == ["runs"])
        merges: list[int] = []

        async def merge() -> None:
            merges.append((await h.merge(parent, winner)).status_code)

        tasks.start_soon(merge)
        await anyio.sleep(0.05)
        tasks.start_soon(run, h, winner, "late", done["winner"])
        tasks.start_soon(run, h, parent, "goes on", done["parent"])
        await anyio.sleep(0.05)
        assert gate.begun == ["runs"] and not merges
        gate.open.set()
        await wait_until(lambda: len(done["winner"]) == 2 and len(done["parent"]) == 1)
        assert merges == [204]
        assert [cell[-1]["data"] for cell in done["winner"]] == [0, 137]
        assert f"merged into {parent}" in text(done["winner"][1], "stderr")
        assert h.engine.machines[0].closed and not h.engine.machines[1].closed


async def test_a_merge_that_must_wait_too_long_changes_nothing(scripted, monkeypatch):
    """Cells that run for too long: 504, both sandboxes are as before."""
    monkeypatch.setattr(branches, "MERGE_WAIT_S", 0.2)
    gate = Gate()
    async with scripted(gate) as h, anyio.create_task_group() as tasks:
        parent = await h.create()
        (winner,) = await h.fork(parent)
        done: list[object] = []
        tasks.start_soon(run, h, winner, "runs", done)
        await wait_until(lambda: gate.begun == ["runs"])
        answer = await h.merge(parent, winner)
        assert answer.status_code == 504 and "nothing has changed" in answer.json()["error"]
        gate.open.set()
        await wait_until(lambda: len(done) == 1)
        for sandbox in (parent, winner):
            assert (await h.exec(sandbox, "x"))[-1]["data"] == 0


async def test_merges_in_both_directions_do_not_block_each_other(scripted):
    """a into b and b into a at once, many times: one is done, the other finds its sandbox gone, nothing hangs."""
    async with scripted(echo) as h:
        for _ in range(10):
            one, two = await h.create(), await h.create()
            answers: list[int] = []

            async def merge(parent: str, winner: str, answers: list[int] = answers) -> None:
                answers.append((await h.merge(parent, winner)).status_code)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(merge, one, two)
                tasks.start_soon(merge, two, one)
            assert sorted(answers) == [204, 404]
        assert len((await h.client.get("/v1/sandboxes")).json()["sandboxes"]) == 10


async def test_a_sandbox_that_ends_while_a_merge_waits_is_told_at_once(scripted):
    """Whichever of the two is deleted while the other one runs a cell: the merge is 404 at once, the other lives."""
    for gone in (0, 1):
        gate = Gate()
        async with scripted(gate) as h, anyio.create_task_group() as tasks:
            pair = [await h.create(), await h.create()]
            done: list[object] = []
            tasks.start_soon(run, h, pair[1 - gone], "runs", done)
            await wait_until(lambda gate=gate: gate.begun == ["runs"])
            merges: list[int] = []

            async def merge(pair: list[str] = pair, merges: list[int] = merges, h: Host = h) -> None:
                merges.append((await h.merge(*pair)).status_code)

            tasks.start_soon(merge)
            await anyio.sleep(0.05)
            with anyio.fail_after(20):
                assert (await h.client.delete(f"/v1/sandboxes/{pair[gone]}")).status_code == 204
            await wait_until(lambda merges=merges: merges == [404])
            gate.open.set()
            await wait_until(lambda done=done: len(done) == 1)
            assert (await h.exec(pair[1 - gone], "x"))[-1]["data"] == 0


async def test_a_winner_whose_machine_just_died_does_not_win(scripted):
    """A winner that is dead, noticed or not, is 404 and the parent keeps its state."""
    async with scripted(echo) as h:
        parent, winner = await h.create(), await h.create()
        h.engine.machines[1].die("killed")
        assert (await h.merge(parent, winner)).status_code == 404
        assert text(await h.exec(parent, "as before")) == "as before"
        assert not h.engine.machines[0].closed


async def test_death_of_the_replaced_machine_does_not_end_its_heir(scripted):
    """After a merge the parent lives and dies with the winner's machine, not with its former one."""
    async with scripted(echo) as h:
        parent, winner = await h.create(), await h.create()
        assert (await h.merge(parent, winner)).status_code == 204
        await wait_until(lambda: h.engine.machines[0].closed)
        assert text(await h.exec(parent, "lives")) == "lives"
        h.engine.machines[1].die("the winner's machine died")
        await wait_until(lambda: h.engine.machines[1].closed)
        gone = await h.client.get(f"/v1/sandboxes/{parent}")
        assert gone.status_code == 404 and "the winner's machine died" in gone.json()["error"]


async def test_a_merged_sandbox_keeps_its_replay_and_kept_output(scripted):
    """The parent's recorded events and outputs stay; a fork starts with none; the winner's are gone with its id."""
    async with scripted(echo) as h:
        parent = await h.create()
        cell = await h.exec(parent, "said before")
        (child,) = await h.fork(parent)
        assert (await h.client.get(f"/v1/sandboxes/{child}/replay")).content == b""
        output = f"cells/{cell[-1]['cell_id']}/output"
        assert (await h.client.get(f"/v1/sandboxes/{child}/{output}")).status_code == 404
        assert (await h.merge(parent, child)).status_code == 204
        assert (await h.client.get(f"/v1/sandboxes/{parent}/{output}")).content == b"said before"
        replayed = events((await h.client.get(f"/v1/sandboxes/{parent}/replay")).content)
        assert [event["data"] for event in replayed] == ["said before", 0]


async def test_turns_are_forgotten_when_they_are_over(scripted):
    """A sandbox is idle again after a fork or a refused merge: its idle time ends it."""
    async with scripted(echo) as h:
        sandbox = await h.create(idle_timeout_seconds=1)
        (child,) = await h.fork(sandbox)
        assert (await h.merge(sandbox, sandbox)).status_code == 400
        await wait_until(lambda: all(machine.closed for machine in h.engine.machines))
        for one in (sandbox, child):
            assert "idle for 1 s" in (await h.client.get(f"/v1/sandboxes/{one}")).json()["error"]
