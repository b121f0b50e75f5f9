"""Where built templates are kept, and which of them may be used.

One directory:  <name>.json what the template is now | trees/<key>/ its files, never changed once they are there |
logs/<name>.log | building-* what is being built.  A rebuilt template gets another tree; the old one goes at the first
change after the last zygote and sandbox of it (a shared lock on its `lock` file).  Read by daemons, written by
`podflare template`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from podflare.errors import BadRequest, TemplateFailed, UnknownTemplate
from podflare.wire.api import DEFAULT_RAM_MIB, DEFAULT_ROOTFS_GB, TemplateInfo

FORMAT = 1
"""Of manifests and trees.  One of another format has to be built anew."""
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_SUFFIX = ".json"


@dataclass(frozen=True)
class Interpreter:
    """A Python on this computer."""

    executable: str
    """Without symbolic links, and not a virtual environment's."""
    version: str
    prefixes: tuple[str, ...]
    """Directories that hold it and its standard library."""
    site_directories: tuple[str, ...]
    """Where its administrator installs packages."""


@dataclass(frozen=True)
class Manifest:
    """A built template."""

    name: str
    key: str
    """Name of its tree; another one whenever something in it is different."""
    definition: str
    """Digest of all that decides about the tree but what the index had."""
    description: str
    python: Interpreter
    packages: tuple[tuple[str, str], ...]
    """(name, version), sorted."""
    preload: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, int], ...]
    """(path in a machine, mode) of single files; the n-th one is files/<n> of the tree."""
    folders: tuple[str, ...]
    """Paths in a machine of directories; folders/<n> of the tree."""
    missing_programs: tuple[tuple[str, str], ...]
    """(program, package of a distribution that has it) which this computer lacked at the build."""
    ram_mib: int = DEFAULT_RAM_MIB
    rootfs_gb: int = DEFAULT_ROOTFS_GB
    cpus: float | None = None
    built_at_ms: int = 0
    build_s: float = 0.0
    size_bytes: int = 0
    format: int = FORMAT

    def info(self) -> TemplateInfo:
        """What is told about it."""
        return TemplateInfo(
            name=self.name,
            description=self.description,
            version=self.key,
            python=self.python.version,
            packages=dict(self.packages),
            preload=self.preload,
            missing_programs=tuple(program for program, _ in self.missing_programs),
            ram_mib=self.ram_mib,
            rootfs_gb=self.rootfs_gb,
            cpus=self.cpus,
            built_at_ms=self.built_at_ms,
            size_bytes=self.size_bytes,
        )


def encode(manifest: Manifest) -> bytes:
    return (json.dumps(asdict(manifest), indent=1) + "\n").encode()


def decode(data: bytes) -> Manifest:
    """Raises: ValueError, TypeError, KeyError if it is no manifest of this version."""
    body: dict[str, Any] = json.loads(data)
    if body["format"] != FORMAT:
        raise ValueError(f"its format is {body['format']!r:.20}, this version's is {FORMAT}")
    python = body["python"]
    body["python"] = Interpreter(
        python["executable"], python["version"], tuple(python["prefixes"]), tuple(python["site_directories"])
    )
    for key in ("preload", "folders"):
        body[key] = tuple(body[key])
    for key in ("packages", "environment", "files", "missing_programs"):
        body[key] = tuple((first, second) for first, second in body[key])
    return Manifest(**body)


class TemplateStore:
    """The templates below one directory, which need not exist."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> tuple[str, ...]:
        """Names of all that were built, usable or not, sorted."""
        try:
            found = [entry.name for entry in os.scandir(self.root) if entry.name.endswith(_SUFFIX)]
        except OSError:
            return ()
        return tuple(sorted(name.removesuffix(_SUFFIX) for name in found if not name.startswith(".")))

    def read(self, name: str) -> Manifest:
        """The template `name` as it is now.

        Raises: UnknownTemplate; TemplateFailed if it is there and cannot be used, with what to do.
        """
        if "/" in name or name.startswith(".") or "\0" in name:
            raise UnknownTemplate(f"unknown template {name!r:.80}")
        path = self.root / f"{name}{_SUFFIX}"
        try:
            check_owner(self.root)
            with path.open("rb") as file:
                check_owner(path, file.fileno())
                manifest = decode(file.read(MAX_MANIFEST_BYTES))
            check_owner(self.tree(manifest))
        except FileNotFoundError as exc:
            if not path.exists():
                raise UnknownTemplate(f"unknown template {name!r:.80}") from exc
            raise TemplateFailed(f"template {name!r} has lost its files; build it again: {exc}") from exc
        except OSError as exc:
            raise TemplateFailed(f"template {name!r} cannot be read: {exc}") from exc
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise TemplateFailed(f"template {name!r} is damaged; build it again: {exc}") from exc
        if not os.access(manifest.python.executable, os.X_OK):
            raise TemplateFailed(
                f"template {name!r} was built for {manifest.python.executable}, which is gone; build it again"
            )
        return manifest

    def tree(self, manifest: Manifest) -> Path:
        """Directory with the files of a template."""
        if not manifest.key.isalnum():
            raise ValueError(f"{manifest.key!r:.40} is no key")
        return self.root / "trees" / manifest.key

    def hold(self, manifest: Manifest) -> int:
        """Keep a tree from being removed, until the returned descriptor is closed.  Raises: OSError."""
        fd = os.open(self.tree(manifest) / "lock", os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH)
        return fd

    # Writing.

    def prepare(self) -> None:
        """Make the directories.  Raises: TemplateFailed, also if others could write to them."""
        try:
            for folder in (self.root, self.root / "trees", self.root / "logs"):
                folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            check_owner(self.root)
        except OSError as exc:
            raise TemplateFailed(f"templates cannot be kept in {self.root}: {exc}") from exc

    def put(self, manifest: Manifest) -> None:
        """Let a name mean a template whose tree is here.  Raises: OSError."""
        write_whole(self.root / f"{manifest.name}{_SUFFIX}", encode(manifest))

    def publish(self, manifest: Manifest, built: TemplateStore) -> None:
        """Take over the tree and the manifest of one template of another store on the same file system.

        At every moment the name means the old template or the new one.  Raises: OSError.
        """
        with self._writing():
            target = self.tree(manifest)
            if target.exists():
                shutil.rmtree(built.tree(manifest))  # the same files, there already and perhaps in use
            else:
                built.tree(manifest).rename(target)
            self.put(manifest)
            self._collect()

    def remove(self, name: str) -> None:
        """Forget a template; sandboxes of it live on.  Raises: UnknownTemplate; OSError."""
        if name not in self.names():
            known = ", ".join(self.names()) or "none"
            raise UnknownTemplate(f"no template {name!r:.80} has been built; built: {known}")
        with self._writing():
            (self.root / f"{name}{_SUFFIX}").unlink(missing_ok=True)
            (self.root / "logs" / f"{name}.log").unlink(missing_ok=True)
            self._collect()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with (self.root / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _collect(self) -> None:
        """Remove trees that no name means and no daemon holds, and what broken-off builds left."""
        used = set()
        for name in self.names():
            try:
                used.add(decode((self.root / f"{name}{_SUFFIX}").read_bytes()).key)
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                continue  # damaged: says so when it is used, and has nothing to keep
        candidates = [tree for tree in (self.root / "trees").iterdir() if tree.name not in used]
        candidates += self.root.glob("building-*")
        for folder in candidates:
            with contextlib.suppress(OSError), (folder / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def check_owner(path: Path, fd: int | None = None) -> None:
    """May only this user and root change what is there?  Raises: OSError that says why not."""
    status = path.stat() if fd is None else os.fstat(fd)
    if status.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{path} belongs to another user (uid {status.st_uid})")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written to by others; chmod go-w it if they are to be trusted")


def write_whole(path: Path, data: bytes) -> None:
    """The file has the old content or `data`, never a part of it, and after a crash too."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def store_at(folder: str) -> TemplateStore:
    """The store in `folder`.  Raises: BadRequest for a path that cannot be one."""
    if not folder or "\0" in folder:
        raise BadRequest("the directory of templates has no name; set PODFLARE_TEMPLATE_DIR")
    return TemplateStore(Path(folder).absolute())
