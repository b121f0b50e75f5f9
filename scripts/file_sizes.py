"""House rule 2: a source file has at most 600 lines and a function at most 50, or a reason in pyproject.toml.

Reasons stand in `[tool.podflare.file-size]` as `"path" = "reason"` (files) and in `[tool.podflare.function-size]`
as `"path:function" = "reason"`.  A reason that is no longer needed fails the check too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: mypy brings the same parser there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES = 600
FUNCTION_LINES = 50


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Qualified name and line count (docstring left out) of every function below `tree`."""
    for node in ast.iter_child_nodes(tree):
        name = getattr(node, "name", "")
        qualified = f"{prefix}{name}." if name else prefix
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
            yield qualified.rstrip("."), lines
        yield from functions(node, qualified)


def too_large() -> dict[str, str]:
    """What breaks the rule now: key -> what was found."""
    found: dict[str, str] = {}
    for folder in ("src", "tests", "scripts", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            key = path.relative_to(ROOT).as_posix()
            lines = text.count("\n")
            if lines > FILE_LINES:
                found[key] = f"{lines} lines, the ceiling is {FILE_LINES}"
            if folder == "src":
                for name, length in functions(ast.parse(text)):
                    if length > FUNCTION_LINES:
                        found[f"{key}:{name}"] = f"{length} lines, the ceiling is {FUNCTION_LINES}"
    return found


def main() -> int:
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")).get("tool", {}).get("podflare", {})
    allowed = {**rules.get("file-size", {}), **rules.get("function-size", {})}
    found = too_large()
    problems = [f"{key}: {what}" for key, what in found.items() if key not in allowed]
    problems += [f"{key}: listed in pyproject.toml and no longer too large" for key in allowed if key not in found]
    problems += [f"{key}: listed in pyproject.toml without a reason" for key, why in allowed.items() if not why.strip()]
    print("\n".join(problems) if problems else "sizes fine")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
