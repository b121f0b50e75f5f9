"""Owners, lifetimes, repeated creates, the pool, limits of the daemon, and which peers it talks to."""

from __future__ import annotations

import anyio
import pytest

from hosting import text, wait_until
from podflare.errors import IsolationIncomplete, NoCapacity
from podflare.host.auth import digest
from podflare.wire.messages import Exit
from scripted_guest import ScriptedGuest

pytestmark = pytest.mark.anyio


async def echo(guest: ScriptedGuest) -> None:
    await guest.ready()
    await guest.serve_cells()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# Keys and owners.


async def test_keys_are_asked_for_with_both_known_texts(scripted):
    """Without a key and with a wrong one every route but the health check answers 401 with the documented text."""
    async with scripted(echo, key_digests=(digest("good"),)) as h:
        for path in ("/v1/sandboxes", "/v1/capacity", "/v1/sandboxes/x", "/v1/spaces"):
            missing = await h.client.get(path)
            assert missing.status_code == 401
            assert missing.json()["error"] == "missing Authorization: Bearer <key>"
            wrong = await h.client.get(path, headers=bearer("bad"))
            assert (wrong.status_code, wrong.json()["error"]) == (401, "invalid api key")
        assert (await h.client.get("/v1/sandboxes", headers=bearer("good"))).status_code == 200


async def test_another_keys_sandbox_does_not_exist(scripted):
    """For another owner an id answers exactly like one that was never issued, alive or gone."""
    async with scripted(echo, key_digests=(digest("a"), digest("b"))) as h:
        sandbox = (await h.client.post("/v1/sandboxes", headers=bearer("a"))).json()["id"]

        async def seen_by(key: str) -> list[int]:
            calls = [
                ("GET", ""),
                ("POST", "/exec"),
                ("GET", "/replay"),
                ("GET", "/files?path=x"),
                ("POST", "/interrupt"),
            ]
            answers = [
                await h.client.request(
                    method, f"/v1/sandboxes/{sandbox}{path}", json={"code": "1"}, headers=bearer(key)
                )
                for method, path in calls
            ]
            answers.append(await h.client.delete(f"/v1/sandboxes/{sandbox}", headers=bearer(key)))
            assert all(answer.json()["error"] == "sandbox not found" for answer in answers)
            return [answer.status_code for answer in answers]

        assert set(await seen_by("b")) == {404}
        assert (await h.client.get("/v1/sandboxes", headers=bearer("b"))).json() == {"sandboxes": []}
        assert (await h.client.delete(f"/v1/sandboxes/{sandbox}", headers=bearer("a"))).status_code == 204
        assert set(await seen_by("b")) == {404}


# Web pages.


async def test_web_pages_cannot_drive_a_keyless_daemon(scripted):
    """Requests with a foreign Origin or a rebound Host are refused; same-origin ones and plain clients are served."""
    async with scripted(echo, uds=None, host="127.0.0.1", port=0) as h:
        own = h.client.base_url.netloc.decode()
        refused = [
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"origin": f"http://{own}.evil.example"},
            {"host": "evil.example"},
            {"host": "127.0.0.1.evil.example:80"},
            {"sec-fetch-site": "cross-site"},
        ]
        for headers in refused:
            answer = await h.client.post("/v1/sandboxes", headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), headers
        assert (await h.client.get("/v1/healthz", headers={"host": "evil.example"})).status_code == 403
        for headers in ({}, {"origin": f"http://{own}"}, {"host": "localhost:1"}, {"host": "[::1]:7070"}):
            if "origin" not in headers or headers["origin"].endswith(own):
                assert (await h.client.post("/v1/sandboxes", headers=headers)).status_code == 200, headers
        assert len(h.engine.machines) == 4


async def test_any_host_name_on_a_unix_socket(scripted):
    """On a Unix socket the Host header is only a placeholder."""
    async with scripted(echo) as h:
        assert (await h.client.get("/v1/sandboxes", headers={"host": "anything"})).status_code == 200


# Lifetimes.


async def test_lifetime_ends_a_sandbox_even_while_busy(scripted):
    """After timeout_seconds a sandbox is gone; its running cell ends with the cause, later calls tell it."""

    async def busy(guest: ScriptedGuest) -> None:
        await guest.ready()
        await anyio.sleep_forever()

    async with scripted(busy) as h:
        sandbox = await h.create(timeout_seconds=1)
        cell = await h.exec(sandbox, "1")
        assert cell[-1]["data"] == 137 and "its lifetime of 1 s was over" in text(cell, "stderr")
        gone = await h.client.get(f"/v1/sandboxes/{sandbox}")
        assert gone.status_code == 404 and "timeout_seconds" in gone.json()["error"]
        assert (await h.client.delete(f"/v1/sandboxes/{sandbox}")).status_code == 204


async def test_lifetimes_of_a_living_sandbox_can_be_changed(scripted):
    """PATCH moves the end away or nearer, tells the new values, and refuses what is no lifetime."""

    async def quiet(guest: ScriptedGuest) -> None:
        await guest.ready()
        await anyio.sleep_forever()

    async with scripted(quiet) as h:
        sandbox = await h.create(timeout_seconds=1, idle_timeout_seconds=50)
        path = f"/v1/sandboxes/{sandbox}"
        changed = await h.client.patch(path, json={"timeout_seconds": 60})
        assert changed.status_code == 200 and changed.json()["timeout_seconds"] in (61, 62)
        assert changed.json()["idle_timeout_seconds"] == 50
        for body in ({}, {"timeout_seconds": 0}, {"idle_timeout_seconds": "long"}, {"timeout_seconds": None}):
            refused = await h.client.patch(path, json=body)
            assert refused.status_code == 400 and "timeout_seconds" in refused.json()["error"], body
        await anyio.sleep(1.1)  # past the first end
        assert (await h.client.get(path)).status_code == 200
        assert (await h.client.patch(path, json={"idle_timeout_seconds": 1})).json()["idle_timeout_seconds"] == 1
        await wait_until(lambda: h.engine.machines[0].closed)
        gone = await h.client.patch(path, json={"timeout_seconds": 60})
        assert gone.status_code == 404 and "idle" in gone.json()["error"]


async def test_idle_time_counts_from_the_last_use(scripted):
    """A used or busy sandbox outlives its idle time; an unused one ends and says why."""

    async def slow(guest: ScriptedGuest) -> None:
        await guest.ready()
        while True:
            channel, _ = await guest.next_exec()
            await anyio.sleep(1.3)
            await guest.say(channel, Exit(0))

    async with scripted(slow) as h:
        sandbox = await h.create(idle_timeout_seconds=1)
        assert (await h.exec(sandbox, "1"))[-1]["data"] == 0
        for _ in range(6):
            await anyio.sleep(0.25)
            assert (await h.client.get(f"/v1/sandboxes/{sandbox}")).status_code == 200
        await wait_until(lambda: h.engine.machines[0].closed)
        gone = await h.client.get(f"/v1/sandboxes/{sandbox}")
        assert "idle for 1 s (idle_timeout_seconds)" in gone.json()["error"]


async def test_embedded_daemon_sets_no_limits_of_its_own(scripted):
    """Without server defaults a sandbox has no lifetime unless it asks for one."""
    async with scripted(echo, lifetime_s=None, idle_s=None) as h:
        body = (await h.client.post("/v1/sandboxes")).json()
        assert body["timeout_seconds"] is None and body["idle_timeout_seconds"] is None


# Repeated creates.


async def test_same_idempotency_key_gives_the_same_sandbox(scripted):
    """Creates with one key, one after another or at once, make one sandbox; another key makes another."""
    async with scripted(echo) as h:
        ids = []

        async def make(key: str) -> None:
            ids.append((await h.client.post("/v1/sandboxes", json={}, headers={"idempotency-key": key})).json()["id"])

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(make, "k1")
        await make("k1")
        assert len(set(ids)) == 1 and len(h.engine.machines) == 1
        await make("k2")
        assert len(set(ids)) == 2


async def test_idempotency_key_for_another_body_or_a_gone_sandbox_is_a_conflict(scripted):
    """A key used for something else, or whose sandbox is gone, is refused with 409."""
    async with scripted(echo) as h:
        headers = {"idempotency-key": "k"}
        sandbox = (await h.client.post("/v1/sandboxes", json={}, headers=headers)).json()["id"]
        other = await h.client.post("/v1/sandboxes", json={"ram_mib": 512}, headers=headers)
        assert (other.status_code, other.json()["code"]) == (409, "conflict")
        await h.client.delete(f"/v1/sandboxes/{sandbox}")
        again = await h.client.post("/v1/sandboxes", json={}, headers=headers)
        assert again.status_code == 409 and "it was closed" in again.json()["error"]


async def test_keys_of_different_owners_are_different(scripted):
    """Two owners using the same key get a sandbox each."""
    async with scripted(echo, key_digests=(digest("a"), digest("b"))) as h:
        ids = {
            (await h.client.post("/v1/sandboxes", headers={**bearer(key), "idempotency-key": "k"})).json()["id"]
            for key in "ab"
        }
        assert len(ids) == 2


async def test_failed_create_frees_its_key(scripted):
    """After a create that failed, the same key works."""
    async with scripted(echo) as h:
        headers = {"idempotency-key": "k"}
        h.engine.refuse = NoCapacity("full")
        assert (await h.client.post("/v1/sandboxes", headers=headers)).status_code == 503
        h.engine.refuse = None
        assert (await h.client.post("/v1/sandboxes", headers=headers)).status_code == 200


async def test_client_that_leaves_a_create_leaves_no_sandbox(scripted):
    """A create whose client disconnects before the answer leaves nothing behind."""
    reached, go = anyio.Event(), anyio.Event()

    async def late(guest: ScriptedGuest) -> None:
        reached.set()
        await go.wait()
        await guest.ready()
        await guest.serve_cells()

    async with scripted(late) as h:
        _, writer = await h.connect()
        writer.write(b"POST /v1/sandboxes HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        await reached.wait()
        writer.transport.abort()
        await wait_until(lambda: h.engine.machines[0].closed)
        go.set()
        assert (await h.client.get("/v1/sandboxes")).json() == {"sandboxes": []}


# Limits of the daemon and refusals of the engine.


async def test_daemon_has_a_limit_of_sandboxes(scripted):
    """Beyond max_sandboxes a create is 503; closing one makes room."""
    async with scripted(echo, max_sandboxes=2) as h:
        first, _ = await h.create(), await h.create()
        full = await h.client.post("/v1/sandboxes")
        assert (full.status_code, full.json()["code"]) == (503, "no_capacity")
        await h.client.delete(f"/v1/sandboxes/{first}")
        await h.create()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NoCapacity("memory is used up"), 503, "no_capacity"),
        (IsolationIncomplete("seccomp is missing"), 503, "isolation_incomplete"),
        (OSError(24, "Too many open files"), 500, "machine_failed"),
    ],
)
async def test_engines_refusal_is_told(scripted, error, status, code):
    """What the engine refuses reaches the caller with its reason."""
    async with scripted(echo) as h:
        h.engine.refuse = error
        answer = await h.client.post("/v1/sandboxes")
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert str(error.args[-1]) in answer.json()["error"]


# The pool.


async def test_pool_hands_out_warm_machines_and_refills(scripted):
    """Creates take from the pool while there is something in it, and it fills up again behind them."""
    async with scripted(echo, pool_size=2) as h:

        async def ready() -> int:
            return int((await h.client.get("/v1/capacity")).json()["pool"]["ready"])

        with anyio.fail_after(20):
            while await ready() < 2:
                await anyio.sleep(0.01)
            ids = [await h.create() for _ in range(2)]
            while await ready() < 2:
                await anyio.sleep(0.01)
        pool = (await h.client.get("/v1/capacity")).json()["pool"]
        assert (pool["hits"], pool["pool_hit_rate_bp"], pool["problem"]) == (2, 10_000, "")
        assert text(await h.exec(ids[0], "works")) == "works"
        assert len(h.engine.machines) == 4


async def test_pooled_machine_gets_the_asked_limits(scripted):
    """A warm machine handed out with other limits has them set before anything runs in it."""
    async with scripted(echo, pool_size=1) as h:
        with anyio.fail_after(20):
            while not (await h.client.get("/v1/capacity")).json()["pool"]["ready"]:
                await anyio.sleep(0.01)
        await h.create(ram_mib=333, rootfs_gb=2)
        limits = h.engine.machines[0].limits[-1]
        assert (limits.memory_bytes, limits.disk_bytes) == (333 * 2**20, 2 * 2**30)


async def test_machines_that_cannot_have_the_asked_limits_stay_in_the_pool(scripted):
    """A create whose limits no warm machine can be given gets a new one, and the next plain one still a warm one."""
    async with scripted(echo, pool_size=2) as h:
        with anyio.fail_after(20):
            while (await h.client.get("/v1/capacity")).json()["pool"]["ready"] < 2:
                await anyio.sleep(0.01)
        warm = list(h.engine.machines)
        await h.create(ram_mib=4096)
        pool = (await h.client.get("/v1/capacity")).json()["pool"]
        assert (pool["ready"], pool["hits"], pool["misses"]) == (2, 0, 1)
        await h.create()
        assert (await h.client.get("/v1/capacity")).json()["pool"]["hits"] == 1
        assert not any(machine.closed for machine in warm)


async def test_dead_pooled_machines_are_never_handed_out(scripted):
    """Warm machines that die in the pool are replaced, and a create gets a living one."""
    async with scripted(echo, pool_size=2) as h:
        with anyio.fail_after(20):
            while (await h.client.get("/v1/capacity")).json()["pool"]["ready"] < 2:
                await anyio.sleep(0.01)
            for machine in h.engine.machines[:2]:
                machine.die("killed in the pool")
            sandbox = await h.create()
            assert text(await h.exec(sandbox, "alive")) == "alive"
            while (await h.client.get("/v1/capacity")).json()["pool"]["ready"] < 2:
                await anyio.sleep(0.01)
        assert all(machine.closed for machine in h.engine.machines[:2])


async def test_create_takes_the_machine_that_is_being_made(scripted):
    """A create that meets an empty pool waits for the machine under way; only a second one makes its own."""
    async with scripted(echo, pool_size=1) as h:
        with anyio.fail_after(20):
            while not (await h.client.get("/v1/capacity")).json()["pool"]["ready"]:
                await anyio.sleep(0.01)
        h.engine.may_create = anyio.Event()
        await h.create()
        await wait_until(lambda: h.engine.asked == 2)  # the refill
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(h.create)
            await anyio.sleep(0.05)
            assert h.engine.asked == 2
            tasks.start_soon(h.create)
            await wait_until(lambda: h.engine.asked == 3)
            h.engine.may_create.set()
        pool = (await h.client.get("/v1/capacity")).json()["pool"]
        assert (pool["hits"], pool["misses"]) == (2, 1)


async def test_create_survives_a_refill_that_fails(scripted):
    """If the machine under way fails, the create that waited for it makes one itself."""
    async with scripted(echo, pool_size=1) as h:
        with anyio.fail_after(20):
            while not (await h.client.get("/v1/capacity")).json()["pool"]["ready"]:
                await anyio.sleep(0.01)
        h.engine.may_create = anyio.Event()
        h.engine.refuse = ValueError("a bug in the engine")
        await h.create()
        await wait_until(lambda: h.engine.asked == 2)
        answers = []

        async def create() -> None:
            answers.append((await h.client.post("/v1/sandboxes")).status_code)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(create)
            await anyio.sleep(0.05)
            h.engine.may_create.set()
        assert answers == [500]
        assert "a bug in the engine" in (await h.client.get("/v1/capacity")).json()["pool"]["problem"]
        h.engine.refuse = None
        await h.create()


# Weeks of uptime.


async def test_churn_leaks_nothing(scripted):
    """Two hundred sandboxes made, used and closed leave no descriptor and no task behind."""
    import asyncio
    import os

    async with scripted(echo) as h:

        async def one() -> None:
            sandbox = await h.create()
            assert text(await h.exec(sandbox, "x")) == "x"
            assert (await h.client.delete(f"/v1/sandboxes/{sandbox}")).status_code == 204

        for _ in range(5):
            await one()
        h.engine.machines.clear()
        fds, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
        for _ in range(200):
            await one()
            h.engine.machines.clear()
        await wait_until(lambda: len(os.listdir("/proc/self/fd")) <= fds and len(asyncio.all_tasks()) <= tasks)


async def test_traceparent_is_logged_and_never_fails_a_request(scripted, caplog):
    """A request's trace ids are in its log lines; malformed values are ignored."""
    caplog.set_level("INFO", logger="podflare")
    async with scripted(echo) as h:
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        good = f"00-{trace}-00f067aa0ba902b7-01"
        assert (await h.client.post("/v1/sandboxes", headers={"traceparent": good})).status_code == 200
        for bad in ("", "junk", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 5000):
            assert (await h.client.get("/v1/sandboxes", headers={"traceparent": bad})).status_code == 200
    fields = [(record.getMessage(), getattr(record, "fields", {})) for record in caplog.records]
    traced = {name for name, values in fields if values.get("trace_id") == trace}
    assert traced >= {"sandbox claimed", "http_request"}
