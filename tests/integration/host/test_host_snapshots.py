"""Snapshots over HTTP: taking, going on, owners, limits, and what is refused.

The fake engine keeps the files of a machine alone; what a virtual machine keeps is tested with one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from hosting import Host, running, text
from podflare.engines.fake import FakeEngine
from podflare.engines.snapshots import SnapshotStore
from podflare.host.auth import digest
from podflare.host.tiers import Tier

pytestmark = pytest.mark.anyio


def keeper(data_dir: Path) -> FakeEngine:
    """An engine that keeps snapshots in the directory."""
    return FakeEngine(saved=SnapshotStore(f"{data_dir}/kept", data_dir))


async def take(h: Host, sandbox: str, name: str, **more: Any) -> httpx.Response:
    return await h.client.post(f"/v1/sandboxes/{sandbox}/snapshots", json={"name": name}, **more)


async def names(h: Host, **more: Any) -> list[str]:
    return [one["name"] for one in (await h.client.get("/v1/snapshots", **more)).json()["snapshots"]]


async def test_sandboxes_go_on_from_a_snapshot(data_dir):
    """What is kept starts any number of sandboxes with its limits, in later daemons too, until it is removed."""
    async with running(data_dir, keeper(data_dir)) as h:
        source = await h.create(ram_mib=512, rootfs_gb=2)
        await h.exec(source, "open('note', 'w').write('kept')")
        told = (await take(h, source, "mine")).json()
        assert (told["name"], told["engine"], told["template"]) == ("mine", "fake", "default")
        assert (told["ram_mib"], told["rootfs_gb"], told["sandbox_id"]) == (512, 2, source)
        assert told["size_bytes"] > 0 and told["created_at_ms"] > 1_700_000_000_000
        assert (await h.client.get("/v1/snapshots/mine")).json() == told
        await h.exec(source, "open('note', 'w').write('later')")
        assert text(await h.exec(source, "print(open('note').read())")) == "later"
    async with running(data_dir, keeper(data_dir)) as h:
        made: list[str] = []

        async def create(number: int) -> None:
            made.append(await h.create(snapshot="mine", metadata={"n": str(number)}, timeout_seconds=600 + number))

        async with anyio.create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(create, number)
        for one in made:
            info = await h.info(one)
            assert (info["snapshot"], info["template"], info["ram_mib"], info["rootfs_gb"]) == (
                "mine",
                "default",
                512,
                2,
            )
            assert info["timeout_seconds"] == 600 + int(info["metadata"]["n"]) and info["egress"] is False
            # Cells of one memory have names of their own, which the kept one's cells go on with.
            cell = await h.exec(one, "print(open('note').read()); 1 / 0")
            assert text(cell) == "kept" and "<cell 2>" in text(cell, "stderr")
        assert (await h.client.delete("/v1/snapshots/mine")).status_code == 204
        assert await names(h) == [] and (await h.client.get("/v1/snapshots/mine")).status_code == 404
        assert text(await h.exec(made[0], "print(open('note').read())")) == "kept"
    assert sorted(path.name for path in data_dir.iterdir()) == ["data", "kept"]


async def test_what_is_refused(data_dir):
    """Wrong names, taken ones, unknown ones and what cannot go with a snapshot are told apart, and nothing is made."""
    async with running(data_dir, keeper(data_dir)) as h:
        source = await h.create()
        assert (await take(h, source, "mine")).status_code == 200
        answer = await take(h, source, "mine")
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict") and "'mine'" in answer.json()["error"]
        for name in ("", "../mine", ".mine", "a/b", "a b", "mine\n", "x" * 65, "ü", 7, None):
            answer = await h.client.post(f"/v1/sandboxes/{source}/snapshots", json={"name": name})
            assert answer.status_code == 400, name
        for body in (
            {"template": "default"},
            {"ram_mib": 512},
            {"rootfs_gb": 1},
            {"egress": True},
            {"egress": ["pypi.org"]},
            {"secrets": {"KEY": {"value": "x", "hosts": ["pypi.org"]}}},
            {"engine": "other"},
        ):
            answer = await h.client.post("/v1/sandboxes", json={"snapshot": "mine", **body})
            assert answer.status_code == 400 and next(iter(body)) in answer.json()["error"], answer.text
        for call in (
            h.client.post("/v1/sandboxes", json={"snapshot": "none"}),
            h.client.get("/v1/snapshots/none"),
            h.client.delete("/v1/snapshots/none"),
            h.client.delete("/v1/snapshots/..%2Fmine"),
        ):
            answer = await call
            assert answer.status_code == 404, answer.text
        assert (await take(h, "sbx_" + "0" * 32, "other")).json()["code"] == "sandbox_not_found"
        assert await names(h) == ["mine"]
        assert len((await h.client.get("/v1/sandboxes")).json()["sandboxes"]) == 1


async def test_a_daemon_whose_sandboxes_have_a_network(data_dir):
    """One that goes on from a snapshot has none all the same, and its creator, who asked for nothing, is told."""
    async with running(data_dir, keeper(data_dir), egress=True) as h:
        await take(h, await h.create(egress=False), "mine")
        told = (await h.client.post("/v1/sandboxes", json={"snapshot": "mine"})).json()
        assert told["egress"] is False and any("no network" in warning for warning in told["warnings"])
        told = (await h.client.post("/v1/sandboxes", json={"snapshot": "mine", "egress": False})).json()
        assert told["warnings"] == []


async def test_an_engine_that_cannot_keep_sandboxes(data_dir):
    """It answers 501 at once, also while a cell runs, and says what can; its daemon has no snapshots."""
    plain = FakeEngine()
    plain.name, plain.capabilities = "plain", {}
    async with running(data_dir, plain, keeper(data_dir)) as h:
        source = await h.create()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(h.exec, source, "import time; time.sleep(20)")
            answer = await take(h, source, "mine")
            assert (answer.status_code, answer.json()["code"]) == (501, "not_built")
            assert "the engine plain" in answer.json()["error"] and "engine='fake' can" in answer.json()["error"]
            await h.client.post(f"/v1/sandboxes/{source}/interrupt")
        assert await names(h) == []
        # One of two engines keeps them; the body need not say which.
        assert (await take(h, await h.create(engine="fake"), "mine")).status_code == 200
        assert (await h.info(await h.create(snapshot="mine")))["engine"] == "fake"


async def test_owners_have_names_of_their_own(data_dir):
    """Two keys use one name for two snapshots; what is another key's does not exist, by no route."""
    mine, theirs = ({"authorization": f"Bearer {key}"} for key in "ab")
    async with running(data_dir, keeper(data_dir), key_digests=(digest("a"), digest("b"))) as h:

        async def create(key: dict[str, str], **body: str) -> httpx.Response:
            return await h.client.post("/v1/sandboxes", headers=key, json=body)

        for key, word in ((mine, "mine"), (theirs, "theirs")):
            source = (await create(key)).json()["id"]
            code = f"open('note', 'w').write('{word}')"
            await h.client.post(f"/v1/sandboxes/{source}/exec", headers=key, json={"code": code})
            assert (await take(h, source, "same", headers=key)).status_code == 200
        assert (await take(h, source, "theirs", headers=mine)).status_code == 404
        assert (await take(h, source, "theirs", headers=theirs)).status_code == 200
        [kept] = [
            path.name for path in (data_dir / "kept").iterdir() if '"theirs"' in (path / "about.json").read_text()
        ]
        for name in ("theirs", kept):
            for answer in (
                await create(mine, snapshot=name),
                await h.client.get(f"/v1/snapshots/{name}", headers=mine),
                await h.client.delete(f"/v1/snapshots/{name}", headers=mine),
            ):
                assert (answer.status_code, answer.json()["code"]) == (404, "snapshot_not_found")
                assert answer.json()["error"] == f"no snapshot {name!r}"
        assert (await names(h, headers=mine), await names(h, headers=theirs)) == (["same"], ["same", "theirs"])
        for key, word in ((mine, "mine"), (theirs, "theirs")):
            one = (await create(key, snapshot="same")).json()["id"]
            look = {"code": "print(open('note').read())"}
            assert word in (await h.client.post(f"/v1/sandboxes/{one}/exec", headers=key, json=look)).text
        assert (await h.client.delete("/v1/snapshots/same", headers=mine)).status_code == 204
        assert (await names(h, headers=mine), await names(h, headers=theirs)) == ([], ["same", "theirs"])


@pytest.mark.parametrize(
    ("tier", "why", "left"),
    [
        (Tier("default", snapshots=1), "this key has 1 snapshots, its limit: 1 (tier default)", ["one"]),
        (Tier("default", snapshots_gb=0), "may have 0 GiB (tier default)", []),
    ],
)
async def test_a_tiers_snapshots(data_dir, tier, why, left):
    """A tier caps number and disk of a key's snapshots; one that is too much is refused and not kept."""
    async with running(data_dir, keeper(data_dir), tiers={"default": tier}) as h:
        source = await h.create()
        await h.exec(source, "open('note', 'w').write('kept')")
        await take(h, source, "one")
        answer = await take(h, source, "two")
        assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded") and why in answer.json()["error"]
        assert await names(h) == left
        assert len(list((data_dir / "kept").iterdir())) == len(left)
        for name in left:
            await h.client.delete(f"/v1/snapshots/{name}")
            assert (await take(h, source, "two")).status_code == 200


async def test_a_snapshot_that_is_more_than_its_owner_may_have_by_now(data_dir):
    """What was kept under higher caps is refused under lower ones, for it cannot be cut."""
    async with running(data_dir, keeper(data_dir)) as h:
        await take(h, await h.create(ram_mib=2048), "big")
    async with running(data_dir, keeper(data_dir), tiers={"default": Tier("default", ram_mib=1024)}) as h:
        answer = await h.client.post("/v1/sandboxes", json={"snapshot": "big"})
        assert answer.status_code == 429 and "ram_mib=2048" in answer.json()["error"]


async def test_it_waits_for_cells_and_ends_with_its_sandbox(data_dir):
    """A snapshot has the whole effect of the cell before it; one whose sandbox ends meanwhile is 404 and not kept."""
    async with running(data_dir, keeper(data_dir)) as h:
        source = await h.create()
        answers: list[httpx.Response] = []

        async def ask(name: str) -> None:
            answers.append(await take(h, source, name))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(h.exec, source, "import time; time.sleep(0.5); open('done', 'w').write('yes')")
            await anyio.sleep(0.1)
            tasks.start_soon(ask, "whole")
        assert answers.pop().status_code == 200
        assert text(await h.exec(await h.create(snapshot="whole"), "print(open('done').read())")) == "yes"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(h.exec, source, "import time; time.sleep(30)")
            await anyio.sleep(0.1)
            tasks.start_soon(ask, "late")
            await anyio.sleep(0.1)
            await h.client.delete(f"/v1/sandboxes/{source}")
        assert answers.pop().status_code == 404 and await names(h) == ["whole"]
        other = await h.create()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(h.exec, other, "import time; time.sleep(30)")
            await anyio.sleep(0.1)
            body = {"name": "never", "timeout_seconds": 0.2}
            answer = await h.client.post(f"/v1/sandboxes/{other}/snapshots", json=body)
            assert answer.status_code == 504 and "not kept" in answer.json()["error"]
            await h.client.post(f"/v1/sandboxes/{other}/interrupt")
        assert await names(h) == ["whole"]
