"""A running machine saved, and others that go on from there: its forks, or itself at another time.

The machine stands still while its device state, the memory that it changed and its disk are written, and goes on then;
nothing else of what follows holds it up.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anyio

from podflare.engines.linux.waiting import to_the_end
from podflare.engines.microvm.birth import Nursery, bear
from podflare.engines.microvm.clocks import tell_time
from podflare.engines.microvm.control import rejoin
from podflare.engines.microvm.disks import copy_disk
from podflare.engines.microvm.machine import MicrovmMachine
from podflare.engines.microvm.origins import Origin
from podflare.errors import PodflareError

MARK_TIMEOUT_S = 20.0
REJOIN_TIMEOUT_S = 20.0
AT_A_TIME = 4
"""Children that are restored at the same time."""


async def fork_machine(
    nursery: Nursery, parent: MicrovmMachine, folder: Path, count: int, *, reseed: bool, timeout_s: float
) -> tuple[MicrovmMachine, ...]:
    """All or none.  Precondition: no cell runs in the parent.

    Args: folder: exists, empty, for what the parent is now; the caller's to remove: children hold what they need of it.
    Raises: as `save` and `bear`.  If cancelled: no child exists.
    """
    await mark(parent, timeout_s=timeout_s)
    origin = Origin.within(folder, parent.root, parent.shape)
    children: list[MicrovmMachine] = []
    room = anyio.Semaphore(AT_A_TIME)
    failures: list[Exception] = []

    async def bear_one(scope: anyio.CancelScope) -> None:
        spec = replace(parent.spec, hostname=f"fork-{secrets.token_hex(4)}")
        try:
            async with room:
                child = await bear(nursery, spec, origin, reseed=reseed, timeout_s=timeout_s, forked=True)
                children.append(child)
        except Exception as exc:  # noqa: BLE001  # told as it is, not as a group
            failures.append(exc)
            scope.cancel()

    try:
        await save(parent, origin)
        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(bear_one, tasks.cancel_scope)
        if failures:
            raise failures[0]
    except BaseException:
        await to_the_end(_close(children))
        raise
    return tuple(children)


async def mark(machine: MicrovmMachine, *, timeout_s: float) -> None:
    """The variables of now are what the machine and its copies have in common (guest/variables/bases.py).

    Raises: MachineFailed if a cell runs: no copy could go on from the middle of it; DeadlineExceeded.
    If cancelled: once it is done; a cell that comes meanwhile would be one too many for the guest.
    """
    await to_the_end(machine.control.ask({"mark": True}, timeout_s=min(timeout_s, MARK_TIMEOUT_S)))


async def _close(machines: Sequence[MicrovmMachine]) -> None:
    for machine in machines:
        await machine.aclose()


async def save(machine: MicrovmMachine, origin: Origin) -> None:
    """Write the machine as it is now to the files of `origin`, whose folder exists.

    Precondition: no cell runs.  Where its channels do not survive that, `machine.channel` is another one afterwards,
    with Ready unread, also if saving failed.
    Raises: MachineFailed, OSError; the files are then the caller's to remove.
    If cancelled: once the machine goes on.
    """
    if machine.vm.channels_survive:
        await _capture(machine, origin)
    else:
        await to_the_end(_capture_and_rejoin(machine, origin))
    await tell_time(machine.control)  # its clock stood still, too


async def _capture_and_rejoin(machine: MicrovmMachine, origin: Origin) -> None:
    async with machine.control.quiet():
        try:
            await _capture(machine, origin)
        finally:
            try:
                await rejoin(machine.vm, machine.control, timeout_s=REJOIN_TIMEOUT_S)
                machine.channel = machine.vm.channel
            except PodflareError as exc:
                await machine.lose(f"it was saved and cannot be reached any more: {exc}")
                raise


async def _capture(machine: MicrovmMachine, origin: Origin) -> None:
    loop = asyncio.get_running_loop()

    async def copy() -> None:
        await loop.run_in_executor(None, copy_disk, machine.disk, origin.disk)

    machine.pause_s = await machine.vm.capture(origin.saved, while_paused=copy)
