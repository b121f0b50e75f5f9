"""`podflare serve`: the host daemon.  Imports argparse only, because the first `Sandbox()` waits for this command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from podflare.errors import PodflareError

_DESCRIPTION = """\
Serve sandboxes over HTTP until SIGTERM or SIGINT.

On loopback no API key is needed; any other address needs PODFLARE_API_KEYS (comma-separated) or
PODFLARE_AUTH_DISABLED=1.
Further settings are environment variables, see docs/operations.md.  The API is described at /docs of the address."""


def parser() -> argparse.ArgumentParser:
    """The options of `podflare serve`.  None stands for the daemon's own default or its environment."""
    options = argparse.ArgumentParser(
        prog="podflare serve",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = options.add_argument_group("where it listens")
    where.add_argument("--host", metavar="ADDRESS", help="address to bind (127.0.0.1)")
    where.add_argument("--port", type=_port, metavar="PORT", help="port to bind, 0 for a free one (7070)")
    where.add_argument("--uds", metavar="PATH", help="Unix socket, mode 0600, in place of address and port")
    what = options.add_argument_group("what it runs")
    what.add_argument(
        "--engine",
        dest="engines",
        action="append",
        metavar="NAME",
        help="engine that makes the sandboxes (process); repeat it to offer several, the first is the default",
    )
    what.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where sandboxes' files live (/var/lib/podflare as root)"
    )
    what.add_argument(
        "--template-dir", type=Path, metavar="DIR", help="where built templates are (PODFLARE_TEMPLATE_DIR)"
    )
    what.add_argument(
        "--image-dir", type=Path, metavar="DIR", help="where images of virtual machines are (PODFLARE_IMAGE_DIR)"
    )
    _add_vm_options(what)
    what.add_argument(
        "--pool-size", type=_count, metavar="N", help="warm sandboxes kept ready (process: 4, microvm: 2)"
    )
    # For the SDK, which starts a private daemon with them.
    options.add_argument("--embedded", action="store_const", const=True, help=argparse.SUPPRESS)
    options.add_argument("--parent-pid", type=_count, help=argparse.SUPPRESS)
    options.add_argument("--announce", action="store_const", const=True, help=argparse.SUPPRESS)
    return options


def _add_vm_options(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "--vmm",
        choices=("auto", "qemu", "firecracker"),
        help="virtual machine monitor of the engine microvm (auto: what can work with KVM, of two QEMU)",
    )
    what.add_argument("--firecracker", type=Path, metavar="PATH", help="the Firecracker to take (that on the PATH)")
    what.add_argument(
        "--disk-rate-mib",
        type=_count,
        metavar="MIB",
        help="what a virtual machine may read from its disk and write to it in a second (no limit)",
    )
    what.add_argument(
        "--disk-rate-operations", type=_count, metavar="N", help="how often it may do so in a second (no limit)"
    )


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def _port(text: str) -> int:
    number = _count(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text} is above 65535")
    return number


def run_serve(arguments: Sequence[str]) -> int:
    """Parse `arguments` and serve; the exit code."""
    try:
        given = vars(parser().parse_args(arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    if given["uds"] is not None and (given["host"] is not None or given["port"] is not None):
        print("podflare serve: --uds takes the place of --host and --port: give one or the other", file=sys.stderr)
        return 2
    from podflare.serve import serve_forever

    try:
        return serve_forever(**given)
    except PodflareError as error:
        print(f"podflare: {error}", file=sys.stderr)
        return 1
