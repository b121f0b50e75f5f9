"""What a virtual machine needs of a distribution's kernel package: the kernel in both formats, and its modules.  Pure
but for the decompressors."""

from __future__ import annotations

import gzip
import lzma
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from podflare.engines.microvm.image import debs, tools
from podflare.errors import TemplateFailed

MODULES = (
    "virtio_pci", "virtio_mmio", "virtio_blk", "virtio_console", "virtio_net", "virtio_rng",
    "vmw_vsock_virtio_transport", "overlay", "squashfs", "ext4",
)  # fmt: skip
"""What either hypervisor's devices and the root file system ask for."""
_DEPENDS = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")
_UNPACK_TIMEOUT_S = 60.0


def read(package: Path) -> tuple[bytes, dict[str, bytes], frozenset[str]]:
    """(bzImage, modules by name in normal form, names of what is built in) of a kernel package.

    Raises: TemplateFailed if it holds no kernel, or compressed modules.
    """
    image = b""
    modules: dict[str, bytes] = {}
    builtin: frozenset[str] = frozenset()
    with debs.content(package) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            file = archive.extractfile(member) if member.isreg() else None
            if file is None:
                continue
            if path.name.startswith("vmlinuz-"):
                image = file.read()
            elif path.name == "modules.builtin":
                builtin = frozenset(_plain(PurePosixPath(line).stem) for line in file.read().decode().split())
            elif path.suffix == ".ko":
                modules[_plain(path.stem)] = file.read()
    if not image or not modules:
        raise TemplateFailed(f"{package.name} holds no kernel with plain modules")
    return image, modules, builtin


def _plain(name: str) -> str:
    return name.replace("-", "_")


def order(modules: Mapping[str, bytes], builtin: frozenset[str], wanted: Sequence[str] = MODULES) -> tuple[str, ...]:
    """Names of the modules to load, each after those that it depends on.  Raises: TemplateFailed."""
    found: list[str] = []

    def visit(name: str) -> None:
        if name in found or name in builtin:
            return
        if name not in modules:
            raise TemplateFailed(f"the kernel package has no module {name}")
        for below in depends(modules[name]):
            visit(below)
        found.append(name)

    for name in wanted:
        visit(name)
    return tuple(found)


def depends(module: bytes) -> tuple[str, ...]:
    """What a module says that it depends on (its .modinfo section)."""
    found = _DEPENDS.search(module)
    return tuple(_plain(name) for name in found.group(1).decode().split(",") if name) if found else ()


def uncompressed(image: bytes) -> bytes:
    """The ELF file inside a bzImage (Documentation/arch/x86/boot.rst: payload_offset, payload_length).

    Raises: TemplateFailed.
    """
    if image[0x202:0x206] != b"HdrS":
        raise TemplateFailed("the kernel is no bzImage")
    sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = image[start : start + length]
    try:
        kernel = _decompressed(payload)
    except (OSError, lzma.LZMAError, EOFError) as exc:
        raise TemplateFailed(f"the kernel cannot be unpacked: {exc}") from exc
    if kernel[:4] != b"\x7fELF":
        raise TemplateFailed("what the kernel's image holds is no ELF file")
    return kernel


def _decompressed(payload: bytes) -> bytes:
    # The build appends the size of what comes out, which no format of these knows.
    data, magic = payload[:-4], payload[:4]
    if magic == b"\x02\x21\x4c\x18":
        return tools.run(["lz4", "-dc", "-"], stdin=data, timeout_s=_UNPACK_TIMEOUT_S)
    if magic == b"\x28\xb5\x2f\xfd":
        return tools.run(["zstd", "-dc"], stdin=payload, timeout_s=_UNPACK_TIMEOUT_S)
    if magic[:2] == b"\x1f\x8b":
        return gzip.decompress(data)
    if magic == b"\xfd7zX":
        return lzma.decompress(data)
    raise TemplateFailed(f"the kernel is compressed in an unknown way ({magic.hex()})")
