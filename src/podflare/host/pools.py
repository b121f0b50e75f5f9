"""The warm machines of one daemon: of which engine's templates how many are kept ready."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from podflare.engines.base import Engine, Limits, MachineSpec
from podflare.errors import BadRequest, UnknownTemplate
from podflare.host import telemetry
from podflare.host.config import Config
from podflare.host.engines import Engines
from podflare.host.pool import Pool, Warm, make
from podflare.wire.api import DEFAULT_TEMPLATE, TemplateInfo


def limits_of(template: TemplateInfo, ram_mib: int | None = None, rootfs_gb: int | None = None) -> Limits:
    """The template's, where the request names none."""
    return Limits(
        memory_bytes=(template.ram_mib if ram_mib is None else ram_mib) << 20,
        disk_bytes=(template.rootfs_gb if rootfs_gb is None else rootfs_gb) << 30,
        cpus=template.cpus,
    )


class Pools:
    """A pool for the default engine's default template, and for each template that the settings name."""

    def __init__(self, engines: Engines, config: Config) -> None:
        self._engines = engines
        self._create_timeout_s = config.create_timeout_s
        self._named = config.pool_templates
        self._pools: dict[tuple[str, str], Pool] = {}
        size = engines.default.pool_size if config.pool_size is None else config.pool_size
        self._add(engines.default, TemplateInfo(DEFAULT_TEMPLATE), size)

    def _add(self, engine: Engine, template: TemplateInfo, size: int) -> None:
        spec = MachineSpec(template.name, limits_of(template))
        pool = Pool(engine, spec, size, create_timeout_s=self._create_timeout_s)
        self._pools[engine.name, template.name] = pool

    def start(self, spawn: Callable[[Callable[[], Awaitable[None]]], None]) -> None:
        """Begin to fill them; the engines have been started.  `spawn` runs each pool's task."""
        started = {engine.name: engine for engine in self._engines.started}
        for name, size in self._named:
            engine_name, _, template = name.rpartition("/")
            try:
                engine = started[self._engines.check(engine_name or None)]
                self._add(engine, engine.describe(template), size)
            except (BadRequest, UnknownTemplate, KeyError) as exc:
                telemetry.problem("no pool for a template that is not there", template=name, error=exc)
        for pool in self._pools.values():
            spawn(pool.run)

    async def take(self, engine: Engine, spec: MachineSpec) -> Warm:
        """As Pool.take."""
        pool = self._pools.get((engine.name, spec.template))
        if pool is None:
            return await make(engine, spec, timeout_s=self._create_timeout_s, pooled=False)
        return await pool.take(spec)

    @property
    def default(self) -> Pool:
        return self._pools[self._engines.default.name, DEFAULT_TEMPLATE]

    def describe(self) -> list[dict[str, Any]]:
        """Their part of GET /v1/capacity."""
        return [{"engine": name, **pool.describe()} for (name, _), pool in self._pools.items()]

    async def aclose(self) -> None:
        """As Pool.aclose, of each."""
        for pool in self._pools.values():
            await pool.aclose()
