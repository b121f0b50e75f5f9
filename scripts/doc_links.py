"""Every relative link in the Markdown pages leads somewhere: the file exists, and so does the heading or test named.

`[words](tests/security/test_x.py::test_name)` names a test, which must be defined there.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)
PAGES = ("*.md", "docs/*.md", "changes/*.md", "benchmarks/*.md", "tests/**/*.md")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts derive them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in HEADING.findall(text)}


def defined(module: Path) -> set[str]:
    """Names that `path::name` may use: functions, classes and `Class::method`."""
    names: set[str] = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}::{item.name}"
                for item in node.body
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return names


def broken(page: Path) -> list[str]:
    """One line for each link of `page` that leads nowhere."""
    problems = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        path, _, test = path.partition("::")
        target = (page.parent / path).resolve() if path else page
        where = f"{page.relative_to(ROOT)}: {link}"
        if not target.exists():
            problems.append(f"{where}: no such file")
        elif test and test not in defined(target):
            problems.append(f"{where}: no such test")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            problems.append(f"{where}: no such heading")
    return problems


def main() -> int:
    pages = sorted({page for pattern in PAGES for page in ROOT.glob(pattern)})
    problems = [line for page in pages for line in broken(page)]
    print("\n".join(problems) if problems else f"links of {len(pages)} pages fine")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
