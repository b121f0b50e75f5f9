"""Snapshots of sandboxes: who owns them, how many there may be, taking and removing them.  Knows no HTTP.

An engine keeps them under names of its own, made from owner and name: so each owner has all names for itself, and what
is in a path is a digest.  Owner and name are in the note beside the files.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.to_thread

from podflare.engines.base import Engine, Snapshot
from podflare.errors import Conflict, MachineFailed, NotBuilt, PodflareError, QuotaExceeded, SnapshotNotFound
from podflare.host import telemetry
from podflare.host.config import Config
from podflare.host.engines import Engines
from podflare.host.headroom import MIB, Headroom
from podflare.host.lineage import Lineage
from podflare.host.registry import Registry
from podflare.host.sandbox import Sandbox
from podflare.host.turns import exclusive
from podflare.wire.api import SnapshotInfo, SnapshotRequest

LEAST_S = 0.001


class Snapshots:
    """The snapshots that one daemon can reach, of all owners."""

    def __init__(self, engines: Engines, registry: Registry, config: Config, headroom: Headroom) -> None:
        self._engines = engines
        self._registry = registry
        self._config = config
        self._headroom = headroom
        self._taking: Counter[str] = Counter()
        """By owner: those that are being taken."""
        self._restoring: Counter[str] = Counter()
        """By key: sandboxes that are being made of it."""

    # Taking.

    async def take(self, sandbox_id: str, owner: str, request: SnapshotRequest) -> SnapshotInfo:
        """Keep a sandbox as it is between two cells; it goes on.  Waits for the cells before it.

        Raises: SandboxNotFound, also if it ends meanwhile; NotBuilt if its engine cannot; Conflict if the name is
            taken; QuotaExceeded, NoCapacity, DeadlineExceeded; and as Machine.snapshot.  Then nothing is kept.
        If cancelled: it is kept as a whole, or not at all.
        """
        deadline_s = time.monotonic() + request.timeout_seconds
        sandbox = await self._registry.get(sandbox_id, owner)
        engine = await self._engine_of(sandbox)
        key = _key(owner, request.name)
        if key in engine.snapshots:
            raise Conflict(_taken(request.name))
        with self._one_more(owner, await self.owned_by(owner)):
            async with exclusive(sandbox, wait_s=request.timeout_seconds, what="not kept"):
                sandbox.check_alive()
                usage = await sandbox.measure()
                if usage is not None:
                    self._headroom.admit_snapshot(usage.memory_bytes + usage.disk_bytes)
                left_s = max(LEAST_S, deadline_s - time.monotonic())
                start = time.monotonic()
                try:
                    async with sandbox.saved():
                        note = _note(sandbox, owner, request.name)
                        await sandbox.machine.snapshot(key, note=note, timeout_s=left_s)
                except MachineFailed:
                    sandbox.touch()  # if it is ending, that is the cause
                    raise
                except Conflict as exc:
                    raise Conflict(_taken(request.name)) from exc
            found = _info(engine, await anyio.to_thread.run_sync(engine.describe_snapshot, key))
            await self._check_size(engine, key, owner, found)
        telemetry.event(
            "snapshot taken",
            sandbox=sandbox.id,
            snapshot=key,
            bytes=found.size_bytes,
            ms=round((time.monotonic() - start) * 1000, 3),
        )
        return found

    async def _engine_of(self, sandbox: Sandbox) -> Engine:
        engine = await self._engines.get(sandbox.terms.engine)
        if "snapshot" in engine.capabilities:
            return engine
        able = [other.name for other in self._engines.started if "snapshot" in other.capabilities]
        hint = f"; sandboxes with engine={able[0]!r} can" if able else "; those of the engine microvm can"
        raise NotBuilt(f"sandboxes of the engine {engine.name} cannot be kept on disk with what runs in them{hint}")

    @contextmanager
    def _one_more(self, owner: str, owned: list[SnapshotInfo]) -> Iterator[None]:
        """Raises: QuotaExceeded."""
        tier = self._config.tier_of(owner)
        if tier.snapshots is not None and len(owned) + self._taking[owner] >= tier.snapshots:
            raise QuotaExceeded(
                f"this key has {len(owned)} snapshots, its limit: {tier.snapshots} (tier {tier.name}); remove some"
            )
        self._taking[owner] += 1
        try:
            yield
        finally:
            self._taking[owner] -= 1
            if not self._taking[owner]:
                del self._taking[owner]

    async def _check_size(self, engine: Engine, key: str, owner: str, new: SnapshotInfo) -> None:
        """Its size is known when it is there, so one that is too much goes again.  Raises: QuotaExceeded."""
        tier = self._config.tier_of(owner)
        if tier.snapshots_gb is None:
            return
        total = sum(one.size_bytes for one in await self.owned_by(owner))
        if total <= tier.snapshots_gb << 30:
            return
        await anyio.to_thread.run_sync(engine.remove_snapshot, key)
        raise QuotaExceeded(
            f"the snapshot has {new.size_bytes // MIB} MiB and was not kept: all of this key may have "
            f"{tier.snapshots_gb} GiB (tier {tier.name}); remove some"
        )

    # Those that there are.

    async def owned_by(self, owner: str) -> list[SnapshotInfo]:
        """This owner's, by name."""
        pairs = await anyio.to_thread.run_sync(self._read, owner)
        return sorted((_info(engine, kept) for engine, kept in pairs), key=lambda one: (one.name, one.engine))

    def _read(self, owner: str) -> list[tuple[Engine, Snapshot]]:
        found = []
        for engine in self._able():
            for key in engine.snapshots:
                try:
                    kept = engine.describe_snapshot(key)
                except PodflareError as exc:
                    # Removed just now, or damaged: it cannot be told whose it is.
                    telemetry.problem("a snapshot is passed over", snapshot=key, error=exc)
                    continue
                if kept.note.get("owner") == owner:
                    found.append((engine, kept))
        return found

    def _able(self) -> list[Engine]:
        return [engine for engine in self._engines.started if "snapshot" in engine.capabilities]

    async def get(self, name: str, owner: str) -> SnapshotInfo:
        """Raises: SnapshotNotFound; MachineFailed if it is damaged."""
        return _info(*await self._find(name, owner))

    async def _find(self, name: str, owner: str) -> tuple[Engine, Snapshot]:
        key = _key(owner, name)
        for engine in self._able():
            if key in engine.snapshots:
                return engine, await anyio.to_thread.run_sync(engine.describe_snapshot, key)
        raise SnapshotNotFound(f"no snapshot {name!r:.80}")

    async def remove(self, name: str, owner: str) -> None:
        """Sandboxes that were made of it live on.  Raises: SnapshotNotFound; Conflict while one is being made."""
        engine, kept = await self._find(name, owner)
        if self._restoring[kept.name]:
            raise Conflict(f"a sandbox is being made of the snapshot {name!r:.80}; try again")
        await anyio.to_thread.run_sync(engine.remove_snapshot, kept.name)
        telemetry.event("snapshot removed", snapshot=kept.name)

    async def begin(self, name: str, owner: str) -> Origin:
        """What a sandbox is to be made of, within the Origin's block.  Raises: as get."""
        engine, kept = await self._find(name, owner)
        return Origin(engine, kept, self._restoring)


class Origin:
    """A snapshot that a sandbox is being made of; cannot be removed within the block."""

    def __init__(self, engine: Engine, kept: Snapshot, using: Counter[str]) -> None:
        self.engine = engine
        self.kept = kept
        self._using = using

    def __enter__(self) -> Origin:
        self._using[self.kept.name] += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._using[self.kept.name] -= 1
        if not self._using[self.kept.name]:
            del self._using[self.kept.name]

    @property
    def lineage(self) -> Lineage:
        """Of a sandbox that goes on from it."""
        note = self.kept.note
        return Lineage(
            generation=_whole(note.get("generation")), cells=_whole(note.get("cells")), snapshot=str(note.get("name"))
        )


def _key(owner: str, name: str) -> str:
    """The engine's name of an owner's snapshot."""
    return hashlib.sha256(f"{owner}\0{name}".encode("utf-8", "surrogateescape")).hexdigest()[:40]


def _note(sandbox: Sandbox, owner: str, name: str) -> dict[str, Any]:
    heritage = sandbox.heritage()
    return {
        "owner": owner,
        "name": name,
        "sandbox": sandbox.id,
        "cells": heritage.cells,
        "generation": sandbox.lineage.generation,
    }


def _info(engine: Engine, kept: Snapshot) -> SnapshotInfo:
    return SnapshotInfo(
        name=str(kept.note.get("name", "")),
        engine=engine.name,
        template=kept.spec.template,
        ram_mib=kept.spec.limits.memory_bytes >> 20,
        rootfs_gb=kept.spec.limits.disk_bytes >> 30,
        created_at_ms=kept.created_at_ms,
        size_bytes=kept.size_bytes,
        sandbox_id=str(kept.note.get("sandbox", "")),
    )


def _whole(value: object) -> int:
    return value if type(value) is int and value >= 0 else 0


def _taken(name: str) -> str:
    return f"there is a snapshot {name!r} already; remove it, or take another name"
