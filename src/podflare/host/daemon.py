"""The daemon's operations: create, find, list, close.  Joins engine, pool, registry and store; knows no HTTP.

`Daemon.run` is the scope of every background task; when it ends, no machine is left.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import anyio
from anyio.abc import TaskGroup

from podflare.engines.base import Engine, Limits, MachineSpec
from podflare.errors import (
    BadRequest,
    Conflict,
    MachineFailed,
    NoCapacity,
    NotBuilt,
    PodflareError,
    QuotaExceeded,
    SandboxNotFound,
)
from podflare.host import telemetry
from podflare.host.body import Body
from podflare.host.branches import Branches
from podflare.host.config import Config
from podflare.host.egress import Grant, Outlet, Outlets
from podflare.host.engines import Engines
from podflare.host.headroom import MIB, Headroom
from podflare.host.kept import Room
from podflare.host.lineage import Lineage, Terms
from podflare.host.pool import Warm, greet
from podflare.host.pools import Pools, limits_of
from podflare.host.recover import Instance
from podflare.host.registry import NOT_FOUND, Registry, new_sandbox_id
from podflare.host.sandbox import Sandbox
from podflare.host.snapshots import Origin, Snapshots
from podflare.host.store import Store
from podflare.wire.api import CreateRequest, SandboxInfo, SandboxUsage, TemplateInfo

MAX_REMEMBERED_KEYS = 10_000
CLOSE_WAIT_S = 20.0
"""A DELETE answers at the latest after this, below the original client's 30 s; the release goes on behind it."""
MEASURING = 2
"""Machines looked at closely at a time: a long list must not keep all threads of the engine from forks."""
MEASURE_WAIT_S = 20.0
"""For a whole list."""

CLOSED = "it was closed"
SHUT_DOWN = "the daemon was shut down"


@dataclass
class _Remembered:
    """One Idempotency-Key: what was asked, and the sandbox once it exists."""

    fingerprint: str
    made: asyncio.Event
    expires_s: float
    sandbox_id: str = ""


@dataclass(frozen=True)
class _Made:
    """A machine for a sandbox, and on which terms."""

    engine: Engine
    granted: CreateRequest
    warm: Warm
    outlet: Outlet | None
    warnings: tuple[str, ...]
    lineage: Lineage = field(default_factory=Lineage)


class Daemon:
    """All sandboxes of one daemon life."""

    def __init__(self, config: Config, engines: Engines, store: Store, instance: Instance) -> None:
        self.config = config
        self.engines = engines
        self.registry = Registry(store)
        self._store = store
        self._instance = instance
        self._room = Room(config.keep_total_bytes)
        self._headroom = Headroom(
            instance.directory,
            memory_reserve=_bytes(config.memory_reserve_mib),
            disk_reserve=_bytes(config.disk_reserve_mib),
        )
        self._remembered: dict[tuple[str, str], _Remembered] = {}
        self._tasks: TaskGroup | None = None
        self._starting: Counter[str] = Counter()
        """By owner: sandboxes that are being made."""
        self._starting_bytes = 0
        """What those may be expected to use."""
        self._none_starting = anyio.Event()
        self._closing = False
        self._outlets = Outlets(config)
        self._measuring = anyio.Semaphore(MEASURING)
        self._pools = Pools(engines, config)
        self.snapshots = Snapshots(engines, self.registry, config, self._headroom)
        self.branches = Branches(self.registry, starting=self._start, add=self._add)

    async def run(self, tasks: TaskGroup) -> None:
        """Start the background tasks in `tasks`; the engines have been started."""
        self._tasks = tasks
        self._pools.start(self._spawn)

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        assert self._tasks is not None
        self._tasks.start_soon(_guarded, work)

    # Create.

    async def create(self, request: CreateRequest, owner: str, idempotency_key: str | None = None) -> Sandbox:
        """A ready sandbox.  With a key that this owner used in the last minutes: the same sandbox again.

        Raises: BadRequest, UnknownTemplate; NotBuilt; NoCapacity; Conflict if the key was used for another request or
            its sandbox is gone; IsolationIncomplete, MachineFailed, DeadlineExceeded from the engine.
        If cancelled or failed: no sandbox exists.
        """
        if idempotency_key is None:
            return await self._create(request, owner)
        key = (owner, idempotency_key)
        fingerprint = hashlib.sha256(json.dumps(asdict(request), sort_keys=True, default=dict).encode()).hexdigest()
        self._forget_old_keys()
        while (known := self._remembered.get(key)) is not None:
            if known.fingerprint != fingerprint:
                raise Conflict("this Idempotency-Key was used for a create with another body")
            await known.made.wait()
            if known.sandbox_id:
                return await self._again(known.sandbox_id, owner)
        entry = self._remembered[key] = _Remembered(
            fingerprint, asyncio.Event(), time.monotonic() + self.config.idempotency_s
        )
        try:
            sandbox = await self._create(request, owner)
            entry.sandbox_id = sandbox.id
        except BaseException:
            # A failed create left nothing, so the same key may try again.
            del self._remembered[key]
            raise
        finally:
            entry.made.set()
        return sandbox

    async def _again(self, sandbox_id: str, owner: str) -> Sandbox:
        try:
            return await self.registry.get(sandbox_id, owner)
        except SandboxNotFound as exc:
            raise Conflict(f"the sandbox made with this Idempotency-Key is gone: {exc}") from exc

    def _forget_old_keys(self) -> None:
        now = time.monotonic()
        # Insertion order is order of expiry.
        while self._remembered:
            key, oldest = next(iter(self._remembered.items()))
            if oldest.expires_s > now and len(self._remembered) < MAX_REMEMBERED_KEYS:
                return
            del self._remembered[key]

    async def _create(self, request: CreateRequest, owner: str) -> Sandbox:
        start = time.monotonic()
        self._admit(request)
        with ExitStack() as held:
            if request.snapshot is None:
                engine = await self.engines.get(request.engine)
                held.enter_context(self._start(owner, engine.name, 1))
                made = await self._made(request, owner, engine)
            else:
                origin = held.enter_context(await self.snapshots.begin(request.snapshot, owner))
                held.enter_context(self._start(owner, origin.engine.name, 1))
                made = await self._restored(request, owner, origin)
            body = Body(made.warm.machine, made.warm.link, made.outlet)
            if self._closing:
                await body.aclose()
                raise NoCapacity(SHUT_DOWN)
            sandbox = self._adopt(made, owner, body)
        telemetry.event(
            "sandbox claimed",
            sandbox=sandbox.id,
            machine=made.warm.machine.id,
            source="snapshot" if request.snapshot is not None else "pool" if made.warm.pooled else "on_demand",
            ms=round((time.monotonic() - start) * 1000, 3),
        )
        return sandbox

    async def _made(self, request: CreateRequest, owner: str, engine: Engine) -> _Made:
        reach = self._outlets.grant(request)
        self.engines.check_template(engine, request.template)
        granted, notes = self._grant(request, owner, limits_of(engine.describe(request.template)))
        warm, outlet = await self._machine(granted, engine, reach)
        return _Made(engine, granted, warm, outlet, (*notes, *_warnings(request, warm)))

    async def _restored(self, request: CreateRequest, owner: str, origin: Origin) -> _Made:
        """Raises: BadRequest for another engine; QuotaExceeded; as Engine.restore."""
        engine = origin.engine
        if request.engine not in (None, engine.name):
            raise BadRequest(f"the snapshot {request.snapshot!r} is of the engine {engine.name}")
        self._check_caps(origin, owner)
        asked = replace(request, template=origin.kept.spec.template)
        granted, notes = self._grant(asked, owner, origin.kept.spec.limits)
        machine = await engine.restore(origin.kept.name, timeout_s=self.config.create_timeout_s)
        warm = await greet(machine, pooled=False)
        if self.config.egress is not False and request.egress is None:
            notes = (*notes, "egress is not given: a sandbox that goes on from a snapshot has no network")
        return _Made(engine, granted, warm, None, notes, origin.lineage)

    def _check_caps(self, origin: Origin, owner: str) -> None:
        """What is kept cannot be cut.  Raises: QuotaExceeded if it has more than its owner may have by now."""
        tier, limits = self.config.tier_of(owner), origin.kept.spec.limits
        for name, has, cap in (
            ("ram_mib", limits.memory_bytes >> 20, tier.ram_mib),
            ("rootfs_gb", limits.disk_bytes >> 30, tier.rootfs_gb),
        ):
            if cap is not None and has > cap:
                raise QuotaExceeded(f"the snapshot has {name}={has}, this key may have {cap} (tier {tier.name})")

    def _admit(self, request: CreateRequest) -> None:
        if self._closing:
            raise NoCapacity(SHUT_DOWN)
        if request.persistent:
            raise NotBuilt("persistent sandboxes are not built yet; leave out persistent")
        self.engines.check(request.engine)

    @contextmanager
    def _start(self, owner: str, engine: str, count: int) -> Iterator[None]:
        """Room for `count` sandboxes of an engine, made within the block.  Raises: NoCapacity, QuotaExceeded."""
        if self._closing:
            raise NoCapacity(SHUT_DOWN)
        more = "" if count == 1 else f", and {count} more are asked for"
        tier = self.config.tier_of(owner)
        if tier.sandboxes is not None:
            owned = len(self.registry.owned_by(owner))
            if owned + self._starting[owner] + count > tier.sandboxes:
                limit = f"its limit: {tier.sandboxes} (tier {tier.name})"
                raise QuotaExceeded(f"this key has {owned} sandboxes, {limit}{more}; close some")
        starting = self._starting.total()
        if len(self.registry) + starting + count > self.config.max_sandboxes:
            limit = str(self.config.max_sandboxes)
            raise NoCapacity(f"this daemon runs {len(self.registry)} sandboxes, its limit: {limit}{more}")
        each_bytes = self.engines.running(engine).expected_memory_bytes
        self._headroom.admit(count, each_bytes, starting_bytes=self._starting_bytes)
        self._starting[owner] += count
        self._starting_bytes += count * each_bytes
        try:
            yield
        finally:
            self._starting[owner] -= count
            self._starting_bytes -= count * each_bytes
            if not self._starting[owner]:
                del self._starting[owner]
            if self._closing and not self._starting:
                self._none_starting.set()

    def _grant(self, request: CreateRequest, owner: str, limits: Limits) -> tuple[CreateRequest, tuple[str, ...]]:
        """The request with the defaults filled in and the owner's caps applied; what was cut, in plain words."""
        config = self.config
        resolved = replace(
            request,
            timeout_seconds=_or(request.timeout_seconds, config.lifetime_s),
            idle_timeout_seconds=_or(request.idle_timeout_seconds, config.idle_s),
            ram_mib=_or(request.ram_mib, limits.memory_bytes >> 20),
            rootfs_gb=_or(request.rootfs_gb, limits.disk_bytes >> 30),
        )
        return config.tier_of(owner).grant(request, resolved)

    async def _machine(self, request: CreateRequest, engine: Engine, reach: Grant | None) -> tuple[Warm, Outlet | None]:
        template = engine.describe(request.template)
        spec = MachineSpec(request.template, limits_of(template, request.ram_mib, request.rootfs_gb))
        if reach is None:
            return await self._take(engine, spec), None
        outlet = await self._outlets.open(reach)
        try:
            warm = await self._take(engine, replace(spec, uplink=outlet.uplink))
        except BaseException:
            await outlet.aclose()
            raise
        try:
            await outlet.attach(warm.machine)
        except BaseException:
            await Body(warm.machine, warm.link, outlet).aclose()
            raise
        return warm, outlet

    async def _take(self, engine: Engine, spec: MachineSpec) -> Warm:
        try:
            return await self._pools.take(engine, spec)
        except OSError as exc:
            if isinstance(exc, PodflareError):
                raise
            raise MachineFailed(f"could not start a machine: {exc}") from exc

    def _adopt(self, made: _Made, owner: str, body: Body) -> Sandbox:
        granted, limits = made.granted, body.machine.spec.limits
        terms = Terms(
            template=granted.template,
            ram_mib=limits.memory_bytes >> 20,
            rootfs_gb=limits.disk_bytes >> 30,
            timeout_seconds=granted.timeout_seconds,
            idle_timeout_seconds=granted.idle_timeout_seconds,
            metadata=dict(granted.metadata),
            warnings=made.warnings,
            engine=made.engine.name,
        )
        return self._add(owner, terms, made.lineage, body)

    def _add(self, owner: str, terms: Terms, lineage: Lineage, body: Body) -> Sandbox:
        """The machine becomes a sandbox with an id."""
        sandbox = Sandbox(
            new_sandbox_id(),
            owner,
            terms,
            lineage,
            body,
            config=self.config,
            directory=self._instance.outputs,
            total_room=self._room,
            spawn=self._spawn,
            ended=self._ended,
        )
        self.registry.add(sandbox)
        return sandbox

    # Ends.

    def _ended(self, sandbox: Sandbox, cause: str) -> None:
        self.registry.ended(sandbox, cause)
        telemetry.event("sandbox ended", sandbox=sandbox.id, cause=cause)

    async def close(self, sandbox_id: str, owner: str) -> None:
        """End a sandbox and wait until nothing of it is left.  One that is gone already is no error.

        Raises: SandboxNotFound if this owner never had it.
        """
        sandbox = self.registry.live(sandbox_id, owner)
        if sandbox is None:
            if await self.registry.cause_of_end(sandbox_id, owner) is None:
                raise SandboxNotFound(NOT_FOUND)
            return
        sandbox.end(CLOSED)
        with anyio.move_on_after(CLOSE_WAIT_S):
            await sandbox.gone.wait()

    def describe(self, sandbox: Sandbox, usage: SandboxUsage | None = None) -> SandboxInfo:
        """What is told about a sandbox."""
        return sandbox.info(self.registry.forks_of(sandbox.id), usage)

    async def measure(self, sandboxes: Sequence[Sandbox]) -> dict[str, SandboxUsage]:
        """By id what each uses now.  Those that cannot be measured in time are missing."""
        found: dict[str, SandboxUsage] = {}

        async def one(sandbox: Sandbox) -> None:
            async with self._measuring:
                usage = await sandbox.measure()
            if usage is not None:
                found[sandbox.id] = usage

        with anyio.move_on_after(MEASURE_WAIT_S):
            async with anyio.create_task_group() as tasks:
                for sandbox in sandboxes:
                    tasks.start_soon(one, sandbox)
        return found

    async def shut_down(self) -> None:
        """End every sandbox, then the engines; bounded by `shutdown_s`, after which the engines alone are closed."""
        self._closing = True
        sandboxes = self.registry.all()
        for sandbox in sandboxes:
            sandbox.end(SHUT_DOWN)
        with anyio.move_on_after(self.config.shutdown_s):
            await self._pools.aclose()
            for sandbox in sandboxes:
                await sandbox.gone.wait()
            if self._starting:
                await self._none_starting.wait()
        with anyio.move_on_after(self.config.shutdown_s, shield=True):
            await self._outlets.aclose()
            await self.engines.aclose()
        await self._store.aclose()

    def templates(self) -> list[TemplateInfo]:
        """What sandboxes can start from, the default engine's first."""
        return self.engines.templates()

    # Numbers.

    def capacity(self) -> dict[str, Any]:
        """Body of GET /v1/capacity."""
        return {
            "engine": self.engines.default.name,
            "engines": list(self.engines.names),
            "templates": list(self.engines.default.templates),
            "sandboxes": len(self.registry),
            "max_sandboxes": self.config.max_sandboxes,
            **self._headroom.describe(),
            "pool": self._pools.default.describe(),
            "pools": self._pools.describe(),
        }


def _bytes(mib: int | None) -> int | None:
    return None if mib is None else mib * MIB


def _or(value: int | None, default: int | None) -> int | None:
    return default if value is None else value


def _warnings(request: CreateRequest, warm: Warm) -> tuple[str, ...]:
    """What was asked for in so many words and is not given."""
    found = []
    if request.ram_mib is not None and "memory_limit" not in warm.machine.walls:
        found.append(f"ram_mib={request.ram_mib} is not enforced: this machine has no memory limit (podflare doctor)")
    if request.rootfs_gb is not None and "disk_limit" not in warm.machine.walls:
        found.append(f"rootfs_gb={request.rootfs_gb} is not enforced: this machine has no disk limit (podflare doctor)")
    cpus = warm.machine.spec.limits.cpus
    if cpus is not None and "cpu_limit" not in warm.machine.walls:
        found.append(f"cpus={cpus:g} of the template is not enforced: this machine has no cpu limit (podflare doctor)")
    return tuple(found)


async def _guarded(work: Callable[[], Awaitable[None]]) -> None:
    """Run a background task; what it did not expect is logged and ends only itself."""
    try:
        await work()
    except Exception:  # noqa: BLE001  # the scope of all tasks: one that fails must not end the others
        telemetry.problem("background task failed", exc_info=True)
