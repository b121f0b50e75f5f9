"""A QEMU that ends at any word of its monitor's first conversation."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from podflare.engines.microvm.console import Console
from podflare.engines.microvm.qemu import QemuVm
from podflare.errors import MachineFailed

pytestmark = pytest.mark.anyio

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}
PROGRAM = "import sys; print('what it said last', flush=True); sys.stdin.read()"


def converse(monitor: socket.socket, process: subprocess.Popen[bytes], words: int) -> None:
    """Say so many words of what a QEMU says first, and end."""
    with monitor:
        if words:
            monitor.sendall(json.dumps(GREETING).encode() + b"\n")
        if words > 1:
            assert b"qmp_capabilities" in monitor.recv(4096)
            monitor.sendall(b'{"return": {}}\n')
    process.kill()


@pytest.mark.parametrize("words", range(3))
async def test_a_qemu_that_ends_early_failed_to_start(tmp_path: Path, words: int) -> None:
    """Without a greeting, before and right after the handshake: MachineFailed with its last line, whatever QMP's own
    client makes of it; or the connection stood for a moment, and the next order fails like that."""
    pairs = [socket.socketpair() for _ in range(4)]
    (channel, _), (control, _), (monitor, theirs), (console, its_output) = pairs
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=its_output.fileno())
    vm = QemuVm(process, tmp_path, os.open(tmp_path, os.O_RDONLY), channel, control, Console(console))
    speaker = threading.Thread(target=converse, args=(theirs, process, words))
    speaker.start()
    try:
        with pytest.raises(MachineFailed, match=r"QEMU did not start: .|did not obey"):
            await vm.connect(monitor)
            await vm.resume()
    finally:
        speaker.join()
        await vm.aclose()
        process.communicate()
        for pair in pairs:
            for sock in pair:
                sock.close()
