"""A conversation goes on in several ways at once: its sandbox is forked, its message history copied, one way is kept.

    with branch(sandbox, messages, 3) as branches:
        for one in branches:
            one.messages.append(...)    # and ask Claude, run its tools in one.sandbox, ...
        messages = commit(max(branches, key=score))

Needs nothing of the `anthropic` package.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from podflare.errors import BadRequest, Conflict
from podflare.wire.api import MAX_FORKS

if TYPE_CHECKING:
    from podflare import AsyncSandbox, Sandbox

S = TypeVar("S")
B = TypeVar("B")


class Branch(Generic[S]):
    """One way of the conversation; also a pair: `sandbox, messages = branch`."""

    def __init__(self, sandbox: S, messages: list[Any], origin: Any) -> None:
        self.sandbox = sandbox
        self.messages = messages
        """The history of this way alone; to be continued in place, or set."""
        self._origin = origin

    def __iter__(self) -> Iterator[Any]:
        return iter((self.sandbox, self.messages))


class _Branches(Sequence[B]):
    """The ways, in order."""

    def __init__(self) -> None:
        self._branches: list[B] = []
        self._committed = False

    def __len__(self) -> int:
        return len(self._branches)

    @overload
    def __getitem__(self, index: int) -> B: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[B]: ...
    def __getitem__(self, index: int | slice) -> B | Sequence[B]:
        return self._branches[index]

    def _check(self, winner: Any) -> None:
        if self._committed:
            raise Conflict("commit: another branch of this conversation was committed already, or all were closed")
        if not any(winner is one for one in self._branches):
            raise BadRequest("commit: this is no branch of this conversation")


class Branches(_Branches[Branch["Sandbox"]]):
    """What `branch` gives.  Leaving its block, or `close`, closes every sandbox that was not committed."""

    def __init__(self, sandbox: Sandbox, messages: Sequence[Any], n: int) -> None:
        super().__init__()
        self._sandbox = sandbox
        self._stack = ExitStack()
        histories = [copy.deepcopy(list(messages)) for _ in range(_count(n))]
        for child, history in zip(sandbox.fork(n), histories, strict=True):
            self._stack.callback(child.close)
            self._branches.append(Branch(child, history, self))

    def _commit(self, winner: Branch[Sandbox]) -> list[Any]:
        self._check(winner)
        self._sandbox.merge_into(winner.sandbox)
        self._committed = True
        self.close()
        return winner.messages

    def close(self) -> None:
        """Close what was not committed; a committed branch's sandbox is gone already.  Idempotent."""
        self._committed = True
        self._stack.close()

    def __enter__(self) -> Branches:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncBranches(_Branches[Branch["AsyncSandbox"]]):
    """What `branch_async` gives, to be awaited or used in `async with`."""

    def __init__(self, sandbox: AsyncSandbox, messages: Sequence[Any], n: int) -> None:
        super().__init__()
        self._sandbox = sandbox
        self._histories = [copy.deepcopy(list(messages)) for _ in range(_count(n))]
        self._stack = AsyncExitStack()

    async def _open(self) -> AsyncBranches:
        histories, self._histories = self._histories, []
        if histories:
            for child, history in zip(await self._sandbox.fork(len(histories)), histories, strict=True):
                self._stack.push_async_callback(child.close)
                self._branches.append(Branch(child, history, self))
        return self

    async def _commit(self, winner: Branch[AsyncSandbox]) -> list[Any]:
        self._check(winner)
        await self._sandbox.merge_into(winner.sandbox)
        self._committed = True
        await self.close()
        return winner.messages

    async def close(self) -> None:
        """Close what was not committed; a committed branch's sandbox is gone already.  Idempotent."""
        self._committed = True
        await self._stack.aclose()

    def __await__(self) -> Generator[Any, None, AsyncBranches]:
        return self._open().__await__()

    async def __aenter__(self) -> AsyncBranches:
        return await self._open()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


def branch(sandbox: Sandbox, messages: Sequence[Any], n: int) -> Branches:
    """n ways of a conversation: forks of its sandbox, each with a deep copy of its messages.

    Args:
        messages: the history so far, dicts or objects; it stays as it is.
        n: 1 to 32.
    Raises: as `Sandbox.fork`.
    """
    return Branches(sandbox, messages, n)


def branch_async(sandbox: AsyncSandbox, messages: Sequence[Any], n: int) -> AsyncBranches:
    """As `branch`: `async with branch_async(...) as branches`, or `branches = await branch_async(...)`."""
    return AsyncBranches(sandbox, messages, n)


def commit(winner: Branch[Sandbox]) -> list[Any]:
    """Make the sandbox that was branched what the winner's is, close the others; the history to go on with.

    Raises: as `Sandbox.merge_into`, and then nothing was closed; Conflict if a branch was committed before.
    """
    return _of(winner, Branches)._commit(winner)  # type: ignore[no-any-return]  # the two classes are alike


async def commit_async(winner: Branch[AsyncSandbox]) -> list[Any]:
    """As `commit`, for a branch of `branch_async`."""
    return await _of(winner, AsyncBranches)._commit(winner)  # type: ignore[no-any-return]  # as above


def _of(winner: Any, kind: type[Any]) -> Any:
    origin = winner._origin if isinstance(winner, Branch) else None
    if not isinstance(origin, kind):
        raise BadRequest(f"commit: expected a branch of {kind.__name__}, got {type(winner).__name__}")
    return origin


def _count(n: object) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_FORKS:
        raise BadRequest(f"branch: n must be an integer from 1 to {MAX_FORKS}, got {n!r:.80}")
    return n
