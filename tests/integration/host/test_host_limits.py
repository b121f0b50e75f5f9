"""What one owner may have, what the daemon admits, and how the end of a life is told before it comes."""

from __future__ import annotations

import time

import anyio
import httpx
import pytest

from hosting import Host, events, text, wait_until
from podflare.host.auth import digest, owner_of
from podflare.host.tiers import PUBLISHED, Tier
from podflare.wire.messages import Exit
from scripted_guest import ScriptedGuest

pytestmark = pytest.mark.anyio

KEYS = {
    "key_digests": (digest("a"), digest("b")),
    "key_tiers": {owner_of(digest("a")): "free"},
    "tiers": {**PUBLISHED, "free": Tier("free", 1800, 300, 1024, 4, sandboxes=3)},
}


async def echo(guest: ScriptedGuest) -> None:
    await guest.ready()
    await guest.serve_cells()


async def held(guest: ScriptedGuest) -> None:
    """Cells end when they are interrupted."""
    await guest.ready()
    while True:
        channel, _ = await guest.next_exec()
        await guest.next_message()
        await guest.say(channel, Exit(0))


async def post(h: Host, key: str, path: str = "", **body: object) -> httpx.Response:
    return await h.client.post(f"/v1/sandboxes{path}", json=body, headers={"authorization": f"Bearer {key}"})


async def test_an_owner_has_its_number_of_sandboxes_and_the_other_owner_its_own(scripted):
    """At its tier's number a create and a fork are 429 and say the limit; closing one makes room; others go on."""
    async with scripted(echo, **KEYS) as h:
        ids = [(await post(h, "a")).json()["id"] for _ in range(2)]
        refused = await post(h, "a", f"/{ids[0]}/fork", n=2)
        assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
        assert "its limit: 3 (tier free), and 2 more are asked for" in refused.json()["error"]
        assert (await post(h, "a", f"/{ids[0]}/fork", n=1)).status_code == 200
        full = await post(h, "a")
        assert full.status_code == 429 and "this key has 3 sandboxes, its limit: 3" in full.json()["error"]
        for _ in range(5):
            assert (await post(h, "b")).status_code == 200
        await h.client.delete(f"/v1/sandboxes/{ids[1]}", headers={"authorization": "Bearer a"})
        assert (await post(h, "a")).status_code == 200
        assert len(h.engine.machines) == 9


async def test_creates_at_the_same_time_do_not_pass_the_number(scripted):
    """Sandboxes that are still being made count."""
    async with scripted(echo, **KEYS) as h:
        answers = []

        async def one() -> None:
            answers.append((await post(h, "a")).status_code)

        h.engine.may_create = anyio.Event()
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(one)
            await wait_until(lambda: h.engine.asked == 3 and len(answers) == 5)
            h.engine.may_create.set()
        assert sorted(answers) == [200] * 3 + [429] * 5


@pytest.mark.parametrize("short", ["memory", "disk"])
async def test_a_machine_that_is_full_admits_none(scripted, short):
    """What was granted does not count, what is left does: below the reserve a create is 503 and says why."""
    async with scripted(echo) as h:
        sandbox = await h.create(ram_mib=1 << 20)
        told = (await h.client.get("/v1/capacity")).json()
        assert 0 < told[f"{short}_reserve_bytes"] < told[f"{short}_left_bytes"]
        h.engine.expected_memory_bytes = 1 << 60
        assert (await h.client.post(f"/v1/sandboxes/{sandbox}/fork", json={"n": 2})).json()["code"] == "no_capacity"
    async with scripted(echo, **{f"{short}_reserve_mib": 1 << 40}) as h:
        refused = await h.client.post("/v1/sandboxes")
        assert (refused.status_code, refused.json()["code"]) == (503, "no_capacity")
        assert f"no {short} for 1 more sandbox" in refused.json()["error"]
        assert h.engine.asked == 0


async def test_caps_of_a_tier_are_in_the_answer(scripted):
    """What is above a cap is cut, the answer has the effective values and says what was cut; a PATCH cannot pass it."""
    async with scripted(echo, **KEYS) as h:
        got = (await post(h, "a", timeout_seconds=99999, idle_timeout_seconds=9999, ram_mib=512, rootfs_gb=64)).json()
        assert (got["timeout_seconds"], got["idle_timeout_seconds"]) == (1800, 300)
        assert (got["ram_mib"], got["rootfs_gb"]) == (512, 4)
        assert [line.partition("=")[0] for line in got["warnings"][:3]] == [
            "timeout_seconds",
            "idle_timeout_seconds",
            "rootfs_gb",
        ]
        assert h.engine.machines[0].spec.limits.disk_bytes == 4 << 30
        path, who = f"/v1/sandboxes/{got['id']}", {"authorization": "Bearer a"}
        longer = (await h.client.patch(path, json={"timeout_seconds": 1800}, headers=who)).json()
        assert longer["timeout_seconds"] == 1800 and "tier free" in longer["warnings"][-1]
        assert longer["warnings"][-1].startswith("timeout_seconds=1800 from now is a life of 18")
        plain = (await post(h, "a")).json()
        assert (plain["timeout_seconds"], plain["idle_timeout_seconds"]) == (1800, 300)
        assert not [line for line in plain["warnings"] if "tier" in line]
        free = (await post(h, "b", timeout_seconds=99999, ram_mib=100_000)).json()
        assert (free["timeout_seconds"], free["ram_mib"]) == (99999, 100_000)


async def test_seconds_left_are_told(scripted):
    """Create, GET and list tell when a life ends and what is left of it; without an end these are null."""
    async with scripted(echo, lifetime_s=None, idle_s=None) as h:
        body = (await h.client.post("/v1/sandboxes", json={"timeout_seconds": 100, "idle_timeout_seconds": 50})).json()
        assert 99 < body["seconds_left"] <= 100 and 49 < body["idle_seconds_left"] <= 50
        assert abs(body["expires_at_ms"] / 1000 - time.time() - 100) < 5
        later = await h.info(body["id"])
        assert later["seconds_left"] < body["seconds_left"]
        endless = await h.info(await h.create())
        assert [endless[key] for key in ("expires_at_ms", "seconds_left", "idle_seconds_left")] == [None] * 3


async def test_a_running_cell_is_warned_of_the_end(scripted, caplog):
    """Some time before the end a running cell has one warning event, logged; so has each that starts afterwards."""
    caplog.set_level("INFO", logger="podflare")
    async with scripted(held) as h:
        sandbox = await h.create(timeout_seconds=3)
        async with anyio.create_task_group() as tasks:
            cells = []

            async def run() -> None:
                cells.append(await h.exec(sandbox, "1"))

            tasks.start_soon(run)
            await wait_until(lambda: "sandbox ends soon" in caplog.messages)
            await h.client.post(f"/v1/sandboxes/{sandbox}/interrupt")
            await wait_until(lambda: len(cells) == 1)
            tasks.start_soon(run)
        first, second = cells
        assert [event["type"] for event in first] == ["warning", "exit"]
        told = first[0]["data"]
        assert told["kind"] == "ending" and 0 < told["seconds_left"] <= 0.6
        assert "its lifetime of 3 s is over" in told["message"] and "timeout_seconds" in told["message"]
        assert abs(told["ends_at_ms"] / 1000 - time.time()) < 30
        assert second[0]["type"] == "warning" and "lifetime of 3 s was over" in text(second, "stderr")
        assert caplog.messages.count("sandbox ends soon") == 1


async def test_an_extended_life_is_not_warned_of(scripted):
    """After an extension cells run without a warning, until the new end is near."""
    async with scripted(echo) as h:
        sandbox = await h.create(timeout_seconds=2)
        await h.client.patch(f"/v1/sandboxes/{sandbox}", json={"timeout_seconds": 600})
        assert "warning" not in [event["type"] for event in await h.exec(sandbox, "1")]
        await h.client.patch(f"/v1/sandboxes/{sandbox}", json={"timeout_seconds": 2})
        await h.client.patch(f"/v1/sandboxes/{sandbox}", json={"timeout_seconds": 1})
        with anyio.fail_after(20):
            while True:
                answer = await h.client.post(f"/v1/sandboxes/{sandbox}/exec", json={"code": "1"})
                if answer.status_code == 404 or "warning" in [event["type"] for event in events(answer.content)]:
                    break
        assert answer.status_code == 200


async def test_output_without_end_comes_at_its_rate_and_leaves_the_neighbour_alone(host):
    """A cell that prints without end is read at the rate, can be interrupted at once, and others run meanwhile."""
    async with host(output_rate_mib=1) as h:
        loud, neighbour = await h.create(), await h.create()
        cells = []

        async def shout() -> None:
            cells.append(await h.exec(loud, "import os\nwhile True: os.write(1, b'x' * 65535 + b'\\n')"))

        async with anyio.create_task_group() as tasks:
            start = time.monotonic()
            tasks.start_soon(shout)
            for _ in range(20):
                assert text(await h.exec(neighbour, "print(2)")) == "2"
                await anyio.sleep(0.05)
            told = await h.client.post(f"/v1/sandboxes/{loud}/interrupt")
            with anyio.fail_after(20):
                await wait_until(lambda: bool(cells))
            passed = time.monotonic() - start
        assert cells[0][-1]["reason"] == "interrupted"
        path = f"/v1/sandboxes/{loud}/cells/{told.json()['cell_id']}/output"
        whole = (await h.client.get(path)).content
        assert 2**20 < len(whole) < (2 + passed) * 2**20 + 2**20


async def test_output_above_the_rate_is_late_not_lost(host):
    """What comes faster than the rate waits in its sandbox; all of it arrives, in order; short lines count for more."""
    async with host(output_rate_mib=1) as h:
        sandbox = await h.create()
        start = time.monotonic()
        cell = await h.exec(sandbox, "for i in range(2 << 10): print(f'{i:1023}')")
        assert [int(line) for line in text(cell).split("\n")] == list(range(2 << 10))
        cell = await h.exec(sandbox, "for i in range(4096): print()")
        assert text(cell) == "\n" * 4095
        assert time.monotonic() - start > 0.7
