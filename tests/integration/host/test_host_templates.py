"""What the daemon makes of what an engine tells of its templates: limits, pools, what was built anew."""

from __future__ import annotations

import anyio
import pytest
from test_host_daemon import echo

from hosting import Host
from podflare.wire.api import TemplateInfo

pytestmark = pytest.mark.anyio


async def ready(h: Host) -> int:
    """Warm machines of the default template."""
    return int((await h.client.get("/v1/capacity")).json()["pool"]["ready"])


async def test_limits_are_the_templates_unless_named(scripted):
    """A create that names no limits gets its template's, one that does gets those; each is told as it is."""
    async with scripted(echo) as h:
        h.engine.infos["default"] = TemplateInfo("default", ram_mib=333, rootfs_gb=2, cpus=0.5)
        for body, limits in (({}, (333, 2)), ({"ram_mib": 99}, (99, 2)), ({"rootfs_gb": 7}, (333, 7))):
            told = (await h.client.post("/v1/sandboxes", json=body)).json()
            assert (told["ram_mib"], told["rootfs_gb"]) == limits
            spec = h.engine.machines[-1].spec
            assert (spec.limits.memory_bytes >> 20, spec.limits.disk_bytes >> 30) == limits
            assert spec.limits.cpus == 0.5
            assert any("cpus=0.5 of the template is not enforced" in warning for warning in told["warnings"])


async def test_templates_are_listed_with_their_problems(scripted):
    """GET /v1/templates tells every template of the engine, also one that cannot be used."""
    async with scripted(echo) as h:
        h.engine.infos["default"] = TemplateInfo("default", problem="damaged", packages={"a": "1"})
        [told] = (await h.client.get("/v1/templates")).json()["templates"]
        assert (told["name"], told["problem"], told["packages"]) == ("default", "damaged", {"a": "1"})


async def test_pools_are_kept_for_named_templates(scripted):
    """Each template of the setting gets its own pool; one that is not there costs a line in the log and no more."""
    async with scripted(echo, pool_templates=(("default", 1), ("gone", 3))) as h:
        with anyio.fail_after(20):
            while await ready(h) < 1:
                await anyio.sleep(0.01)
        await h.create()
        pools = (await h.client.get("/v1/capacity")).json()["pools"]
        assert [(pool["template"], pool["size"], pool["hits"]) for pool in pools] == [("default", 1, 1)]


async def test_warm_machines_of_an_old_template_are_not_handed_out(scripted):
    """After a template was built anew, what waits in its pool is closed, and a create gets the new one."""
    async with scripted(echo, pool_size=2) as h:
        with anyio.fail_after(20):
            while await ready(h) < 2:
                await anyio.sleep(0.01)
            old = list(h.engine.machines)
            h.engine.infos["default"] = TemplateInfo("default", version="2")
            await h.create()
            assert all(machine.closed for machine in old)
