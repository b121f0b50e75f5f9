# Generated from _async/client.py by scripts/unasync.py: change that file, not this one.
"""One daemon's operations, by sandbox id.  `Sandbox` is the face for daily use; this is what it is made of."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Mapping, Sequence
from secrets import token_hex
from typing import Any

from podflare.client import _calls, _config, _egress, _embedded, _merging, _snapshots, _tools
from podflare.client._concurrency import beside_sync, in_thread_sync, outcome_sync, shield_sync
from podflare.client._egress import Egress, Secret
from podflare.client._files import Content, LocalPath, Target, open_source
from podflare.client._merging import OnConflict, Rule
from podflare.client._notices import warn_of_end
from podflare.client._sync.connection import Connection
from podflare.client._sync.pty import PtyCalls
from podflare.client._tools import ToolFunctions, ToolNames
from podflare.client._transport import SyncTransport
from podflare.client._types import Diff, Event, ExecResult, Language, ToolCallEvent
from podflare.errors import (
    BadRequest,
    CallNotFound,
    CellNotFound,
    Conflict,
    ConnectionLost,
    DaemonUnreachable,
    NotBuilt,
    PodflareError,
    TooLarge,
)
from podflare.wire.api import SandboxInfo, SnapshotInfo
from podflare.wire.egress import EgressLog
from podflare.wire.merges import MergeReport

_UNDO_TIMEOUT_S = 5.0


class Client(PtyCalls):
    """Talks to one daemon: the one at `host`, else the configured one, else the private one of this process.

    Nothing is sent before the first operation.  Usable by many threads at a time.
    """

    def __init__(
        self,
        host: str | None = None,
        timeout: float = _config.READ_TIMEOUT_S,
        traceparent: str | None = None,
        api_key: str | None = None,
        *,
        region: str | None = None,
        transport: SyncTransport | None = None,
    ) -> None:
        """Settle address and credentials.

        Args:
            host: `http://...`, `https://...` or `unix:/path`; None means the environment's.
            timeout: seconds without a byte after which a call fails.
            traceparent: W3C trace context sent with every request.
            api_key: bearer token.
            region: a name in PODFLARE_REGIONS; stronger than `host`.
            transport: replaces the network, for tests and special proxies; the caller closes it.
        Raises: BadRequest for an address or header value that is none; UnknownRegionError.
        """
        self._address = _config.find_address(host, region)
        if self._address is None and transport is not None:
            raise BadRequest("a transport needs a host")
        self.api_key = _config.find_api_key(api_key)
        self.traceparent = _config.find_traceparent(traceparent)
        self._timeout_s = timeout
        self._transport = transport
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._holders = 1

    @property
    def host(self) -> str:
        """Where the daemon is; "" before the private one was started."""
        if self._address is not None:
            return str(self._address)
        return str(self._connection.address) if self._connection is not None else ""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.host or 'private daemon'}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the connections.  Sandboxes live on.  Idempotent."""
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            with shield_sync():
                connection.close()

    def _retain(self, holders: int) -> None:
        """As many more sandboxes own this client."""
        with self._lock:
            self._holders += holders

    def _release(self) -> None:
        """One owner less; the last one closes."""
        with self._lock:
            self._holders -= 1
            last = self._holders <= 0
        if last:
            self.close()

    def connection(self, *, renew: bool = False) -> Connection:
        """The connection in use, made on first use.

        Args:
            renew: take a new private daemon if the last one has ended.
        Raises: Conflict if this client is closed; DaemonStartFailed.
        """
        if self._closed:
            raise Conflict("this client is closed")
        current = self._connection
        if current is not None and not (renew and self._has_ended(current)):
            return current
        address = self._address
        if address is None:
            address = in_thread_sync(_embedded.ready_address)
        with self._lock:  # no waiting inside: other threads, or tasks, may have been here meanwhile
            previous = self._connection
            if previous is not None and previous.address == address:
                return previous
            made = self._connection = self._connect(address)
        if previous is not None:
            previous.close()
        return made

    @staticmethod
    def _has_ended(connection: Connection) -> bool:
        return connection.address.embedded and not _embedded.is_alive(connection.address)

    def _connect(self, address: _config.Address) -> Connection:
        return Connection(
            address,
            # The private daemon has no keys; somebody else's key is none of its business.
            api_key=None if address.embedded else self.api_key,
            traceparent=self.traceparent,
            read_timeout_s=self._timeout_s,
            transport=self._transport,
        )

    def _call(self, call: _calls.Call) -> bytes:
        connection = self.connection()
        return connection.call(call)

    def healthz(self) -> bool:
        """Whether the daemon answers as a healthy podflare daemon does; False also if it cannot be reached."""
        try:
            return (self._call(_calls.healthz())).strip() == b"ok"
        except PodflareError:
            return False

    def capacity(self) -> dict[str, Any]:
        """What the daemon says of its load."""
        call = _calls.capacity()
        return _calls.parse_object(call, self._call(call))

    def create_sandbox(
        self,
        template: str | None = None,
        *,
        engine: str | None = None,
        snapshot: str | None = None,
        timeout_seconds: int | None = None,
        idle_timeout_seconds: int | None = None,
        ram_mib: int | None = None,
        rootfs_gb: int | None = None,
        persistent: bool | None = None,
        egress: Egress | None = None,
        metadata: Mapping[str, str] | None = None,
        secrets: Mapping[str, Secret] | None = None,
    ) -> str:
        """The id of a new sandbox.  Arguments and errors as `create_sandbox_info`."""
        created = self.create_sandbox_info(
            template,
            engine=engine,
            snapshot=snapshot,
            timeout_seconds=timeout_seconds,
            idle_timeout_seconds=idle_timeout_seconds,
            ram_mib=ram_mib,
            rootfs_gb=rootfs_gb,
            persistent=persistent,
            egress=egress,
            metadata=metadata,
            secrets=secrets,
        )
        return str(created["id"])

    def create_sandbox_info(
        self,
        template: str | None = None,
        *,
        engine: str | None = None,
        snapshot: str | None = None,
        timeout_seconds: int | None = None,
        idle_timeout_seconds: int | None = None,
        ram_mib: int | None = None,
        rootfs_gb: int | None = None,
        persistent: bool | None = None,
        egress: Egress | None = None,
        metadata: Mapping[str, str] | None = None,
        secrets: Mapping[str, Secret] | None = None,
    ) -> dict[str, Any]:
        """The daemon's whole answer to a create: effective values, `warnings` for what is not given.

        Raises: UnknownTemplate, BadRequest, NotBuilt (also if the daemon is too old to know `engine` or
            `snapshot`), SnapshotNotFound, EgressUnavailable, NoCapacity, QuotaExceeded, IsolationIncomplete, ...
        If interrupted (Ctrl-C): the sandbox that may have come to be is closed.
        """
        options = {
            "template": template,
            "engine": engine,
            "snapshot": snapshot,
            "timeout_seconds": timeout_seconds,
            "idle_timeout_seconds": idle_timeout_seconds,
            "ram_mib": ram_mib,
            "rootfs_gb": rootfs_gb,
            "persistent": persistent,
            "egress": _egress.reach(egress),
            "metadata": dict(metadata) if metadata is not None else None,
            "secrets": _egress.secrets(secrets),
        }
        call = _calls.create(options, token_hex(16))
        connection = self.connection(renew=True)
        try:
            created = self._create(connection, call)
        except (DaemonUnreachable, ConnectionLost):
            if not self._has_ended(connection):
                raise
            # The private daemon ended between two looks: nothing of it is left, so this is a first try on a new one.
            created = self._create(self.connection(renew=True), call)
        if ignored := _calls.ignored(options, created):
            self.destroy_sandbox(created["id"])
            raise NotBuilt(ignored)
        return created

    def _create(self, connection: Connection, call: _calls.Call) -> dict[str, Any]:
        try:
            return _calls.parse_created(call, connection.call(call))
        except Exception:
            raise
        except BaseException:
            with shield_sync():
                self._undo_create(connection, call)
            raise

    @staticmethod
    def _undo_create(connection: Connection, call: _calls.Call) -> None:
        """Close what an interrupted create may have left: its key tells the daemon which sandbox that was."""
        try:
            again = connection.call(call, read_timeout_s=_UNDO_TIMEOUT_S)
            made = _calls.parse_created(call, again)["id"]
            connection.call(_calls.destroy(made), read_timeout_s=_UNDO_TIMEOUT_S)
        except PodflareError:
            return  # the interruption is what the caller must see; the daemon's idle timeout does the rest

    def get_sandbox(self, sandbox_id: str, *, usage: bool = False) -> SandboxInfo:
        """What the daemon says of a sandbox.

        Args:
            usage: measure what it uses, too (`SandboxInfo.usage`); costs milliseconds.
        Raises: SandboxNotFound, whose text says why it is gone.
        """
        call = _calls.get(sandbox_id, usage=usage)
        return _calls.parse_info(_calls.parse_object(call, self._call(call)))

    def list_sandboxes(self, *, usage: bool = False) -> list[SandboxInfo]:
        """The living sandboxes of this key.

        Args:
            usage: measure what each uses, too (`SandboxInfo.usage`); costs milliseconds for each.
        """
        call = _calls.list_sandboxes(usage=usage)
        return list(_calls.parse_list(call, self._call(call)))

    def set_lifetimes(
        self, sandbox_id: str, *, timeout_seconds: int | None = None, idle_timeout_seconds: int | None = None
    ) -> SandboxInfo:
        """See `Sandbox.extend`."""
        call = _calls.set_lifetimes(sandbox_id, timeout_seconds, idle_timeout_seconds)
        return _calls.parse_info(_calls.parse_object(call, self._call(call)))

    def egress_log(self, sandbox_id: str) -> EgressLog:
        """See `Sandbox.egress_log`."""
        call = _egress.log(sandbox_id)
        return _egress.parse_log(call, self._call(call))

    def destroy_sandbox(self, sandbox_id: str) -> None:
        """Raises: SandboxNotFound if the id was never issued."""
        self._call(_calls.destroy(sandbox_id))

    def run(
        self,
        sandbox_id: str,
        code: str,
        language: Language = "python",
        *,
        timeout: float | None = None,
        tools: ToolFunctions | None = None,
        tool_timeout: float | None = None,
    ) -> ExecResult:
        """As `Sandbox.run_code`."""
        if not tools:
            connection = self.connection()
            return connection.run(_calls.execute(sandbox_id, code, language, timeout))
        builder = _calls.ResultBuilder()
        awaiting = False
        declared = _tools.declare_functions(tools, awaiting=awaiting)
        call = _calls.execute(sandbox_id, code, language, timeout, declared, tool_timeout)
        connection = self.connection()
        with beside_sync() as begin, contextlib.closing(connection.events(call)) as events:
            for event in events:
                warn_of_end(builder.add([event]))
                if isinstance(event, ToolCallEvent):
                    begin(self._serve, sandbox_id, tools, event)
        return builder.build()

    def _serve(self, sandbox_id: str, tools: ToolFunctions, event: ToolCallEvent) -> None:
        """Have the function called, and send what it gave or raised."""
        cell_id, call_id = event.cell_id, event.call_id
        result: Any = None
        error: Exception | None = None
        try:
            result = outcome_sync(_tools.invoke, tools[event.name], event.input)
        except Exception as exc:  # noqa: BLE001  # whatever the function raises belongs to the code that called it
            error = exc
        try:
            call = _calls.answer_tool_call(sandbox_id, cell_id, call_id, result, error)
        except BadRequest as exc:
            call = _calls.answer_tool_call(sandbox_id, cell_id, call_id, None, TypeError(f"{event.name}(): {exc}"))
        # The code may wait no longer: its cell is over, or it gave up this call.
        with contextlib.suppress(CallNotFound, CellNotFound, Conflict):
            self._call(call)

    def exec_stream(
        self,
        sandbox_id: str,
        code: str,
        language: Language = "python",
        *,
        timeout: float | None = None,
        tools: ToolNames = (),
        tool_timeout: float | None = None,
    ) -> Generator[Event, None, None]:
        """As `Sandbox.run_code_stream`."""
        connection = self.connection()
        call = _calls.execute(sandbox_id, code, language, timeout, _tools.declare(tools), tool_timeout)
        with contextlib.closing(connection.events(call)) as events:
            yield from events

    def answer_tool_call(
        self,
        sandbox_id: str,
        cell_id: str,
        call_id: str,
        *,
        result: Any = None,
        error: Exception | Mapping[str, str] | None = None,
    ) -> None:
        """As `Sandbox.answer_tool_call`."""
        self._call(_calls.answer_tool_call(sandbox_id, cell_id, call_id, result, error))

    def interrupt(self, sandbox_id: str, cell_id: str | None = None) -> bool:
        """As `Sandbox.interrupt`."""
        call = _calls.interrupt(sandbox_id, cell_id)
        return _calls.parse_object(call, self._call(call)).get("interrupted") is True

    def replay(self, sandbox_id: str) -> list[Event]:
        """As `Sandbox.replay`."""
        reader = _calls.EventReader()
        return [*reader.feed(self._call(_calls.replay(sandbox_id))), *reader.finish()]

    def output(self, sandbox_id: str, cell_id: str, stream: str = "stdout") -> bytes:
        """As `Sandbox.output`."""
        return self._call(_calls.output(sandbox_id, cell_id, stream))

    def upload(self, sandbox_id: str, source: Content | LocalPath, remote_path: str) -> None:
        """Put bytes or a local file under `remote_path`.  Raises: OSError (FileAccessError, ...)."""
        connection = self.connection()
        opened = open_source(source)
        try:
            call = _calls.upload(sandbox_id, remote_path, opened.size_bytes)
            connection.call(call, source=opened)
        finally:
            opened.close()

    def download(self, sandbox_id: str, remote_path: str, *, max_bytes: int | None = None) -> bytes:
        """The content of a file.

        Raises: OSError (FileMissing, FileAccessError, ...); TooLarge above max_bytes.
        """
        call = _calls.download(sandbox_id, remote_path)
        if max_bytes is None:
            return self._call(call)
        connection = self.connection()
        content = bytearray()
        with contextlib.closing(connection.stream(call)) as pieces:
            for piece in pieces:
                content += piece
                if len(content) > max_bytes:
                    raise TooLarge(f"download: {remote_path!r:.200} has more than {max_bytes} bytes")
        return bytes(content)

    def download_file(self, sandbox_id: str, remote_path: str, local_path: LocalPath) -> int:
        """Write a file's content to `local_path`, whole or not at all, in constant memory; its size."""
        connection = self.connection()
        call = _calls.download(sandbox_id, remote_path)
        target = Target(local_path)
        try:
            with contextlib.closing(connection.stream(call)) as pieces:
                for piece in pieces:
                    in_thread_sync(target.write, piece)
            target.keep()
        finally:
            target.close()
        return target.size_bytes

    def fork_sandbox(
        self, sandbox_id: str, n: int = 1, *, reseed: bool = True, timeout: float | None = None
    ) -> list[str]:
        """The ids of n forks.  Arguments and errors as `Sandbox.fork`."""
        call = _calls.fork(sandbox_id, n, reseed, timeout)
        read_s = _config.FORK_TIMEOUT_S if timeout is None else timeout + _config.FORK_ANSWER_S
        connection = self.connection()
        return _calls.parse_children(call, connection.call(call, read_timeout_s=read_s), n)

    def merge_into(self, parent_id: str, winner_id: str) -> None:
        """As `Sandbox.merge_into`."""
        call = _calls.merge(parent_id, winner_id)
        connection = self.connection()
        connection.call(call, read_timeout_s=_config.FORK_TIMEOUT_S)

    def merge_sandboxes(
        self,
        sandbox_id: str,
        other_id: str,
        *,
        files: bool | Sequence[str] = True,
        variables: bool | Sequence[str] = True,
        on_conflict: OnConflict | Rule = "error",
        timeout: float | None = None,
    ) -> MergeReport:
        """As `Sandbox.merge`."""
        decided: dict[tuple[str, str], dict[str, str]] = {}
        read_s = _config.FORK_TIMEOUT_S if timeout is None else timeout + _config.FORK_ANSWER_S
        for _ in range(_merging.MAX_ROUNDS):
            call = _merging.merge(sandbox_id, other_id, files, variables, on_conflict, decided.values(), timeout)
            connection = self.connection()
            report = _merging.parse_report(call, connection.call(call, read_timeout_s=read_s))
            if report.applied:
                return report
            if not callable(on_conflict):
                break
            for item in report.unresolved:
                answer = outcome_sync(_merging.ask, on_conflict, item)
                decided[item.kind, item.name] = _merging.resolution(item, answer)
        raise _merging.conflict_error(sandbox_id, other_id, report)

    def snapshot_sandbox(self, sandbox_id: str, name: str, *, timeout: float | None = None) -> SnapshotInfo:
        """As `Sandbox.snapshot`."""
        call = _snapshots.take(sandbox_id, name, timeout)
        read_s = _config.FORK_TIMEOUT_S if timeout is None else timeout + _config.FORK_ANSWER_S
        connection = self.connection()
        answer = connection.call(call, read_timeout_s=read_s)
        return _snapshots.parse(_calls.parse_object(call, answer))

    def snapshots(self) -> list[SnapshotInfo]:
        """The snapshots of this key."""
        call = _snapshots.listing()
        return _snapshots.parse_list(call, self._call(call))

    def delete_snapshot(self, name: str) -> None:
        """Sandboxes that were made of it live on.

        Raises: SnapshotNotFound; Conflict while a sandbox is being made of it.
        """
        self._call(_snapshots.remove(name))

    def diff_sandboxes(
        self,
        sandbox_id: str,
        other_id: str,
        paths: Sequence[str] | None = None,
        *,
        detail: bool = False,
        variables: bool = False,
    ) -> Diff:
        """As `Sandbox.diff`."""
        call = _calls.diff(sandbox_id, other_id, paths, detail, variables)
        connection = self.connection()
        return _calls.parse_diff(call, connection.call(call, read_timeout_s=_config.FORK_TIMEOUT_S))

    def resume_space(
        self,
        space_id: str,
        *,
        timeout_seconds: int | None = None,
        idle_timeout_seconds: int | None = None,
        persistent: bool | None = None,
        egress: Egress | None = None,
    ) -> dict[str, Any]:
        """Raises: NotBuilt if the daemon has no spaces yet."""
        options = {
            "timeout_seconds": timeout_seconds,
            "idle_timeout_seconds": idle_timeout_seconds,
            "persistent": persistent,
            "egress": _egress.reach(egress),
        }
        call = _calls.resume(space_id, options)
        return _calls.parse_created(call, self._call(call))

    def delete_space(self, space_id: str) -> None:
        """Raises: NotBuilt if the daemon has no spaces yet."""
        self._call(_calls.delete_space(space_id))
