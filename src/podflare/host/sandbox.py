"""One sandbox: its machine, the queue of its cells, its file transfers, its kept outputs, its lifetimes, its end.

Knows no HTTP, and of other sandboxes only the one that it is to become.  Every way to end says the cause to everybody
concerned.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import anyio

from podflare.engines.base import Machine, Usage
from podflare.errors import CellNotFound, PodflareError, QuotaExceeded, SandboxNotFound
from podflare.host import lifetimes, telemetry, transfers
from podflare.host.body import Body
from podflare.host.cells import STOP_INTERRUPTED, Cell, Ending, check_fits, judge
from podflare.host.config import Config
from podflare.host.egress import Outlet, join_logs
from podflare.host.guest_link import GuestLink
from podflare.host.kept import KeptOutput, Room, SharedRoom
from podflare.host.lifecycle import State, Step, step
from podflare.host.lineage import Lineage, Terms, losses
from podflare.host.output import ReplayBuffer
from podflare.host.pace import Pace
from podflare.host.relinking import across_save
from podflare.host.turns import Turn
from podflare.wire import events
from podflare.wire.api import ExecRequest, LifetimesRequest, SandboxInfo, SandboxUsage, ToolAnswer
from podflare.wire.egress import EgressLog
from podflare.wire.messages import DIED, Exit

QUIET_CELL_S = 0.1
"""Cells shorter than this are not followed by a look at the machine's memory: it would cost more than the cell."""
CAUSE_WAIT_S = 1.0
"""A closed channel is only the symptom: so long the machine may take to say why it died."""
USAGE_TIMEOUT_S = 2.0
TURN_END_TIMEOUT_S = 30.0


class Sandbox:
    """What a user holds.  Owned by the registry; `end` starts its end, `gone` is set when nothing is left."""

    def __init__(
        self,
        sandbox_id: str,
        owner: str,
        terms: Terms,
        lineage: Lineage,
        body: Body,
        *,
        config: Config,
        directory: Path,
        total_room: Room,
        spawn: Callable[[Callable[[], Awaitable[None]]], None],
        ended: Callable[[Sandbox, str], None],
    ) -> None:
        """`spawn` runs a task to its end in the daemon's scope; `ended` is called once, at the start of the end."""
        self.id = sandbox_id
        self.owner = owner
        self.terms = terms
        self.lineage = lineage
        self.config = config
        self.state = step(State.STARTING, Step.STARTED)
        self.replay = ReplayBuffer(config.replay_events, config.replay_bytes)
        self.pace = Pace(config.output_rate_mib << 20)
        self.gone = asyncio.Event()
        self.cause = ""
        self._ending = asyncio.Event()
        self._machine, self._link, self._outlet = body
        self._seen = EgressLog(False, {})  # in machines that are gone
        self._directory = directory
        self._room = SharedRoom(config.keep_sandbox_bytes, total_room, self._drop_oldest_kept)
        self._spawn = spawn
        self._ended = ended
        self._created_at_ms = time.time_ns() // 1_000_000
        self._born_s = self._active_s = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._warning_timer: asyncio.TimerHandle | None = None
        self._ends_soon = False
        self._current: Cell | Turn | None = None
        self._waiting: deque[Cell | Turn] = deque()
        self._kept: deque[Cell] = deque()
        self._cells = self._transfers = self._oom_kills = 0
        self._names = lineage.cells
        """Cells that ran in the machine's memory; no two of them may share a name, by which tracebacks find lines."""
        self._notice = losses(lineage.fork_report)
        self._slowed = self._out_of_memory = False
        body.link.when_down = self._on_link_down
        spawn(self._watch_machine)
        self._arm()
        self._arm_warning()

    # Cells.

    def submit(self, request: ExecRequest) -> Cell:
        """Queue a cell; it runs when all before it are over.  Called right after `settled`.

        Raises: SandboxNotFound if the sandbox is ending; QuotaExceeded if too many wait already; TooLarge if the code
            does not fit into a frame.
        """
        self.touch()
        check_fits(request)
        self._check_queue()
        self._cells += 1
        cell = Cell(self._cells, f"cell_{secrets.token_hex(8)}", request, self, self._directory, self._room)
        self._keep(cell)
        if self._current is None:
            self._run(cell)
        else:
            self._waiting.append(cell)
        return cell

    def _check_queue(self) -> None:
        if len(self._waiting) >= self.config.max_waiting_cells:
            raise QuotaExceeded(f"{len(self._waiting)} cells wait in sandbox {self.id} already; they run one at a time")

    def _run(self, cell: Cell) -> None:
        self._current = cell
        self.state = step(self.state, Step.CELL_STARTED)
        try:
            self._names += 1
            cell.start(self._link, name=f"<cell {self._names}>")
        except BaseException:
            self._cell_ended()
            raise
        notice, self._notice = self._notice, ""
        if notice:
            cell.tell(notice)
        if self._ends_soon:
            self._warn(cell)

    def _cell_ended(self) -> None:
        self._current = None
        self._active_s = time.monotonic()
        if self.state is State.BUSY:
            self.state = step(self.state, Step.CELL_ENDED)

    def _advance(self) -> None:
        # Who waits behind a link that is down is told why when the sandbox ends.
        while self._waiting and self._current is None and not self.cause and not self._link.down:
            first = self._waiting.popleft()
            if isinstance(first, Turn):
                self._current = first
                first.granted.set()
                return
            try:
                self._run(first)
            except PodflareError as exc:
                first.finish(Ending(1, "sandbox_failed", notes=(str(exc),)))

    def cell_said_exit(self, cell: Cell, message: Exit) -> None:
        suspicious = message.reason == DIED or message.code in (events.EXIT_KILLED, -9)
        if suspicious or cell.duration_s > QUIET_CELL_S:
            self._spawn(lambda: self._finish_after_look(cell, message))
        else:
            self._finish(cell, message, "")

    async def _finish_after_look(self, cell: Cell, message: Exit) -> None:
        note = ""
        usage = await self._usage()
        if usage.oom_kills > self._oom_kills:
            self._oom_kills = usage.oom_kills
            note = f"out of memory: this sandbox may use {self.terms.ram_mib} MiB (ram_mib)"
            if message.reason != DIED:
                note += "; a process in it was killed"
        self._finish(cell, message, note)

    def _finish(self, cell: Cell, message: Exit, oom_note: str) -> None:
        if cell is not self._current:
            return
        ending = judge(cell, message, oom_note)
        cell.finish(ending)
        telemetry.event(
            "cell ended", sandbox=self.id, cell=cell.id, ms=round(cell.duration_s * 1000, 3), reason=ending.reason
        )
        self._cell_ended()
        self._advance()

    async def _usage(self) -> Usage:
        with anyio.move_on_after(USAGE_TIMEOUT_S):
            return await self._machine.usage()
        return Usage(oom_kills=self._oom_kills)

    def leave(self, cell: Cell) -> None:
        """The client of `cell` is gone: a running cell is stopped, a waiting one never runs.  Idempotent."""
        if cell in self._waiting:
            self._waiting.remove(cell)
            cell.finish(Ending(events.EXIT_INTERRUPTED, "disconnected"))
        cell.leave()

    def interrupt(self, cell_id: str | None = None) -> str | None:
        """Interrupt the running cell, or the given one; return the id of the cell that was told, None if none runs.

        Raises: CellNotFound if `cell_id` is not a cell of this sandbox that is still remembered.
        """
        self.touch()
        cell = self._current if cell_id is None else self._find(cell_id)
        if not isinstance(cell, Cell) or cell.over:
            return None
        if cell in self._waiting:
            self._waiting.remove(cell)
            cell.finish(Ending(events.EXIT_INTERRUPTED, STOP_INTERRUPTED))
        else:
            cell.stop(STOP_INTERRUPTED)
        return cell.id

    def answer(self, cell_id: str, answer: ToolAnswer) -> None:
        """Answer a tool call of a cell.  Raises: CellNotFound, CallNotFound; Conflict if it waits no longer."""
        self.touch()
        self._find(cell_id).answer(answer)

    def slow_down(self, cost: int) -> None:
        """Output came.  What is above the sandbox's pace is not read before its time: its writers wait."""
        owed_s = self.pace.spend(cost, time.monotonic())
        if owed_s and not self._slowed:
            self._slowed = True
            self._link.hold()
            asyncio.get_running_loop().call_later(owed_s, self._go_on, self._link)

    def _go_on(self, link: GuestLink) -> None:
        owed_s = self.pace.owed_s(time.monotonic())
        if owed_s and not link.down:
            asyncio.get_running_loop().call_later(owed_s, self._go_on, link)
        else:
            self._slowed = False
            link.unhold()

    def give_up(self, cause: str) -> None:
        self.end(f"machine closed: {cause}")

    # Turns of other operations.

    @contextmanager
    def queue_up(self) -> Iterator[Turn]:
        """See turns.Queue."""
        self.touch()
        turn = Turn()
        if self._current is None and not self._link.down:
            self._current = turn
            turn.granted.set()
        else:
            self._check_queue()
            self._waiting.append(turn)
        try:
            yield turn
        finally:
            turn.over.set()
            if turn is self._current:
                self._current = None
                self._active_s = time.monotonic()
                self._advance()
            elif turn in self._waiting:
                self._waiting.remove(turn)

    @property
    def machine(self) -> Machine:
        return self._machine

    @property
    def link(self) -> GuestLink:
        """The conversation with the guest of now; `become` replaces it."""
        return self._link

    def saved(self) -> AbstractAsyncContextManager[None]:
        """Around a fork or a snapshot of its machine; a turn is held."""
        return across_save(self._machine, self._link, self._take_link, self._on_link_down)

    def _take_link(self, link: GuestLink) -> None:
        self._link = link
        link.when_down = self._on_link_down

    def heritage(self) -> Lineage:
        """What a fork made now has of this sandbox."""
        return Lineage(self.id, self.lineage.generation + 1, self._names)

    def check_alive(self) -> None:
        """Raises: SandboxNotFound if it is ending, also if only its machine's link is down so far."""
        self.touch()
        if self._link.down:
            raise SandboxNotFound(f"sandbox not found: {self.id} is about to be gone: {self._link.down}")

    @property
    def outlet(self) -> Outlet | None:
        """Its machine's way out; `become` replaces it, too."""
        return self._outlet

    async def egress_log(self) -> EgressLog:
        """What was tried to reach from it.  Raises: MachineFailed, DeadlineExceeded if the gate cannot tell."""
        seen = self._seen
        return seen if self._outlet is None else join_logs(seen, await self._outlet.log())

    def become(self, winner: Sandbox, seen: EgressLog | None = None) -> asyncio.Event:
        """Take over the machine of `winner`, which is gone then; own machine and state are given up.

        Own id, clocks, labels, replay and kept outputs stay.  Without any await, so nobody sees a half of it.
        Precondition: a turn is held in both, and both are alive.
        Args: seen: the own log, to go on with.
        Returns: set when nothing is left of the own former machine.
        """
        former, released = self._body, asyncio.Event()
        self._machine, self._link, self._outlet = winner._surrender(f"merged into {self.id}")
        self._seen = join_logs(self._seen if seen is None else seen, winner._seen)
        self._take_link(self._link)
        self.terms = replace(
            winner.terms,
            timeout_seconds=self.terms.timeout_seconds,
            idle_timeout_seconds=self.terms.idle_timeout_seconds,
            metadata=self.terms.metadata,
        )
        self.lineage = replace(winner.lineage, parent_id=self.lineage.parent_id)
        self._names, self._notice, self._oom_kills = winner._names, winner._notice, winner._oom_kills
        former.link.close(f"{winner.id} was merged into this sandbox")

        async def release() -> None:
            try:
                await former.aclose()
            finally:
                released.set()

        self._spawn(release)
        self._spawn(self._watch_machine)
        return released

    @property
    def _body(self) -> Body:
        return Body(self._machine, self._link, self._outlet)

    def _surrender(self, cause: str) -> Body:
        self._stop(cause)
        self._forget()
        return self._body

    # Kept output.

    def _keep(self, cell: Cell) -> None:
        self._kept.append(cell)
        finished = [old for old in self._kept if old.over]
        for old in finished[: max(0, len(self._kept) - self.config.keep_cells)]:
            self._kept.remove(old)
            old.forget()

    def _drop_oldest_kept(self) -> bool:
        for old in self._kept:
            if old.over:
                self._kept.remove(old)
                old.forget()
                return True
        return False

    def _find(self, cell_id: str) -> Cell:
        for cell in self._kept:
            if cell.id == cell_id:
                return cell
        raise CellNotFound(
            f"no output is kept for cell {cell_id[:64]!r} in sandbox {self.id}: "
            f"only the latest {self.config.keep_cells} cells are"
        )

    def output(self, cell_id: str, stream: str) -> KeptOutput:
        """The kept output of a cell.  Raises: CellNotFound."""
        self.touch()
        return self._find(cell_id).kept(stream)

    # Files.

    async def upload(self, path: str, chunks: AsyncIterator[bytes], size: int | None) -> int:
        """Write a file from `chunks`; return its size.  Outside the queue of cells.  Raises: as transfers.upload."""
        limit = self.terms.rootfs_gb << 30
        await self.settled()
        with self._transferring():
            return await transfers.upload(
                self._link, path, chunks, size=size, limit=limit, stall_s=self.config.transfer_stall_s
            )

    async def download(self, path: str) -> transfers.Download:
        """Open a file for reading; the caller closes it.  Raises: as transfers.Download.open."""
        await self.settled()
        slot = ExitStack()
        slot.enter_context(self._transferring())
        try:
            return await transfers.Download.open(
                self._link, path, stall_s=self.config.transfer_stall_s, closed=slot.close
            )
        except BaseException:
            slot.close()
            raise

    @contextmanager
    def _transferring(self) -> Iterator[None]:
        self.touch()
        if self._transfers >= self.config.max_transfers:
            raise QuotaExceeded(f"{self._transfers} file transfers run in sandbox {self.id} already")
        self._transfers += 1
        try:
            yield
        finally:
            self._transfers -= 1
            self._active_s = time.monotonic()

    # Lifetimes.

    def touch(self) -> None:
        """Somebody used the sandbox.  Raises: SandboxNotFound if it is ending."""
        if self.cause:
            raise SandboxNotFound(f"sandbox not found: {self.id} is gone: {self.cause}")
        self._active_s = time.monotonic()

    async def settled(self) -> None:
        """Return when it can be used, or its end has begun: a link that is down waits for the machine to say why."""
        # While a turn is held the link may be down and come again (`saved`).
        if self._link.down and not isinstance(self._current, Turn):
            with anyio.move_on_after(2 * CAUSE_WAIT_S):
                await self._ending.wait()

    def set_lifetimes(self, request: LifetimesRequest) -> None:
        """Replace the lifetimes that the request names.  Raises: SandboxNotFound if the sandbox is ending."""
        self.touch()
        tier = self.config.tier_of(self.owner)
        self.terms = lifetimes.changed(self.terms, request, tier, age_s=time.monotonic() - self._born_s)
        self._cancel_timers()
        self._arm()
        self._arm_warning()

    def _left(self) -> lifetimes.Left:
        now = time.monotonic()
        used = self._current is not None or bool(self._transfers)
        return lifetimes.left(self.terms, age_s=now - self._born_s, idle_s=0.0 if used else now - self._active_s)

    def _arm(self) -> None:
        due = self._left().due(self.terms)
        if due is None or self.cause:
            return
        if due[0] <= 0:
            self.end(due[1])
        else:
            # The idle time only moves the end away, so a timer that fires early just looks again.
            self._timer = asyncio.get_running_loop().call_later(due[0] + 0.001, self._arm)

    def _arm_warning(self) -> None:
        """Tell the running cell, and each that starts from then on, some time before the lifetime is over."""
        life_s = self._left().life_s
        if life_s is None or self.terms.timeout_seconds is None or self.cause:
            return
        early_s = life_s - lifetimes.lead_s(self.terms.timeout_seconds)
        self._ends_soon = early_s <= 0
        if not self._ends_soon:
            self._warning_timer = asyncio.get_running_loop().call_later(early_s + 0.001, self._arm_warning)
            return
        telemetry.event("sandbox ends soon", sandbox=self.id, seconds_left=round(life_s, 3))
        if isinstance(self._current, Cell):
            self._warn(self._current)

    def _warn(self, cell: Cell) -> None:
        life_s = self._left().life_s or 0.0
        message = (
            f"this sandbox ends in {life_s:.3g} s, when its lifetime of {self.terms.timeout_seconds} s is over "
            "(timeout_seconds); fetch what shall stay, or extend its life"
        )
        ends_at_ms = time.time_ns() // 1_000_000 + round(life_s * 1000)
        cell.warn(
            {
                "kind": "ending",
                "message": message,
                "seconds_left": round(life_s, 3),
                "ends_at_ms": ends_at_ms,
            }
        )

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._warning_timer):
            if timer is not None:
                timer.cancel()

    # The end.

    def end(self, cause: str) -> None:
        """Begin the end: cells and transfers end with `cause`, the machine is released behind it.  Idempotent."""
        if self.cause:
            return
        turn = self._stop(cause)
        if turn is not None:
            turn.scope.cancel()
        self._link.close(f"the sandbox is gone: {cause}")
        self._spawn(lambda: self._release(turn))

    def _stop(self, cause: str) -> Turn | None:
        """From now on nobody can use it.  Returns the turn that is held."""
        self.cause = cause
        self._ending.set()
        self.state = step(self.state, Step.END)
        self._cancel_timers()
        self._ended(self, cause)
        reason = "out_of_memory" if self._out_of_memory else "sandbox_failed"
        held, self._current = self._current, None
        waiting, self._waiting = list(self._waiting), deque()
        for one in ([held] if isinstance(held, Cell) else []) + waiting:
            if isinstance(one, Cell):
                one.finish(Ending(events.EXIT_KILLED, reason, notes=(f"the sandbox is gone: {cause}",)))
            else:
                one.scope.cancel()
        return held if isinstance(held, Turn) else None

    async def _release(self, turn: Turn | None) -> None:
        try:
            if turn is not None:
                # What a cancelled fork has made so far lies in the machine and must be gone before it.
                with anyio.move_on_after(TURN_END_TIMEOUT_S):
                    await turn.over.wait()
            await self._body.aclose()
        finally:
            self._forget()

    def _forget(self) -> None:
        for cell in self._kept:
            cell.forget()
        self.state = step(self.state, Step.RELEASED)
        self.gone.set()

    async def _watch_machine(self) -> None:
        machine = self._machine
        death = await machine.wait_dead()
        if self.cause or machine is not self._machine:
            return
        self._out_of_memory = death.out_of_memory
        self.end(f"its machine died: {death.reason}")

    def _on_link_down(self, cause: str, violation: bool) -> None:
        if violation:
            self.end(f"machine closed: {cause}")
        else:
            link = self._link
            self._spawn(lambda: self._end_after_cause(link, cause))

    async def _end_after_cause(self, link: GuestLink, cause: str) -> None:
        # _watch_machine ends the sandbox with the real cause if the machine knows one in time.
        with anyio.move_on_after(CAUSE_WAIT_S):
            await self._ending.wait()
        if link is self._link:
            self.end(f"machine closed: {cause}")

    async def measure(self) -> SandboxUsage | None:
        """What it uses now; None if that could not be measured in time."""
        with anyio.move_on_after(USAGE_TIMEOUT_S):
            found = await self._machine.usage(detail=True)
            return SandboxUsage(
                memory_bytes=found.memory_bytes,
                private_memory_bytes=found.private_memory_bytes,
                processes=found.processes,
                changed_files=found.changed_files,
                disk_bytes=found.disk_bytes,
            )
        return None

    def info(self, children: tuple[str, ...] = (), usage: SandboxUsage | None = None) -> SandboxInfo:
        """What is told about it.  `ready` also while a cell runs: it accepts work."""
        left = self._left()
        return SandboxInfo(
            id=self.id,
            state="ready" if self.state is State.BUSY else self.state.value,
            template=self.terms.template,
            engine=self.terms.engine,
            isolation=tuple(self._machine.walls),
            egress=False if self._outlet is None else self._outlet.grant.reach,
            ram_mib=self.terms.ram_mib,
            rootfs_gb=self.terms.rootfs_gb,
            timeout_seconds=self.terms.timeout_seconds,
            idle_timeout_seconds=self.terms.idle_timeout_seconds,
            persistent=False,
            created_at_ms=self._created_at_ms,
            metadata=self.terms.metadata,
            warnings=self.terms.warnings,
            parent_id=self.lineage.parent_id,
            generation=self.lineage.generation,
            children=children,
            fork_report=self.lineage.fork_report,
            snapshot=self.lineage.snapshot,
            secrets={} if self._outlet is None else self._outlet.grant.hosts,
            usage=usage,
            expires_at_ms=None if left.life_s is None else time.time_ns() // 1_000_000 + round(left.life_s * 1000),
            seconds_left=None if left.life_s is None else round(left.life_s, 3),
            idle_seconds_left=None if left.idle_s is None else round(left.idle_s, 3),
        )
