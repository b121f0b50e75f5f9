"""When a signal may become a KeyboardInterrupt: only while user code of a cell runs.

Knows nothing of cells.  Main thread only, where Python runs signal handlers.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
from types import FrameType
from typing import Any, Optional

INTERRUPT_SIGNAL = signal.SIGRTMIN + 5
"""What the agent interrupts with.  Not SIGINT, because system(3) throws that away while its command runs, and
because user code may have a SIGINT handler of its own, which is its right."""


class InterruptGate:
    """The handler of INTERRUPT_SIGNAL and, at first, of SIGINT.  A signal outside of `arm` ... `disarm` is dropped."""

    def __init__(self) -> None:
        self._armed = False
        self._shielded = False
        self._pending = False
        self._round = 0
        """Counts `arm`: which cell runs."""
        self._main_thread = _thread.get_ident()
        sys.unraisablehook = self._on_unraisable
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(INTERRUPT_SIGNAL, self._handle)

    def arm(self) -> None:
        """From now on signals raise.  Reinstalls the handler, which user code of the last cell may have replaced."""
        signal.signal(INTERRUPT_SIGNAL, self._handle)
        self._pending = False
        self._round += 1
        self._armed = True

    def disarm(self) -> None:
        """From the return on, signals are dropped.

        Raises: KeyboardInterrupt if one came before the flag was down; call again then.
        """
        self._armed = False

    def shield(self) -> bool:
        """Put off interrupts until `unshield`, so that a frame is not cut in the middle.

        Returns: what to give to `unshield`.  Other threads than the main one are never interrupted.
        """
        if _thread.get_ident() != self._main_thread or self._shielded:
            return False
        self._shielded = True
        return True

    def unshield(self, shielded: bool) -> None:
        """Raises: KeyboardInterrupt if one was put off."""
        if not shielded:
            return
        self._shielded = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _handle(self, signum: int, frame: Optional[FrameType]) -> None:
        if not self._armed:
            return
        if self._shielded:
            self._pending = True
            return
        raise KeyboardInterrupt

    def _on_unraisable(self, unraisable: Any) -> None:
        """Python drops an exception that is raised in a finalizer or callback (the import system has such).

        An interrupt that fell into one would be lost, so it comes again; from another thread, because here it would
        be dropped once more.
        """
        if self._armed and unraisable.exc_type is KeyboardInterrupt:
            _thread.start_new_thread(self._interrupt_again, (self._round,))
        else:
            sys.__unraisablehook__(unraisable)

    def _interrupt_again(self, round_number: int) -> None:
        if self._armed and self._round == round_number:
            os.kill(os.getpid(), INTERRUPT_SIGNAL)
