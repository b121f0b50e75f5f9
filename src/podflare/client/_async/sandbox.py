"""The sandbox as its user holds it.  Everything but its own life cycle is done by a client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from podflare.client import _config, _embedded
from podflare.client._async.pty import AsyncPtyNamespace
from podflare.client._concurrency import in_thread_async, shield_async
from podflare.client._notices import note, warn
from podflare.client._types import Event, ExecResult, Language
from podflare.errors import Conflict, PodflareError, SandboxNotFound

if TYPE_CHECKING:
    from podflare.client._async.client import AsyncClient
    from podflare.client._config import Address
    from podflare.client._egress import Egress, Secret
    from podflare.client._files import Content, LocalPath
    from podflare.client._merging import AsyncRule, OnConflict
    from podflare.client._tools import ToolFunctions, ToolNames
    from podflare.client._types import Diff
    from podflare.wire.api import SandboxInfo, SnapshotInfo
    from podflare.wire.egress import EgressLog
    from podflare.wire.merges import MergeReport

    # Named here because `list` is a method inside the class.
    Events = list[Event]
    SandboxInfos = list[SandboxInfo]
    Sandboxes = list["AsyncSandbox"]

# The client and httpx below it are imported on use: the private daemon starts while they load.


class AsyncSandbox:
    """An isolated Linux sandbox with a live Python REPL.

    `async with AsyncSandbox() as sandbox: ...` or `sandbox = await AsyncSandbox.create()`; closed by leaving the
    block or by `close()`, else it lives until its idle timeout (a private daemon's: until this process ends).
    """

    def __init__(
        self,
        *,
        template: str | None = None,
        engine: str | None = None,
        snapshot: str | None = None,
        region: str | None = None,
        host: str | None = None,
        client: AsyncClient | None = None,
        traceparent: str | None = None,
        api_key: str | None = None,
        timeout_seconds: int | None = None,
        idle_timeout_seconds: int | None = None,
        ram_mib: int | None = None,
        rootfs_gb: int | None = None,
        persistent: bool | None = None,
        egress: Egress | None = None,
        metadata: Mapping[str, str] | None = None,
        secrets: Mapping[str, Secret] | None = None,
    ) -> None:
        """Describe the sandbox; it comes to be on entering the block or with `create`.

        Args:
            template: what it starts from; None means the daemon's default.
            engine: what makes it, "process" or "microvm"; None means the daemon's default.
            snapshot: go on from what `snapshot` kept; takes the place of template, ram_mib and rootfs_gb.
            region: a name in PODFLARE_REGIONS; stronger than `host`.
            host: the daemon's address; None means the environment's, else a private daemon of this process.
            client: the client to use instead of one of its own; stronger than region, host and credentials.
            traceparent: W3C trace context sent with every request.
            api_key: bearer token; None means PODFLARE_API_KEY.
            timeout_seconds: longest life.
            idle_timeout_seconds: longest time without use.
            ram_mib: memory limit.
            rootfs_gb: limit of what it may write.
            persistent: keep it as a space when it is idle (not built yet).
            egress: outbound network: True for every public address, a list of names for those alone, False for
                none; None means the daemon's default, which is none.
            metadata: labels, shown by `list`.
            secrets: by environment variable, values that only requests to their hosts carry.
        Raises: as `AsyncClient` and `AsyncClient.create_sandbox_info`.
        """
        self._owns_client = client is None
        self._maybe_client = client
        self._where: dict[str, str | None]
        self._where = {"host": host, "region": region, "traceparent": traceparent, "api_key": api_key}
        self._options: dict[str, Any] = {
            "template": template,
            "engine": engine,
            "snapshot": snapshot,
            "timeout_seconds": timeout_seconds,
            "idle_timeout_seconds": idle_timeout_seconds,
            "ram_mib": ram_mib,
            "rootfs_gb": rootfs_gb,
            "persistent": persistent,
            "egress": egress,
            "metadata": metadata,
            "secrets": secrets,
        }
        self._reset()
        # sync only: self._open()

    def _reset(self) -> None:
        self._id: str | None = None
        self._address: Address | None = None
        self._ending = ""
        """How it ended, if this program ended it."""
        self.pty = AsyncPtyNamespace(self)

    @classmethod
    async def create(cls, **options: Any) -> AsyncSandbox:
        """A sandbox that is ready.  Arguments and errors as the constructor."""
        sandbox = cls(**options)
        await sandbox._open()  # async only
        return sandbox

    @classmethod
    async def connect(
        cls,
        sandbox_id: str,
        *,
        region: str | None = None,
        host: str | None = None,
        client: AsyncClient | None = None,
        traceparent: str | None = None,
        api_key: str | None = None,
    ) -> AsyncSandbox:
        """A living sandbox, by its id.  Leaving a `with` block closes it, as any other.

        Raises: SandboxNotFound, whose text says why it is gone.
        """
        where = {"host": host, "region": region, "traceparent": traceparent, "api_key": api_key}
        used = client or _new_client(**where)
        try:
            await used.get_sandbox(sandbox_id)
            address = (await used.connection()).address
        except BaseException:
            if client is None:
                await used.close()
            raise
        return cls._adopt(sandbox_id, used, address=address, owns_client=client is None)

    @classmethod
    def _from_id(cls, sandbox_id: str, client: AsyncClient) -> AsyncSandbox:
        """The sandbox of an id, unchecked.  The client stays the caller's."""
        return cls._adopt(sandbox_id, client, address=None, owns_client=False)

    @classmethod
    def _adopt(
        cls, sandbox_id: str, client: AsyncClient, *, address: Address | None, owns_client: bool
    ) -> AsyncSandbox:
        """A sandbox that exists, and will not be opened again."""
        sandbox = cls.__new__(cls)
        sandbox._owns_client = owns_client
        sandbox._maybe_client = client
        sandbox._where, sandbox._options = {}, {}
        sandbox._reset()
        sandbox._id, sandbox._address = sandbox_id, address
        return sandbox

    @classmethod
    async def resume(
        cls,
        space_id: str,
        *,
        region: str | None = None,
        host: str | None = None,
        client: AsyncClient | None = None,
        traceparent: str | None = None,
        api_key: str | None = None,
        timeout_seconds: int | None = None,
        idle_timeout_seconds: int | None = None,
        persistent: bool | None = None,
        egress: Egress | None = None,
    ) -> AsyncSandbox:
        """A sandbox from a space.  Raises: NotBuilt if the daemon has no spaces yet."""
        where = {"host": host, "region": region, "traceparent": traceparent, "api_key": api_key}
        used = client or _new_client(**where)
        try:
            created = await used.resume_space(
                space_id,
                timeout_seconds=timeout_seconds,
                idle_timeout_seconds=idle_timeout_seconds,
                persistent=persistent,
                egress=egress,
            )
            address = (await used.connection()).address
        except BaseException:
            if client is None:
                await used.close()
            raise
        return cls._adopt(created["id"], used, address=address, owns_client=client is None)

    async def _open(self) -> AsyncSandbox:
        if self._id is not None:
            return self
        client = self._maybe_client
        if client is None:
            if _config.find_address(self._where["host"], self._where["region"]) is None:
                await in_thread_async(_embedded.begin)
            client = self._maybe_client = _new_client(**self._where)
        try:
            created = await client.create_sandbox_info(**self._options)
            self._id, self._ending = created["id"], ""
            self._address = (await client.connection()).address
            warn(created.get("warnings"))  # raises where the user made warnings errors
        except BaseException:
            await self._abandon(client)
            raise
        return self

    async def _abandon(self, client: AsyncClient) -> None:
        """Leave nothing of a half-made sandbox."""
        with shield_async(), contextlib.suppress(PodflareError):
            if self._id is not None:
                await client.destroy_sandbox(self._id)
        self._id = None
        if self._owns_client:
            self._maybe_client = None
            await client._release()

    async def __aenter__(self) -> AsyncSandbox:
        return await self._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except PodflareError as failure:
            if exc is None:
                raise
            note(exc, f"besides, {failure}")

    def __await__(self) -> Generator[Any, None, AsyncSandbox]:  # async only
        return self._open().__await__()  # async only

    def __repr__(self) -> str:
        state = f"{self._id} {self._ending}" if self._ending else self._id or "not open"
        return f"<{type(self).__name__} {state}>"

    @property
    def id(self) -> str:
        """Raises: Conflict before the sandbox was opened."""
        if self._id is None:
            raise Conflict("this sandbox is not open: use `async with`, or `await AsyncSandbox.create()`")
        return self._id

    def _client_for(self, what: str) -> AsyncClient:
        """The client, if the sandbox can be there.

        Raises: SandboxNotFound if it was ended here; DaemonUnreachable if its private daemon has ended.
        """
        from podflare.client import _errors

        sandbox_id = self.id
        client = self._maybe_client
        if self._ending or client is None:
            raise _errors.ended_here(what, sandbox_id, self._ending)
        if self._address is not None and self._daemon_ended():
            raise _errors.daemon_ended(what, sandbox_id, _embedded.ending(self._address))
        return client

    def _daemon_ended(self) -> bool:
        address = self._address
        return address is not None and address.embedded and not _embedded.is_alive(address)

    async def run_code(
        self,
        code: str,
        language: Language = "python",
        *,
        timeout: float | None = None,
        tools: ToolFunctions | None = None,
        tool_timeout: float | None = None,
    ) -> ExecResult:
        """Run a cell and wait for its end.

        With `tools={"query": function}` the code has a coroutine function `query` for the time of this cell:
        `await query(sql="...")`, by name or by position, or with one dict of all arguments. The function is called
        here, and what it returns (JSON) or raises is what the `await` gives or raises. An AsyncSandbox serves calls
        side by side, coroutine functions as tasks, others in threads; a Sandbox one after the other, in the
        thread that called `run_code`.

        Args:
            code: a Python cell for the live REPL, or a bash script.
            language: "python" or "bash".
            timeout: seconds after which the cell is ended (exit code 124), waiting in the queue not counted, nor the
                time in which it waits for tools.
            tools: functions that the code may call, Python cells only.
            tool_timeout: seconds after which a call raises TimeoutError in the code; None means 270.
        Raises: SandboxNotFound; DeadlineExceeded if the daemon falls silent; ConnectionLost. An exception in the
            cell is no error: see `ExecResult.error` and `exit_code`.
        If cancelled or interrupted: the cell is interrupted too.
        """
        client = self._client_for("run_code")
        return await client.run(self.id, code, language, timeout=timeout, tools=tools, tool_timeout=tool_timeout)

    async def run_code_stream(
        self,
        code: str,
        language: Language = "python",
        *,
        timeout: float | None = None,
        tools: ToolNames = (),
        tool_timeout: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """The events of a cell as they come; nothing is sent until iterated.

        Leaving the loop early interrupts the cell. Arguments and errors as `run_code`, but `tools` are only names
        (or a mapping of names to the names of their parameters, so that code may give arguments by position):
        each call that the code makes is a `ToolCallEvent` with `cell_id`, `call_id`, `name` and `input`, and
        `answer_tool_call` answers it, from this program or any other that holds the sandbox's id, in any order.
        An event of type "tool_cancelled", whose `data` has the `call_id`, says that an answer is not waited for any
        more: the code gave the call up, or its time was over. The end of the cell cancels what is open without one.
        """
        stream = self._client_for("run_code").exec_stream(
            self.id, code, language, timeout=timeout, tools=tools, tool_timeout=tool_timeout
        )
        async with contextlib.aclosing(stream) as events:
            async for event in events:
                yield event

    async def answer_tool_call(
        self,
        cell_id: str,
        call_id: str,
        *,
        result: Any = None,
        error: Exception | Mapping[str, str] | None = None,
    ) -> None:
        """Answer a call that a cell of `run_code_stream(..., tools=names)` made: the `await` in the code ends.

        Args:
            cell_id: of the ToolCallEvent.
            call_id: of the ToolCallEvent.
            result: what the call gives; JSON of at most 8 MiB.
            error: raised in the code instead: an exception, or {"type": ..., "message": ...}. A type that is a built-in
                exception is raised as that one, any other under its own name.
        Raises: Conflict if the call has its answer already, was cancelled or timed out, or if its cell is over;
            CallNotFound, CellNotFound; BadRequest if the result is not JSON or too large.
        """
        client = self._client_for("answer_tool_call")
        await client.answer_tool_call(self.id, cell_id, call_id, result=result, error=error)

    async def interrupt(self, cell_id: str | None = None) -> bool:
        """Interrupt the running cell: KeyboardInterrupt in it, its processes ended.  Does not wait for its end.

        Args:
            cell_id: interrupt only this cell.
        Returns: whether a cell was told.
        """
        return await self._client_for("interrupt").interrupt(self.id, cell_id)

    async def upload(self, local_path: Content | LocalPath, remote_path: str | Content) -> None:
        """Put bytes, or the local file of a path, under a path in the sandbox; directories are made.

        Source first, destination second; (path, bytes) is understood too.
        Raises: TypeError for other arguments; OSError if it could not be read or written.
        """
        from podflare.client._files import order_upload

        source, destination = order_upload(local_path, remote_path)
        await self._client_for("upload").upload(self.id, source, destination)

    async def upload_file(self, local_path: LocalPath, remote_path: str) -> None:
        """Put a local file under a path in the sandbox, in constant memory.  Raises: OSError."""
        await self._client_for("upload").upload(self.id, local_path, remote_path)

    async def download(self, remote_path: str, *, max_bytes: int | None = None) -> bytes:
        """The content of a file in the sandbox.

        Args:
            max_bytes: refuse a larger one, as it is the sandbox that says how much comes.
        Raises: OSError (FileMissing, FileAccessError); TooLarge above max_bytes.
        """
        return await self._client_for("download").download(self.id, remote_path, max_bytes=max_bytes)

    async def download_file(self, remote_path: str, local_path: LocalPath) -> int:
        """Write a sandbox's file to `local_path`, whole or not at all, in constant memory; its size.

        Raises: OSError.
        """
        return await self._client_for("download").download_file(self.id, remote_path, local_path)

    async def replay(self) -> Events:
        """The latest events of all cells, oldest first; `exit` events separate the cells."""
        return await self._client_for("replay").replay(self.id)

    async def output(self, cell_id: str, stream: str = "stdout") -> bytes:
        """Everything a recent cell wrote to "stdout" or "stderr", byte for byte, also what its result left out.

        Raises: CellNotFound if it is not kept any more.
        """
        return await self._client_for("output").output(self.id, cell_id, stream)

    async def info(self, *, usage: bool = False) -> SandboxInfo:
        """What the daemon says of this sandbox: effective limits, engine, walls in force.

        Args:
            usage: measure the memory and files that it uses, too (`SandboxInfo.usage`); costs milliseconds.
        """
        return await self._client_for("look-up").get_sandbox(self.id, usage=usage)

    async def egress_log(self) -> EgressLog:
        """What this sandbox tried to reach, allowed or refused; of a fork since the fork."""
        return await self._client_for("egress log").egress_log(self.id)

    async def extend(
        self, timeout_seconds: int | None = None, *, idle_timeout_seconds: int | None = None
    ) -> SandboxInfo:
        """Change how long the sandbox lives.

        Args:
            timeout_seconds: it ends so long after this call, instead of when it was to end; shorter is fine.
            idle_timeout_seconds: longest time without use, from now on.
        Raises: ValueError if neither is given or one is out of range; SandboxNotFound.
        """
        return await self._client_for("extend").set_lifetimes(
            self.id, timeout_seconds=timeout_seconds, idle_timeout_seconds=idle_timeout_seconds
        )

    async def fork(self, n: int = 1, *, reseed: bool = True, timeout: float | None = None) -> Sandboxes:
        """n copies of the running sandbox: memory, files, working directory, open files.  All of them or none.

        A running cell is waited for.  The copies share this sandbox's client, limits and labels; close each.

        Args:
            n: 1 to 32.
            reseed: give the global random generators of each copy fresh state; False keeps them as they are.
            timeout: seconds for all of it, waiting for a running cell included; None means the daemon's 50.
        Raises: ValueError if n is out of range; DeadlineExceeded if there was no fork in time; Conflict if this
            sandbox cannot be forked (too many generations deep, or its engine cannot); NoCapacity, QuotaExceeded;
            ConnectionLost: the copies may have been made, `info().children` tells. It is never sent twice.
        If cancelled or interrupted: the daemon takes back what it has not answered yet.
        """
        client = self._client_for("fork")
        children = await client.fork_sandbox(self.id, n, reseed=reseed, timeout=timeout)
        if self._owns_client:
            client._retain(len(children))
        return [self._adopt(child, client, address=self._address, owns_client=self._owns_client) for child in children]

    async def snapshot(self, name: str, *, timeout: float | None = None) -> SnapshotInfo:
        """Keep this sandbox on disk with all that runs in it, for `AsyncSandbox(snapshot=name)`; it goes on.

        A running cell is waited for. timeout: seconds for all of it; None means the daemon's 50.
        Raises: NotBuilt if its engine cannot; Conflict if the name is taken; BadRequest if it is none; QuotaExceeded,
            NoCapacity, DeadlineExceeded; ConnectionLost: it may have been taken, `AsyncClient.snapshots` tells.
        """
        return await self._client_for("snapshot").snapshot_sandbox(self.id, name, timeout=timeout)

    async def merge_into(self, winner: AsyncSandbox) -> None:
        """Make this sandbox what `winner` is: a replace, what this one held is gone.  Its id stays.

        The winner's id ends, and closing `winner` afterwards is silent.  Forks of this sandbox live on.
        Running cells of both are waited for.

        Raises: ValueError if `winner` is this sandbox; SandboxNotFound if one of them is gone; Conflict if they
            are not of the same engine. Nothing has changed then. ConnectionLost, DeadlineExceeded: outcome
            unknown, this sandbox has the old state or the new one, never none.
        """
        client = self._client_for("merge_into")
        winner._client_for("merge_into")
        await client.merge_into(self.id, winner.id)
        winner._ending = f"was merged into {self.id} by this program"
        await winner._leave_client()

    async def merge(
        self,
        other: AsyncSandbox,
        files: bool | Sequence[str] = True,
        variables: bool | Sequence[str] = True,
        on_conflict: OnConflict | AsyncRule = "error",
        *,
        timeout: float | None = None,
    ) -> MergeReport:
        """Bring in what `other` changed since both were one; what this sandbox changed stays.

        A three-way merge: what only `other` changed comes over, text files that both changed are merged by lines, and
        the rest that both changed is a conflict. All of it happens, or nothing. Both sandboxes live on; merging
        again brings only what came since. Running cells of both are waited for.

        Args:
            files: directories or files whose changes come over; True means /root and /tmp, as in `diff`.
            variables: names of variables whose changes come over; True means all. One that is named and cannot be
                carried to another process is an error, else it is told in the report.
            on_conflict: "error" raises; "ours" or "theirs" decides every conflict for this sandbox or for `other`; a
                function is asked about each (a ConflictInfo) and returns "ours" or "theirs". In text files only the
                lines in conflict are decided by that.
            timeout: seconds for all of it, waiting for running cells included; None means the daemon's 50.
        Raises: MergeConflict with the report; ValueError if `other` is this sandbox; SandboxNotFound; Conflict if
            running code changed files meanwhile, or a named variable cannot be carried; TooLarge, DeadlineExceeded;
            what `on_conflict` raises. Nothing has changed then. ConnectionLost: outcome unknown; merging again is safe.
        If cancelled or interrupted: it is done, or nothing has changed.
        """
        client = self._client_for("merge")
        other._client_for("merge")
        return await client.merge_sandboxes(
            self.id, other.id, files=files, variables=variables, on_conflict=on_conflict, timeout=timeout
        )

    async def diff(
        self,
        other: AsyncSandbox,
        paths: Sequence[str] | None = None,
        *,
        detail: bool = False,
        variables: bool = False,
    ) -> Diff:
        """Which files differ in `other`: {"added": [...], "removed": [...], "modified": [...]}, sorted.

        Args:
            paths: directories or files to compare; None means /root and /tmp.
            detail: add "detail": for each path its kind, both sizes and, for text, the change as a unified diff.
            variables: add "variables": which variables of the Python process `other` has added, removed and changed,
                by type, size and a fingerprint of the content.  Reading them runs the objects' own pickling code.
        Raises: SandboxNotFound if one of them is gone.  With `variables` DeadlineExceeded if cells are running in
            one of them for longer than 20 s, or if reading the variables takes so long; Conflict if it ends the
            Python process.
        """
        client = self._client_for("diff")
        other._client_for("diff")
        return await client.diff_sandboxes(self.id, other.id, paths, detail=detail, variables=variables)

    async def close(self) -> None:
        """End the sandbox.  Idempotent; one that is already gone, with its daemon or without, is closed.

        Raises: DaemonUnreachable, ConnectionLost, DeadlineExceeded if the daemon of an address could not be
            told: the sandbox may live on, and `close` may be called again.
        """
        client = self._maybe_client
        if self._id is None or client is None:
            return
        if not self._ending:
            with shield_async():
                await self._destroy(client)
            self._ending = "was closed by this program"
        await self._leave_client()

    async def _leave_client(self) -> None:
        if self._owns_client:
            # Another thread may close it too; only one of them may give the client back.
            held, self._maybe_client = self._maybe_client, None
            if held is not None:
                await held._release()

    async def _destroy(self, client: AsyncClient) -> None:
        if self._daemon_ended():
            return
        try:
            await client.destroy_sandbox(self.id)
        except SandboxNotFound:
            return
        except PodflareError:
            if not self._daemon_ended():
                raise

    aclose = close  # async only

    @classmethod
    async def list(
        cls,
        *,
        region: str | None = None,
        host: str | None = None,
        client: AsyncClient | None = None,
        traceparent: str | None = None,
        api_key: str | None = None,
    ) -> SandboxInfos:
        """The living sandboxes of this key.  Arguments as the constructor."""
        used = client or _new_client(host=host, region=region, traceparent=traceparent, api_key=api_key)
        try:
            return await used.list_sandboxes()
        finally:
            if client is None:
                await used.close()


def _new_client(*, host: str | None, region: str | None, traceparent: str | None, api_key: str | None) -> AsyncClient:
    from podflare.client._async.client import AsyncClient

    return AsyncClient(host, region=region, traceparent=traceparent, api_key=api_key)
