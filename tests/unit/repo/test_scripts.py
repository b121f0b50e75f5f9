"""The repository's own checks find what they are for."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from podflare.cli.app import make_app

ROOT = Path(__file__).resolve().parents[3]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_long_function_is_measured_without_its_docstring() -> None:
    """The rule counts code: a long contract does not count, and methods have their class in their name."""
    source = 'class A:\n    def f(self):\n        """One\n\n        two."""\n        x = 1\n        return x\n'
    assert list(_script("file_sizes").functions(ast.parse(source))) == [("A.f", 3)]


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file, heading or test each is one line of complaint; what exists is none."""
    links = _script("doc_links")
    monkeypatch.setattr(links, "ROOT", tmp_path)
    (tmp_path / "test_a.py").write_text("def test_here(): ...\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# A Title: here\n[ok](#a-title-here) [ok](test_a.py::test_here) [ok](https://x.y/z)\n"
        "[bad](nowhere.md) [bad](#nowhere) [bad](test_a.py::test_gone)\n```\n[ignored](gone.md)\n```\n"
    )
    found = links.broken(page)
    assert [line.partition("page.md: ")[2].split(":")[0] for line in found] == ["nowhere.md", "#nowhere", "test_a.py"]


def test_the_reference_covers_the_programs_commands() -> None:
    """The generator's list of commands is the program's, those of groups included."""
    app = make_app()
    names = {command.name for command in app.registered_commands}
    for group in app.registered_groups:
        assert group.typer_instance is not None
        names |= {str(group.name), *(f"{group.name} {one.name}" for one in group.typer_instance.registered_commands)}
    assert set(_script("cli_reference").COMMANDS) - {""} == names


def test_benchmark_figures_are_what_statistics_says() -> None:
    """Median and p95 interpolate between ranks, and a ratio above 1 means faster than the peer."""
    from benchmarks.series import Series, percentile, ratios

    assert percentile([4, 1, 3, 2], 50) == 2.5 and percentile(range(101), 95) == 95
    ours, peer = Series("ours", "ms", (2.0,), peer="theirs"), Series("theirs", "ms", (8.0,))
    assert [(item.name, times) for item, times in ratios([ours, peer])] == [("ours", 4.0)]


def test_comparison_tells_change_from_scatter() -> None:
    """A median that moved by less than the scatter is unchanged; one far outside it is a change."""
    from benchmarks.compare import verdict

    before = {"values": [1.0, 1.1, 0.9, 1.05, 0.95], "unit": "ms"}
    assert verdict("a", before, {"values": [1.02, 1.1, 0.95], "unit": "ms"}).startswith("unchanged")
    assert verdict("a", before, {"values": [2.0, 2.1, 1.9], "unit": "ms"}).startswith("CHANGED")


def test_setup_refuses_an_interpreter_that_is_too_old(tmp_path: Path) -> None:
    """One line says what is wanted, and nothing is installed."""
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "requirements").mkdir()
    for name in ("pyproject.toml", "requirements/dev.lock", "scripts/setup.sh"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        ["bash", "scripts/setup.sh"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "no Python 3.10 or newer" in done.stderr and not (tmp_path / ".venv").exists()
