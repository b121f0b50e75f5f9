"""Three-way merge of files into a living virtual machine: see engines.base.FileMerge for the contract.

What both machines were is read from the saved VM of that moment (a fork's, a snapshot's, the template's), restored for
a moment in which nothing of its sandbox runs.  Planned, done and undone is it inside the receiving machine, by code
that the process engine has, too (guest/vm/merging.py), over the lists and contents that are brought there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace

import anyio

from podflare.engines.base import FilesPlan
from podflare.engines.linux.waiting import to_the_end
from podflare.engines.microvm.birth import Nursery, bear
from podflare.engines.microvm.bygone import Bygone
from podflare.engines.microvm.came import Came, Coming, Piece
from podflare.engines.microvm.diff import MAX_ORDER_BYTES, list_files, same_content, unsure
from podflare.engines.microvm.machine import MicrovmMachine
from podflare.engines.microvm.origins import Origin
from podflare.engines.microvm.past import Past
from podflare.engines.microvm.planned import read_plan
from podflare.engines.microvm.shipping import Merger, Sized, ahead, pieces_kept, pieces_of
from podflare.engines.microvm.trio import LayerRows, Trio, changed, overlaid, trio
from podflare.errors import DeadlineExceeded, MachineFailed, PodflareError, TooLarge
from podflare.wire.paths import outermost

END_TIMEOUT_S = 60.0
"""For a merge that is given up, to undo what it did."""
STEP_TIMEOUT_S = 120.0
"""For one order, of those whose whole has a limit of its own."""
MAX_TOUCHED = 50_000
"""Paths that one merge may be about: they are looked at in the machine's own memory."""
LEAST_S = 0.05
BASE, THEIRS = "base", "theirs"


TemplateOrigin = Callable[[], Awaitable[Origin]]


class MicrovmFileMerge:
    """Made by `begin`."""

    def __init__(
        self, nursery: Nursery, past: Past, template: TemplateOrigin, ours: MicrovmMachine, theirs: MicrovmMachine
    ) -> None:
        self.plan = FilesPlan((), (), ())
        self._nursery = nursery
        self._past = past
        self._template = template
        self._ours, self._theirs = ours, theirs
        self._merger = Merger(ours.control)
        self._used: tuple[str, ...] = ()
        self._layer = ""
        self._touched = 0

    @classmethod
    async def begin(
        cls,
        nursery: Nursery,
        past: Past,
        template: TemplateOrigin,
        ours: MicrovmMachine,
        theirs: MicrovmMachine,
        paths: tuple[str, ...],
        timeout_s: float,
    ) -> MicrovmFileMerge:
        """A merge that is planned.

        Args: template: gives what machines are that nothing has happened to.
        Raises: as engines.base.Machine.merge_files.
        """
        made = cls(nursery, past, template, ours, theirs)
        try:
            try:
                with anyio.fail_after(timeout_s):
                    await made._plan(paths, time.monotonic() + timeout_s)
            except TimeoutError:
                raise DeadlineExceeded(f"a merge of files was not planned within {timeout_s:g} s") from None
            except OSError as exc:
                raise MachineFailed(f"the sandboxes' files could not be merged: {exc}") from exc
        except BaseException:
            await made.aclose()
            raise
        return made

    async def _plan(self, paths: tuple[str, ...], ends_s: float) -> None:
        wanted = outermost(paths)
        if len(json.dumps(wanted)) > MAX_ORDER_BYTES:
            raise TooLarge(f"the paths to merge are too long: more than {MAX_ORDER_BYTES >> 10} KiB together")
        moments, former = self._past.kin.base_of(self._ours, self._theirs)
        self._used = tuple(name for name in (former, *moments) if name)
        self._layer = self._past.folders.new()
        self._past.folders.retain((self._layer,))
        loop = asyncio.get_running_loop()
        folder = self._past.folders.path(self._layer)
        await loop.run_in_executor(None, lambda: folder.mkdir(mode=0o700))
        with contextlib.ExitStack() as stack:
            came = await loop.run_in_executor(None, Came, self._past.folders.path(former)) if former else None
            if came is not None:
                stack.callback(came.close)
            coming = Coming(folder)
            stack.callback(coming.close)
            async with aclosing(self._base(moments)) as base:
                made = await self._ship(base, came, coming, wanted)
            if made is not None:
                await self._check_and_plan(made, wanted, ends_s)
                await to_the_end(_in_thread(coming.finish, made.theirs, came))

    def _base(self, moments: tuple[str, ...]) -> Bygone:
        """What both were.  Args: moments: the name of what is kept of it; () for the template."""
        spec = replace(self._theirs.spec, uplink=None)

        async def wake() -> MicrovmMachine:
            if moments:
                origin = Origin.within(self._past.folders.path(moments[0]), self._ours.root, self._ours.shape)
            else:
                origin = await self._template()
            return await bear(self._nursery, spec, origin, reseed=False, timeout_s=STEP_TIMEOUT_S, still=True)

        return Bygone("".join(moments) or str(self._ours.root), self._past.lists, wake)

    async def _ship(self, base: Bygone, came: Came | None, coming: Coming, paths: list[str]) -> Trio | None:
        """Bring into ours what it takes to plan there; None if theirs has changed nothing."""
        old, mine, others = await asyncio.gather(
            base.rows(paths, timeout_s=STEP_TIMEOUT_S),
            *(list_files(one.control, paths, STEP_TIMEOUT_S) for one in (self._ours, self._theirs)),
        )
        was = old if came is None else overlaid(old, came.rows, came.hides)
        found = await asyncio.get_running_loop().run_in_executor(None, changed, was, others)
        kept = frozenset(came.contents) if came is not None else frozenset()
        doubtful = [path for path in found[0] if path not in kept and path in was and unsure(was[path], others[path])]
        same: frozenset[str] = frozenset()
        if doubtful:
            same = await same_content(await base.control(), self._theirs.control, doubtful, STEP_TIMEOUT_S)
        touched = ([path for path in found[0] if path not in same], found[1])
        if not any(touched):
            return None
        if len(touched[0]) + len(touched[1]) > MAX_TOUCHED:
            raise TooLarge(f"more than {MAX_TOUCHED} paths to merge; merge fewer directories (files)")
        made = await asyncio.get_running_loop().run_in_executor(None, trio, was, mine, others, touched)
        size = Sized(self._ours.spec.limits.disk_bytes)
        from_came = [path for path in _files(made.base) if path in kept]
        from_base = [path for path in _files(made.base) if path not in kept]
        await self._merger.put(BASE, made.base, timeout_s=STEP_TIMEOUT_S)
        await self._merger.put(THEIRS, made.theirs, timeout_s=STEP_TIMEOUT_S)
        if came is not None:
            await self._pass_on(BASE, pieces_kept(came, from_came), size)
        if from_base:
            await self._pass_on(BASE, pieces_of(await base.control(), from_base, timeout_s=STEP_TIMEOUT_S), size)
        from_theirs = pieces_of(self._theirs.control, _files(made.theirs), timeout_s=STEP_TIMEOUT_S)
        await self._pass_on(THEIRS, from_theirs, size, coming)
        return made

    async def _pass_on(
        self, layer: str, coming: AsyncIterator[list[Piece]], size: Sized, also_to: Coming | None = None
    ) -> None:
        async with aclosing(ahead(coming)) as found:
            async for pieces in found:
                for piece in pieces:
                    size.take(piece)
                    if also_to is not None:
                        await to_the_end(_in_thread(also_to.add, piece))
                await self._merger.write(layer, pieces, timeout_s=STEP_TIMEOUT_S)

    async def _check_and_plan(self, made: Trio, paths: list[str], ends_s: float) -> None:
        left_s = max(LEAST_S, ends_s - time.monotonic())
        order = {"plan": {"paths": paths, "timeout_s": left_s}}
        answer = await self._merger.ask(order, timeout_s=left_s)
        self.plan, self._touched = await asyncio.get_running_loop().run_in_executor(None, read_plan, answer.get("plan"))
        # Last: from here on it is the plan's own marks that changes of ours would show at.
        await self._merger.check(made.unchanged, timeout_s=STEP_TIMEOUT_S)

    async def apply(self, decisions: Mapping[str, str], *, timeout_s: float) -> None:
        self._check_alive()
        if not self._merger.begun:
            return
        known = {one.path: decisions[one.path] for one in self.plan.conflicts}
        await self._merger.decide(known, timeout_s=timeout_s)
        await self._merger.ask({"apply": {"timeout_s": timeout_s}}, timeout_s=timeout_s + END_TIMEOUT_S)
        self._check_alive()

    def _check_alive(self) -> None:
        for machine in (self._ours, self._theirs):
            machine.check_alive()

    async def keep(self) -> None:
        if not self._touched:
            return
        layer, self._layer = self._layer, ""
        try:
            await self._merger.ask({"keep": True}, timeout_s=END_TIMEOUT_S)
        except PodflareError:
            pass  # the machine died
        finally:
            with anyio.CancelScope(shield=True):
                await self._past.kin.merged(self._ours, self._theirs, layer)

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            if not self._ours.is_closed:
                with contextlib.suppress(PodflareError):
                    await self._merger.end(timeout_s=END_TIMEOUT_S)
            layer, self._layer = self._layer, ""
            used, self._used = self._used, ()
            await self._past.folders.release((layer, *used) if layer else used)


async def _in_thread(work: Callable[..., None], *args: object) -> None:
    await asyncio.get_running_loop().run_in_executor(None, work, *args)


def _files(rows: LayerRows) -> list[str]:
    return [path for path, row in rows.items() if row is not None and row.kind == "file"]
