"""scripts/unasync.py: the synchronous half is what the asynchronous one says."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts/unasync.py"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("unasync", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def unasync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on a copy of the code."""
    module = loaded()
    for name in ("SOURCE", "TARGET"):
        copy = tmp_path / getattr(module, name).name
        shutil.copytree(getattr(module, name), copy, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(module, name, copy)
    return module


def test_generated_code_is_up_to_date() -> None:
    """`--check` passes on the checkout."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_stale_code_is_found_and_rewritten(unasync: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A hand-made change of generated code fails the check and is undone by a run."""
    target = unasync.TARGET / "pty.py"
    text = target.read_text()
    target.write_text(text + "\n# edited by hand\n")
    assert unasync.main(["--check"]) == 1
    assert "pty.py" in capsys.readouterr().err
    assert unasync.main([]) == 0
    assert target.read_text() == text


def test_rule_without_use_fails(unasync: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]  # fixture
    """A replacement that nothing needs any more is reported."""
    monkeypatch.setitem(unasync.WORDS, "AsyncNothing", "Nothing")
    assert unasync.main(["--check"]) == 1
    assert "AsyncNothing" in capsys.readouterr().err


def test_generated_file_without_source_fails(unasync: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """What is left of a removed source is reported."""
    (unasync.TARGET / "old.py").write_text("")
    assert unasync.main(["--check"]) == 1
    assert "old.py" in capsys.readouterr().err


def test_generated_code_waits_for_nothing() -> None:
    """No asynchronous word is left in the synchronous half."""
    for path in loaded().TARGET.glob("*.py"):
        words = set(path.read_text().split("by scripts/unasync.py", 1)[-1].replace("(", " ").split())
        assert not words & {"async", "await", "anyio", "asyncio", "AsyncIterator"}, path
