"""One container: a sandbox, the files that were put into it, and the results of calls that it has run."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import anyio

from podflare.errors import NoCapacity, PodflareError, QuotaExceeded, SandboxNotFound
from podflare.integrations.anthropic.containers import cells, editor
from podflare.integrations.anthropic.containers.files import FileStore
from podflare.integrations.anthropic.hosted.blocks import (
    BASH,
    CODE,
    EDITOR,
    INVALID_INPUT,
    TOO_MANY,
    UNAVAILABLE,
    Block,
    Call,
    error_content,
    hosted_result,
    output_content,
)
from podflare.integrations.anthropic.hosted.uploads import INPUT_DIR

if TYPE_CHECKING:
    from podflare import AsyncSandbox

_KEPT_RESULTS = 256
_INTERRUPTED = 130


class Container:
    """Runs one call at a time, and each call once, however often it is asked for."""

    def __init__(self, container_id: str, owner: str, sandbox: AsyncSandbox, store: FileStore) -> None:
        self.id = container_id
        self.owner = owner
        self.sandbox = sandbox
        self.gone = False
        """The sandbox ended by itself."""
        self.in_use = 0
        self.expires_at = 0.0
        self._store = store
        self._lock = anyio.Lock()
        self._results: OrderedDict[str, Block] = OrderedDict()
        self._placed: dict[str, str] = {}
        self._calls = 0

    def adopt_state(self, other: Container) -> None:
        """Know what `other` knows: this one's sandbox is a fork of its."""
        self._results = OrderedDict(other._results)
        self._placed = dict(other._placed)
        self._calls = other._calls

    async def place_files(self, names: dict[str, str]) -> None:
        """Put files, id -> name, into the input directory, those that are not there yet.

        Raises: PodflareError.
        """
        async with self._lock:
            for file_id, name in names.items():
                if self._placed.get(file_id) != name:
                    row = self._store.find(self.owner, file_id)
                    await self.sandbox.upload_file(self._store.path_of(row), f"{INPUT_DIR}/{name}")
                    self._placed[file_id] = name

    async def run(self, call: Call, timeout_s: float) -> Block:
        """The result block of a call.  Never raises a PodflareError: what fails is a result, too.

        If cancelled: the code is interrupted, and that is the call's result from then on.
        """
        async with self._lock:
            found = self._results.get(call.id)
            if found is None:
                found = await self._run_once(call, timeout_s)
                self._remember(call, found)
            return found

    async def _run_once(self, call: Call, timeout_s: float) -> Block:
        self._calls += 1
        place = cells.Place(self.owner, f"{cells.OUTPUT_ROOT}/{self._calls}", self._store)
        name = call.name if call.name in (BASH, EDITOR) else CODE
        try:
            if call.name == BASH:
                content = await cells.run_bash(self.sandbox, call, place, timeout_s)
            elif call.name == EDITOR:
                content = await editor.edit(self.sandbox, call.input)
            elif call.name == CODE:
                content = await cells.run_python(self.sandbox, call, place, timeout_s)
            else:
                content = error_content(name, INVALID_INPUT)
        except (NoCapacity, QuotaExceeded):
            content = error_content(name, TOO_MANY)
        except PodflareError as exc:
            self.gone = self.gone or isinstance(exc, SandboxNotFound)
            content = error_content(name, UNAVAILABLE, str(exc))
        except BaseException:
            text = "interrupted: the request was cancelled"
            self._remember(call, hosted_result(call, output_content(name, "", text, _INTERRUPTED, [])))
            raise
        return hosted_result(call, content)

    def _remember(self, call: Call, result: Block) -> None:
        self._results[call.id] = result
        while len(self._results) > _KEPT_RESULTS:
            self._results.popitem(last=False)
