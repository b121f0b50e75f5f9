"""One container: a sandbox, the files that were put into it, and the results of calls that it has run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
from anyio.abc import TaskGroup

from podflare.errors import NoCapacity, PodflareError, QuotaExceeded, SandboxNotFound
from podflare.integrations.anthropic.containers import cells, editor
from podflare.integrations.anthropic.containers.files import FileStore
from podflare.integrations.anthropic.containers.programs import Program
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
from podflare.integrations.anthropic.hosted.rounds import Paused
from podflare.integrations.anthropic.hosted.uploads import INPUT_DIR

if TYPE_CHECKING:
    from podflare import AsyncSandbox

_KEPT_RESULTS = 256
_INTERRUPTED = 130


@dataclass(frozen=True)
class Order:
    """How a call is to be run."""

    timeout_s: float
    functions: Sequence[str] = ()
    """Tools of the client that code may call."""
    answers: Mapping[str, str] | None = None
    """What they gave, by tool_use id; None if the code was not begun before."""


class Container:
    """Runs one call at a time, and each call once, however often it is asked for."""

    def __init__(
        self, container_id: str, owner: str, sandbox: AsyncSandbox, store: FileStore, tasks: TaskGroup
    ) -> None:
        """`tasks` is where code lives that goes on between two requests."""
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
        self._tasks = tasks
        self._programs: dict[str, tuple[Program, cells.Place]] = {}

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

    @property
    def waits(self) -> bool:
        """Whether code in it waits for tools of the client."""
        return bool(self._programs)

    async def run(self, call: Call, order: Order) -> Block | Paused:
        """The result block of a call, or what its code wants from the client.

        Never raises a PodflareError: what fails is a result, too.
        If cancelled: the code is interrupted, and that is the call's result from then on.
        """
        async with self._lock:
            found = self._results.get(call.id)
            if found is not None:
                return found
            outcome = await self._run_once(call, order)
            if not isinstance(outcome, Paused):
                self._programs.pop(call.id, None)
                self._remember(call, outcome)
            return outcome

    async def _run_once(self, call: Call, order: Order) -> Block | Paused:
        name = call.name if call.name in (BASH, EDITOR) else CODE
        try:
            if call.name == CODE and (order.functions or order.answers is not None):
                outcome = await self._run_program(call, order)
                if isinstance(outcome, Paused):
                    return outcome
                content = outcome
            elif call.name == BASH:
                content = await cells.run_bash(self.sandbox, call, self._new_place(), order.timeout_s)
            elif call.name == EDITOR:
                content = await editor.edit(self.sandbox, call.input)
            elif call.name == CODE:
                content = await cells.run_python(self.sandbox, call, self._new_place(), order.timeout_s)
            else:
                content = error_content(name, INVALID_INPUT)
        except (NoCapacity, QuotaExceeded):
            content = error_content(name, TOO_MANY)
        except PodflareError as exc:
            self.gone = self.gone or isinstance(exc, SandboxNotFound)
            content = error_content(name, UNAVAILABLE, str(exc))
        except BaseException:
            if (begun := self._programs.pop(call.id, None)) is not None:
                begun[0].abort()
            text = "interrupted: the request was cancelled"
            self._remember(call, hosted_result(call, output_content(name, "", text, _INTERRUPTED, [])))
            raise
        return hosted_result(call, content)

    def _new_place(self) -> cells.Place:
        self._calls += 1
        return cells.Place(self.owner, f"{cells.OUTPUT_ROOT}/{self._calls}", self._store)

    async def _run_program(self, call: Call, order: Order) -> Block | Paused:
        """Begin code that calls tools of the client, or let it go on."""
        begun = self._programs.get(call.id)
        if begun is None:
            if order.answers is not None:
                return error_content(CODE, UNAVAILABLE)  # it was begun in a life of this program that is over
            if not isinstance(call.input.get("code"), str):
                return error_content(CODE, INVALID_INPUT)
            place = self._new_place()
            await cells.prepare_python(self.sandbox, place)
            begun = self._programs[call.id] = (Program(call, self.sandbox, order.functions), place)
            self._tasks.start_soon(begun[0].drive)
        program, place = begun
        outcome = await program.go_on(order.answers or {})
        if isinstance(outcome, Paused):
            return outcome
        return await cells.finished(self.sandbox, CODE, outcome, place, limit_told=True)

    def _remember(self, call: Call, result: Block) -> None:
        self._results[call.id] = result
        while len(self._results) > _KEPT_RESULTS:
            self._results.popitem(last=False)
