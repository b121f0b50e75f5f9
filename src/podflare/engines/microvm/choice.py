"""Which virtual machine monitor is taken, and what is told about those that are not: pure."""

from __future__ import annotations

from podflare.engines.microvm.vmm import VmmStatus

AUTO, QEMU, FIRECRACKER = "auto", "qemu", "firecracker"
ORDER = (QEMU, FIRECRACKER)
"""Of those with KVM the first is taken, else the first that can work: QEMU is what guests are tried on everywhere."""


def choose(wish: str, statuses: tuple[VmmStatus, ...]) -> tuple[str, str]:
    """The name of the one to take and "", or "" and what is missing and what to do.

    Args:
        wish: AUTO, or the name of one.
        statuses: of each in ORDER.
    """
    by_name = {status.vmm: status for status in statuses}
    if wish == AUTO:
        usable = [by_name[name] for name in ORDER if by_name[name].usable]
        if usable:
            return min(usable, key=lambda status: status.accelerator != "kvm").vmm, ""
        return "", "; ".join(f"{status.vmm}: {status.detail}" for status in statuses)
    if wish not in by_name:
        return "", f"unknown virtual machine monitor {wish!r:.80}; there is: {', '.join((AUTO, *ORDER))}"
    if by_name[wish].usable:
        return wish, ""
    others = [name for name in ORDER if name != wish and by_name[name].usable]
    instead = f"; --vmm {others[0]} can work here" if others else ""
    return "", f"{wish} was asked for: {by_name[wish].detail}{instead}"


def notes(wish: str, statuses: tuple[VmmStatus, ...]) -> tuple[str, ...]:
    """A line for each: found or not, and whether it is taken and why."""
    taken, _ = choose(wish, statuses)
    why = "the first of QEMU and Firecracker that can work, with KVM if possible" if wish == AUTO else "asked for"
    lines = []
    for status in statuses:
        if status.vmm == taken:
            end = f" - taken: {why}"
        elif status.usable:
            end = f" - not taken: {'another one was asked for' if wish != AUTO else f'{taken} comes first'}"
        else:
            end = " - cannot be used"
        lines.append(f"{status.vmm}: {status.detail}{end}")
    return tuple(lines)
