"""A daemon with several engines: who makes a sandbox, what stays within one engine, and what is counted over all."""

from __future__ import annotations

import anyio
import pytest

from hosting import Host, running, text
from podflare.engines.fake import FakeEngine
from podflare.errors import IsolationIncomplete
from podflare.host.engines import Engines

pytestmark = pytest.mark.anyio


def other(*templates: str) -> FakeEngine:
    """A second engine, by another name."""
    engine = FakeEngine()
    engine.name = "other"
    engine.templates = templates or ("default",)
    return engine


async def refused(h: Host, **body: object) -> tuple[int, str]:
    answer = await h.client.post("/v1/sandboxes", json=body)
    return answer.status_code, answer.json()["error"]


async def test_the_creator_chooses_the_engine(data_dir):
    """The body names the engine, else it is the first one; each sandbox, template and pool says whose it is."""
    async with running(
        data_dir, FakeEngine(), other("default", "big"), pool_templates=(("other/default", 1), ("gone/default", 1))
    ) as h:
        plain, named, chosen = await h.create(), await h.create(engine="fake"), await h.create(engine="other")
        assert [(await h.info(one))["engine"] for one in (plain, named, chosen)] == ["fake", "fake", "other"]
        assert text(await h.exec(chosen, "print(6 * 7)")) == "42"
        told = (await h.client.get("/v1/templates")).json()["templates"]
        assert [(one["engine"], one["name"]) for one in told] == [
            ("fake", "default"),
            ("other", "default"),
            ("other", "big"),
        ]
        capacity = (await h.client.get("/v1/capacity")).json()
        assert (capacity["engine"], capacity["engines"], capacity["templates"]) == (
            "fake",
            ["fake", "other"],
            ["default"],
        )
        assert [(pool["engine"], pool["template"]) for pool in capacity["pools"]] == [
            ("fake", "default"),
            ("other", "default"),
        ]
        assert capacity["pools"][1]["hits"] == 1
        status, error = await refused(h, engine="third")
        assert status == 400 and error == "unknown engine 'third'; this daemon offers: fake, other"
        status, error = await refused(h, template="big")
        assert status == 400 and "engine='other' has it" in error
        status, error = await refused(h, template="none", engine="other")
        assert status == 400 and "default, big" in error and "has it" not in error


async def test_nothing_crosses_from_one_engine_to_another(data_dir):
    """Sandboxes of two engines can be neither compared nor merged: 409, and both live on."""
    async with running(data_dir, FakeEngine(), other()) as h:
        one, two = await h.create(), await h.create(engine="other")
        for method, path in (
            ("GET", f"{one}/diff/{two}"),
            ("GET", f"{two}/diff/{one}?variables=true"),
            ("POST", f"{one}/merge/{two}"),
            ("POST", f"{one}/merge_into/{two}"),
        ):
            answer = await h.client.request(method, f"/v1/sandboxes/{path}")
            assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
            assert all(word in answer.json()["error"] for word in ("runs on the engine", one, "fake", two, "other"))
        assert [text(await h.exec(each, "print(1)")) for each in (one, two)] == ["1", "1"]


async def test_limits_count_sandboxes_of_all_engines(data_dir):
    """The number of sandboxes that a daemon runs has one limit, whoever makes them."""
    async with running(data_dir, FakeEngine(), other(), max_sandboxes=2) as h:
        await h.create()
        await h.create(engine="other")
        for engine in ("fake", "other"):
            assert (await refused(h, engine=engine))[0] == 503


async def test_each_engine_says_what_its_machines_need(data_dir):
    """A computer with too little memory for one engine's machines may have enough for another's."""
    large = other()
    large.expected_memory_bytes = 1 << 60
    async with running(data_dir, FakeEngine(), large) as h:
        status, error = await refused(h, engine="other")
        assert status == 503 and f"each needs {1 << 40}" in error
        assert text(await h.exec(await h.create(), "print(1)")) == "1"


async def test_an_engine_on_request(data_dir):
    """Such an engine is started by the first create that names it, once; one that fails may be asked for again."""
    started = []

    class Late(FakeEngine):
        name = "late"

        async def start(self) -> None:
            started.append(self)
            if len(started) == 1:
                raise IsolationIncomplete("no virtual machines here")
            await super().start()

    engines = Engines(FakeEngine(), later={"late": Late})
    async with running(data_dir, engines) as h:
        capacity = (await h.client.get("/v1/capacity")).json()
        assert capacity["engines"] == ["fake", "late"] and started == []
        assert len((await h.client.get("/v1/templates")).json()["templates"]) == 1
        assert await refused(h, engine="late") == (503, "no virtual machines here")
        made: list[str] = []

        async def create() -> None:
            made.append(await h.create(engine="late"))

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(create)
        assert [(await h.info(one))["engine"] for one in made] == ["late"] * 3
        assert len(started) == 2


async def test_one_that_cannot_start(data_dir):
    """If one of a daemon's engines cannot start, none runs on: those before it are closed again."""

    class Broken(FakeEngine):
        name = "broken"

        async def start(self) -> None:
            raise IsolationIncomplete("no virtual machines here")

    first = FakeEngine()
    engines = Engines(first, Broken())
    with pytest.raises(IsolationIncomplete):
        await engines.start()
    assert first._bundle is None
