"""The floor: the same HTTP stack (uvicorn, httpx) carrying the same two NDJSON lines, and nothing behind it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from types import TracebackType

import httpx

_APP = """
import sys, uvicorn

async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-ndjson")]})
    for line in (b'{"type":"stdout","data":"2","seq":0,"ts":1}', b'{"type":"exit","data":0,"seq":1,"ts":1}'):
        await send({"type": "http.response.body", "body": line + b"\\n", "more_body": b"stdout" in line})

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), lifespan="off", log_level="error", access_log=False)
"""
START_S = 30.0


class Echo:
    """The echo server in a process of its own, and its client."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._process = subprocess.Popen([sys.executable, "-c", _APP, str(port)], stdin=subprocess.DEVNULL)
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)

    def __enter__(self) -> Echo:
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.run("")
                return self
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    self.__exit__(None, None, None)
                    raise
                time.sleep(0.02)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait()

    def run(self, code: str) -> str:
        """Send `code`, read the two events back."""
        output = ""
        with self._client.stream("POST", "/exec", json={"code": code, "language": "python"}) as response:
            for line in response.iter_lines():
                event = json.loads(line)
                if event["type"] == "stdout":
                    output += event["data"]
        return output
