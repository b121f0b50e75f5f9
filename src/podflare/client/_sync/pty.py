# Generated from _async/pty.py by scripts/unasync.py: change that file, not this one.
"""Terminals in a sandbox.  The names are there; this version of podflare does not build them yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from podflare.client._types import PtySessionInfo
from podflare.errors import NotBuilt

if TYPE_CHECKING:
    from podflare.client._sync.sandbox import Sandbox

PtySessions = list[PtySessionInfo]


def _not_built() -> NoReturn:
    raise NotBuilt(
        "terminals (pty) are not built yet in this version of podflare; run commands with run_code(..., 'bash')"
    )


class PtyHandle:
    """One attached terminal.  Every method raises NotBuilt in this version."""

    def __init__(
        self,
        sandbox: Sandbox,
        event_iter: Any = None,
        on_data: Callable[[bytes], None] | None = None,
        on_exit: Callable[[int], None] | None = None,
    ) -> None:
        self.id = ""
        _not_built()

    def send_input(self, data: bytes | str) -> None:
        _not_built()

    def resize(self, cols: int, rows: int) -> None:
        _not_built()

    def kill(self) -> None:
        _not_built()

    def wait(self, timeout: float | None = None) -> int:
        _not_built()

    def close(self) -> None:
        _not_built()


class PtyNamespace:
    """`sandbox.pty`.  Every method raises NotBuilt in this version."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def create(
        self,
        *,
        cmd: str | list[str],
        cols: int = 80,
        rows: int = 24,
        on_data: Callable[[bytes], None] | None = None,
        on_exit: Callable[[int], None] | None = None,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
        timeout_ms: int = 300_000,
    ) -> PtyHandle:
        """Raises: ValueError if `cmd` is an empty list; NotBuilt otherwise."""
        if not cmd:
            raise ValueError("pty.create(cmd=...): cmd is empty")
        _not_built()

    def attach(
        self,
        pty_id: str,
        *,
        on_data: Callable[[bytes], None] | None = None,
        on_exit: Callable[[int], None] | None = None,
    ) -> PtyHandle:
        _not_built()

    def list(self) -> PtySessions:
        _not_built()


class PtyCalls:
    """The terminal operations of a client.  Every method raises NotBuilt in this version."""

    def pty_create_stream(self, sandbox_id: str, body: dict[str, Any]) -> Any:
        _not_built()

    def pty_attach_stream(self, sandbox_id: str, pty_id: str) -> Any:
        _not_built()

    def pty_input(self, sandbox_id: str, pty_id: str, data: bytes) -> None:
        _not_built()

    def pty_resize(self, sandbox_id: str, pty_id: str, cols: int, rows: int) -> None:
        _not_built()

    def pty_kill(self, sandbox_id: str, pty_id: str) -> None:
        _not_built()

    def pty_list(self, sandbox_id: str) -> list[dict[str, Any]]:
        _not_built()

    def pty_read(
        self, sandbox_id: str, pty_id: str, since_seq: int, max_bytes: int = 65536, timeout_ms: int = 10_000
    ) -> dict[str, Any]:
        _not_built()
