"""`podflare tree`: which sandbox of a daemon was forked from which."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from podflare.cli.daemon import NAMED_HOST
from podflare.cli.listing import age_of, named_daemon, usage_texts
from podflare.cli.terminal import console, is_rich, one_line

if TYPE_CHECKING:
    from podflare.wire.api import SandboxInfo

_COLUMNS = (
    "sandbox", "generation", "state", "age", "private memory", "processes", "changed files", "stayed behind", "metadata"
)  # fmt: skip
_GUIDES = ("├── ", "└── ", "│   ", "    ")
_PLAIN_GUIDES = ("  ", "  ", "  ", "  ")


def tree(
    host: str | None = NAMED_HOST,
    as_json: bool = typer.Option(False, "--json", help="A JSON array in the tree's order, each with its depth."),
) -> None:
    """Draw which sandboxes of the daemon were forked from which.

    A fork whose parent is gone stands at the left, with the parent's id in brackets.  `generation` counts the forks in
    the history of a sandbox's state, which a merge brings along; `private memory` is what the sandbox's processes share
    with no other, and `changed files` counts those written or deleted since it was made or forked, so both are what a
    fork has cost; `stayed behind` is what could not cross its fork.
    """
    from podflare import Client

    with Client(named_daemon(host)) as client:
        nodes = list(in_order(client.list_sandboxes(usage=True)))
    if as_json:
        print(json.dumps([{**info.to_json(), "depth": len(last)} for info, last in nodes], indent=2))
        return
    out = console()
    guides = _GUIDES if is_rich(out.file) and out.encoding.startswith("utf") else _PLAIN_GUIDES
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in _COLUMNS:
        table.add_column(column)
    alive = {info.id for info, _ in nodes}
    now_s = time.time()
    for info, last in nodes:
        table.add_row(_branch(last, guides) + _name(info, alive), *_row(info, now_s))
    out.print(table)


def in_order(sandboxes: Sequence[SandboxInfo]) -> Iterator[tuple[SandboxInfo, tuple[bool, ...]]]:
    """Every sandbox once, each behind its parent and before that one's next fork.

    With it, for each level from the left, whether it is the last on that level; () for one at the left.
    """
    alive = {info.id: info for info in sandboxes}
    forks: dict[str | None, list[SandboxInfo]] = {}
    for info in sandboxes:
        forks.setdefault(info.parent_id if info.parent_id in alive else None, []).append(info)
    # Whatever a daemon says: parents in a circle hang below nobody, and are shown from the first of them on.
    roots = [*forks.pop(None, ()), *sandboxes]
    shown: set[str] = set()
    for root in roots:
        stack: list[tuple[SandboxInfo, tuple[bool, ...]]] = [(root, ())]
        while stack:
            info, last = stack.pop()
            if info.id in shown:
                continue
            shown.add(info.id)
            yield info, last
            below = forks.get(info.id, [])
            stack += [(fork, (*last, fork is below[-1])) for fork in reversed(below)]


def _branch(last: tuple[bool, ...], guides: tuple[str, str, str, str]) -> str:
    go_on, end, pass_by, blank = guides
    if not last:
        return ""
    return "".join(blank if is_last else pass_by for is_last in last[:-1]) + (end if last[-1] else go_on)


def _name(info: SandboxInfo, alive: set[str]) -> str:
    if info.parent_id is None or info.parent_id in alive:
        return one_line(info.id)
    return one_line(f"{info.id} [{info.parent_id}]")


def _row(info: SandboxInfo, now_s: float) -> list[str]:
    metadata = " ".join(f"{key}={value}" for key, value in sorted(info.metadata.items()))
    age = age_of(info, now_s)
    used = usage_texts(info.usage) if info.usage else ("?", "?", "?")
    texts = (str(info.generation), info.state, age, *used, _losses(info), metadata)
    return [one_line(text) for text in texts]


def _losses(info: SandboxInfo) -> str:
    report = info.fork_report
    if report is None or report.lossless:
        return ""
    counts = {
        "threads": len(report.threads),
        "processes": report.processes,
        "sockets": report.sockets,
        "pipes": report.pipes,
        "terminals": report.terminals,
    }
    return " ".join(f"{name}={count}" for name, count in counts.items() if count)
