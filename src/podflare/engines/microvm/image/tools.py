"""The programs of this computer that a build calls, and what to say where one is missing or fails."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from podflare.errors import TemplateFailed

PACKAGES: Mapping[str, str] = {
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg-deb": "dpkg",
    "sqfstar": "squashfs-tools",
    "lz4": "lz4",
}
"""Program -> package of Debian and Ubuntu that has it."""
MAX_CHARS = 800
"""Of what a program said, in an error."""


def missing() -> tuple[str, ...]:
    """Programs that are not on the PATH."""
    return tuple(name for name in PACKAGES if shutil.which(name) is None)


def check() -> None:
    """Raises: TemplateFailed that names every missing program and how to get them."""
    lost = missing()
    if lost:
        packages = " ".join(dict.fromkeys(PACKAGES[name] for name in lost))
        raise TemplateFailed(
            f"building an image needs {', '.join(lost)}, which the PATH does not have "
            f"(Debian and Ubuntu: apt-get install {packages})"
        )


def run(
    command: Sequence[str],
    *,
    timeout_s: float,
    cwd: Path | None = None,
    stdin: bytes | None = None,
    environment: Mapping[str, str] | None = None,
) -> bytes:
    """Standard output of a program.

    Raises: TemplateFailed that says which program failed, and its last words.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=timeout_s, cwd=cwd, input=stdin, env=environment, check=False
        )
    except FileNotFoundError as exc:
        raise TemplateFailed(f"{command[0]} is missing") from exc
    except subprocess.TimeoutExpired as exc:
        raise TemplateFailed(f"{command[0]} did not end within {timeout_s:g} s") from exc
    if done.returncode != 0:
        raise TemplateFailed(failure(command, done.returncode, done.stderr))
    return done.stdout


def failure(command: Sequence[str], status: int, said: bytes) -> str:
    """Words for a program that failed."""
    text = " ".join(said.decode("utf-8", "replace").split())
    return f"{command[0]} failed with status {status}: {text[-MAX_CHARS:]}"


def stream(
    command: Sequence[str], *, status_of: Callable[[str], None], cwd: Path | None = None, environment: Mapping[str, str]
) -> None:
    """Run a program and give each line that it writes to `status_of`; its errors become TemplateFailed."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd, env=environment
    ) as process:
        assert process.stdout is not None
        said: list[bytes] = []
        try:
            for line in process.stdout:
                status_of(line.decode("utf-8", "replace").rstrip())
                said = [*said[-20:], line]
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise TemplateFailed(failure(command, process.returncode, b"".join(said)))
