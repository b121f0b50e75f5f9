"""The first root file system: a shell that loads modules, puts the real root together and starts process 1 in it.

The guest's code is part of it rather than of the root, so that another version of podflare needs no other root.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from podflare.engines.microvm.image import cpio, debs
from podflare.errors import TemplateFailed

SHELL = "bin/busybox"
GUEST = "podflare"
"""Directory with the bundle."""
GUEST_TARGET = "/run/podflare"
"""Where it lies once the machine runs."""

# userxattr: marks of deleted names and replaced directories as in the process engine, whose code reads them.
# /dev/vda is the root file system of the image, read-only; /dev/vdb is the machine's own disk, where it has one.
SCRIPT = """#!/bin/busybox sh
die() {
  echo "podflare: $*"
  /bin/busybox reboot -f
}
for tool in mkdir mount insmod cp cat sleep switch_root chmod; do
  eval "$tool() { /bin/busybox $tool \\"\\$@\\"; }"
done
mkdir -p /dev /lower /disk /new
mount -t devtmpfs dev /dev || die "no /dev"
for module in $(cat /modules/order); do
  insmod /modules/$module.ko || die "module $module cannot be loaded"
done
tries=0
while [ ! -b /dev/vda ]; do
  tries=$((tries + 1))
  [ $tries -le 100 ] || die "no disk with the image"
  sleep 0.1
done
mount -t squashfs -o ro /dev/vda /lower || die "the image cannot be mounted"
if [ -b /dev/vdb ]; then
  mount -t ext4 -o noatime /dev/vdb /disk || die "the machine's disk cannot be mounted"
else
  mount -t tmpfs -o mode=755 disk /disk || die "no memory for files"
fi
mkdir -p /disk/upper /disk/work
mount -t overlay -o userxattr,lowerdir=/lower,upperdir=/disk/upper,workdir=/disk/work root /new || die "no root"
mount -t devtmpfs -o nosuid dev /new/dev || die "no /dev in the root"
mount -t proc -o nosuid,nodev,noexec proc /new/proc || die "no /proc"
mount -t sysfs -o nosuid,nodev,noexec sys /new/sys || die "no /sys"
mount -t tmpfs -o nosuid,nodev,mode=755 run /new/run || die "no /run"
mkdir /new/run/podflare
mount -t tmpfs -o nosuid,nodev,mode=755 podflare /new/run/podflare || die "no /run/podflare"
cp -r /podflare/. /new/run/podflare/ && mkdir /new/run/podflare/empty || die "no place for the guest's code"
mount -t tmpfs -o remount,ro,nosuid,nodev podflare /new/run/podflare || die "/run/podflare stays writable"
exec /bin/busybox switch_root /new /usr/bin/python3 -I -S /run/podflare vm
die "process 1 cannot be started"
"""


def build(shell: bytes, modules: Mapping[str, bytes], order: Sequence[str], guest: Mapping[str, bytes]) -> bytes:
    """The archive.

    Args:
        shell: a statically linked busybox.
        order: names of modules, in the order of loading.
        guest: path in the bundle -> content.
    """
    files = {"init": SCRIPT.encode(), SHELL: shell, "modules/order": "\n".join((*order, "")).encode()}
    files |= {f"modules/{name}.ko": modules[name] for name in order}
    files |= {f"{GUEST}/{path}": content for path, content in guest.items()}
    return cpio.archive(files, executable=frozenset(("init", SHELL)))


def shell_of(package: Path) -> bytes:
    """The program in the package busybox-static.  Raises: TemplateFailed."""
    with debs.content(package) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isreg() else None
            if file is not None and member.name.endswith("bin/busybox"):
                return file.read()
    raise TemplateFailed(f"{package.name} holds no busybox")


def guest_files(bundle: Path) -> dict[str, bytes]:
    """Path -> content of a packed guest."""
    return {str(path.relative_to(bundle)): path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()}
