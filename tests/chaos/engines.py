"""What the processes of each engine's daemons are, and how often each is killed or stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from chaos import processes as p
from chaos.processes import Process


@dataclass(frozen=True)
class Engine:
    """For a stand and its killer."""

    name: str
    kind_of: Callable[[Process, int, Mapping[int, Process]], str]
    """Of a process below a daemon of a pid, "" for nothing of ours."""
    kills: Mapping[str, int]
    """Kind -> weight."""
    stops: Mapping[str, int]
    of_each_sandbox: tuple[str, ...]
    """Kinds of which each sandbox has one process."""
    of_an_idle_daemon: tuple[str, ...]
    """Kinds that may be there without a sandbox."""
    templates: tuple[str, ...]
    """What clients create."""


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "process",
            p.kind_of,
            {
                p.ZYGOTE: 3, p.PRELOAD: 2, p.ZYGOTE_HELPER: 2, p.FAMILY: 6, p.FAMILY_HELPER: 5, p.AGENT: 6,
                p.REPL: 12, p.REPL_CHILD: 4, p.BASH: 4,
            },
            {p.DAEMON: 1, p.ZYGOTE: 1, p.FAMILY: 2, p.FAMILY_HELPER: 1, p.AGENT: 2, p.REPL: 3},
            (p.FAMILY, p.AGENT, p.REPL),
            (p.DAEMON, p.ZYGOTE, p.PRELOAD),
            ("default", "default", "warm"),
        ),
        Engine(
            "microvm",
            p.kind_of_vm,
            {p.HYPERVISOR: 5, p.HYPERVISOR_HELPER: 1},
            {p.DAEMON: 1, p.HYPERVISOR: 4},
            (p.HYPERVISOR,),
            (p.DAEMON,),
            ("default",),
        ),
    )
}  # fmt: skip
