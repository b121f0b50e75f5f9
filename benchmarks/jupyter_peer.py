"""The peer that people would otherwise use on their own machine: jupyter_client and ipykernel, no isolation."""

from __future__ import annotations

import subprocess
from types import TracebackType

from jupyter_client.manager import KernelManager

REPLY_S = 60.0


class Jupyter:
    """One local Jupyter kernel and its blocking client."""

    def __init__(self) -> None:
        self._manager = KernelManager(kernel_name="python3")
        self._manager.start_kernel(stderr=subprocess.DEVNULL)
        self._client = self._manager.blocking_client()
        self._client.start_channels()

    def __enter__(self) -> Jupyter:
        self._client.wait_for_ready(timeout=REPLY_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)

    def run(self, code: str) -> str:
        """Standard output of `code`, complete: the cell is over when its kernel says idle."""
        request = self._client.execute(code)
        output = ""
        while True:
            message = self._client.get_iopub_msg(timeout=REPLY_S)
            if message["parent_header"].get("msg_id") != request:
                continue
            if message["msg_type"] == "stream":
                output += message["content"]["text"]
            elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return output
