"""Makes a template from its definition: beside the store first, tried, then put in place at once.

No code of the template runs on the computer itself: wheels are unpacked, and what `preload` names is imported for
the trial as it is for every sandbox, by a zygote without privileges.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from podflare.engines.templates import interpreters
from podflare.engines.templates.definition import Definition
from podflare.engines.templates.pip import Installed, Sources, install
from podflare.engines.templates.store import FORMAT, Interpreter, Manifest, TemplateStore
from podflare.errors import TemplateFailed, UnknownTemplate

MAX_SINGLE_FILES_BYTES = 16 * 1024 * 1024
"""Of all single files together: every zygote keeps a copy in memory.  Directories stay on disk."""
PROGRAM_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
"""Where sandboxes look for programs of this computer."""

Try = Callable[[TemplateStore, str], None]
"""Start a sandbox of a template in a store, and end it.  Raises: PodflareError if that fails."""


@dataclass(frozen=True)
class Built:
    """What a build came to."""

    manifest: Manifest
    cached: bool
    """It was there already and nothing had to be done."""


def build(
    definition: Definition,
    store: TemplateStore,
    *,
    sources: Sources,
    again: bool,
    attempt: Try,
    tell: Callable[[str], None],
) -> Built:
    """Build a template and put it into the store under its name.

    Args:
        again: even if the definition is unchanged, with what the index has now.
        attempt: is given the template before anybody else can use it.
        tell: is called with what is being done, in a few words each time.
    Raises: TemplateFailed, BadRequest, or what `attempt` raises; the store is then as it was.
    """
    store.prepare()
    python = interpreters.find(definition.python)
    digest = _digest(definition, python, sources)
    if not again:
        there = _there(store, definition.name, digest)
        if there is not None:
            return Built(there, cached=True)
    started = time.time()
    try:
        with _beside(store) as scratch:
            manifest = _make(definition, python, scratch, sources, store.root / "logs" / f"{definition.name}.log", tell)
            manifest = replace(
                manifest, definition=digest, built_at_ms=int(started * 1000), build_s=round(time.time() - started, 1)
            )
            scratch.put(manifest)
            tell("starting a sandbox of it")
            attempt(scratch, manifest.name)
            store.publish(manifest, scratch)
    except OSError as exc:
        raise TemplateFailed(f"template {definition.name!r} could not be built: {exc}") from exc
    return Built(manifest, cached=False)


def _there(store: TemplateStore, name: str, digest: str) -> Manifest | None:
    try:
        manifest = store.read(name)
    except (UnknownTemplate, TemplateFailed):
        return None
    return manifest if manifest.definition == digest else None


@contextmanager
def _beside(store: TemplateStore) -> Iterator[TemplateStore]:
    """A store of its own on the same file system; gone after the block, whatever happens in it."""
    folder = Path(tempfile.mkdtemp(prefix="building-", dir=store.root))
    try:
        folder.chmod(0o755)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # while it is held, no other build takes this for an abandoned one
            scratch = TemplateStore(folder)
            scratch.prepare()
            yield scratch
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make(
    definition: Definition,
    python: Interpreter,
    scratch: TemplateStore,
    sources: Sources,
    log: Path,
    tell: Callable[[str], None],
) -> Manifest:
    tree = scratch.root / "trees" / "new"
    packages = tree / "packages"
    for folder in (tree, packages, tree / "files", tree / "folders"):
        folder.mkdir(mode=0o755)
    (tree / "lock").touch()
    log.write_bytes(b"")
    installed: tuple[Installed, ...] = ()
    if definition.packages:
        tell(f"installing {len(definition.packages)} package(s) for Python {python.version}")
        installed = install(python, definition.packages, packages, sources=sources, log=log, tell=tell)
    files, folders = _copy_files(definition, python, tree)
    missing = _link_programs(definition, python, packages / "bin")
    size = _seal(tree)
    manifest = Manifest(
        name=definition.name,
        key="",
        definition="",
        description=definition.description,
        python=python,
        packages=tuple((one.name, one.version) for one in installed),
        preload=definition.preload,
        environment=definition.environment,
        files=files,
        folders=folders,
        missing_programs=missing,
        ram_mib=definition.ram_mib,
        rootfs_gb=definition.rootfs_gb,
        cpus=definition.cpus,
        size_bytes=size,
    )
    content = [asdict(manifest), [asdict(one) for one in installed], _digest(definition, python, sources)]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    tree.rename(scratch.root / "trees" / key)
    return replace(manifest, key=key)


def _copy_files(
    definition: Definition, python: Interpreter, tree: Path
) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """Single files as (target, mode), and targets of directories, copied in that order.  Raises: TemplateFailed."""
    files: list[tuple[str, int]] = []
    folders: list[str] = []
    single_bytes = 0
    for target, source in definition.files:
        for prefix in python.prefixes:
            if target == prefix or target.startswith(f"{prefix}/"):
                raise TemplateFailed(f"{target} lies in {prefix}, the directory of the interpreter")
        path = definition.folder / source
        if path.is_dir():
            # Links are copied as links: what they point to in a sandbox is the sandbox's business.
            shutil.copytree(path, tree / "folders" / str(len(folders)), symlinks=True)
            folders.append(target)
        elif path.is_file():
            single_bytes += path.stat().st_size
            if single_bytes > MAX_SINGLE_FILES_BYTES:
                raise TemplateFailed(
                    f"the single files are larger than {MAX_SINGLE_FILES_BYTES >> 20} MiB together; put large ones "
                    "into a directory and name that in 'files'"
                )
            shutil.copyfile(path, tree / "files" / str(len(files)))
            files.append((target, 0o755 if os.access(path, os.X_OK) else 0o644))
        else:
            raise TemplateFailed(f"{path}, to be copied to {target}, is neither a file nor a directory")
    return tuple(files), tuple(folders)


def _link_programs(definition: Definition, python: Interpreter, folder: Path) -> tuple[tuple[str, str], ...]:
    """Links to the interpreter, and to programs that this computer has under another name; the missing ones."""
    folder.mkdir(mode=0o755, exist_ok=True)
    for name in ("python", "python3"):
        if not (folder / name).exists():
            (folder / name).symlink_to(python.executable)
    missing: list[tuple[str, str]] = []
    for names, package in definition.programs:
        wanted, *others = names.split("|")
        if _program(wanted) or (folder / wanted).exists():
            continue
        other = next((path for name in others if (path := _program(name))), None)
        if other is None:
            missing.append((wanted, package))
        else:
            (folder / wanted).symlink_to(other)
    return tuple(missing)


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join(PROGRAM_FOLDERS))


def _seal(tree: Path) -> int:
    """Let everybody read and nobody but the owner write; the number of bytes in it."""
    size = 0
    for folder, _, names in os.walk(tree):
        for path in (Path(folder), *(Path(folder, name) for name in names)):
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                continue
            readable = 0o555 if stat.S_ISDIR(status.st_mode) or status.st_mode & 0o111 else 0o444
            path.chmod(readable | 0o200)
            size += status.st_size
    return size


def _digest(definition: Definition, python: Interpreter, sources: Sources) -> str:
    """Of all that decides about the tree but what the index and this computer's programs are."""
    body = asdict(definition)
    del body["folder"]
    content = [FORMAT, body, asdict(python), asdict(sources), list(_file_digests(definition))]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_digests(definition: Definition) -> Iterator[tuple[str, str]]:
    for _, source in definition.files:
        path = definition.folder / source
        inside = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        for one in inside:
            try:
                with one.open("rb") as file:
                    yield f"{one} {os.access(one, os.X_OK)}", _digest_of(file.read)
            except OSError:
                yield str(one), ""  # the copy, which follows, says what is wrong with it


def _digest_of(read: Callable[[int], bytes]) -> str:
    state = hashlib.sha256()
    while chunk := read(1 << 20):
        state.update(chunk)
    return state.hexdigest()
