"""What is built from the checkout is complete."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from programs import Cli

ROOT = Path(__file__).resolve().parents[3]


def test_the_wheel_alone_runs_a_sandbox(cli: Cli, tmp_path: Path) -> None:
    """Unpacked outside of the checkout, the wheel starts its daemon, its guest and a cell."""
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-qq",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        assert "podflare/engines/templates/definitions/python-datasci.toml" in archive.namelist()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PODFLARE_")}
    code = (
        "import podflare, sys; sys.stderr.write(podflare.__file__); "
        "from podflare.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "-c", "print(6 * 7)"], cwd=tmp_path, capture_output=True, text=True,
        env={**environment, "PYTHONPATH": str(tmp_path / "site")}, timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("42\n", str(tmp_path / "site/podflare/__init__.py"), 0)
