"""Compile and run the code of one cell in a namespace.  Knows nothing of channels, signals or streams.

The dialect: like a notebook cell.  The last expression's value is handed back unless a `;` follows it, `await` works
at top level, uniformly indented code is accepted, `from __future__` imports last for all later cells.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import sys
from types import CodeType
from typing import Any, Coroutine, Dict, List, Optional

_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_CO_COROUTINE = 0x80
_FEATURES = [getattr(__future__, name) for name in __future__.all_feature_names]
NO_VALUE = object()


class Compiler:
    """Source -> code objects; remembers which future features are on."""

    def __init__(self) -> None:
        self._flags = 0

    def compile(self, source: str, name: str) -> "CompiledCell":
        """Raises: what the compiler raises (SyntaxError, ValueError, MemoryError, RecursionError)."""
        tree = self._parse(source, name)
        value: Optional[ast.Expression] = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = tree.body.pop()
            assert isinstance(last, ast.Expr)
            value = ast.Expression(last.value)
            silent = _ends_with_semicolon(source, last)
        body = self._finish(tree, name, "exec") if tree.body else None
        if value is None:
            return CompiledCell(body, None, silent=True)
        return CompiledCell(body, self._finish(value, name, "eval"), silent=silent)

    def _finish(self, tree: ast.AST, name: str, mode: str) -> CodeType:
        code: CodeType = compile(tree, name, mode, _AWAIT | self._flags, dont_inherit=True)  # type: ignore[call-overload]
        for feature in _FEATURES:
            if code.co_flags & feature.compiler_flag:
                self._flags |= feature.compiler_flag
        return code

    def _parse(self, source: str, name: str) -> ast.Module:
        try:
            return self._ast(source, name)
        except IndentationError as exc:
            tree = self._parse_indented(source, name)
            if tree is None:
                raise exc from None
            return tree

    def _parse_indented(self, source: str, name: str) -> Optional[ast.Module]:
        """Code that is indented as a whole, taken as the body of a block: string literals in it stay as they are."""
        try:
            tree = self._ast("if 1:\n" + source, name)
        except IndentationError:
            return None
        except SyntaxError as exc:
            # Indented as a whole and wrong elsewhere: the user's mistake is this one, a line further up.
            for attribute in ("lineno", "end_lineno"):
                line = getattr(exc, attribute, None)
                if line:
                    setattr(exc, attribute, line - 1)
            raise exc from None
        block = tree.body[0]
        if len(tree.body) != 1 or not isinstance(block, ast.If) or block.orelse:
            return None
        return ast.increment_lineno(ast.Module(body=block.body, type_ignores=[]), -1)

    def _ast(self, source: str, name: str) -> ast.Module:
        flags = ast.PyCF_ONLY_AST | _AWAIT | self._flags
        tree = compile(source, name, "exec", flags, dont_inherit=True)
        assert isinstance(tree, ast.Module)
        return tree


class CompiledCell:
    """Statements, then perhaps a last expression."""

    def __init__(self, body: Optional[CodeType], value: Optional[CodeType], *, silent: bool) -> None:
        self._body = body
        self._value = value
        self._silent = silent

    def run(self, namespace: Dict[str, Any], awaiter: "Awaiter") -> Any:
        """Run it; the last expression's value, or NO_VALUE if there is none to show."""
        if any(code is not None and code.co_flags & _CO_COROUTINE for code in (self._body, self._value)):
            # All of the cell inside the loop: what stands before the first await may need a running one, too.
            value = awaiter.run(self._run_awaiting(namespace))
        else:
            if self._body is not None:
                eval(self._body, namespace)
            value = None if self._value is None else eval(self._value, namespace)
        if self._silent or value is None:
            return NO_VALUE
        builtins._ = value  # type: ignore[attr-defined]  # as the interactive interpreter does
        return value

    async def _run_awaiting(self, namespace: Dict[str, Any]) -> Any:
        value = None
        for code in (self._body, self._value):
            if code is not None:
                value = eval(code, namespace)
                if code.co_flags & _CO_COROUTINE:
                    value = await value
        return None if self._value is None else value


class Awaiter:
    """The event loop for `await` at top level: one for all cells, so that what is bound to it lives on between them."""

    def __init__(self) -> None:
        self._loop: Any = None

    def run(self, coroutine: "Coroutine[Any, Any, Any]") -> Any:
        """The coroutine's value.

        If interrupted: its task is cancelled and has run its clean-up; KeyboardInterrupt shows where it waited.
        """
        import asyncio  # not before it is needed: most sandboxes never await, and it takes 30 ms to import

        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        task = self._loop.create_task(coroutine)
        try:
            return self._loop.run_until_complete(task)
        except KeyboardInterrupt as interrupt:
            if task.done():
                raise
            task.cancel()
            try:
                self._loop.run_until_complete(task)
            except asyncio.CancelledError as cancelled:
                raise interrupt.with_traceback(cancelled.__traceback__) from None
            raise

    def after_fork(self) -> None:
        """In a forked REPL: give the loop a self-pipe of its own, so that its timers and tasks go on here, too.

        Its epoll instance and sockets were replaced already (inheritance.py); what waits for a socket waits for ever.
        """
        if self._loop is None or self._loop.is_closed():
            return
        try:
            self._loop._close_self_pipe()
            self._loop._make_self_pipe()
        except Exception:  # noqa: BLE001  # not a loop of the standard library, or another version of it
            self._loop = None


def _ends_with_semicolon(source: str, last: ast.stmt) -> bool:
    """Whether a `;` follows the last statement.  After it only parentheses, `;` and comments can come."""
    assert last.end_lineno is not None and last.end_col_offset is not None
    if ";" not in source:
        return False
    lines: List[str] = source.split("\n") if "\r" not in source else _python_lines(source)
    rest = lines[last.end_lineno - 1 :]
    # Columns are counted in UTF-8 bytes.
    rest[0] = rest[0].encode("utf-8", "surrogatepass")[last.end_col_offset :].decode("utf-8", "replace")
    return any(";" in line.split("#", 1)[0] for line in rest)


def _python_lines(source: str) -> List[str]:
    """Lines as the tokenizer counts them: \\r\\n and \\r end a line as \\n does, nothing else."""
    return source.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def exit_status(exc: SystemExit) -> int:
    """The exit code by CPython's rule; a message goes to sys.stderr."""
    code = exc.code
    if code is None:
        return 0
    if isinstance(code, int):
        return int(code) & 0xFF if -(2**31) <= code < 2**31 else 255
    print(code, file=sys.stderr)
    return 1
