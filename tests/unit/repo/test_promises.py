"""What the repository promises about itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("changes/*.md")])


def _test_functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node


def test_every_test_states_the_fact_that_it_proves() -> None:
    """Each test function has a docstring."""
    silent = [
        f"{path.name}:{test.name}" for path in TESTS for test in _test_functions(path) if not ast.get_docstring(test)
    ]
    assert not silent


def test_locks_pin_every_package_and_name_no_index() -> None:
    """A lock is a list of name==version and nothing else: no address, no path, no option."""
    for path in sorted((ROOT / "requirements").glob("*.lock")):
        for line in path.read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+", line), (
                f"{path.name}: {line}"
            )


def test_the_lock_holds_every_direct_dependency() -> None:
    """A package that pyproject.toml names and the lock does not would be installed unpinned."""
    text = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0]
    # The lock is for Python 3.11 and newer: what only an older one needs is not in it.
    named = re.findall(r'"([A-Za-z0-9_.-]+)[^";]*[<>=][^";]*"', text)
    lock = {_canonical(line.split("==")[0]) for line in (ROOT / "requirements/dev.lock").read_text().splitlines()}
    assert named and not {_canonical(name) for name in named} - lock


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("path", ["src", "tests", "scripts", "benchmarks", "docs", "requirements"])
def test_no_machine_path_is_written_down(path: str) -> None:
    """No file names the directory that it was written in: a clone works anywhere."""
    for file in (ROOT / path).rglob("*"):
        if file.is_file() and file.suffix in (".py", ".md", ".toml", ".sh", ".lock") and "results" not in file.parts:
            assert str(ROOT) + "/" not in file.read_text(encoding="utf-8"), file


def test_every_page_is_listed() -> None:
    """docs/index.md leads to each page under docs/."""
    index = (ROOT / "docs/index.md").read_text()
    assert not [
        page.name for page in ROOT.glob("docs/*.md") if page.name != "index.md" and f"({page.name})" not in index
    ]


def test_every_command_is_in_the_reference() -> None:
    """docs/cli.md has a section for each command that the program has."""
    from podflare.cli.app import make_app

    page = (ROOT / "docs/cli.md").read_text()
    names = [command.name for command in make_app().registered_commands]
    assert names and not [name for name in names if f"## podflare {name}\n" not in page]


def test_every_setting_of_the_daemon_is_in_the_operations_page() -> None:
    """Each environment variable that the daemon reads is explained."""
    page = (ROOT / "docs/operations.md").read_text()
    known = set(re.findall(r"PODFLARE_[A-Z_]+", (ROOT / "src/podflare/host/config.py").read_text()))
    assert known and not [name for name in known - {"PODFLARE_FC_POOL_SIZE"} if name not in page]


def test_every_wall_is_explained() -> None:
    """docs/security-model.md says what each wall stops, or that no engine of this version puts it up."""
    from typing import get_args

    from podflare.engines.base import Wall

    page = (ROOT / "docs/security-model.md").read_text()
    assert not [wall for wall in get_args(Wall) if f"`{wall}`" not in page]


def test_every_goal_names_its_benchmark() -> None:
    """Each row of SPEC.md's goals links the benchmark that measures it, or says that it is pending."""
    table = (ROOT / "SPEC.md").read_text().split("## Measured")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith(("| what", "|---"))]
    assert rows and not [row for row in rows if "](benchmarks/" not in row and "pending" not in row]


def test_every_promise_of_security_names_its_tests() -> None:
    """Each numbered promise of SECURITY.md links at least one test."""
    text = (ROOT / "SECURITY.md").read_text()
    promises = re.split(r"(?m)^(?=\d+\. )", text.split("## Promises")[1].split("\n## ")[0])[1:]
    assert promises and not [promise for promise in promises if "](tests/" not in promise]


def test_agents_page_stays_short() -> None:
    """AGENTS.md links and does not repeat: fewer than 60 lines."""
    assert len((ROOT / "AGENTS.md").read_text().splitlines()) < 60
