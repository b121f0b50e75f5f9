"""The engines of one daemon, by name: which there are, which is meant, and when each is started.  Makes no machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import anyio
import anyio.to_thread

from podflare.engines.base import Engine
from podflare.errors import BadRequest, NoCapacity, UnknownTemplate
from podflare.wire.api import TemplateInfo


class Engines:
    """What a daemon offers.  Owns its engines: `aclose` closes all that were started."""

    def __init__(self, *engines: Engine, later: Mapping[str, Callable[[], Engine]] | None = None) -> None:
        """Args:
        engines: begun by `start`; the first is the default.
        later: of further names what makes the engine, blocking.  Each is begun when somebody asks for it.
        """
        self.default = engines[0]
        self._engines = {engine.name: engine for engine in engines}
        self._later = dict(later or {})
        self._starting = anyio.Lock()
        self._closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """All that can be asked for, the default first."""
        return tuple(dict.fromkeys((*self._engines, *self._later)))

    @property
    def started(self) -> tuple[Engine, ...]:
        """The default first."""
        return tuple(self._engines.values())

    def running(self, name: str) -> Engine:
        """One that was started."""
        return self._engines[name]

    def check(self, name: str | None) -> str:
        """The name that is meant.  Raises: BadRequest, with what there is, if it is not offered."""
        if name is None:
            return self.default.name
        if name not in self.names:
            raise BadRequest(f"unknown engine {name!r:.80}; this daemon offers: {', '.join(self.names)}")
        return name

    async def start(self) -> None:
        """Raises: as Engine.start.  Then none of them is started."""
        try:
            for engine in self.started:
                await engine.start()
        except BaseException:
            await self.aclose()
            raise

    async def get(self, name: str | None) -> Engine:
        """A started engine; None stands for the default.

        Raises: BadRequest if it is not offered, or its package is missing; as Engine.start; NoCapacity.
        """
        name = self.check(name)
        if name not in self._engines:
            async with self._starting:
                if name not in self._engines:
                    await self._begin(name)
        return self._engines[name]

    async def _begin(self, name: str) -> None:
        engine = await anyio.to_thread.run_sync(self._later[name])
        try:
            await engine.start()
            if self._closed:
                raise NoCapacity("the daemon was shut down")
        except BaseException:
            with anyio.CancelScope(shield=True):
                await engine.aclose()
            raise
        self._engines[name] = engine

    def check_template(self, engine: Engine, template: str) -> None:
        """Raises: UnknownTemplate with what there is, and which other engine has it."""
        if template in engine.templates:
            return
        others = [other.name for other in self.started if template in other.templates]
        hint = f"; engine={others[0]!r} has it" if others else ""
        try:
            engine.describe(template)
        except UnknownTemplate as exc:
            raise UnknownTemplate(f"{exc}{hint}") from exc
        raise UnknownTemplate(f"unknown template {template!r:.80} of the engine {engine.name}{hint}")

    def templates(self) -> list[TemplateInfo]:
        """What sandboxes can start from, those of the default engine first."""
        return [
            replace(engine.describe(name), engine=engine.name) for engine in self.started for name in engine.templates
        ]

    async def aclose(self) -> None:
        """Close all that were started.  Idempotent, shielded from cancellation."""
        self._closed = True
        with anyio.CancelScope(shield=True):
            for engine in self.started:
                await engine.aclose()
