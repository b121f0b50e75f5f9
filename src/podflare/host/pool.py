"""Warm machines: made ahead in the background, handed out only while they live.  Knows no owners and no ids."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import anyio

from podflare.engines.base import Engine, Limits, Machine, MachineSpec
from podflare.errors import MachineFailed, PodflareError
from podflare.host import telemetry
from podflare.host.guest_link import GuestLink
from podflare.host.rehearsal import rehearse

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
"""After a failed refill the pool waits, twice as long each time, so that a broken host is not kept busy by it."""
QUIET_S = 0.02
"""A refill starts so long after a machine was handed out: its user's first cell should not share the CPU with it."""
READY_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Warm:
    """A machine whose guest has said Ready, and the host's link to it."""

    machine: Machine
    link: GuestLink
    pooled: bool
    version: str = ""
    """Of its template, when it was made."""


async def make(engine: Engine, spec: MachineSpec, *, timeout_s: float, pooled: bool) -> Warm:
    """A new machine, ready.  Raises: as Engine.describe and Engine.create.  On any of them, and if cancelled: none."""
    start = time.monotonic()
    version = engine.describe(spec.template).version
    machine = await engine.create(spec, timeout_s=timeout_s)
    warm = await greet(machine, pooled=pooled, version=version)
    if pooled and engine.rehearsal:
        try:
            await rehearse(warm.link, engine.rehearsal, timeout_s=timeout_s)
        except BaseException:
            warm.link.close()
            with anyio.CancelScope(shield=True):
                await machine.aclose()
            raise
    telemetry.event("machine started", machine=machine.id, pooled=pooled, ms=_ms_since(start))
    return warm


async def greet(machine: Machine, *, pooled: bool, version: str = "") -> Warm:
    """Begin the conversation with a machine's guest.  Raises: as GuestLink.open.  Then, and if cancelled: closed."""
    try:
        return Warm(machine, await GuestLink.open(machine, timeout_s=READY_TIMEOUT_S), pooled, version)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await machine.aclose()
        raise


class _Claim:
    """A create that waits for the machine which the refill is making."""

    def __init__(self) -> None:
        self.answered = anyio.Event()
        self.warm: Warm | None = None

    def answer(self, warm: Warm | None) -> None:
        self.warm = warm
        self.answered.set()


class Pool:
    """Keeps `size` machines of one template ready.  `run` is its task; `aclose` closes what is left."""

    def __init__(self, engine: Engine, spec: MachineSpec, size: int, *, create_timeout_s: float) -> None:
        self.spec = spec
        self.size = size
        self.hits = 0
        self.misses = 0
        self.problem = ""
        """Why the latest refill failed; empty if it did not."""
        self._engine = engine
        self._create_timeout_s = create_timeout_s
        self._ready: deque[Warm] = deque()
        self._wanted = anyio.Event()
        self._making = False
        self._claim: _Claim | None = None
        self._closed = False
        self._refilling = anyio.CancelScope()
        self._stopped = anyio.Event()
        self._last_taken_s = 0.0

    @property
    def ready(self) -> int:
        return len(self._ready)

    def describe(self) -> dict[str, Any]:
        """Its part of GET /v1/capacity."""
        taken = self.hits + self.misses
        return {
            "template": self.spec.template,
            "size": self.size,
            "ready": self.ready,
            "hits": self.hits,
            "misses": self.misses,
            "pool_hit_rate_bp": 10_000 * self.hits // taken if taken else 0,
            "problem": self.problem,
        }

    async def take(self, spec: MachineSpec) -> Warm:
        """A warm machine if one fits and lives, else a new one.  `spec` names this pool's template.

        Raises: as Engine.describe and Engine.create.  On any of them no machine is left over.
        If cancelled: no machine is left over.
        """
        # One with a way out is born with it.
        fits = spec.uplink is None and self._engine.can_change(self.spec.limits, spec.limits)
        while fits and not self._closed:
            warm = await self._next()
            if warm is None:
                break
            self._last_taken_s = time.monotonic()
            self._wanted.set()
            if warm.version != self._engine.describe(spec.template).version:
                await self._discard(warm)  # the template was built anew meanwhile
                continue
            if await self._fit(warm, spec.limits):
                self.hits += 1
                return warm
        self.misses += 1
        return await self._make(spec, pooled=False)

    async def _next(self) -> Warm | None:
        """A ready machine, or the one that is being made and nobody waits for: sooner there than another one."""
        if self._ready:
            return self._ready.popleft()
        if not self._making or self._claim is not None:
            return None
        claim = self._claim = _Claim()
        try:
            await claim.answered.wait()
        except BaseException:
            if claim.warm is not None:
                self._ready.append(claim.warm)
            elif self._claim is claim:
                self._claim = None
            raise
        return claim.warm

    def _made(self, warm: Warm | None) -> None:
        """The refill has a machine, or failed to make one."""
        self._making = False
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.answer(warm)
        elif warm is not None:
            self._ready.append(warm)

    async def _fit(self, warm: Warm, limits: Limits) -> bool:
        try:
            if limits != self.spec.limits and not warm.link.down:
                await warm.machine.set_limits(limits)
            if warm.link.down:
                raise MachineFailed(warm.link.down)
        except PodflareError as exc:
            telemetry.problem("pooled machine was not usable", machine=warm.machine.id, error=exc)
            await self._discard(warm)
            return False
        except BaseException:
            await self._discard(warm)
            raise
        return True

    async def _make(self, spec: MachineSpec, *, pooled: bool) -> Warm:
        return await make(self._engine, spec, timeout_s=self._create_timeout_s, pooled=pooled)

    async def run(self) -> None:
        """Refill until `aclose`."""
        try:
            with self._refilling:
                await self._refill()
        finally:
            self._stopped.set()

    async def _refill(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            self._wanted = anyio.Event()
            while len(self._ready) < self.size:
                quiet = QUIET_S - (time.monotonic() - self._last_taken_s)
                if quiet > 0:
                    await anyio.sleep(quiet)
                self._making = True
                try:
                    warm = await self._make(self.spec, pooled=True)
                except Exception as exc:  # noqa: BLE001  # whatever the engine's trouble is, the pool tries again
                    self._made(None)
                    self.problem = str(exc)
                    telemetry.problem("pool refill failed", error=exc, next_try_s=pause)
                    await anyio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                    continue
                except BaseException:
                    self._made(None)
                    raise
                self.problem = ""
                pause = FIRST_PAUSE_S
                warm.link.when_down = lambda cause, violation: self._wanted.set()
                self._made(warm)
            await self._wanted.wait()
            for dead in [warm for warm in self._ready if warm.link.down]:
                self._ready.remove(dead)
                telemetry.problem("pooled machine died", machine=dead.machine.id, cause=dead.link.down)
                await self._discard(dead)

    async def _discard(self, warm: Warm) -> None:
        with anyio.CancelScope(shield=True):
            warm.link.close()
            await warm.machine.aclose()

    async def aclose(self) -> None:
        """Stop refilling and close the machines that nobody took.  `run` has been called.  Idempotent."""
        self._closed = True
        self._refilling.cancel()
        await self._stopped.wait()
        while self._ready:
            await self._discard(self._ready.popleft())


def _ms_since(start_s: float) -> float:
    return round((time.monotonic() - start_s) * 1000, 3)
