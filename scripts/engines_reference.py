"""Writes docs/engines.md from what the engines say of themselves and the figures of SPEC.md; --check: is it stale?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

from podflare.engines.base import Behaviour, Capability, Wall
from podflare.engines.microvm.birth import INHERENT_WALLS
from podflare.engines.microvm.confinement import ALWAYS, AS_ROOT, ENTERED
from podflare.engines.microvm.engine import MicrovmEngine
from podflare.engines.process.engine import ProcessEngine
from podflare.engines.process.probe import FOREIGN

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "engines.md"
HEAD = """\
# Engines

Written by `make docs`; do not edit. `podflare serve --engine process` (the default), `--engine microvm`
([virtual machines](microvm.md)) or both: SDK, HTTP API, code inside and the rules of cells are the same, and the tests
marked `both_engines` run on each. What differs is below; `podflare doctor` says what of it this computer offers.

With `podflare serve --engine process --engine microvm` the first one is the default, and `Sandbox(engine="microvm")` or
`podflare run --engine microvm` chooses. If one of them cannot work here, the daemon does not start. Forks stay with
their parent's engine; sandboxes of two engines cannot be compared or merged.
"""
BEHAVIOUR = """\
What both can, and do not in the same way. Everything else is the same: the tests marked `any_engine` or `both_engines`
hold it (`make test-microvm` runs all of them on virtual machines), and those marked `process_engine` say why they are
not among them.
"""
WALLS = """\
Walls are explained in the [security model](security-model.md). In the column of `microvm` a wall that is not the
machine's own stands around its hypervisor process, for a guest that has broken out of its machine.
"""
SPEED = """\
Medians from [SPEC](../SPEC.md), in ms; those of `microvm` were measured where instructions are translated (TCG),
because the computer had no hardware virtualisation.
"""
FIGURES = (
    ("create, no pool", "create, no pool", "microvm: create by restore"),
    ("hot cell", "hot cell, SDK to SDK", "microvm: hot cell"),
    ("fork(1)", "fork(1)", "microvm: fork(1)"),
    ("fork(5)", "fork(5)", "microvm: fork(5)"),
    ("fork(32)", "fork(32)", "microvm: fork(32)"),
    ("the parent stands still", "", "microvm: pause of the parent"),
    (
        "memory that a child adds, MiB",
        "memory that a forked child adds (PSS)",
        "microvm: memory that a child adds (PSS)",
    ),
)


def page() -> str:
    rows = [
        (name, ProcessEngine.capabilities.get(name, "no"), MicrovmEngine.capabilities.get(name, "no"))
        for name in get_args(Capability)
    ]
    ways = [(name, ProcessEngine.behaviour[name], MicrovmEngine.behaviour[name]) for name in get_args(Behaviour)]
    walls = [(f"`{wall}`", "no" if wall in FOREIGN else "yes", _of_microvm(wall)) for wall in get_args(Wall)]
    medians = _medians()
    speed = [(name, medians.get(one, "-"), medians.get(other, "pending")) for name, one, other in FIGURES]
    return "\n".join(
        (
            HEAD,
            _table("Capabilities", rows),
            _table("Behaviour", ways, BEHAVIOUR),
            _table("Walls", walls, WALLS),
            _table("Speed", speed, SPEED),
        )
    )


def _of_microvm(wall: Wall) -> str:
    if wall in INHERENT_WALLS:
        return "the machine's own"
    if wall in ALWAYS:
        return "around the hypervisor"
    if wall in ENTERED:
        return "around the hypervisor, as root; else where Firecracker has a network"
    if wall in AS_ROOT:
        return "around the hypervisor, as root"
    return "control group" if wall == "cpu_limit" else "no need: it has a kernel of its own"


def _table(title: str, rows: list[tuple[str, str, str]], words: str = "") -> str:
    lines = [f"## {title}", "", *([words] if words else []), "| | process | microvm |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _medians() -> dict[str, str]:
    """Operation -> median, of the table of figures in SPEC.md."""
    found = {}
    for line in (ROOT / "SPEC.md").read_text().split("<!-- figures")[1].splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 4:
            found[cells[1]] = cells[2]
    return found


def main() -> int:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        print(f"{PAGE.name} is stale: run make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
