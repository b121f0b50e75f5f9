"""Promise: the bundle runs under every supported interpreter, alone, and takes nothing of a user's with it."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from interpreters import VERSIONS, find_python
from podflare.engines.bundle import build_bundle


@pytest.fixture(params=VERSIONS)
def python(request: pytest.FixtureRequest) -> str:
    """Each supported interpreter that this computer has."""
    found = find_python(request.param)
    if found is None:
        pytest.skip(f"no Python {request.param} on PATH or in ~/.pyenv/versions")
    return found


def test_guest_runs_under_every_interpreter(start_guest, python):
    """Cells, tracebacks, awaits, bash, interrupts, restarts and files work under each interpreter from 3.9 on."""
    guest = start_guest(python=python)
    version = guest.wait_ready().python
    assert guest.run("import platform; print(platform.python_version())").out.strip() == version
    assert guest.run("x = 1\nx + 1").value == "2"
    assert guest.run("    y = 5\n    y;").value is None
    failed = guest.run("def f():\n    return 1 / 0\nf()")
    assert failed.stderr.splitlines()[1] == f'  File "<cell {guest._channel}>", line 3, in <module>'
    assert "return 1 / 0" in failed.stderr
    assert guest.run("def = 1").error.name == "SyntaxError"
    assert guest.run("import asyncio\nawait asyncio.sleep(0, 'awaited')").value == "'awaited'"
    assert guest.run("asyncio.run(asyncio.sleep(0, 6))").value == "6"
    assert guest.run("import inspect\ndef g(): return 3\nprint(inspect.getsource(g))").out == "def g(): return 3\n\n"
    assert guest.run("import sys; sys.exit(3)").exit.code == 3
    assert guest.run("class A:\n    def _repr_html_(self): return 'h'\nA()").results[0].data["text/html"] == "h"
    assert guest.bash("echo shell; exit 4").exit.code == 4
    channel = guest.start("print('started', flush=True)\nwhile True: pass")
    guest.wait_output(channel, b"started")
    guest.interrupt(channel)
    assert guest.finish(channel).exit.reason == "interrupted"
    assert guest.run("x").value == "1"
    assert guest.write_file("f", b"data").size == 4
    assert guest.read_file("f") == b"data"
    assert guest.run("import os; os._exit(2)").exit.restarted
    assert guest.run("print(open('f').read())").out == "data\n"


def test_concurrent_futures_and_fork_work_under_every_interpreter(start_guest, python):
    """Pools of forked processes run functions that cells defined."""
    guest = start_guest(python=python)
    guest.wait_ready()
    guest.run("def square(n): return n * n")
    cell = guest.run("""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
    print(list(pool.map(square, range(4))))
""")
    assert cell.out == "[0, 1, 4, 9]\n", cell.stderr


def test_bundle_holds_exactly_what_the_guest_needs(bundle):
    """The bundle is an empty package with errors, wire and guest, and a start file; no caches, nothing else."""
    names = sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*.py"))
    assert (bundle / "podflare/__init__.py").read_text() == ""
    tops = {name.split("/")[1] for name in names if name.startswith("podflare/")}
    assert tops == {"__init__.py", "errors.py", "wire", "guest"}
    assert [name for name in names if not name.startswith("podflare/")] == ["__main__.py"]


def test_bundle_imports_the_standard_library_only(bundle):
    """Every import in the bundle is of the standard library or of the bundle."""
    for path in bundle.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                assert top == "podflare" or top in sys.stdlib_module_names, (path, name)


def test_every_module_parses_under_the_oldest_interpreter(bundle):
    """No module of the bundle uses syntax newer than Python 3.9."""
    for path in bundle.rglob("*.py"):
        ast.parse(path.read_text(), filename=str(path), feature_version=(3, 9))


def test_bundle_can_be_built_again_over_itself(tmp_path):
    """Building into a folder that holds a bundle refreshes it."""
    target = build_bundle(tmp_path / "deep" / "bundle")
    (target / "podflare/errors.py").write_text("broken")
    build_bundle(target)
    assert "class PodflareError" in (target / "podflare/errors.py").read_text()


@pytest.mark.parametrize("arguments", [[], ["agent"], ["agent", "x"], ["agent", "1", "2", "3"], ["nonsense"]])
def test_wrong_calls_are_explained(bundle, arguments):
    """A wrong call of the bundle exits with 2 and the usage."""
    done = subprocess.run([sys.executable, "-I", "-S", str(bundle), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_environment_of_the_computer_does_not_matter(start_guest, tmp_path, monkeypatch):
    """PYTHONPATH and a working directory with modules of the standard library's names do not reach the guest."""
    for name in ("json", "select", "struct", "dataclasses"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    guest = start_guest(environment={"PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "json.py")})
    guest.wait_ready()
    assert guest.run("import json; json.dumps(1)").value == "'1'"
