"""Merges of two machines' files by their engine, without a daemon."""

from __future__ import annotations

from machines import DrivenMachine
from podflare.engines.base import FilesPlan

PATHS = ("/root", "/tmp")


class Merged:
    """What one merge said."""

    def __init__(self, plan: FilesPlan, applied: bool) -> None:
        self.applied = applied
        self.merged = list(plan.merged)
        self.conflicts = {one.path: one for one in plan.conflicts}
        self.skipped = list(plan.skipped)


def merge(
    ours: DrivenMachine,
    theirs: DrivenMachine,
    paths: tuple[str, ...] = PATHS,
    *,
    decide: str = "error",
    timeout_s: float = 60,
    keep: bool = True,
) -> Merged:
    """Merge `theirs` into `ours`; with "error" only if there is no conflict."""

    async def run() -> Merged:
        merging = await ours.machine.merge_files(theirs.machine, paths, timeout_s=timeout_s)
        try:
            if merging.plan.conflicts and decide == "error":
                return Merged(merging.plan, False)
            decisions = {one.path: decide for one in merging.plan.conflicts}
            await merging.apply(decisions, timeout_s=timeout_s)
            if keep:
                await merging.keep()
            return Merged(merging.plan, keep)
        finally:
            await merging.aclose()

    found: Merged = ours.call(run)
    return found


def sh(machine: DrivenMachine, code: str) -> str:
    """What a bash cell prints, which has to end well."""
    out = machine.run(code, "bash")
    assert out.exit.code == 0, out.stderr
    return out.stdout


def tree(machine: DrivenMachine, path: str = "/root") -> str:
    """Every path below, with kind, mode, target and content."""
    contents = "find . -type f -print0 | sort -z | xargs -0 -r head -c 2000"
    return sh(machine, f"cd {path}; find . -printf '%P %y %m %l\\n' | sort; {contents}")
