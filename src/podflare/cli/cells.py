"""One cell at a time, shown as it runs; Ctrl-C goes to the cell, not to the connection that carries its output."""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from podflare.cli.terminal import write_output
from podflare.wire.events import EXIT, STDERR, STDOUT

if TYPE_CHECKING:
    from podflare import Event, Language, Sandbox

_QUEUED_EVENTS = 256
"""How far the connection may run ahead of a slow terminal."""
_LEAVE_S = 10.0
"""How long an abandoned cell's stream may take to end; the daemon ends an interrupted cell in less."""

Show = Callable[["Event"], None]


def show_output(event: Event) -> None:
    """The two output streams to ours; everything else is left out."""
    if event.type == STDOUT:
        write_output(str(event.data), sys.stdout)
    elif event.type == STDERR:
        write_output(str(event.data), sys.stderr)


def run_cell(
    sandbox: Sandbox,
    code: str,
    *,
    language: Language = "python",
    timeout_s: float | None = None,
    show: Show = show_output,
) -> int:
    """Run `code` and give each event to `show` as it arrives; the cell's exit code.

    Ctrl-C interrupts the cell, whose exit then tells so; a second one raises KeyboardInterrupt here.
    Raises: PodflareError if the cell could not be run to its end; what `show` raises, after interrupting the cell.
    """
    pump = _Pump(sandbox, code, language, timeout_s)
    exit_code = -1
    with _ctrl_c_goes_to(sandbox):
        pump.start()
        try:
            while (event := pump.next()) is not None:
                if event.type == EXIT:
                    exit_code = int(event.data)
                show(event)
        finally:
            pump.leave()
    return exit_code


@contextlib.contextmanager
def _ctrl_c_goes_to(sandbox: Sandbox) -> Iterator[None]:
    """Within the block the first SIGINT interrupts the sandbox's cell, and only the second raises KeyboardInterrupt.

    A handler, because KeyboardInterrupt would come up wherever the main thread is, half-written output included.
    """
    pressed = 0

    def on_sigint(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise KeyboardInterrupt
        sandbox.interrupt()

    before = signal.signal(signal.SIGINT, on_sigint)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Pump(threading.Thread):
    """Carries a cell's events from the SDK to the main thread, which alone gets KeyboardInterrupt."""

    def __init__(self, sandbox: Sandbox, code: str, language: Language, timeout_s: float | None) -> None:
        super().__init__(name="podflare-cell", daemon=True)
        self._sandbox = sandbox
        self._request = (code, language, timeout_s)
        self._events: queue.Queue[Event | BaseException | None] = queue.Queue(_QUEUED_EVENTS)

    def run(self) -> None:
        code, language, timeout_s = self._request
        try:
            for event in self._sandbox.run_code_stream(code, language, timeout=timeout_s):
                self._events.put(event)
        except BaseException as error:  # noqa: BLE001 - crosses to the main thread, which raises it
            self._events.put(error)
        else:
            self._events.put(None)

    def next(self) -> Event | None:
        """The next event, None at the end.  Raises what the stream raised."""
        item = self._events.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def leave(self) -> None:
        """Return once the stream is over; a cell that still runs is interrupted first."""
        if not self.is_alive():
            return
        self.join(0.05)
        if self.is_alive():
            self._sandbox.interrupt()
            while self.is_alive():
                try:
                    self._events.get(timeout=_LEAVE_S)
                except queue.Empty:
                    return
