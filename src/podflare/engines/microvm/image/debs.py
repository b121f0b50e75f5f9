"""Packages of a distribution: which are needed, fetched and checked by apt, and read without being installed.

apt works with directories of its own below the cache and with this computer's sources and keys; nothing of the
system changes, and no privilege is needed.  No script of a package is run.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from podflare.engines.microvm.image import tools
from podflare.errors import TemplateFailed

ARCHITECTURE = "amd64"
UPDATE_TIMEOUT_S = 300.0
QUESTION_TIMEOUT_S = 120.0

_CHOSEN = re.compile(r"^Inst (\S+) .*?\((\S+) .*\[(\w+)\]\)", re.MULTILINE)
_CANDIDATE = re.compile(r"^(\S+):\n  Installed: .*\n  Candidate: (?!\(none\))", re.MULTILINE)
_FETCHED = re.compile(r"dlstatus:\d+:([\d.]+):(.*)")


@dataclass(frozen=True)
class Deb:
    """One package, as the signed index of the distribution describes it."""

    name: str
    version: str
    architecture: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


class Apt:
    """apt with its state in one directory."""

    def __init__(self, folder: Path, sources: Path | None = None) -> None:
        """`sources`: a file in the format of sources.list(5) to be used instead of this computer's."""
        self._folder = folder
        self._environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        self._options = ["-c", str(folder / "apt.conf")]
        self._sources = sources
        self.archives = folder / "archives"

    def prepare(self) -> None:
        """Make the directories and the configuration.  Raises: OSError."""
        for name in ("lists/partial", "archives/partial"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").touch()
        lines = [
            # Hooks of this computer tidy its own caches.
            "#clear APT::Update::Post-Invoke;",
            "#clear APT::Update::Post-Invoke-Success;",
            f'Dir::State::lists "{self._folder}/lists";',
            f'Dir::State::status "{self._folder}/status";',
            f'Dir::State::extended_states "{self._folder}/extended_states";',
            f'Dir::Cache::archives "{self._folder}/archives";',
            f'Dir::Cache::pkgcache "{self._folder}/pkgcache.bin";',
            f'Dir::Cache::srcpkgcache "{self._folder}/srcpkgcache.bin";',
            f'Dir::Log "{self._folder}";',
            f'APT::Architecture "{ARCHITECTURE}";',
            f'APT::Architectures {{ "{ARCHITECTURE}"; }};',
            "APT::Install-Recommends false;",
            "APT::Install-Suggests false;",
            'APT::Sandbox::User "";',
            "Debug::NoLocking true;",
            'Acquire::Languages "none";',
            "Acquire::Retries 3;",
        ]
        if self._sources is not None:
            lines += [f'Dir::Etc::sourcelist "{self._sources}";', 'Dir::Etc::sourceparts "/dev/null";']
        (self._folder / "apt.conf").write_text("\n".join(lines) + "\n")

    def update(self) -> None:
        """Fetch the newest index.  Raises: TemplateFailed."""
        command = ["apt-get", *self._options, "-q", "--error-on=any", "update"]
        tools.run(command, timeout_s=UPDATE_TIMEOUT_S, environment=self._environment)

    def resolve(self, wanted: Sequence[str]) -> tuple[Deb, ...]:
        """The packages and all that they depend on, sorted.  Raises: TemplateFailed if one is unknown to apt."""
        said = self._ask("apt-get", "-qq", "-s", "install", "--", *wanted)
        chosen = sorted(_CHOSEN.findall(said))
        return self._with_digests(chosen)

    def known(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the names that are packages which could be fetched."""
        said = self._ask("apt-cache", "policy", "--", *names) if names else ""
        return tuple(_CANDIDATE.findall(said))

    def newest(self, name: str) -> Deb:
        """One package, without what it depends on.  Raises: TemplateFailed."""
        fields = _fields(self._ask("apt-cache", "show", "--no-all-versions", "--", name))
        return Deb(fields[0]["Package"], fields[0]["Version"], fields[0]["Architecture"], fields[0]["SHA256"])

    def depends(self, name: str) -> tuple[str, ...]:
        """Names of what a package directly depends on.  Raises: TemplateFailed."""
        fields = _fields(self._ask("apt-cache", "show", "--no-all-versions", "--", name))
        return tuple(part.split()[0] for part in fields[0].get("Depends", "").split(",") if part.strip())

    def fetch(self, debs: Sequence[Deb], told: Callable[[float], None]) -> None:
        """Have all archives here, each as the index describes it.

        Args:
            told: is called with the fraction that has been fetched.
        Raises: TemplateFailed.
        """
        wanted = [deb for deb in debs if not self._is_here(deb)]
        if wanted:
            # `download` writes into the working directory and asks for no dependencies.
            command = ["apt-get", *self._options, "-q", "-o", "APT::Status-Fd=1", "download", "--"]
            command += [f"{deb.name}={deb.version}" for deb in wanted]

            def status_of(line: str) -> None:
                found = _FETCHED.match(line)
                if found:
                    told(float(found.group(1)) / 100)

            tools.stream(command, status_of=status_of, cwd=self.archives, environment=self._environment)
        for deb in wanted:
            if not self._is_here(deb):
                raise TemplateFailed(f"apt did not fetch {deb.filename} as the index describes it")

    def path(self, deb: Deb) -> Path:
        return self.archives / deb.filename

    def _is_here(self, deb: Deb) -> bool:
        path = self.path(deb)
        if not path.is_file():
            return False
        with path.open("rb") as file:
            if digest_of(file.read) == deb.sha256:
                return True
        path.unlink()
        return False

    def _with_digests(self, chosen: Sequence[tuple[str, str, str]]) -> tuple[Deb, ...]:
        said = self._ask("apt-cache", "show", "--", *(f"{name}={version}" for name, version, _ in chosen))
        digests = {(one["Package"], one["Version"]): one["SHA256"] for one in _fields(said) if "SHA256" in one}
        return tuple(Deb(name, version, arch, digests[name, version]) for name, version, arch in chosen)

    def _ask(self, program: str, *arguments: str) -> str:
        command = [program, *self._options, *arguments]
        return tools.run(command, timeout_s=QUESTION_TIMEOUT_S, environment=self._environment).decode()


def _fields(text: str) -> list[dict[str, str]]:
    """The paragraphs of a Debian control file; continuation lines are left out."""
    found = []
    for paragraph in text.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line and not line[0].isspace()]
        if lines:
            found.append({key: value.strip() for key, _, value in (line.partition(":") for line in lines)})
    return found


def digest_of(read: Callable[[int], bytes]) -> str:
    """SHA-256 of a stream."""
    state = hashlib.sha256()
    while chunk := read(1 << 20):
        state.update(chunk)
    return state.hexdigest()


@contextmanager
def content(path: Path) -> Iterator[tarfile.TarFile]:
    """The files of a package, as a stream: members have to be read in their order.

    Raises: TemplateFailed if it is no package.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                yield archive
        except tarfile.TarError as exc:
            raise TemplateFailed(f"{path} cannot be unpacked: {exc}") from exc
        finally:
            process.stdout.close()
