"""Makes an image: packages are chosen and fetched, then kernel, root and initramfs made of them beside the store.

What an older image has already (the same root, the same kernel) is taken from there.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from podflare.engines.bundle import build_bundle
from podflare.engines.microvm.image import initramfs, kernel, rootfs, tools
from podflare.engines.microvm.image import store as files
from podflare.engines.microvm.image.debs import Apt, Deb, digest_of
from podflare.engines.microvm.image.recipe import KERNEL, SHELL, Recipe
from podflare.engines.microvm.image.store import Image, ImageStore, Manifest
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


def guest_digest() -> str:
    """Of the guest's code that this version of podflare puts into images."""
    with tempfile.TemporaryDirectory() as folder:
        return _digest(sorted((path, content.hex()) for path, content in _guest(Path(folder)).items()))


def build(recipe: Recipe, store: ImageStore, *, again: bool, tell: Progress, sources: Path | None = None) -> Built:
    """Build an image and put it into the store under its name.

    Args:
        again: even if the recipe is unchanged, with what the distribution has now.
        sources: a file in the format of sources.list(5), instead of this computer's package sources.
    Raises: TemplateFailed, BadRequest; the store is then as it was.
    """
    tools.check()
    store.prepare()
    definition, guest = _digest([files.FORMAT, _body(recipe), str(sources)]), guest_digest()
    old = _there(store, recipe.name)
    if not again and old is not None and (old.manifest.definition, old.manifest.guest) == (definition, guest):
        return Built(old, cached=True)
    started = time.time()
    try:
        with store.building() as folder:
            manifest = _make(recipe, store, folder, sources, tell)
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


def _make(recipe: Recipe, store: ImageStore, folder: Path, sources: Path | None, tell: Progress) -> Manifest:
    tell("asking for the newest packages", 0.0)
    apt = Apt(store.cache, sources)
    apt.prepare()
    apt.update()
    tell("choosing packages", 0.08)
    chosen = _choose(apt, recipe)
    apt.fetch(chosen.all, lambda done: tell(f"fetching {len(chosen.all)} packages", 0.1 + 0.3 * done))
    tell("unpacking the kernel", 0.4)
    bzimage, modules, builtin = kernel.read(apt.path(chosen.kernel))
    (folder / files.KERNEL).write_bytes(bzimage)
    (folder / files.VMLINUX).write_bytes(kernel.uncompressed(bzimage))
    tell("packing the first root", 0.55)
    with tempfile.TemporaryDirectory() as scratch:
        guest = _guest(Path(scratch))
    shell = initramfs.shell_of(apt.path(chosen.shell))
    (folder / files.INITRD).write_bytes(initramfs.build(shell, modules, kernel.order(modules, builtin), guest))
    rootfs.write(
        folder / files.ROOTFS,
        [apt.path(deb) for deb in chosen.root],
        (),
        lambda done: tell("writing the root file system", 0.6 + 0.4 * done),
    )
    root = _digest([files.FORMAT, [asdict(deb) for deb in chosen.root]])
    return Manifest(
        name=recipe.name,
        definition="",
        guest="",
        root=root,
        files=tuple(_described(folder / name) for name in files.FILES),
        kernel=chosen.kernel.version,
        python=next(deb.version for deb in chosen.root if deb.name == "python3"),
        packages=tuple((deb.name, deb.version) for deb in chosen.root),
    )


def _choose(apt: Apt, recipe: Recipe) -> _Packages:
    kernels = [name for name in apt.depends(KERNEL) if name.startswith("linux-image-")]
    if not kernels:
        raise TemplateFailed(f"{KERNEL} depends on no kernel")
    return _Packages(apt.resolve(recipe.packages), apt.newest(kernels[0]), apt.newest(SHELL))


def _guest(folder: Path) -> dict[str, bytes]:
    return initramfs.guest_files(build_bundle(folder))


def _described(path: Path) -> tuple[str, str, int]:
    path.chmod(0o644)
    with path.open("rb") as file:
        return path.name, digest_of(file.read), path.stat().st_size


def _body(recipe: Recipe) -> object:
    body = asdict(recipe)
    if recipe.definition is not None:
        del body["definition"]["folder"]
    return body


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
