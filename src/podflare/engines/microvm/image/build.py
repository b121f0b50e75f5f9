"""Makes an image: packages are chosen and fetched, then kernel, root and initramfs made of them beside the store.

A root that an older image has already, made from the same packages, is taken from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from podflare.engines.bundle import build_bundle
from podflare.engines.microvm.image import additions, initramfs, kernel, rootfs, tools
from podflare.engines.microvm.image import store as files
from podflare.engines.microvm.image.debs import Apt, Deb, digest_of
from podflare.engines.microvm.image.python import ImagePython
from podflare.engines.microvm.image.recipe import KERNEL, SHELL, Recipe
from podflare.engines.microvm.image.store import Image, ImageStore, Manifest
from podflare.engines.templates.pip import Installed
from podflare.errors import TemplateFailed, UnknownTemplate

Progress = Callable[[str, float], None]
"""Is told what is being done, and what fraction of the whole build is behind."""


@dataclass(frozen=True)
class Built:
    """What a build came to."""

    image: Image
    cached: bool
    """It was there already and nothing had to be done."""


@dataclass(frozen=True)
class _Packages:
    """What was chosen."""

    root: tuple[Deb, ...]
    kernel: Deb
    shell: Deb

    @property
    def all(self) -> tuple[Deb, ...]:
        return (*self.root, self.kernel, self.shell)


@dataclass(frozen=True)
class _Root:
    """A root file system that was made."""

    digest: str
    wheels: tuple[Installed, ...] = ()
    missing_programs: tuple[str, ...] = ()


def guest_digest() -> str:
    """Of the code that this version of podflare puts into images."""
    with tempfile.TemporaryDirectory() as folder:
        guest = _guest(Path(folder))
    return _digest([initramfs.SCRIPT, sorted((path, content.hex()) for path, content in guest.items())])


def build(recipe: Recipe, store: ImageStore, *, again: bool, tell: Progress, sources: Path | None = None) -> Built:
    """Build an image and put it into the store under its name.

    Args:
        again: even if the recipe is unchanged, with what the distribution has now.
        sources: a file in the format of sources.list(5), instead of this computer's package sources.
    Raises: TemplateFailed, BadRequest; the store is then as it was.
    """
    tools.check()
    store.prepare()
    definition, guest = _digest([_own_code(), _body(recipe), str(sources)]), guest_digest()
    started = time.time()
    try:
        with store.building() as folder:
            old = _there(store, recipe.name)
            if not again and old and (old.manifest.definition, old.manifest.guest) == (definition, guest):
                return Built(old, cached=True)
            manifest = _Build(recipe, store, folder, sources, tell).run()
            manifest = replace(
                manifest,
                definition=definition,
                guest=guest,
                built_at_ms=int(started * 1000),
                build_s=round(time.time() - started, 1),
            )
            store.publish(manifest, folder)
    except OSError as exc:
        raise TemplateFailed(f"image {recipe.name!r} could not be built: {exc}") from exc
    return Built(store.get(recipe.name), cached=False)


def _there(store: ImageStore, name: str) -> Image | None:
    try:
        return store.get(name)
    except (UnknownTemplate, TemplateFailed):
        return None


class _Build:
    """One build, step by step."""

    def __init__(self, recipe: Recipe, store: ImageStore, folder: Path, sources: Path | None, tell: Progress) -> None:
        self._recipe, self._store, self._folder, self._tell = recipe, store, folder, tell
        self._apt = Apt(store.cache, sources)

    def run(self) -> Manifest:
        """Make the files of the image in the folder.  Raises: TemplateFailed; OSError."""
        self._tell("asking for the newest packages", 0.0)
        self._apt.prepare()
        self._apt.update()
        self._tell("choosing packages", 0.1)
        chosen = self._choose()
        definition = self._recipe.definition
        if definition is not None:
            additions.check_python(definition, _python_of(chosen))
        self._fetch(chosen)
        with tempfile.TemporaryDirectory(dir=self._store.cache) as scratch:
            self._tell("unpacking Python", 0.4)
            python_folder = Path(scratch, "python")
            python_folder.mkdir()
            whole = definition is not None and bool(definition.packages)
            python = ImagePython.unpack(self._apt, chosen.root, python_folder, whole=whole)
            self._write_kernel(chosen, python, Path(scratch, "guest"))
            root = self._write_root(chosen, python, Path(scratch))
        return Manifest(
            name=self._recipe.name,
            definition="",
            guest="",
            root=root.digest,
            files=tuple(_described(self._folder / name) for name in files.FILES),
            kernel=chosen.kernel.version,
            python=_python_of(chosen),
            packages=tuple((deb.name, deb.version) for deb in chosen.root),
            wheels=tuple((one.name, one.version) for one in root.wheels),
            missing_programs=root.missing_programs,
        )

    def _choose(self) -> _Packages:
        kernels = [name for name in self._apt.depends(KERNEL) if name.startswith("linux-image-")]
        if not kernels:
            raise TemplateFailed(f"{KERNEL} depends on no kernel")
        wanted = (*self._recipe.packages, *self._apt.known(self._recipe.programs))
        return _Packages(self._apt.resolve(wanted), self._apt.newest(kernels[0]), self._apt.newest(SHELL))

    def _fetch(self, chosen: _Packages) -> None:
        what = f"fetching {len(chosen.all)} packages"
        self._apt.fetch(chosen.all, lambda done: self._tell(what, 0.15 + 0.25 * done))

    def _write_kernel(self, chosen: _Packages, python: ImagePython, scratch: Path) -> None:
        """The kernel, and the initramfs with its modules and the guest's code."""
        self._tell("unpacking the kernel", 0.45)
        bzimage, modules, builtin = kernel.read(self._apt.path(chosen.kernel))
        (self._folder / files.KERNEL).write_bytes(bzimage)
        (self._folder / files.VMLINUX).write_bytes(kernel.uncompressed(bzimage))
        guest = _guest(scratch / "plain")
        guest |= python.compiled(guest, initramfs.GUEST_TARGET, scratch / "compiled")
        guest[additions.SETTINGS] = additions.settings(self._recipe.definition)
        shell = initramfs.shell_of(self._apt.path(chosen.shell))
        order = kernel.order(modules, builtin)
        (self._folder / files.INITRD).write_bytes(initramfs.build(shell, modules, order, guest))

    def _write_root(self, chosen: _Packages, python: ImagePython, scratch: Path) -> _Root:
        definition = self._recipe.definition
        packages = [asdict(deb) for deb in chosen.root]
        if definition is None:
            digest = _digest([_own_code(), packages])
            if self._take_over(digest):
                return _Root(digest)
        extra: list[rootfs.Entry] = []
        installed: tuple[Installed, ...] = ()
        missing: list[str] = []
        if definition is not None:
            if definition.packages:
                log = self._store.cache / f"{definition.name}.log"
                log.write_bytes(b"")
                installed, extra = additions.wheels(
                    definition, python, scratch / "wheels", log, lambda step: self._tell(step, 0.5)
                )
            extra += additions.files(definition)
            digest = _digest(
                [files.FORMAT, packages, [hashlib.sha256(repr(one).encode()).hexdigest() for one in extra]]
            )

        def fill(writer: rootfs.Writer) -> None:
            for entry in (*extra, *python.standard_library()):
                writer.add(entry)
            for number, deb in enumerate(chosen.root):
                self._tell("writing the root file system", 0.6 + 0.4 * number / len(chosen.root))
                writer.add_package(self._apt.path(deb))
            if definition is not None:
                links, lacking = additions.program_links(definition, writer.has)
                missing.extend(lacking)
                for link in links:
                    writer.add(link)

        self._tell("compiling the standard library", 0.55)
        rootfs.write(self._folder / files.ROOTFS, fill)
        return _Root(digest, installed, tuple(missing))

    def _take_over(self, digest: str) -> bool:
        """Use the root of an image that has the same one."""
        for name in self._store.names():
            old = _there(self._store, name)
            if old is not None and old.manifest.root == digest:
                os.link(old.rootfs, self._folder / files.ROOTFS)
                return True
        return False


def _python_of(chosen: _Packages) -> str:
    """Its version, as 3.11.2."""
    found = next((deb.version for deb in chosen.root if deb.name == "python3"), "")
    return found.partition("-")[0]


def _guest(folder: Path) -> dict[str, bytes]:
    return initramfs.guest_files(build_bundle(folder))


def _described(path: Path) -> tuple[str, str, int]:
    path.chmod(0o644)
    with path.open("rb") as file:
        return path.name, digest_of(file.read), path.stat().st_size


def _own_code() -> str:
    """Of how images are made: another version makes other ones from the same packages."""
    return _digest([path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))])


def _body(recipe: Recipe) -> object:
    body = asdict(recipe)
    if recipe.definition is not None:
        del body["definition"]["folder"]
        body["content"] = [
            _digest([one.path, one.content.hex(), one.link]) for one in additions.files(recipe.definition)
        ]
    return body


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
