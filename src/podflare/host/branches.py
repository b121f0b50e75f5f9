"""Fork, merge and diff of live sandboxes: what concerns more than one of them at a time.  Knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import anyio

from podflare.engines.base import Machine
from podflare.errors import BadRequest, Conflict, MachineFailed, PodflareError
from podflare.host import telemetry
from podflare.host.body import Body
from podflare.host.egress import Outlet
from podflare.host.guest_link import GuestLink
from podflare.host.lineage import Lineage, Terms, read_report
from podflare.host.merging import Deadline, merge_changes
from podflare.host.registry import Registry
from podflare.host.sandbox import Sandbox
from podflare.host.turns import exclusive
from podflare.host.verdicts import differences
from podflare.wire.api import Diff, DiffRequest, ForkRequest
from podflare.wire.egress import EgressLog
from podflare.wire.merges import MergeReport, MergeRequest

READY_TIMEOUT_S = 10.0
MERGE_WAIT_S = 20.0
"""For running cells; with the next one below the 30 s after which the original's client gives up on a merge."""
RELEASE_WAIT_S = 8.0
"""A merge answers at the latest so long after it was done; the release of the old state goes on behind it."""
DIFF_TIMEOUT_S = 25.0
LEAST_S = 0.001
LOG_WAIT_S = 2.0


class Branches:
    """The operations of one daemon on its sandboxes' trees."""

    def __init__(
        self,
        registry: Registry,
        *,
        starting: Callable[[str, str, int], AbstractContextManager[None]],
        add: Callable[[str, Terms, Lineage, Body], Sandbox],
    ) -> None:
        """`starting(owner, engine, n)` is room for n new sandboxes within its block; `add` gives a machine an id."""
        self._registry = registry
        self._starting = starting
        self._add = add

    async def fork(self, sandbox_id: str, owner: str, request: ForkRequest) -> list[Sandbox]:
        """New sandboxes that go on from where this one is now.  Waits for the cells before it.

        Raises: SandboxNotFound, also if the sandbox ends meanwhile; NoCapacity, QuotaExceeded; DeadlineExceeded;
            and as Machine.fork.  Then none of them exists.
        If cancelled: none of them exists.
        """
        start = time.monotonic()
        parent = await self._registry.get(sandbox_id, owner)
        with self._starting(owner, parent.terms.engine, request.n):
            async with exclusive(parent, wait_s=request.timeout_seconds, what="not forked"):
                turn = time.monotonic()
                left_s = max(LEAST_S, request.timeout_seconds - (turn - start))
                try:
                    async with parent.saved():
                        machines = await parent.machine.fork(request.n, reseed=request.reseed, timeout_s=left_s)
                except MachineFailed:
                    parent.touch()  # if it is ending, that is the cause
                    raise
                bodies = await _embody(machines, parent.outlet)
                heritage = parent.heritage()
                children = [
                    self._add(
                        owner,
                        parent.terms,
                        replace(heritage, fork_report=read_report(body.machine.fork_report)),
                        body,
                    )
                    for body in bodies
                ]
        telemetry.event(
            "fork complete",
            sandbox=parent.id,
            children=",".join(child.id for child in children),
            waited_ms=_ms(turn - start),
            ms=_ms(time.monotonic() - turn),
        )
        return children

    async def merge(self, sandbox_id: str, winner_id: str, owner: str) -> None:
        """The first becomes what the winner is, and the winner is gone.  Waits for running cells of both.

        Raises: BadRequest if they are one; SandboxNotFound; Conflict if their engines differ; QuotaExceeded;
            DeadlineExceeded if cells run too long.  Then nothing has changed.
        If cancelled: it is done, or nothing has changed.
        """
        parent, winner = await self._mergeable(sandbox_id, winner_id, owner)
        async with exclusive(parent, winner, wait_s=MERGE_WAIT_S, what="not merged"):
            parent.check_alive()
            winner.check_alive()
            seen = await _log_so_far(parent)
            parent.check_alive()
            winner.check_alive()
            self._registry.succeed(winner, parent)
            released = parent.become(winner, seen)
        telemetry.event("merged", sandbox=parent.id, winner=winner.id, machine=parent.machine.id)
        with anyio.move_on_after(RELEASE_WAIT_S):
            await released.wait()

    async def _mergeable(self, sandbox_id: str, other_id: str, owner: str) -> tuple[Sandbox, Sandbox]:
        """Raises: BadRequest if they are one; SandboxNotFound; Conflict if their engines differ."""
        if sandbox_id == other_id:
            raise BadRequest(f"{sandbox_id[:64]} cannot be merged into itself")
        one = await self._registry.get(sandbox_id, owner)
        other = await self._registry.get(other_id, owner)
        _check_engines(one, other)
        return one, other

    async def merge_changes(self, sandbox_id: str, other_id: str, owner: str, request: MergeRequest) -> MergeReport:
        """Bring into the first what the other changed since both were one.  Waits for running cells of both.

        Both live on, and the other is as it was.  With unresolved conflicts nothing changes (`applied`).
        Raises: as _mergeable, exclusive and merging.merge_changes.  Then nothing has changed, or the message says more.
        If cancelled: it is done, or nothing has changed.
        """
        start = time.monotonic()
        deadline = Deadline(request.timeout_seconds)
        ours, theirs = await self._mergeable(sandbox_id, other_id, owner)
        async with exclusive(ours, theirs, wait_s=request.timeout_seconds, what="not merged"):
            ours.check_alive()
            theirs.check_alive()
            turn = time.monotonic()
            report = await merge_changes(ours, theirs, request, deadline)
        telemetry.event(
            "changes merged" if report.applied else "changes in conflict",
            sandbox=ours.id,
            other=theirs.id,
            files=len(report.files),
            variables=len(report.variables),
            conflicts=len(report.conflicts),
            waited_ms=_ms(turn - start),
            ms=_ms(time.monotonic() - turn),
        )
        return report

    async def diff(self, sandbox_id: str, other_id: str, owner: str, request: DiffRequest) -> Diff:
        """Which files the other one has otherwise, now: running cells are not waited for.

        Unless variables are to be compared, too: then both are compared between two cells.
        Raises: SandboxNotFound; Conflict if their engines differ, or if one became another one meanwhile; as
            Machine.diff; with variables as exclusive and verdicts.differences.
        """
        pair = [await self._registry.get(one, owner) for one in (sandbox_id, other_id)]
        _check_engines(*pair)
        if not request.variables:
            return await self._diff_files(pair, request)
        async with exclusive(*dict.fromkeys(pair), wait_s=MERGE_WAIT_S, what="not compared"):
            variables = await differences(pair[0], pair[1], timeout_s=DIFF_TIMEOUT_S)
            return replace(await self._diff_files(pair, request), variables=variables)

    async def _diff_files(self, pair: list[Sandbox], request: DiffRequest) -> Diff:
        for sandbox in pair:
            sandbox.touch()
        first, second = (sandbox.machine for sandbox in pair)
        try:
            found = await first.diff(second, request.paths, detail=request.detail, timeout_s=DIFF_TIMEOUT_S)
        except MachineFailed:
            self._check_same(pair, [first, second])
            raise
        self._check_same(pair, [first, second])
        return found

    @staticmethod
    def _check_same(pair: list[Sandbox], machines: list[Machine]) -> None:
        for sandbox, machine in zip(pair, machines, strict=True):
            sandbox.touch()
            if sandbox.machine is not machine:
                raise Conflict(f"another sandbox was merged into {sandbox.id} while it was compared; ask again")


def _check_engines(one: Sandbox, other: Sandbox) -> None:
    """Raises: Conflict if they have nothing in common that could be compared or merged."""
    if one.terms.engine != other.terms.engine:
        raise Conflict(f"{other.id} runs on the engine {other.terms.engine}, {one.id} on {one.terms.engine}")


async def _embody(machines: tuple[Machine, ...], parent: Outlet | None) -> list[Body]:
    """A link to each machine, and the way out that their parent has.  Failed or cancelled: all of them are closed."""
    bodies: list[Body] = []
    try:
        for machine in machines:
            bodies.append(Body(machine, await GuestLink.open(machine, timeout_s=READY_TIMEOUT_S)))
        if parent is not None:
            for number, body in enumerate(bodies):
                bodies[number] = body._replace(outlet=await parent.branch(body.machine))
    except BaseException:
        with anyio.CancelScope(shield=True):
            for body in bodies:
                await body.aclose()
            for machine in machines:
                await machine.aclose()
        raise
    return bodies


async def _log_so_far(sandbox: Sandbox) -> EgressLog | None:
    """What was tried from its machine, which is about to go; None if nobody can tell in time."""
    try:
        with anyio.move_on_after(LOG_WAIT_S):
            return await sandbox.egress_log()
    except PodflareError as exc:
        telemetry.problem("what was tried to reach is lost", sandbox=sandbox.id, error=exc)
    return None


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
