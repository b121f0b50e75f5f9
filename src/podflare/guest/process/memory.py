"""Makes one process's memory the same as another's, from outside, where both were forked from the same ancestor.

Pure where it plans (regions in, steps out), so that it is tested without a process.
"""

from __future__ import annotations

import errno
import mmap
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

from podflare.guest.process import tracee as tr
from podflare.guest.process.tracee import Tracee, present_pages

_KERNEL_NAMES = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]")
_PRIVATE, _FIXED, _ANONYMOUS, _GROWS_DOWN, _NO_RESERVE = 0x2, 0x10, 0x20, 0x100, 0x4000
_PROTECTION = {"r": 1, "w": 2, "x": 4}
_CHUNK = 1 << 20
_HUGE = 2 << 20
_MADV_HUGEPAGE = 14

KEEP, PROTECT, MAP, UNMAP = "keep", "protect", "map", "unmap"


@dataclass(frozen=True)
class Region:
    """One line of /proc/<pid>/maps (proc_pid_maps(5))."""

    start: int
    end: int
    flags: str
    offset: int
    device: str
    inode: int
    name: str

    @property
    def protection(self) -> int:
        return sum(_PROTECTION[letter] for letter in self.flags[:3] if letter in _PROTECTION)

    @property
    def of_kernel(self) -> bool:
        return self.name in _KERNEL_NAMES

    def backing_at(self, address: int) -> Tuple[str, int, int]:
        """What lies behind an address: the same in two processes if they have it from their ancestor."""
        if not self.inode:
            return ("", 0, 0)
        return (self.device, self.inode, self.offset + address - self.start)


@dataclass(frozen=True)
class Step:
    """What to do with [start, end) of the target."""

    kind: str
    start: int
    end: int
    protection: int = 0
    grows_down: bool = False

    @property
    def deed(self) -> Tuple[str, int, bool]:
        return self.kind, self.protection, self.grows_down


def parse_maps(text: str) -> List[Region]:
    """The regions of /proc/<pid>/maps, in order."""
    found = []
    for line in text.splitlines():
        fields = line.split(None, 5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        name = fields[5] if len(fields) > 5 else ""
        found.append(Region(start, end, fields[1], int(fields[2], 16), fields[3], int(fields[4]), name))
    return found


def plan_steps(source: Sequence[Region], target: Sequence[Region]) -> List[Step]:
    """How the target comes to have the source's regions.

    What both have from their ancestor is kept; every other region becomes anonymous memory with the same content.
    Raises: OSError if what the kernel itself maps (vdso) lies elsewhere in the two.
    """
    if [r for r in source if r.of_kernel] != [r for r in target if r.of_kernel]:
        raise OSError(errno.EINVAL, "the processes are not of one ancestor: the kernel's mappings differ")
    ours = [region for region in source if not region.of_kernel]
    theirs = [region for region in target if not region.of_kernel]
    bounds = sorted({edge for region in (*ours, *theirs) for edge in (region.start, region.end)})
    steps: List[Step] = []
    for index in range(len(bounds) - 1):
        start, end = bounds[index], bounds[index + 1]
        step = _step(_at(ours, start), _at(theirs, start), start, end)
        if step is None:
            continue
        last = steps[-1] if steps else None
        if (
            last is not None
            and last.end == start
            and (last.kind, last.protection, last.grows_down)
            == (
                step.kind,
                step.protection,
                step.grows_down,
            )
        ):
            steps[-1] = Step(last.kind, last.start, end, last.protection, last.grows_down)
        else:
            steps.append(step)
    return steps


def _at(regions: Sequence[Region], address: int) -> Optional[Region]:
    low, high = 0, len(regions)
    while low < high:
        middle = (low + high) // 2
        if regions[middle].end <= address:
            low = middle + 1
        else:
            high = middle
    return regions[low] if low < len(regions) and regions[low].start <= address else None


def _step(source: Optional[Region], target: Optional[Region], start: int, end: int) -> Optional[Step]:
    if source is None:
        return None if target is None else Step(UNMAP, start, end)
    same = target is not None and source.backing_at(start) == target.backing_at(start)
    if same and target is not None and source.flags[3] == target.flags[3] == "p":
        kind = KEEP if source.flags == target.flags else PROTECT
        return Step(kind, start, end, source.protection)
    return Step(MAP, start, end, source.protection, grows_down=source.name == "[stack]")


def read_maps(process: Tracee) -> List[Region]:
    with open(f"{process.folder}/maps", errors="surrogateescape") as file:
        return parse_maps(file.read())


def copy_memory(source: Tracee, target: Tracee) -> int:
    """Give the stopped `target` the memory of the stopped `source`.  Returns the number of bytes written.

    Precondition: both wait in a system call of the C library, and were forked from one ancestor, neither having
    executed a program since.
    Raises: OSError; the target is of no more use then.
    """
    at = target.syscall_address()
    edge = source.call(source.syscall_address(), tr.BRK, 0)
    if target.call(at, tr.BRK, edge) != edge:
        raise OSError(errno.ENOMEM, "the heap could not be made as large as the other one's")
    regions = read_maps(source)
    steps = plan_steps(regions, read_maps(target))
    if not any(step.kind == KEEP and step.start <= at < step.end for step in steps):
        raise OSError(errno.EINVAL, "the processes do not share their C library")
    for step in steps:
        _carry_out(step, target, at)
    return sum(_copy_pages(step, regions, source, target) for step in steps if step.kind != UNMAP)


def _carry_out(step: Step, target: Tracee, at: int) -> None:
    length = step.end - step.start
    if step.kind == UNMAP:
        target.call(at, tr.MUNMAP, step.start, length)
    elif step.kind == PROTECT:
        target.call(at, tr.MPROTECT, step.start, length, step.protection)
    elif step.kind == MAP:
        flags = _PRIVATE | _FIXED | _ANONYMOUS | (_GROWS_DOWN if step.grows_down else _NO_RESERVE)
        target.call(at, tr.MMAP, step.start, length, step.protection, flags, -1, 0)
        if length >= _HUGE and not step.grows_down:
            try:
                target.call(at, tr.MADVISE, step.start, length, _MADV_HUGEPAGE)  # as the C library asks for it
            except OSError:
                pass  # a kernel without huge pages


def _copy_pages(step: Step, regions: Sequence[Region], source: Tracee, target: Tracee) -> int:
    """Write what differs.  Memory that the source gave back is emptied in the target, too."""
    page = mmap.PAGESIZE
    written = 0
    if step.kind == MAP:
        # Of any backing: files and shared memory have become anonymous.
        for start, end in _mapped_runs(source, regions, step, page):
            written += _copy_run(source, target, start, end, compare=False)
        return written
    ours = present_pages(source, step.start, step.end, page)
    for start, end in ours:
        written += _copy_run(source, target, start, end, compare=True)
    for start, end in _without(present_pages(target, step.start, step.end, page), ours):
        written += _copy_run(source, target, start, end, compare=True)
    return written


def _mapped_runs(source: Tracee, regions: Sequence[Region], step: Step, page: int) -> List[Tuple[int, int]]:
    """What is to be copied into a region that is new in the target."""
    runs: List[Tuple[int, int]] = []
    for region in regions:
        start, end = max(region.start, step.start), min(region.end, step.end)
        if start >= end:
            continue
        if region.inode or region.flags[3] == "s":
            runs.append((start, end))
        else:
            runs += present_pages(source, start, end, page)
    return runs


def _copy_run(source: Tracee, target: Tracee, start: int, end: int, *, compare: bool) -> int:
    written = 0
    while start < end:
        length = min(_CHUNK, end - start)
        try:
            content = source.read(start, length)
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
            start += mmap.PAGESIZE  # a mapping that reaches beyond the end of its file has nothing there
            continue
        if compare:
            written += _write_differing(target, start, content)
        else:
            target.write(start, content)
            written += len(content)
        start += len(content)
    return written


def _write_differing(target: Tracee, start: int, content: bytes) -> int:
    found = target.read(start, len(content))
    if found == content:
        return 0
    page, written = mmap.PAGESIZE, 0
    ours, theirs = memoryview(content), memoryview(found)
    for offset in range(0, len(content), page):
        if ours[offset : offset + page] != theirs[offset : offset + page]:
            target.write(start + offset, ours[offset : offset + page])
            written += page
    return written


def _without(runs: Sequence[Tuple[int, int]], taken: Sequence[Tuple[int, int]]) -> List[Tuple[int, int]]:
    """The parts of `runs` that no run of `taken` covers; both sorted."""
    left: List[Tuple[int, int]] = []
    index = 0
    for start, end in runs:
        while index < len(taken) and taken[index][1] <= start:
            index += 1
        number = index
        while start < end and number < len(taken) and taken[number][0] < end:
            if start < taken[number][0]:
                left.append((start, taken[number][0]))
            start = max(start, taken[number][1])
            number += 1
        if start < end:
            left.append((start, end))
    return left


_THREAD_BYTES = 0x1000
_NUMBER_BYTES = 4


def become(source: Tracee, target: Tracee) -> int:
    """Make the stopped `target` a copy of the stopped `source`, going on where that waits, as after EINTR.

    Returns: bytes written.  Precondition and Raises: as `copy_memory`.
    """
    registers, floats = source.registers(), source.float_registers()
    slots = _thread_id_slots(source, target, registers["fs_base"])
    written = copy_memory(source, target)
    # The C library keeps a thread's id beside the thread's own variables.
    own_id = target.thread_id().to_bytes(_NUMBER_BYTES, "little")
    for slot in slots:
        target.write(slot, own_id)
    target.set_float_registers(floats)
    target.set_registers(dict(registers, rax=-errno.EINTR, orig_rax=-1))
    return written


def _thread_id_slots(source: Tracee, target: Tracee, base: int) -> List[int]:
    """Where each of the two has its own thread id in the memory of its main thread."""
    if target.registers()["fs_base"] != base:
        raise OSError(errno.EINVAL, "the processes are not of one ancestor: their main threads differ")
    ids = [process.thread_id().to_bytes(_NUMBER_BYTES, "little") for process in (source, target)]
    ours, theirs = (process.read(base, _THREAD_BYTES) for process in (source, target))
    return [
        base + offset
        for offset in range(0, min(len(ours), len(theirs)) - _NUMBER_BYTES + 1, _NUMBER_BYTES)
        if [content[offset : offset + _NUMBER_BYTES] for content in (ours, theirs)] == ids
    ]
