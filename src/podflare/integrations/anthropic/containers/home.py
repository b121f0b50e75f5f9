"""Containers for a program that has no event loop, or many: a thread of its own with one, until the program ends."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import anyio
from anyio.from_thread import BlockingPortal

from podflare.client import AsyncClient
from podflare.errors import Conflict
from podflare.integrations.anthropic.containers.files import FileStore
from podflare.integrations.anthropic.containers.index import Index
from podflare.integrations.anthropic.containers.registry import Containers, Settings

T = TypeVar("T")

_CLOSE_S = 10.0


class Home:
    """Starts on first use.  `close` ends its containers, at the latest when the program ends."""

    def __init__(self, host: str | None, data_dir: Path | None, settings: Settings) -> None:
        self._host = host
        self._data_dir = data_dir
        self._settings = settings
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._portal: BlockingPortal
        self._containers: Containers

    @property
    def containers(self) -> Containers:
        """Its methods are to be called through `call` or `ask`.  Raises: Conflict once closed."""
        self._start()
        return self._containers

    @property
    def files(self) -> FileStore:
        """May be called from any thread."""
        return self.containers.files

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise Conflict("this code execution is closed")
            if self._thread is not None:
                return
            ready: concurrent.futures.Future[None] = concurrent.futures.Future()
            # A daemon thread: any other would be waited for before the exit handler below could end it.
            self._thread = threading.Thread(target=self._run, args=(ready,), name="podflare-containers", daemon=True)
            self._thread.start()
            try:
                ready.result()
            except BaseException:
                self._thread = None
                raise
            atexit.register(self.close)

    def _run(self, ready: concurrent.futures.Future[None]) -> None:
        try:
            anyio.run(self._live, ready)
        except BaseException as exc:  # noqa: BLE001  # told to whoever waits for the start, or to nobody
            if not ready.done():
                ready.set_exception(exc)

    async def _live(self, ready: concurrent.futures.Future[None]) -> None:
        directory = self._data_dir or Path(tempfile.mkdtemp(prefix="podflare-files-"))
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        index = Index(None if self._data_dir is None else directory / "containers.sqlite")
        try:
            files = FileStore(directory / "files", index)
            async with Containers(AsyncClient(self._host), files, index, self._settings) as containers:
                async with BlockingPortal() as portal:
                    self._portal, self._containers = portal, containers
                    ready.set_result(None)
                    await portal.sleep_until_stopped()
        finally:
            index.close()
            if self._data_dir is None:
                shutil.rmtree(directory, ignore_errors=True)

    def call(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Do something in the home's event loop and wait for it.

        If interrupted: it is cancelled.
        """
        future = self._begin(function, arguments)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def ask(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """The same from asyncio.  If cancelled: it is cancelled, too."""
        future = self._begin(function, arguments)
        return await asyncio.wrap_future(future)

    def _begin(
        self, function: Callable[..., Awaitable[T]], arguments: tuple[object, ...]
    ) -> concurrent.futures.Future[T]:
        self._start()
        return self._portal.start_task_soon(functools.partial(function, *arguments))

    def post(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Have something done in the home's event loop, without waiting.  Nothing once closed."""
        with self._lock:
            if self._thread is not None:
                self._portal.start_task_soon(functools.partial(function, *arguments))

    def close(self) -> None:
        """End the containers and forget the files that were in no directory of the caller's.  Idempotent."""
        with self._lock:
            thread, self._thread, self._closed = self._thread, None, True
        if thread is None:
            return
        atexit.unregister(self.close)
        self._portal.call(self._portal.stop, True)
        thread.join(_CLOSE_S)
