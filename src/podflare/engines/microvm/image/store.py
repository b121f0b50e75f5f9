"""Where built images are kept, and which of them may be used.

One directory:  <name>.json what the image is now | images/<key>/ its files, never changed once they are there |
cache/ packages and apt's state | building-* what is being built.  An image built anew gets another key; the old files
go at the first change after the last user of them (a shared lock on their `lock` file).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from podflare.engines.microvm.image.debs import digest_of
from podflare.engines.templates.store import check_owner, write_whole
from podflare.errors import TemplateFailed, UnknownTemplate

FORMAT = 1
"""Of manifests and files.  An image of another format has to be built anew."""
KERNEL, VMLINUX, INITRD, ROOTFS = "vmlinuz", "vmlinux", "initrd", "rootfs.squashfs"
FILES = (KERNEL, VMLINUX, INITRD, ROOTFS)
MAX_MANIFEST_BYTES = 1024 * 1024
_SUFFIX = ".json"


@dataclass(frozen=True)
class Manifest:
    """A built image."""

    name: str
    """Of its template."""
    definition: str
    """Digest of all that decides about the image but what the distribution has."""
    guest: str
    """Digest of the guest's code in it."""
    root: str
    """Digest of all that decides about the root file system, packages included."""
    files: tuple[tuple[str, str, int], ...]
    """(name, SHA-256, size) of each of FILES, in that order."""
    kernel: str
    """Version of the kernel's package."""
    python: str
    packages: tuple[tuple[str, str], ...]
    """(name, version) of the distribution's packages in the root, sorted."""
    wheels: tuple[tuple[str, str], ...] = ()
    """The same of Python packages that the template brings."""
    missing_programs: tuple[str, ...] = ()
    """Programs that the template names and the distribution does not have."""
    built_at_ms: int = 0
    build_s: float = 0.0
    format: int = FORMAT

    @property
    def checksum(self) -> str:
        """Of all files together: two builds from the same packages have the same."""
        return hashlib.sha256("".join(digest for _, digest, _ in self.files).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(size for _, _, size in self.files)


@dataclass(frozen=True)
class Image:
    """What a virtual machine of one template boots."""

    name: str
    directory: Path
    kernel: Path
    """A bzImage, for QEMU."""
    vmlinux: Path
    """The same kernel as an ELF file, for Firecracker."""
    initrd: Path
    rootfs: Path
    """A read-only squashfs, to be attached as the first virtio disk (/dev/vda)."""
    checksum: str
    manifest: Manifest


def encode(manifest: Manifest) -> bytes:
    return (json.dumps(asdict(manifest), indent=1) + "\n").encode()


def decode(data: bytes) -> Manifest:
    """Raises: ValueError, TypeError, KeyError if it is no manifest of this version."""
    body: dict[str, Any] = json.loads(data)
    if body["format"] != FORMAT:
        raise ValueError(f"its format is {body['format']!r:.20}, this version's is {FORMAT}")
    for key in ("files", "packages", "wheels"):
        body[key] = tuple(tuple(row) for row in body[key])
    body["missing_programs"] = tuple(body["missing_programs"])
    manifest = Manifest(**body)
    if tuple(name for name, _, _ in manifest.files) != FILES:
        raise ValueError("it names other files than this version's")
    return manifest


class ImageStore:
    """The images below one directory, which need not exist."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def cache(self) -> Path:
        """Packages and what apt knows; may be removed at any time."""
        return self.root / "cache"

    def names(self) -> tuple[str, ...]:
        """Names of all that were built, usable or not, sorted."""
        try:
            found = [entry.name for entry in os.scandir(self.root) if entry.name.endswith(_SUFFIX)]
        except OSError:
            return ()
        return tuple(sorted(name.removesuffix(_SUFFIX) for name in found if not name.startswith(".")))

    def read(self, name: str) -> Manifest:
        """Raises: UnknownTemplate if there is no image of that name; TemplateFailed if it cannot be used."""
        if "/" in name or name.startswith(".") or "\0" in name:
            raise UnknownTemplate(f"unknown template {name!r:.80}")
        path = self.root / f"{name}{_SUFFIX}"
        try:
            check_owner(self.root)
            with path.open("rb") as file:
                check_owner(path, file.fileno())
                return decode(file.read(MAX_MANIFEST_BYTES))
        except FileNotFoundError as exc:
            raise UnknownTemplate(
                f"no image of template {name!r:.80} has been built; podflare image build --template {name} makes it"
            ) from exc
        except OSError as exc:
            raise TemplateFailed(f"image {name!r} cannot be read: {exc}") from exc
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise TemplateFailed(f"image {name!r} is damaged; build it again: {exc}") from exc

    def get(self, name: str, *, guest: str = "") -> Image:
        """The image of a template.

        Args:
            guest: digest of the guest's code that it must have (`build.guest_digest()`); empty: any.
        Raises: UnknownTemplate; TemplateFailed if files are missing or cut short, or it holds another guest.
        """
        manifest = self.read(name)
        if guest and manifest.guest != guest:
            raise TemplateFailed(
                f"image {name!r} was built by another version of podflare; podflare image build --template {name} "
                "brings it up to date in a few seconds"
            )
        folder = self.folder(manifest)
        for file, _, size in manifest.files:
            try:
                there = (folder / file).stat().st_size
            except OSError as exc:
                raise TemplateFailed(f"image {name!r} has lost {file}; build it again: {exc}") from exc
            if there != size:
                raise TemplateFailed(f"image {name!r}: {file} has {there} bytes instead of {size}; build it again")
        kernel, vmlinux, initrd, rootfs = (folder / file for file in FILES)
        return Image(name, folder, kernel, vmlinux, initrd, rootfs, manifest.checksum, manifest)

    def verify(self, image: Image) -> None:
        """Compare every byte with the checksums.  Raises: TemplateFailed that names the file."""
        for name, digest, _ in image.manifest.files:
            with (image.directory / name).open("rb") as file:
                if digest_of(file.read) != digest:
                    raise TemplateFailed(f"image {image.name!r}: {name} is not what was built; build it again")

    def folder(self, manifest: Manifest) -> Path:
        """Directory of an image's files."""
        return self.root / "images" / manifest.checksum[:32]

    def hold(self, image: Image) -> int:
        """Keep an image's files from being removed, until the returned descriptor is closed.  Raises: OSError."""
        fd = os.open(image.directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH)
        return fd

    # Writing.

    def prepare(self) -> None:
        """Make the directories.  Raises: TemplateFailed, also if others could write to them."""
        try:
            for folder in (self.root, self.root / "images", self.cache):
                folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            check_owner(self.root)
        except OSError as exc:
            raise TemplateFailed(f"images cannot be kept in {self.root}: {exc}") from exc

    @contextlib.contextmanager
    def building(self) -> Iterator[Path]:
        """A directory to build in, on the same file system, gone afterwards; one build at a time."""
        with (self.root / "building").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder = self.root / "images" / f"building-{os.getpid()}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o755)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, manifest: Manifest, built: Path) -> None:
        """Take over built files.  At every moment the name means the old image or the new one.  Raises: OSError."""
        with self._writing():
            target = self.folder(manifest)
            (built / "lock").touch()
            if target.exists():
                shutil.rmtree(built)  # the same bytes, there already and perhaps in use
            else:
                built.rename(target)
            write_whole(self.root / f"{manifest.name}{_SUFFIX}", encode(manifest))
            self._collect()

    def remove(self, name: str) -> None:
        """Forget an image; machines of it live on.  Raises: UnknownTemplate; OSError."""
        if name not in self.names():
            known = ", ".join(self.names()) or "none"
            raise UnknownTemplate(f"no image {name!r:.80} has been built; built: {known}")
        with self._writing():
            (self.root / f"{name}{_SUFFIX}").unlink(missing_ok=True)
            self._collect()

    def clear_cache(self) -> None:
        """Remove packages that were fetched; the next build fetches them again."""
        shutil.rmtree(self.cache, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with (self.root / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _collect(self) -> None:
        """Remove files that no name means and nobody holds."""
        used = set()
        for name in self.names():
            with contextlib.suppress(UnknownTemplate, TemplateFailed):
                used.add(self.folder(self.read(name)).name)
        for folder in (self.root / "images").iterdir():
            if folder.name in used or folder.name.startswith("building-"):
                continue
            with contextlib.suppress(OSError), (folder / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
