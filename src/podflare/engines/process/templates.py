"""The zygotes of one daemon: one for each template in use, started at first use, kept, replaced when dead or outdated.

Zygotes come and go without their families: a machine never notices.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from podflare.engines.process.facts import HostFacts, read_facts
from podflare.engines.process.plan import plan_stage
from podflare.engines.process.template_plan import plan_template
from podflare.engines.process.zygote import Zygote
from podflare.engines.templates.store import Manifest, TemplateStore
from podflare.errors import DeadlineExceeded, IsolationIncomplete, MachineFailed, TemplateFailed, UnknownTemplate
from podflare.wire.api import DEFAULT_TEMPLATE, TemplateInfo
from podflare.wire.plan import StagePlan


@dataclass(frozen=True)
class _Warm:
    """A zygote and what it was started from."""

    zygote: Zygote
    key: str


class Zygotes:
    """All zygotes of one engine.  `aclose` ends them."""

    def __init__(self, facts: HostFacts, data: Path, machines_dir: Path, store: str) -> None:
        """Args: store: directory of built templates, or empty."""
        self._facts = facts
        self._data = data
        self._machines_dir = machines_dir
        self._filters: tuple[bytes, ...] = ()
        self._store = TemplateStore(Path(store)) if store else None
        self._warm: dict[str, _Warm] = {}
        self._starting: dict[str, asyncio.Task[_Warm]] = {}
        self._closed = False

    # What there is.

    @property
    def names(self) -> tuple[str, ...]:
        """All templates, the default one first."""
        return (DEFAULT_TEMPLATE, *(self._store.names() if self._store else ()))

    def describe(self, name: str) -> TemplateInfo:
        """As Engine.describe."""
        if name == DEFAULT_TEMPLATE:
            # Its interpreter is the one below the daemon's environment, so of the same version.
            text = "this computer's own system directories and Python"
            return TemplateInfo(name, description=text, python=platform.python_version())
        try:
            info = self._manifest(name).info()
        except TemplateFailed as exc:
            return TemplateInfo(name, problem=str(exc))
        warm = self._warm.get(name)
        return info if warm is None else replace(info, not_preloaded=warm.zygote.cold)

    def _manifest(self, name: str) -> Manifest:
        try:
            if self._store is not None:
                return self._store.read(name)
        except UnknownTemplate:
            pass  # said below, with what there is
        raise UnknownTemplate(
            f"unknown template {name!r:.80}; there is: {', '.join(self.names)}; podflare template build makes others"
        )

    # Zygotes.

    async def start(self, filters: tuple[bytes, ...]) -> None:
        """Start the default template's zygote; all will have these system-call filters.  Raises: as `get`."""
        self._filters = filters
        await self.get(DEFAULT_TEMPLATE)

    async def get(self, name: str) -> Zygote:
        """A living zygote of the template as it is now.

        Raises: UnknownTemplate; TemplateFailed; IsolationIncomplete; MachineFailed.
        If cancelled: a start that is under way goes on, for the next call.
        """
        manifest = None if name == DEFAULT_TEMPLATE else self._manifest(name)
        key = "" if manifest is None else manifest.key
        while True:
            warm = self._warm.get(name)
            if warm is not None and warm.zygote.alive and warm.key == key:
                return warm.zygote
            if self._closed:
                raise MachineFailed("the process engine is closed")
            task = self._starting.get(name)
            if task is None:
                task = asyncio.get_running_loop().create_task(self._start(name, manifest))
                self._starting[name] = task
                task.add_done_callback(lambda done: self._started(name, done))
            # Shielded: importing a template's modules may take longer than one caller waits.
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                if self._closed and task.cancelled():  # by `aclose`; the caller was not
                    raise MachineFailed("the process engine is closed") from None
                raise

    def _started(self, name: str, task: asyncio.Task[_Warm]) -> None:
        del self._starting[name]
        if not task.cancelled():
            task.exception()  # told to whoever waited; nobody may have

    async def _start(self, name: str, manifest: Manifest | None) -> _Warm:
        old = self._warm.pop(name, None)
        if old is not None:
            await _end(old)
        warm = await (self._start_default() if manifest is None else self._start_template(manifest))
        self._warm[name] = warm
        return warm

    async def _start_default(self) -> _Warm:
        def plan(map_ids: bool) -> StagePlan:
            return plan_stage(self._facts, map_ids=map_ids, **self._where())

        return _Warm(await self._start_zygote(self._facts.python, "bundle", plan), "")

    async def _start_template(self, manifest: Manifest) -> _Warm:
        assert self._store is not None
        try:
            held = self._store.hold(manifest)
        except OSError as exc:
            raise TemplateFailed(f"template {manifest.name!r} has lost its files; build it again: {exc}") from exc
        try:
            tree = self._store.tree(manifest)
            mine = tree.stat().st_uid == os.geteuid()
            facts = read_facts(manifest.python)

            def plan(map_ids: bool) -> StagePlan:
                return plan_template(facts, manifest, str(tree), mine=mine, map_ids=map_ids, **self._where())

            zygote = await self._start_zygote(facts.python, f"bundle-{manifest.name}", plan)
        except (TemplateFailed, MachineFailed, DeadlineExceeded) as exc:
            os.close(held)
            raise TemplateFailed(f"template {manifest.name!r} cannot start: {exc}") from exc
        except BaseException:
            os.close(held)
            raise
        zygote.held = held  # locks the tree for its families, too: what they started from must not go before them
        return _Warm(zygote, manifest.key)

    def _where(self) -> dict[str, Any]:
        stage_dir = self._data / "stage"
        stage_dir.mkdir(exist_ok=True)
        return {"stage_dir": str(stage_dir), "machines_dir": str(self._machines_dir), "filters": self._filters}

    async def _start_zygote(self, python: str, bundle: str, plan: Callable[[bool], StagePlan]) -> Zygote:
        problem: IsolationIncomplete | None = None
        # Without idmapped mounts (older kernels, some file systems) a root daemon's /usr is read-only, no less walled.
        for map_ids in (True, False) if self._facts.root else (False,):
            zygote = Zygote(python, self._data / bundle)
            try:
                await zygote.start(plan(map_ids))
                return zygote
            except IsolationIncomplete as exc:
                problem = exc
        assert problem is not None
        raise problem

    async def aclose(self) -> None:
        """End every zygote.  Idempotent."""
        self._closed = True
        starting = list(self._starting.values())
        for task in starting:
            task.cancel()
        if starting:
            await asyncio.wait(starting)
        while self._warm:
            await _end(self._warm.popitem()[1])


async def _end(warm: _Warm) -> None:
    await warm.zygote.aclose()
    if warm.zygote.held >= 0:
        os.close(warm.zygote.held)
