"""A daemon over the fake engine as a process of its own: `python fake_daemon.py '{"uds": ...}'`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from podflare.engines.fake import FakeEngine
from podflare.errors import PodflareError
from podflare.host.config import Config
from podflare.serve import serve


def main() -> int:
    given = json.loads(sys.argv[1])
    given["data_dir"] = Path(given["data_dir"])
    try:
        return serve(Config.from_environment(os.environ, **given), lambda options: FakeEngine())
    except PodflareError as exc:
        print(f"podflare: {exc}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
